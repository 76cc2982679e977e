"""Averaged weights: an exponential moving average of the student's weights, ``SOLVER.EMA``.

After each step every weight moves towards the trained one (Polyak and Juditsky, 1992):

    average = d_t * average + (1 - d_t) * weight,    d_t = min(DECAY, (1 + t) / (10 + t))

with t the number of steps averaged so far, so that the random weights of the start are forgotten.
Buffers, BatchNorm's running statistics among them, are copied: they are averages already. The
teacher never changes and distillers are not part of the result, so neither is averaged.

Checkpoints hold the average as their model, so that evaluation, export and a teacher's
``KD.TEACHER.WEIGHTS`` need not know of it; the trained weights stand beside it for a resume.
Tests: ``tests/engine/test_weight_average.py``.
"""

import contextlib
from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kd_detectron.errors import ConfigError


def decay_at(step: int, decay: float) -> float:
    """The share of the old average at the ``step``-th average, counted from 0."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage(HookBase):
    """Averages a student's weights after each step; put it before what writes checkpoints.

    Args:
        model: the student, not wrapped.
        decay: ``SOLVER.EMA.DECAY``, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ConfigError(
                f"SOLVER.EMA.DECAY is {decay}; it must lie between 0 and 1, such as 0.999"
            )
        self._decay = decay
        self._student = without_distillers(model)
        self._average = AveragedModel(self._student, multi_avg_fn=self._blend)
        self._trained: dict[str, torch.Tensor] | None = None

    def _blend(self, averages: list, weights: list, _) -> None:
        step = int(self._average.n_averaged)  # on the CPU, unlike the argument
        get_ema_multi_avg_fn(decay_at(step, self._decay))(averages, weights, step)

    def after_step(self) -> None:
        self._average.update_parameters(self._student)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards the trained ones, bit for bit."""
        if self._average.n_averaged == 0 or self._trained is not None:
            yield  # there is no average, or it is in the model already
            return
        self._trained = {name: x.clone() for name, x in self._student.state_dict().items()}
        self._student.load_state_dict(self._average.module.state_dict())
        try:
            yield
        finally:
            self._student.load_state_dict(self._trained)
            self._trained = None

    def state_dict(self) -> dict:
        """What a checkpoint, written inside :meth:`applied`, needs beside its model."""
        if self._trained is None:
            return {}
        return {"trained": self._trained, "n_averaged": int(self._average.n_averaged)}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues from a checkpoint whose model, the average, is loaded already."""
        self._average.module.load_state_dict(self._student.state_dict())
        self._average.n_averaged.fill_(state_dict["n_averaged"])
        self._student.load_state_dict(state_dict["trained"])


def without_distillers(model: nn.Module) -> nn.Module:
    """A module of the model's own layers, under their names, but for ``distillers``."""
    student = nn.Module()
    for name, child in model.named_children():
        if name != "distillers":
            student.add_module(name, child)
    for name, parameter in model.named_parameters(recurse=False):
        student.register_parameter(name, parameter)
    for name, buffer in model.named_buffers(recurse=False):
        # Copied like all buffers, so the model's own state_dict() is enough to keep it.
        student.register_buffer(name, buffer, persistent=False)
    return student
