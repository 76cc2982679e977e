"""``datasets/masks_to_coco.py``: what it writes trains, and what it refuses."""

import json
import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle

from kd_detectron.preflight.annotations import check_coco_files

DATASETS = Path(__file__).parents[2] / "datasets"
WIDTH, HEIGHT = 24, 16


def write_masks(folder, masks):
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    image = np.full((HEIGHT, WIDTH, 3), (200, 100, 50), np.uint8)
    cv2.imwrite(str(folder / "images" / f"{folder.name}.png"), image)
    for number, mask in enumerate(masks):
        cv2.imwrite(str(folder / "masks" / f"{number}.png"), mask * 255)


@pytest.fixture
def source(tmp_path):
    """Two images in the layout of the 2018 Data Science Bowl, with two objects and one."""
    big, small = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    big[3:9, 2:10] = 1
    small[12:14, 20:22] = 1
    write_masks(tmp_path / "stage1" / "aa11", [big, small])
    write_masks(tmp_path / "stage1" / "ab22", [big])
    return tmp_path / "stage1"


@pytest.fixture
def convert(source):
    """Runs the command; returns the exit code and the file's content."""

    def run(*options):
        target = source.parent / "out" / "coco.json"
        main = runpy.run_path(str(DATASETS / "masks_to_coco.py"))["main"]
        code = main([str(source), str(target), *options])
        return code, json.loads(target.read_text()) if target.is_file() else None

    return run


def test_converted_file_passes_the_checks(convert, source):
    assert convert("--name", "cell")[0] == 0
    out = source.parent / "out"
    summary = check_coco_files(str(out / "coco.json"), str(out / "images"), name="cells")
    assert str(summary) == "cells: 2 images, 3 annotations, 1 classes (cell)"


def test_boxes_areas_and_masks_are_those_of_the_mask_files(convert, source):
    big, small, _ = convert()[1]["annotations"]
    assert big["bbox"] == [2, 3, 8, 6] and big["area"] == 48
    assert small["bbox"] == [20, 12, 2, 2] and small["area"] == 4
    drawn = cv2.imread(str(source / "aa11" / "masks" / "0.png"), cv2.IMREAD_GRAYSCALE) > 0
    assert np.array_equal(rle.decode(big["segmentation"]) > 0, drawn)


def test_images_keep_their_colours(convert, source):
    convert()
    image = cv2.imread(str(source.parent / "out" / "images" / "aa11.jpg"))
    assert np.abs(image.astype(int) - (200, 100, 50)).max() <= 3


def test_a_list_gives_order_and_small_objects_can_be_left_out(convert, tmp_path):
    (tmp_path / "ids.txt").write_text("ab\naa\n")
    content = convert("--list", str(tmp_path / "ids.txt"), "--min-area", "5")[1]
    assert [image["file_name"] for image in content["images"]] == ["ab.jpg", "aa.jpg"]
    assert [(a["image_id"], a["area"]) for a in content["annotations"]] == [(1, 48), (2, 48)]


def test_ids_that_fit_no_folder_or_two_are_refused(convert, tmp_path, capsys):
    for ids, count in (("x", 0), ("a", 2)):
        (tmp_path / "ids.txt").write_text(ids)
        assert convert("--list", str(tmp_path / "ids.txt"))[0] == 2
        assert f"'{ids}' is listed, but {count} folders" in capsys.readouterr().err


def test_a_mask_of_another_size_is_refused(convert, source, capsys):
    cv2.imwrite(str(source / "ab22" / "masks" / "9.png"), np.ones((4, 6), np.uint8))
    assert convert()[0] == 2
    assert "has 6 x 4 pixels and its image 24 x 16" in capsys.readouterr().err


def test_missing_and_unreadable_files_are_refused(convert, source, capsys):
    (source / "aa11" / "masks" / "0.png").write_bytes(b"no image")
    assert convert()[0] == 2
    assert "0.png' cannot be read as an image" in capsys.readouterr().err
    assert convert("--list", "nowhere.txt")[0] == 2
    assert "--list is 'nowhere.txt'" in capsys.readouterr().err
    (source / "aa11" / "images" / "aa11.png").unlink()
    assert convert()[0] == 2
    assert "holds 0 PNG files; it needs one" in capsys.readouterr().err


def test_nuclei_lists_have_each_image_once():
    train, val = (
        (DATASETS / f"nuclei_{split}.txt").read_text().split() for split in ("train", "val")
    )
    assert (len(train), len(val), len({*train, *val})) == (200, 64, 264)
