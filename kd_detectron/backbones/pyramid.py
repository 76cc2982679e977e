"""Shared by the backbones: stages by stride, and Detectron2's FPN on them.

Outputs are named "res2".."res5" as Detectron2 names a ResNet's. Features are
(N, C, H/stride, W/stride).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from kd_detectron.errors import ConfigError, did_you_mean

STAGE_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
"""Detectron2's names of a network's stages, and the strides in pixels that they stand for."""

BATCH_NORMS = ("FrozenBN", "BN", "SyncBN")
"""What ``MODEL.RESNETS.NORM`` may be for these networks, whose weights are trained with BatchNorm
and whose channel numbers GroupNorm does not divide."""


class StageBackbone(Backbone):
    """A backbone whose outputs are stages; ``norm`` is ``MODEL.RESNETS.NORM``."""

    def __init__(self, norm: str):
        super().__init__()
        if norm not in BATCH_NORMS:
            raise ConfigError(
                f"MODEL.RESNETS.NORM is '{norm}', which this backbone does not have"
                f"{did_you_mean(norm, BATCH_NORMS)}"
            )

    def _set_outputs(self, channels: Mapping[str, int]) -> None:
        """Says what ``forward`` returns: channels of each stage, fine to coarse."""
        self._out_features = list(channels)
        self._out_feature_strides = {stage: STAGE_STRIDES[stage] for stage in channels}
        self._out_feature_channels = dict(channels)


class NetworkBackbone(StageBackbone):
    """Base of the backbones that hold a network of another library."""

    name_key: ClassVar[str]  # config key that names the network
    examples: ClassVar[str]  # two convolutional networks of the library, for messages

    def _maps(self, network: nn.Module, images: torch.Tensor) -> Iterable[tuple[object, object]]:
        """Runs a network; its outputs that may be a stage's, in order, each behind its key."""
        raise NotImplementedError

    def _find_stages(self, network: nn.Module, name: str, stages: Sequence[str]) -> dict:
        """The key of each stage's output: the last at its stride, for a small blank image.

        Raises:
            ConfigError: the network is for one image size, or has no map at one of the strides.
        """
        height, width = 128, 192  # differ, so that channels-last maps are not taken for others
        network.eval()  # a blank image must not move BatchNorm statistics
        try:
            with torch.no_grad():
                maps = list(self._maps(network, torch.zeros(1, 3, height, width)))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"{self.name_key} '{name}' does not take images of any size ({reason}): name a"
                f" convolutional network, such as {self.examples}"
            ) from error
        network.train()
        found = {}
        for key, output in maps:
            for stage, stride in STAGE_STRIDES.items():
                if tuple(output.shape[2:]) == (height // stride, width // stride):
                    found[stage] = key, output.shape[1]
        missing = [stage for stage in stages if stage not in found]
        if missing:
            raise ConfigError(
                f"{self.name_key} '{name}' has feature maps of exactly 1/stride of the image at"
                f" strides {[STAGE_STRIDES[stage] for stage in sorted(found)]} but"
                f" MODEL.FPN.IN_FEATURES asks for {missing} (strides"
                f" {[STAGE_STRIDES[stage] for stage in missing]}): name another network, or leave"
                " these out of IN_FEATURES"
            )
        self._set_outputs({stage: found[stage][1] for stage in stages})
        return {stage: found[stage][0] for stage in stages}


def check_not_frozen(cfg: CfgNode) -> None:
    """Refuses a ``MODEL.BACKBONE.FREEZE_AT`` for a network of unknown stages."""
    if cfg.MODEL.BACKBONE.FREEZE_AT != 0:
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}, which has no meaning for"
            f" MODEL.BACKBONE.NAME '{cfg.MODEL.BACKBONE.NAME}': set it to 0 (MODEL.RESNETS.NORM"
            " 'FrozenBN' freezes its BatchNorm)"
        )


def register_builders(network: str, build: Callable[[CfgNode, list[str]], StageBackbone]) -> None:
    """Registers ``build_<network>_fpn_backbone`` and ``build_retinanet_<network>_fpn_backbone``.

    The second has RetinaNet's p6 and p7 in place of a pooled p5; its ``MODEL.FPN.IN_FEATURES``
    starts at res3. ``build`` builds the network, given the stages that the FPN reads.
    """
    for name, retinanet in ((network, False), (f"retinanet_{network}", True)):

        def builder(cfg: CfgNode, input_shape: ShapeSpec, retinanet: bool = retinanet) -> FPN:
            return build_pyramid(cfg, build, retinanet=retinanet)

        builder.__name__ = f"build_{name}_fpn_backbone"
        BACKBONE_REGISTRY.register(builder)


def build_pyramid(
    cfg: CfgNode, build: Callable[[CfgNode, list[str]], StageBackbone], *, retinanet: bool
) -> FPN:
    """Builds Detectron2's FPN as its ResNet builders do: p2..p6, or p3..p7 for RetinaNet.

    Raises:
        ConfigError: ``MODEL.FPN.IN_FEATURES`` names something else than res2 to res5.
    """
    stages, channels = list(cfg.MODEL.FPN.IN_FEATURES), cfg.MODEL.FPN.OUT_CHANNELS
    for stage in stages:
        if stage not in STAGE_STRIDES:
            raise ConfigError(
                f"MODEL.FPN.IN_FEATURES names '{stage}', which this backbone does not have"
                f"{did_you_mean(stage, STAGE_STRIDES)}"
            )
    bottom_up = build(cfg, stages)
    if retinanet:
        last = stages[-1]
        top_block = LastLevelP6P7(bottom_up.output_shape()[last].channels, channels, last)
    else:
        top_block = LastLevelMaxPool()
    return FPN(
        bottom_up=bottom_up,
        in_features=stages,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
