"""``--check``: everything that a training needs, tried in seconds, one step included."""

import resource
import time

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from kd_detectron.preflight.data import check_data
from kd_detectron.preflight.pixel_statistics import warn_of_pixel_statistics

from .trainer import DistillationTrainer, describe, unwrap


def check(cfg: CfgNode) -> None:
    """Validates a config in seconds: data, teacher, student, one step.

    The main process prints what it found.
    """
    say = print if comm.is_main_process() else lambda text: None
    for summary in check_data(cfg).values():
        say(f"data     {summary}")
    if cfg.KD.ENABLED and cfg.KD.TEACHER.INHERIT:
        # Which parts fit is known and logged where they are copied.
        setup_logger(name="kd_detectron.inherit")
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    model = unwrap(trainer.model)
    warn_of_pixel_statistics(model)
    say(describe(model))
    with EventStorage(0) as trainer._trainer.storage:
        start = time.perf_counter()
        trainer._trainer.iter = 0
        trainer._trainer.run_step()
        seconds = time.perf_counter() - start
        losses = {
            name: value
            for name, (value, _) in trainer._trainer.storage.latest().items()
            if "loss" in name
        }
    say("losses   " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items()))
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory"
    if cfg.MODEL.DEVICE.startswith("cuda"):
        memory = (
            f"{torch.cuda.max_memory_allocated(cfg.MODEL.DEVICE) / 2**30:.2f} GiB of GPU memory"
        )
    images = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE_STEPS
    say(f"step     {seconds:.2f} s for {images} images, {memory}")
    say("ok       this config is ready to train")
