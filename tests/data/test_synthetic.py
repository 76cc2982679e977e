"""The synthetic dataset: the same for the same seed, annotations that fit, never half-made."""

import json
import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from kd_detectron.data import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.data import synthetic as synthetic_module
from kd_detectron.data.synthetic import render
from kd_detectron.errors import ConfigError

SMALL = {"num_train": 4, "num_val": 2, "image_size": (64, 96)}
SCRIPT = Path(__file__).parents[2] / "datasets" / "make_synthetic.py"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_same_seed_gives_the_same_bytes(tmp_path):
    first = make_synthetic(tmp_path / "a", **SMALL, seed=3)
    second = make_synthetic(tmp_path / "b", **SMALL, seed=3)
    other = make_synthetic(tmp_path / "c", **SMALL, seed=4)
    assert contents(first) == contents(second)
    assert (first / "train.json").read_bytes() != (other / "train.json").read_bytes()


def test_larger_set_begins_with_the_smaller_one(tmp_path):
    small = make_synthetic(tmp_path / "a", 2, 1, image_size=(64, 64))
    large = make_synthetic(tmp_path / "b", 4, 1, image_size=(64, 64))
    for name in ("000000.jpg", "000001.jpg"):
        assert (small / "train" / name).read_bytes() == (large / "train" / name).read_bytes()


@pytest.mark.usefixtures("needs_detectron2")
@pytest.mark.parametrize("split", ["train", "val"])
def test_set_passes_the_dataset_check(tmp_path, split):
    from kd_detectron.preflight.annotations import check_coco_files

    folder = make_synthetic(tmp_path / "set", **SMALL)
    summary = check_coco_files(
        str(folder / f"{split}.json"), str(folder / split), name="set", mask_format="polygon"
    )
    assert summary.classes == SYNTHETIC_CLASSES
    assert summary.images == SMALL[f"num_{split}"]
    assert summary.annotations >= summary.images


def test_train_and_val_images_differ(tmp_path):
    folder = make_synthetic(tmp_path / "set", **SMALL)
    first = (folder / "train" / "000000.jpg").read_bytes()
    assert first != (folder / "val" / "000000.jpg").read_bytes()


@pytest.mark.parametrize("number", range(5))
def test_boxes_areas_and_polygons_agree(number):
    image, annotations = render(np.random.default_rng(number), (120, 160))
    assert image.shape == (120, 160, 3) and image.dtype == np.uint8
    for annotation in annotations:
        polygons = [np.float32(p).reshape(-1, 2) for p in annotation["segmentation"]]
        area = sum(cv2.contourArea(polygon) for polygon in polygons)
        assert area == pytest.approx(annotation["area"], abs=0.02 * len(np.concatenate(polygons)))
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 160 and y + height <= 120
        points = np.concatenate(polygons)
        assert points.min(axis=0) == pytest.approx([x, y], abs=0.02)
        assert points.max(axis=0) == pytest.approx([x + width, y + height], abs=0.02)


def test_masks_do_not_overlap():
    for number in range(5):
        _, annotations = render(np.random.default_rng(number), (120, 160))
        total = np.zeros((120, 160), int)
        for annotation in annotations:
            parts = coco_mask.frPyObjects(annotation["segmentation"], 120, 160)
            total += np.asarray(coco_mask.decode(coco_mask.merge(parts)))
        # Polygons are drawn to whole pixels, so neighbours may share pixels of their border.
        assert (total > 1).mean() < 0.01


def test_all_classes_and_sizes_occur():
    classes, areas = set(), []
    for number in range(40):
        for annotation in render(np.random.default_rng(number), (96, 96))[1]:
            classes.add(annotation["category_id"])
            areas.append(annotation["area"] / 96**2)
    assert classes == set(range(1, len(SYNTHETIC_CLASSES) + 1))
    assert min(areas) < 0.015 and max(areas) > 0.1


def test_finished_set_is_not_made_again(tmp_path, monkeypatch):
    folder = make_synthetic(tmp_path / "set", **SMALL)
    monkeypatch.setattr(synthetic_module, "render", None)
    assert make_synthetic(tmp_path / "set", **SMALL) == folder


def test_set_with_other_arguments_is_replaced(tmp_path):
    make_synthetic(tmp_path / "set", **SMALL)
    make_synthetic(tmp_path / "set", 1, 1, image_size=(64, 96))
    assert [path.name for path in (tmp_path / "set" / "train").iterdir()] == ["000000.jpg"]


def test_interrupted_making_leaves_no_set_and_the_next_one_completes_it(tmp_path, monkeypatch):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return render(*arguments)

    monkeypatch.setattr(synthetic_module, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic(tmp_path / "set", **SMALL)
    assert not (tmp_path / "set").exists()
    monkeypatch.undo()
    make_synthetic(tmp_path / "set", **SMALL)
    assert len(list((tmp_path / "set" / "train").iterdir())) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_folder_with_other_things_is_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a synthetic dataset made earlier"):
        make_synthetic(tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine" / "train.json").read_text() == "{}"


def test_command_makes_the_set(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = ["--num-train", "2", "--num-val", "1", "--image-size", "64", "96"]
    assert main([str(tmp_path / "set"), *arguments]) == 0
    train = json.loads((tmp_path / "set" / "train.json").read_text())
    assert [(image["height"], image["width"]) for image in train["images"]] == [(64, 96)] * 2
    assert main([str(tmp_path), *arguments]) == 2
    assert "error: " in capsys.readouterr().err
