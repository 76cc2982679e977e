"""FGFI: imitate the teacher's features only near objects.

Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019,
arXiv 1906.03609. At every level the locations whose anchors overlap a ground-truth box about as
well as the best anchor does are compared, after a 3x3 convolution of the student's map.

Features are (N, C, H, W) maps, fine to coarse; anchors are the student's, of each level
(H * W * A, 4), and ground-truth boxes (G, 4) of each image, both XYXY in input pixels.

Differences from the release: it has one feature map and a ReLU after the convolution; FPN maps are
not rectified, so there is none here, and every level has its own mask. The published rows' code
was never released; see ``docs/methods.md``.
"""

from collections.abc import Sequence

import torch

from kd_detectron.losses import fgfi_loss, fgfi_mask

from .adapters import LevelAdapters
from .argument_checks import check_number, level_channels
from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class FGFI(Distiller):
    """Squared feature difference at locations near objects, 0 without objects (CVPR 2019)."""

    default_weight = 0.01
    requires = frozenset({"features", "anchors"})

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], *, psi: float = 0.5
    ):
        """
        Args:
            in_channels: channels of the student's levels, fine to coarse.
            out_channels: channels of the teacher's levels, in the same order.
            psi: anchors whose IoU is above psi times a box's best one are imitated; in [0, 1).
        """
        super().__init__()
        self.psi = check_number("KD.FGFI.PSI", psi, at_least=0, below=1)
        self.adapters = LevelAdapters(in_channels, out_channels, kernel_size=3)

    @classmethod
    def from_specs(cls, student, teacher, **options):
        return cls(*level_channels("FGFI", student, teacher), **options)

    def forward(self, context):
        features = context.student.features
        adapted = self.adapters(features)
        masks = [
            torch.stack(
                [
                    fgfi_mask(context.anchors[level], boxes, *feature.shape[-2:], psi=self.psi)
                    for boxes in context.gt_boxes
                ]
            )
            for level, feature in features.items()
        ]
        teacher = [context.teacher.features[level] for level in features]
        return {"loss_fgfi": fgfi_loss(adapted, teacher, masks)}
