"""PKD: the student's feature maps correlate with the teacher's, channel by channel.

"PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
NeurIPS 2022, arXiv 2207.02039. Features are (N, C, H, W) maps, fine to coarse. Nothing stands
between the maps of the two models, so both need the same number of channels.
"""

from collections.abc import Sequence

from kd_detectron.losses import pkd_loss

from .argument_checks import check_same_channels, count_levels, level_channels
from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class PKD(Distiller):
    """1 - Pearson's correlation of each channel with the teacher's, summed over the levels."""

    default_weight = 6.0
    requires = frozenset({"features"})

    def __init__(self, strides: Sequence[int], *, max_stride: int = 32):
        """
        Args:
            strides: of the student's levels, fine to coarse.
            max_stride: levels of at most this stride are compared: p2 to p5 at 32, p6 too at 64.
        """
        super().__init__()
        self.num_levels = count_levels("KD.PKD.MAX_STRIDE", strides, max_stride)

    @classmethod
    def from_specs(cls, student, teacher, **options):
        own, others = level_channels("PKD", student, teacher)
        check_same_channels("PKD", own, others, instead="use ReviewKD or FitNet, which adapt it")
        return cls([student.strides[level] for level in student.channels], **options)

    def forward(self, context):
        levels = list(context.student.features)[: self.num_levels]
        loss = pkd_loss(
            [context.student.features[level] for level in levels],
            [context.teacher.features[level] for level in levels],
        )
        return {"loss_pkd": loss}
