"""Own datasets named in the config: registered once, read as written, useless boxes left out."""

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_detectron.data import build_train_loader, register_coco_format
from kd_detectron.data.coco_format import is_usable_box, resolve_path
from kd_detectron.errors import ConfigError


def test_named_dataset_is_registered_for_training_and_coco_evaluation(make_cfg):
    cfg = make_cfg()
    register_coco_format(cfg)
    dataset_dicts = DatasetCatalog.get("tiny")
    assert len(dataset_dicts) == 6
    assert MetadataCatalog.get("tiny").evaluator_type == "coco"
    assert MetadataCatalog.get("tiny").thing_classes == ["cat", "dog"]


def test_paths_are_relative_to_detectron2_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert resolve_path("cells/train.json") == str(tmp_path / "cells/train.json")
    assert resolve_path("/elsewhere/train.json") == "/elsewhere/train.json"
    assert resolve_path("https://host/train.json") == "https://host/train.json"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert resolve_path("cells/train.json") == "datasets/cells/train.json"


def test_registering_the_same_files_again_is_fine(make_cfg):
    cfg = make_cfg()
    register_coco_format(cfg)
    register_coco_format(cfg)
    assert len(DatasetCatalog.get("tiny")) == 6


@pytest.mark.parametrize("name", ["tiny", "coco_2017_train"])
def test_a_name_taken_by_other_files_is_refused(make_cfg, name):
    cfg = make_cfg()
    register_coco_format(cfg)
    cfg.DATASETS.COCO_FORMAT = [[name, "other.json", "other"]]
    with pytest.raises(ConfigError, match=f"DATASETS.COCO_FORMAT names '{name}'.*other.json"):
        register_coco_format(cfg)


@pytest.mark.parametrize(
    "entry", [["name", "a.json"], "name", ["name", "a.json", 3], ["", "a", "b"]]
)
def test_an_entry_that_is_not_three_strings_is_refused(make_cfg, entry):
    cfg = make_cfg()
    cfg.DATASETS.COCO_FORMAT = [entry]
    with pytest.raises(ConfigError, match="DATASETS.COCO_FORMAT has the entry"):
        register_coco_format(cfg)


@pytest.mark.parametrize(
    ("box", "usable"),
    [
        ([0, 0, 10, 10], True),
        ([-5, -5, 6, 6], True),
        ([5, 5, 0, 10], False),
        ([5, 5, 10, -1], False),
        ([5, 5, float("nan"), 10], False),
        ([5, 5, float("inf"), 10], False),
        ([20, 0, 5, 5], False),
        ([0, 10, 5, 5], False),
        ([-5, 0, 5, 5], False),
        ([float("nan"), 0, 5, 5], False),
    ],
)
def test_box_without_a_pixel_in_the_image_is_not_usable(box, usable):
    assert is_usable_box(box, width=20, height=10) == usable


def test_useless_boxes_are_dropped_and_counted_in_the_log(make_cfg, caplog, make_coco):
    content = make_coco(4)
    content["annotations"][0]["bbox"] = [2.0, 3.0, 0.0, 6.0]
    content["annotations"][1]["bbox"] = [100.0, 3.0, 5.0, 6.0]
    content["annotations"][2]["bbox"] = [-3.0, 3.0, 5.0, 6.0]
    cfg = make_cfg(content)
    register_coco_format(cfg)
    with caplog.at_level(logging.WARNING):
        dataset_dicts = DatasetCatalog.get("tiny")
    assert [len(record["annotations"]) for record in dataset_dicts] == [0, 0, 1, 1]
    assert "dropped 2 boxes without area or outside" in caplog.text


def test_annotation_file_is_not_opened_before_it_is_needed(make_cfg, tmp_path, make_coco):
    cfg = make_cfg()
    (tmp_path / "tiny" / "annotations.json").unlink()
    register_coco_format(cfg)
    (tmp_path / "tiny" / "annotations.json").write_text(json.dumps(make_coco(3)))
    assert len(DatasetCatalog.get("tiny")) == 3


@pytest.mark.parametrize("flip", ["horizontal", "none"])
def test_keypoints_of_own_data_are_named_as_in_the_file(make_cfg, make_coco, flip):
    def load(category):
        content = make_coco(3)
        for annotation in content["annotations"]:
            annotation["keypoints"], annotation["num_keypoints"] = [3, 4, 2, 9, 6, 2, 5, 5, 2], 3
        content["categories"][0] |= category
        cfg = make_cfg(content)
        cfg.MODEL.KEYPOINT_ON, cfg.INPUT.RANDOM_FLIP = True, flip
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
        register_coco_format(cfg)
        build_train_loader(cfg)

    with pytest.raises(ConfigError, match='"keypoints": .* keypoint_flip_map'):
        load({})
    load({"keypoints": ["left_ear", "right_ear", "nose"]})
    metadata = MetadataCatalog.get("tiny")
    assert metadata.keypoint_names == ["left_ear", "right_ear", "nose"]
    assert metadata.keypoint_flip_map == [("left_ear", "right_ear")]
