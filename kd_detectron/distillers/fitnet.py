"""FitNet: every feature level of the student, through its own 1x1 convolution, onto the teacher's.

Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550. Features are (N, C, H, W) maps,
fine to coarse (p2..p6 of an FPN). The detection code behind the published FitNet rows was never
released; see ``docs/methods.md`` for what was chosen.
"""

from collections.abc import Sequence

from kd_detectron.losses import fitnet_loss

from .adapters import LevelAdapters
from .argument_checks import check_same_channels, level_channels
from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class FitNet(Distiller):
    """Mean squared error of FPN features, adapted or as they are, all levels (arXiv 1412.6550)."""

    requires = frozenset({"features"})

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], *, adapter: bool = True
    ):
        """
        Args:
            in_channels: channels of the student's levels, fine to coarse.
            out_channels: channels of the teacher's levels, in the same order.
            adapter: a 1x1 convolution stands between the maps. False compares them as they are,
                for students whose heads are the teacher's; both then need equal channels.
        """
        super().__init__()
        self.adapters = LevelAdapters(in_channels, out_channels, kernel_size=1) if adapter else None
        if not adapter:
            own, others = list(in_channels), list(out_channels)
            check_same_channels("FitNet", own, others, instead="set KD.FITNET.ADAPTER True")

    @classmethod
    def from_specs(cls, student, teacher, **options):
        return cls(*level_channels("FitNet", student, teacher), **options)

    def forward(self, context):
        features = context.student.features
        adapted = self.adapters(features) if self.adapters else list(features.values())
        return {
            "loss_fitnet": fitnet_loss(adapted, [context.teacher.features[k] for k in features])
        }
