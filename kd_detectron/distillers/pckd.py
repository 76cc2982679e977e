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
from functools import partial

from kd_detectron.losses import pckd_loss

from .argument_checks import check_number
from .base import DISTILLER_REGISTRY
from .map_distiller import MapDistiller


@DISTILLER_REGISTRY.register()
class PCKD(MapDistiller):
    """Relative squared error of each principal component of the maps, summed over the levels."""

    default_weight = 6.0

    def __init__(self, strides: Sequence[int], *, floor: float = 0.01, max_stride: int = 32):
        """
        Args:
            strides: of the student's levels, fine to coarse.
            floor: a component with this share of the level's mean variance has half the weight,
                those far below it hardly any; 1e-6 or more, as far as float32 is exact.
            max_stride: levels of at most this stride are compared: p2 to p5 at 32, p6 too at 64.
        """
        super().__init__(strides, max_stride)
        self.floor = check_number("KD.PCKD.FLOOR", floor, at_least=1e-6)

    def forward(self, context):
        return {"loss_pckd": self.compare(partial(pckd_loss, floor=self.floor), context)}
