"""Tiny COCO-format datasets on disk, for all tests, and a config for one."""

import json

import cv2
import numpy as np
import pytest


def coco_content(
    num_images=6,
    *,
    annotations_per_image=1,
    size=(16, 24),
    turned=True,
    classes=("cat", "dog"),
    box=(2, 3, 8, 6),
):
    """COCO-format content: images of ``size`` (height, width), every third turned if ``turned``.

    All annotations of an image have the same box (x, y, width, height), a polygon of the same form,
    and one class; the classes alternate from image to image.
    """
    x, y, width, height = map(float, box)
    right, bottom = x + width, y + height
    images, annotations = [], []
    for number in range(num_images):
        rows, columns = size[::-1] if turned and number % 3 == 0 else size
        file_name = f"{number}.png"
        images.append({"id": number + 1, "file_name": file_name, "height": rows, "width": columns})
        for _ in range(annotations_per_image):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": 1 + number % len(classes),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [[x, y, right, y, right, bottom, x, bottom]],
                }
            )
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco_files(folder, content):
    """Writes ``content`` and an image of noise for each entry; returns the config's entry."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        pixels = np.random.default_rng(image["id"]).integers(
            0, 256, (image["height"], image["width"], 3), dtype=np.uint8
        )
        cv2.imwrite(str(folder / "images" / image["file_name"]), pixels)
    (folder / "annotations.json").write_text(json.dumps(content))
    return [folder.name, str(folder / "annotations.json"), str(folder / "images")]


@pytest.fixture
def make_coco():
    """Returns a function that gives COCO-format content."""
    return coco_content


@pytest.fixture
def write_coco():
    """Returns a function that writes a dataset and gives its DATASETS.COCO_FORMAT entry."""
    return write_coco_files


@pytest.fixture
def make_cfg(tmp_path):
    """Returns a function that writes a dataset "tiny" and gives a config that trains on it."""
    from detectron2.config import get_cfg

    from kd_detectron.config import add_kd_config

    def make(content=None, name="tiny"):
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.DATASETS.COCO_FORMAT = [write_coco_files(tmp_path / name, content or coco_content())]
        cfg.DATASETS.TRAIN = (name,)
        cfg.DATASETS.TEST = (name,)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
        cfg.SOLVER.IMS_PER_BATCH = 2
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.INPUT.MIN_SIZE_TRAIN = (16, 20, 24)
        cfg.SEED = 7
        return cfg

    return make
