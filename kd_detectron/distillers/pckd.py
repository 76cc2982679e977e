"""PCKD: the student's feature maps equal the teacher's in each principal component.

A method of this project, not of a paper. The first principal components of an FPN map's channels
have most of its variance, but the heads need components of a few hundredths of it as well.
PKD's correlation and FitNet's squared error weight a component by its variance; here each counts
alike. ``docs/methods.md`` has the measurements.

Features are (N, C, H, W) maps, fine to coarse. Nothing stands between the maps of the two models,
so both need the same number of channels; scale and offset count, so the student's heads should
start from the teacher's (``KD.TEACHER.INHERIT``).
"""

from collections.abc import Sequence

from kd_detectron.losses import pckd_loss

from .argument_checks import check_number, check_same_channels, count_levels, level_channels
from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class PCKD(Distiller):
    """Relative squared error of each principal component of the maps, summed over the levels."""

    default_weight = 6.0
    requires = frozenset({"features"})

    def __init__(self, strides: Sequence[int], *, floor: float = 0.01, max_stride: int = 32):
        """
        Args:
            strides: of the student's levels, fine to coarse.
            floor: a component with this share of the level's mean variance has half the weight,
                those far below it hardly any; above 0.
            max_stride: levels of at most this stride are compared: p2 to p5 at 32, p6 too at 64.
        """
        super().__init__()
        self.floor = check_number("KD.PCKD.FLOOR", floor, above=0)
        self.num_levels = count_levels("KD.PCKD.MAX_STRIDE", strides, max_stride)

    @classmethod
    def from_specs(cls, student, teacher, **options):
        own, others = level_channels("PCKD", student, teacher)
        check_same_channels("PCKD", own, others, instead="use ReviewKD or FitNet, which adapt it")
        return cls([student.strides[level] for level in student.channels], **options)

    def forward(self, context):
        levels = list(context.student.features)[: self.num_levels]
        loss = pckd_loss(
            [context.student.features[level] for level in levels],
            [context.teacher.features[level] for level in levels],
            floor=self.floor,
        )
        return {"loss_pckd": loss}
