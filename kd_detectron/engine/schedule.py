"""The schedule of distillation, ``KD.SCHEDULE``: what all its weights are multiplied by."""

import math

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from kd_detectron.errors import ConfigError

DECAYS = ("none", "linear", "cosine")


def schedule_factor(
    iteration: int, *, warmup_iters: int, decay: str, stop_iter: int, max_iter: int
) -> float:
    """The factor on all distillation weights at one iteration, between 0 and 1.

    Args:
        iteration: 0-based.
        warmup_iters: linear rise over this many iterations; the first one already gets a share.
        decay: "none", "linear" or "cosine", from the end of the warm-up to the end.
        stop_iter: 0 from here on; 0 means never.
        max_iter: the end of the decay where ``stop_iter`` is 0.
    """
    if stop_iter and iteration >= stop_iter:
        return 0.0
    if iteration < warmup_iters:
        return (iteration + 1) / (warmup_iters + 1)
    end = stop_iter or max_iter
    progress = (iteration - warmup_iters) / max(end - warmup_iters, 1)
    if decay == "linear":
        return 1 - progress
    if decay == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


class DistillationSchedule(HookBase):
    """Sets ``model.distillation_factor`` before each step, as ``KD.SCHEDULE`` says."""

    def __init__(self, model, schedule, max_iter: int):
        if schedule.DECAY not in DECAYS:
            raise ConfigError(
                f"KD.SCHEDULE.DECAY is '{schedule.DECAY}'; known: {', '.join(DECAYS)}"
            )
        for key in ("WARMUP_ITERS", "STOP_ITER"):
            if schedule[key] < 0:
                raise ConfigError(f"KD.SCHEDULE.{key} is {schedule[key]}; it must be 0 or more")
        if 0 < schedule.STOP_ITER <= schedule.WARMUP_ITERS:
            raise ConfigError(
                f"KD.SCHEDULE.STOP_ITER is {schedule.STOP_ITER} and KD.SCHEDULE.WARMUP_ITERS is "
                f"{schedule.WARMUP_ITERS}, so distillation would end before its warm-up does; "
                "raise the one or lower the other"
            )
        self._model = model
        self._options = {
            "warmup_iters": schedule.WARMUP_ITERS,
            "decay": schedule.DECAY,
            "stop_iter": schedule.STOP_ITER,
            "max_iter": max_iter,
        }
        self._constant = schedule == CfgNode({"WARMUP_ITERS": 0, "DECAY": "none", "STOP_ITER": 0})

    def before_step(self) -> None:
        factor = schedule_factor(self.trainer.iter, **self._options)
        self._model.distillation_factor = factor
        if not self._constant:
            self.trainer.storage.put_scalar("distillation_factor", factor, smoothing_hint=False)
