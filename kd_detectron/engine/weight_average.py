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
from collections.abc import Iterator, Mapping

import torch
from detectron2.engine import HookBase
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

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
        self._model = model
        self._decay = decay
        self._steps = 0
        self._average = self._copy()
        self._trained: dict[str, torch.Tensor] | None = None

    def after_step(self) -> None:
        decay = decay_at(self._steps, self._decay) if self._steps else 0.0
        tensors = self._tensors()
        weights = [name for name, _ in self._model.named_parameters() if name in tensors]
        averages = [self._average[name] for name in weights]
        get_ema_multi_avg_fn(decay)(averages, [tensors[name] for name in weights], self._steps)
        for name in tensors.keys() - weights:
            self._average[name].copy_(tensors[name])
        self._steps += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards the trained ones, bit for bit."""
        if self._steps == 0 or self._trained is not None:
            yield  # there is no average, or it is in the model already
            return
        self._trained = self._copy()
        self._write(self._average)
        try:
            yield
        finally:
            self._write(self._trained)
            self._trained = None

    def state_dict(self) -> dict:
        """What a checkpoint, written inside :meth:`applied`, needs beside its model."""
        if self._trained is None:
            return {}
        return {"trained": self._trained, "n_averaged": self._steps}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues from a checkpoint whose model, the average, is loaded already."""
        self._steps = state_dict["n_averaged"]
        self._average = self._copy()
        self._write(state_dict["trained"])

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The student's weights and buffers themselves, by name."""
        state = self._model.state_dict()
        return {name: x for name, x in state.items() if not name.startswith("distillers.")}

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: x.clone() for name, x in self._tensors().items()}

    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, x in self._tensors().items():
            x.copy_(values[name])
