"""A tiny COCO-format dataset on disk and a config for it, used by all tests of the data part."""

import json

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_detectron.config import add_kd_config


def _make_coco(num_images=6, *, annotations_per_image=1):
    """COCO-format content: images alternate between wide and high, classes between two."""
    images, annotations = [], []
    for number in range(num_images):
        width, height = (24, 16) if number % 3 else (16, 24)
        images.append(
            {"id": number + 1, "file_name": f"{number}.png", "width": width, "height": height}
        )
        for _ in range(annotations_per_image):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": 1 + number % 2,
                    "bbox": [2.0, 3.0, 8.0, 6.0],
                    "area": 48.0,
                    "iscrowd": 0,
                    "segmentation": [[2.0, 3.0, 10.0, 3.0, 10.0, 9.0, 2.0, 9.0]],
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def _write_coco(folder, content):
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
    return _make_coco


@pytest.fixture
def write_coco():
    """Returns a function that writes a dataset and gives its DATASETS.COCO_FORMAT entry."""
    return _write_coco


@pytest.fixture(autouse=True)
def forget_new_datasets():
    """Detectron2's catalogues are global: names that a test adds are taken out again."""
    known = set(DatasetCatalog)
    yield
    for name in set(DatasetCatalog) - known:
        DatasetCatalog.remove(name)
        if name in MetadataCatalog:
            MetadataCatalog.remove(name)


@pytest.fixture
def make_cfg(tmp_path):
    """Returns a function that writes a dataset "tiny" and gives a config that trains on it."""

    def make(content=None, name="tiny"):
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.DATASETS.COCO_FORMAT = [_write_coco(tmp_path / name, content or _make_coco())]
        cfg.DATASETS.TRAIN = (name,)
        cfg.DATASETS.TEST = (name,)
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
        cfg.SOLVER.IMS_PER_BATCH = 2
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.INPUT.MIN_SIZE_TRAIN = (16, 20, 24)
        cfg.SEED = 7
        return cfg

    return make
