"""Run folders as a training leaves them, with numbers that the tests choose.

Without Detectron2 the folders hold no models, and of the config only what tables and pictures read.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from coco_files import coco_content, write_coco_files
from PIL import Image

# Detectron2's and this project's own defaults (tests/test_without_detectron2.py compares them).
DEFAULTS = {
    "DATASETS.COCO_FORMAT": [],
    "KD.CKD.TRIPLE": "tss",
    "KD.ENABLED": True,
    "KD.TEACHER.INHERIT": [],
    "KD.TEACHER.WEIGHTS": "",
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.MAX_ITER": 40000,
}


def config_text(values: dict) -> str:
    """The ``config.yaml`` of a run with these values by dotted key."""
    if find_spec("detectron2") is None:
        config = {}
        for key, value in (DEFAULTS | values).items():
            *nodes, name = key.split(".")
            node = config
            for part in nodes:
                node = node.setdefault(part, {})
            node[name] = list(value) if isinstance(value, tuple) else value
        return yaml.safe_dump(config)
    from detectron2.config import get_cfg

    from kd_detectron.config import add_kd_config

    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_list([part for item in values.items() for part in item])
    return cfg.dump()


@pytest.fixture
def write_run(tmp_path):
    """Returns a function that writes a run folder and returns its path."""

    def write(
        name,
        *,
        distillers=(),
        ap=None,
        mask_ap=None,
        depth=18,
        teacher="COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
        seed=0,
        opts=(),
        metrics=(),
        result=True,
        seconds=3600.0,
        iterations=100,
    ):
        folder = tmp_path / name
        folder.mkdir()
        values = {
            "MODEL.META_ARCHITECTURE": "DistilledRCNN",
            "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
            "MODEL.RESNETS.DEPTH": depth,
            "MODEL.MASK_ON": mask_ap is not None,
            "DATASETS.TEST": ("coco_2017_val",),
            "KD.DISTILLERS": list(distillers),
            "KD.TEACHER.CONFIG_FILE": teacher,
            "SEED": seed,
            "OUTPUT_DIR": str(folder),
        }
        values |= zip(opts[::2], opts[1::2], strict=True)
        (folder / "config.yaml").write_text(config_text(values))
        (folder / "metrics.json").write_text("".join(json.dumps(m) + "\n" for m in metrics))
        if result:
            results = {}
            for task, values in (("bbox", ap), ("segm", mask_ap)):
                if values is not None:
                    metrics_of_task = ("AP", "AP50", "AP75", "APs", "APm", "APl")
                    results[task] = dict(zip(metrics_of_task, values, strict=False))
            record = {
                "results": results,
                "iterations": iterations,
                "seconds": seconds,
                "student_parameters": 10,
                "teacher_parameters": 20,
                "seed": seed,
                "config_name": f"{name}.yaml",
                "finished": True,
            }
            (folder / "result.json").write_text(json.dumps(record))
        return folder

    return write


@pytest.fixture
def check_picture():
    """Returns a function that asserts that an image shows something and nothing is cut off."""

    def check(path):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.std() > 0
        for border in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
            assert (border == 255).all()

    return check


@pytest.fixture
def tiny_dataset(tmp_path):
    """Writes six small images with one white object each; returns the config entry."""
    classes, box = ("cat", "dog", "hen"), (6, 8, 24, 20)
    content = coco_content(size=(48, 64), turned=False, classes=classes, box=box)
    entry = write_coco_files(tmp_path / "tiny", content)
    for path in Path(entry[2]).iterdir():
        image = cv2.imread(str(path))
        cv2.rectangle(image, box, (230, 230, 230), thickness=cv2.FILLED)
        cv2.imwrite(str(path), image)
    return entry


@pytest.fixture
def write_trained_run(write_run, tiny_dataset):
    """Returns a function that writes a run folder with a (random) trained student in it."""
    from detectron2.modeling import build_model

    from kd_detectron.config import load_run_config

    def write(name, *, opts=(), seed=0, mask=False, depth=50, **options):
        tiny = [
            *("DATASETS.COCO_FORMAT", [tiny_dataset], "DATASETS.TEST", (tiny_dataset[0],)),
            *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
            # Untrained FrozenBN lets activations grow with depth: begin with small ones.
            *("MODEL.PIXEL_STD", [2000.0] * 3),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 5),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 3),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.FPN.OUT_CHANNELS", 16),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
            *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
            *("MODEL.MASK_ON", mask, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128),
        ]
        folder = write_run(name, seed=seed, depth=depth, opts=[*tiny, *opts], **options)
        cfg = load_run_config(folder)
        cfg.KD.ENABLED = False
        torch.manual_seed(seed)
        model = build_model(cfg)
        # Random heads find nothing: spread the scores, so that there are detections to draw.
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.3)
        torch.save({"model": model.state_dict()}, folder / "student_final.pth")
        return folder

    return write
