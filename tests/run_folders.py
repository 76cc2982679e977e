"""Run folders as a training leaves them, with numbers that the tests choose."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from coco_files import coco_content, write_coco_files
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from PIL import Image

from kd_detectron.config import add_kd_config, load_run_config


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
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.MODEL.META_ARCHITECTURE = "DistilledRCNN"
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.DEPTH = depth
        cfg.MODEL.MASK_ON = mask_ap is not None
        cfg.DATASETS.TEST = ("coco_2017_val",)
        cfg.KD.DISTILLERS = list(distillers)
        cfg.KD.TEACHER.CONFIG_FILE = teacher
        cfg.SEED = seed
        cfg.merge_from_list(list(opts))
        folder = tmp_path / name
        folder.mkdir()
        cfg.OUTPUT_DIR = str(folder)
        (folder / "config.yaml").write_text(cfg.dump())
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
