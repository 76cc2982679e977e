"""PKD: the student's feature maps correlate with the teacher's, channel by channel.

"PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
NeurIPS 2022, arXiv 2207.02039. Features are (N, C, H, W) maps, fine to coarse. Nothing stands
between the maps of the two models, so both need the same number of channels.
"""

from collections.abc import Sequence

from kd_detectron.losses import pkd_loss

from .base import DISTILLER_REGISTRY
from .map_distiller import MapDistiller


@DISTILLER_REGISTRY.register()
class PKD(MapDistiller):
    """1 - Pearson's correlation of each channel with the teacher's, summed over the levels."""

    default_weight = 6.0

    def __init__(self, strides: Sequence[int], *, max_stride: int = 32):
        """
        Args:
            strides: of the student's levels, fine to coarse.
            max_stride: levels of at most this stride are compared: p2 to p5 at 32, p6 too at 64.
        """
        super().__init__(strides, max_stride)

    def forward(self, context):
        return {"loss_pkd": self.compare(pkd_loss, context)}
