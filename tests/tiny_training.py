"""Trainings that take seconds, for the tests of the engine."""

import json
import os

import cv2
import numpy as np
import pytest
import torch
from tiny import NUM_CLASSES, distilled_cfg

from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.engine import DistillationTrainer


def write_dataset(tmp_path):
    """Six noisy images with two boxes each, in COCO format; returns DATASETS.COCO_FORMAT."""
    random = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(6):
        height, width = (64, 96) if index % 3 else (96, 64)
        picture = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{index}.png"), picture)
        images.append(
            {"id": index + 1, "file_name": f"{index}.png", "height": height, "width": width}
        )
        for box in range(2):
            x, y = random.integers(0, 30, 2).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": 1 + (index + box) % NUM_CLASSES,
                    "bbox": [x, y, 24, 20],
                    "area": 480,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + 24, y, x + 24, y + 20, x, y + 20]],
                }
            )
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(NUM_CLASSES)]
    path = tmp_path / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return [[f"tiny_{tmp_path.name}", str(path), str(tmp_path)]]


def run_cfg(tmp_path, dataset, output, opts=()):
    """A tiny distilled run of six iterations with a checkpoint after each third."""
    cfg = distilled_cfg(
        tmp_path,
        opts=[
            *("DATASETS.COCO_FORMAT", dataset),
            *("DATASETS.TRAIN", (dataset[0][0],)),
            *("DATASETS.TEST", (dataset[0][0],)),
            *("SOLVER.MAX_ITER", 6),
            *("SOLVER.CHECKPOINT_PERIOD", 3),
            *("SOLVER.WARMUP_ITERS", 2),
            *("SOLVER.STEPS", (5,)),
            *("OUTPUT_DIR", str(tmp_path / output)),
            *opts,
        ],
    )
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    register_coco_format(cfg)
    return cfg


def train(cfg, resume=False, until=None):
    """Trains a config, or up to an exception before iteration ``until``; returns the trainer."""
    torch.manual_seed(0)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if until is not None:

        def stop():
            if trainer.iter == until:
                raise InterruptedError

        trainer._hooks[-1].before_step = stop
        with pytest.raises(InterruptedError):
            trainer.train()
    else:
        trainer.train()
    return trainer
