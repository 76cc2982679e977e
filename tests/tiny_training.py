"""Trainings that take seconds, for the tests of the engine."""

import os

import pytest
import torch
from coco_files import coco_content, write_coco_files
from detectron2.engine import HookBase
from tiny import NUM_CLASSES, distilled_cfg

from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.engine import DistillationTrainer


def write_dataset(tmp_path):
    """Six images of noise with two boxes each, in COCO format; returns DATASETS.COCO_FORMAT."""
    content = coco_content(
        size=(64, 96),
        annotations_per_image=2,
        classes=[f"class {index}" for index in range(NUM_CLASSES)],
        box=(12, 20, 24, 20),
    )
    return [write_coco_files(tmp_path / f"tiny_{tmp_path.name}", content)]


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

        class Stop(HookBase):
            def before_step(self):
                if self.trainer.iter == until:
                    raise InterruptedError

        trainer.register_hooks([Stop()])
        with pytest.raises(InterruptedError):
            trainer.train()
    else:
        trainer.train()
    return trainer
