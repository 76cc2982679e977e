"""The training command and ``--check`` make the same checks."""

import json

import pytest
from detectron2 import model_zoo
from omegaconf import OmegaConf
from tiny import distilled_cfg, write_tiny_teacher

from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.engine.lazy import as_yaml
from kd_detectron.engine.main import main


@pytest.mark.parametrize("command", [["--check"], []])
def test_both_training_and_check_look_at_class_and_channel_order(tmp_path, capfd, caplog, command):
    data = make_synthetic(tmp_path / "data", 2, 1, image_size=(64, 64))
    content = json.loads((data / "train.json").read_text())
    for category in content["categories"]:
        category["id"] = len(SYNTHETIC_CLASSES) + 1 - category["id"]
    (data / "reversed.json").write_text(json.dumps(content))
    name, opts = f"train_{tmp_path.name}", ["MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)]
    cfg = distilled_cfg(
        tmp_path, ["CKD"], [*opts, "INPUT.FORMAT", "RGB", "DATASETS.TRAIN", (name,)]
    )
    cfg.DATASETS.COCO_FORMAT = [[name, str(data / "train.json"), str(data / "train")]]
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (), str(tmp_path / "run")
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1, ()
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    for file, code, words in (
        ("train.json", 0, ["of the student are ImageNet's in BGR order"]),
        ("reversed.json", 2, ["class 0 is 'disc'", f"'{SYNTHETIC_CLASSES[-1]}'"]),
    ):
        entry = [["of_the_teacher", str(data / file), str(data / "train")]]
        trained_on = ["DATASETS.COCO_FORMAT", entry, "DATASETS.TRAIN", ("of_the_teacher",)]
        write_tiny_teacher(tmp_path, [*opts, *trained_on])
        output = ["OUTPUT_DIR", str(tmp_path / file)]
        assert main(["--config-file", str(path), *command, *output]) == code
        captured = capfd.readouterr()
        said = captured.out + captured.err + caplog.text
        for word in words:
            assert word in said, said


def test_check_says_which_parts_are_inherited_where_nothing_is_distilled(tmp_path, capfd):
    data = make_synthetic(tmp_path / "data", 2, 1, image_size=(64, 64))
    name, classes = (
        f"train_{tmp_path.name}",
        ["MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)],
    )
    cfg = distilled_cfg(tmp_path, [], [*classes, "DATASETS.TRAIN", (name,), "DATASETS.TEST", ()])
    cfg.DATASETS.COCO_FORMAT = [[name, str(data / "train.json"), str(data / "train")]]
    cfg.KD.TEACHER.OPTS, cfg.KD.TEACHER.INHERIT = [*classes, "MODEL.FPN.OUT_CHANNELS", 32], ["auto"]
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    assert main(["--config-file", str(path), "--check"]) == 0
    said = "".join(capfd.readouterr())
    assert "Inherited from the teacher: backbone.fpn_lateral2, " in said
    assert "Not inherited from the teacher: roi_heads.box_head" in said and "ok " in said


def test_images_that_a_lazy_config_may_skip_are_no_fault_of_its_data():
    train = model_zoo.get_config("common/train.py").train
    train.max_corrupt_images = 3
    cfg = OmegaConf.create({"train": train, "dataloader": {}, "model": {}})
    assert as_yaml(cfg).DATALOADER.MAX_CORRUPT_IMAGES == 3
