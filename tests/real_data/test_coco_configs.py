"""The rows of the main job on real COCO images: each config trains two iterations and evaluates.

Unmodified but for the number of iterations, image size, sampled proposals, device and weights. The
weights are random, with the last norm of each residual block at zero, so that a network with frozen
BatchNorm and no pretrained weights does not overflow, and with a liking for one class, so that
there are detections.

A row costs up to half a minute: the combined rows run by default, which hold every
student, teacher and detector; the others are marked slow.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tiny import MAIN_ROWS

from kd_detectron import get_config
from kd_detectron.modeling.teacher_loading import teacher_config

VALIDATION_IMAGES = 8
ROWS = [
    name if name.startswith("ckd_reviewkd") else pytest.param(name, marks=pytest.mark.slow)
    for name in MAIN_ROWS
]
TRAIN_NET = str(Path(__file__).parents[2] / "tools" / "train_net.py")


@pytest.fixture
def coco(tmp_path, datasets_folder):
    """A folder in COCO's layout with all training images and the first validation images."""
    source = Path(datasets_folder) / "coco_tiny" / "coco"
    target = tmp_path / "data" / "coco"
    (target / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (target / split).symlink_to(source / split)
        name = f"annotations/instances_{split}.json"
        content = json.loads((source / name).read_text())
        if split == "val2017":
            content["images"] = content["images"][:VALIDATION_IMAGES]
            kept = {image["id"] for image in content["images"]}
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (target / name).write_text(json.dumps(content))
    return target.parent


def write_weights(cfg: CfgNode, path: Path) -> str:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.KD.ENABLED = "", False
    torch.manual_seed(0)
    state = build_model(cfg).state_dict()
    last = "conv2.norm.weight" if cfg.MODEL.RESNETS.DEPTH < 50 else "conv3.norm.weight"
    for name in state:
        if name.endswith(last):
            state[name].zero_()
    state["roi_heads.box_predictor.cls_score.bias"][0] = 4.0
    if list(cfg.MODEL.PIXEL_STD) == [1.0, 1.0, 1.0]:
        # Pretrained networks that take images as they are have small first weights.
        state["backbone.bottom_up.stem.conv1.weight"] /= 57.0
    torch.save({"model": state}, path)
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_config_trains_and_evaluates_on_real_images(name, tmp_path, coco):
    output = tmp_path / "output"
    changes = [
        *("MODEL.DEVICE", "cpu"),
        *("SEED", 1),
        *("SOLVER.MAX_ITER", 2),
        *("SOLVER.STEPS", ()),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 64),
        *("INPUT.MIN_SIZE_TRAIN", (64,)),
        *("INPUT.MAX_SIZE_TRAIN", 128),
        *("INPUT.MIN_SIZE_TEST", 64),
        *("INPUT.MAX_SIZE_TEST", 128),
        *("OUTPUT_DIR", str(output)),
    ]
    cfg = get_config(name, [*changes, "KD.TEACHER.WEIGHTS", "none"])
    changes += ["MODEL.WEIGHTS", write_weights(cfg, tmp_path / "student.pth")]
    if cfg.KD.TEACHER.CONFIG_FILE and not name.startswith("baseline"):
        weights = write_weights(teacher_config(cfg), tmp_path / "teacher.pth")
        changes += ["KD.TEACHER.WEIGHTS", weights]
    # Detectron2 reads DETECTRON2_DATASETS when it is imported, hence a process of its own.
    command = [sys.executable, TRAIN_NET, "--config-file", name, *map(str, changes)]
    environment = os.environ | {"DETECTRON2_DATASETS": str(coco)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    result = json.loads((output / "result.json").read_text())
    assert {"bbox", "segm"} >= set(result["results"]) >= {"bbox"}
    assert ("segm" in result["results"]) == ("mask" in name)
    record = {}
    for line in (output / "metrics.json").read_text().splitlines():
        record |= json.loads(line)
    expected = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    expected |= {f"loss_{method}" for method in ("ckd", "reviewkd") if method in name.split("_")}
    assert expected <= set(record) and all(math.isfinite(record[key]) for key in expected)
    assert (output / "student_final.pth").is_file()
    assert os.path.getsize(output / "log.txt") > 0
