"""MobileNetV2 with an FPN, the student of the papers' R50-MV2 rows, from torchvision's layers.

Paper: MobileNetV2, CVPR 2018 (arXiv 1801.04381). Stages are the last blocks at strides 4, 8, 16
and 32: 24, 32, 96 and 320 channels at width 1, named "res2".."res5" as Detectron2 names a ResNet's.
torchvision's last 1x1 convolution to 1280 channels and its classifier are left out. The layers keep
torchvision's names (``features.<index>``), so that ``MODEL.WEIGHTS: torchvision://mobilenet_v2``
loads as it is; images are then to be RGB with torchvision's mean and std.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, get_norm

from kd_detectron.backbones.pyramid import StageBackbone, register_builders

# Index of the last block of each stage in torchvision's ``features``; "stem" has stride 2.
_LAST_BLOCKS = {"stem": 1, "res2": 3, "res3": 6, "res4": 13, "res5": 17}


class MobileNetV2(StageBackbone):
    """torchvision's MobileNetV2 as a Detectron2 backbone."""

    def __init__(
        self,
        *,
        width_mult: float = 1.0,
        norm: str = "FrozenBN",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
    ):
        """
        Args:
            width_mult: factor on the number of channels of every layer.
            norm: "FrozenBN", "BN" or "SyncBN".
            out_features: the stages to return, of "res2".."res5"; later layers are not built.
            freeze_at: stages to freeze, counted as for ResNet: 1 the layers before stride 4,
                2 also res2, ... 5 everything.
        """
        super().__init__(norm)
        network = torchvision.models.mobilenet_v2(
            weights=None, width_mult=width_mult, norm_layer=partial(get_norm, norm)
        )
        last = max(_LAST_BLOCKS[stage] for stage in out_features)
        self.features = network.features[: last + 1]
        self._set_outputs(
            {stage: self.features[_LAST_BLOCKS[stage]].out_channels for stage in out_features}
        )
        self.freeze(freeze_at)

    def freeze(self, freeze_at: int) -> None:
        """Freezes the first stages: no gradients, and BatchNorm becomes FrozenBatchNorm."""
        frozen = list(_LAST_BLOCKS.values())[:freeze_at]
        for block in self.features[: frozen[-1] + 1 if frozen else 0]:
            FrozenBatchNorm2d.convert_frozen_batchnorm(block).requires_grad_(False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps images (N, 3, H, W) to the features of each stage, by its name."""
        outputs, features = {}, images
        for index, block in enumerate(self.features):
            features = block(features)
            for stage in self._out_features:
                if index == _LAST_BLOCKS[stage]:
                    outputs[stage] = features
        return outputs


def _network(cfg: CfgNode, stages: Sequence[str]) -> MobileNetV2:
    return MobileNetV2(
        width_mult=cfg.MODEL.MOBILENETV2.WIDTH_MULT,
        norm=cfg.MODEL.RESNETS.NORM,
        out_features=stages,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


register_builders("mobilenetv2", _network)
