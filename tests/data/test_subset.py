"""``datasets/make_subset.py``: the images it draws, and what it refuses."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "datasets" / "make_subset.py"


@pytest.fixture
def source(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 8} for i in range(10)]
    annotations = [{"id": n, "image_id": n // 3, "category_id": 1 + n % 2} for n in range(30)]
    file = tmp_path / "train.json"
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def subset(source, tmp_path):
    def run(images, seed=0):
        target = tmp_path / f"{images}_{seed}.json"
        main = runpy.run_path(str(SCRIPT))["main"]
        code = main([str(source), str(target), "--images", str(images), "--seed", str(seed)])
        return code, json.loads(target.read_text()) if target.is_file() else None

    return run


def test_images_come_with_all_their_annotations_and_all_categories(source, subset):
    whole = json.loads(source.read_text())
    code, part = subset(4)
    kept = {image["id"] for image in part["images"]}
    assert code == 0
    assert len(part["images"]) == len(kept) == 4
    assert part["annotations"] == [a for a in whole["annotations"] if a["image_id"] in kept]
    assert part["categories"] == whole["categories"]


def test_same_seed_draws_the_same_and_a_larger_subset_contains_the_smaller(subset):
    def names(images, seed):
        return {image["file_name"] for image in subset(images, seed)[1]["images"]}

    assert names(4, 1) == names(4, 1) < names(7, 1)
    assert names(4, 1) != names(4, 2)


@pytest.mark.parametrize("images", [0, -1, 11])
def test_impossible_number_of_images_is_refused_with_both_numbers(images, subset, capsys):
    assert subset(images) == (2, None)
    message = capsys.readouterr().err
    assert f"--images is {images}" in message
    assert "10 images" in message


@pytest.mark.parametrize("content", ["{}", "[]", "no json"])
def test_other_files_are_refused_by_name(content, source, subset, capsys):
    source.write_text(content)
    assert subset(4) == (2, None)
    assert "train.json' is not a COCO-format annotation file" in capsys.readouterr().err


def test_the_source_is_never_replaced(source, capsys):
    before = source.read_bytes()
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([str(source), str(source.parent / "." / "train.json"), "--images", "4"]) == 2
    assert source.read_bytes() == before
    assert "must be different files" in capsys.readouterr().err


def test_rest_has_all_images_that_were_not_drawn(source, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    drawn, rest = tmp_path / "drawn.json", tmp_path / "rest.json"
    assert main([str(source), str(drawn), "--images", "4", "--rest", str(rest)]) == 0
    whole, *parts = (json.loads(file.read_text()) for file in (source, drawn, rest))
    for key, count in (("images", 6), ("annotations", 18)):
        assert len(parts[1][key]) == count
        both = parts[0][key] + parts[1][key]
        assert sorted(entry["id"] for entry in both) == [entry["id"] for entry in whole[key]]
    assert parts[1]["categories"] == whole["categories"]
    assert main([str(source), str(drawn), "--images", "4", "--rest", str(drawn)]) == 2
    assert "must be different files" in capsys.readouterr().err
    assert main([str(source), str(drawn), "--images", "10", "--rest", str(rest)]) == 2
    assert "ask for 1 to 9" in capsys.readouterr().err
