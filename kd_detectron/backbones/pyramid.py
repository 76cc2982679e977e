"""Shared by the backbones of other libraries: stages by stride, and Detectron2's FPN on them.

A :class:`NetworkBackbone` names its outputs "res2".."res5" as Detectron2 names a ResNet's. Features
are (N, C, H/stride, W/stride).
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from kd_detectron.errors import ConfigError, did_you_mean

STAGE_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
"""Detectron2's names of a network's stages, and the strides in pixels that they stand for."""

BATCH_NORMS = ("FrozenBN", "BN", "SyncBN")
"""What ``MODEL.RESNETS.NORM`` may be for these networks, whose weights are trained with BatchNorm
and whose channel numbers GroupNorm does not divide."""


class NetworkBackbone(Backbone):
    """Base of the backbones that hold a network of another library.

    Class attributes:
        name_key: config key that names the network.
        examples: two convolutional networks of the library, for messages.
    """

    name_key: ClassVar[str]
    examples: ClassVar[str]

    def _set_outputs(self, channels: Mapping[str, int]) -> None:
        """Says what ``forward`` returns: channels of each stage, fine to coarse."""
        self._out_features = list(channels)
        self._out_feature_strides = {stage: STAGE_STRIDES[stage] for stage in channels}
        self._out_feature_channels = dict(channels)

    def _check_stages(self, name: str, stages: Sequence[str], strides: Collection[int]) -> None:
        """Refuses a network that has no map at the stride of a stage."""
        missing = [stage for stage in stages if STAGE_STRIDES[stage] not in strides]
        if missing:
            raise ConfigError(
                f"{self.name_key} '{name}' has feature maps of exactly 1/stride of the image at"
                f" strides {sorted(strides)} but MODEL.FPN.IN_FEATURES asks for {missing} (strides"
                f" {[STAGE_STRIDES[stage] for stage in missing]}): name another network, or leave"
                " these out of IN_FEATURES"
            )

    @contextlib.contextmanager
    def _trial(self, network: nn.Module, name: str) -> Iterator[None]:
        """Runs a blank image through a network, for which one image size may be the only one."""
        network.eval()  # one blank image must not move BatchNorm statistics
        try:
            with torch.no_grad():
                yield
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(
                f"{self.name_key} '{name}' does not take images of any size ({reason}): name a"
                f" convolutional network, such as {self.examples}"
            ) from error
        network.train()


def check_norm(norm: str) -> None:
    """Raises ConfigError for another ``MODEL.RESNETS.NORM`` than :data:`BATCH_NORMS`."""
    if norm not in BATCH_NORMS:
        raise ConfigError(
            f"MODEL.RESNETS.NORM is '{norm}', which this backbone does not have"
            f"{did_you_mean(norm, BATCH_NORMS)}"
        )


def check_three_channels(cfg: CfgNode) -> None:
    """Raises ConfigError where ``MODEL.PIXEL_MEAN`` says other images than of 3 channels."""
    if len(cfg.MODEL.PIXEL_MEAN) != 3:
        raise ConfigError(
            f"MODEL.PIXEL_MEAN has {len(cfg.MODEL.PIXEL_MEAN)} values and MODEL.BACKBONE.NAME "
            f"'{cfg.MODEL.BACKBONE.NAME}' takes images of 3 channels: give it three, or use "
            "another backbone"
        )


def check_not_frozen(cfg: CfgNode) -> None:
    """Raises ConfigError for stages to freeze in a network whose stages are not known."""
    if cfg.MODEL.BACKBONE.FREEZE_AT != 0:
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}, which has no meaning for"
            f" MODEL.BACKBONE.NAME '{cfg.MODEL.BACKBONE.NAME}': set it to 0 (MODEL.RESNETS.NORM"
            " 'FrozenBN' freezes its BatchNorm)"
        )


def pyramid_stages(cfg: CfgNode) -> list[str]:
    """Returns ``MODEL.FPN.IN_FEATURES``, checked.

    Raises:
        ConfigError: it is empty or names something else than res2 to res5.
    """
    stages = list(cfg.MODEL.FPN.IN_FEATURES)
    if not stages:
        raise ConfigError(
            "MODEL.FPN.IN_FEATURES is empty: set it to the stages that the FPN reads, such as"
            " ['res2', 'res3', 'res4', 'res5']"
        )
    for stage in stages:
        if stage not in STAGE_STRIDES:
            raise ConfigError(
                f"MODEL.FPN.IN_FEATURES names '{stage}', which this backbone does not have"
                f"{did_you_mean(stage, STAGE_STRIDES)}"
            )
    return stages


def build_network_pyramid(
    cfg: CfgNode, build: Callable[[list[str]], NetworkBackbone], *, retinanet: bool
) -> FPN:
    """Builds a network of another library, given the stages that the FPN reads, and its FPN."""
    check_three_channels(cfg)
    check_not_frozen(cfg)
    stages = pyramid_stages(cfg)
    return build_pyramid(cfg, build(stages), stages=stages, retinanet=retinanet)


def build_pyramid(
    cfg: CfgNode, bottom_up: Backbone, *, stages: Sequence[str], retinanet: bool = False
) -> FPN:
    """Builds Detectron2's FPN as its ResNet builders do: p2..p6, or p3..p7 for RetinaNet.

    Args:
        cfg: the config; ``MODEL.FPN`` is read.
        bottom_up: the network.
        stages: names of the network's outputs that the FPN reads, fine to coarse.
        retinanet: whether p6 and p7 are convolutions on the network's last output, as RetinaNet
            has them, instead of a pooled p5.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
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
