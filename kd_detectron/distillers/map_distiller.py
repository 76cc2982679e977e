"""What distillers share that compare FPN maps as they are, without a layer in between."""

from collections.abc import Callable, Sequence

import torch

from .argument_checks import check_same_channels, count_levels, level_channels
from .base import Distiller

Maps = Sequence[torch.Tensor]


class MapDistiller(Distiller):
    """Compares the maps of equal width of both models, up to a stride.

    Args:
        strides: of the student's levels, fine to coarse.
        max_stride: levels of at most this stride are compared.
    """

    requires = frozenset({"features"})

    def __init__(self, strides: Sequence[int], max_stride: int):
        super().__init__()
        key = f"KD.{type(self).__name__.upper()}.MAX_STRIDE"
        self.num_levels = count_levels(key, strides, max_stride)

    @classmethod
    def from_specs(cls, student, teacher, **options):
        name = cls.__name__
        own, others = level_channels(name, student, teacher)
        check_same_channels(name, own, others, instead="use ReviewKD or FitNet, which adapt it")
        return cls([student.strides[level] for level in student.channels], **options)

    def compare(self, loss: Callable[[Maps, Maps], torch.Tensor], context) -> torch.Tensor:
        """``loss`` of the maps of student and teacher, fine to coarse, each (N, C, H, W)."""
        levels = list(context.student.features)[: self.num_levels]
        return loss(
            [context.student.features[level] for level in levels],
            [context.teacher.features[level] for level in levels],
        )
