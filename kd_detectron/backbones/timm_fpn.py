"""Any convolutional network of timm with an FPN as the student.

``MODEL.TIMM.NAME`` is a name of ``timm.list_models()`` whose network takes images of any size and
returns feature maps at the strides that ``MODEL.FPN.IN_FEATURES`` asks for (res2: 4, res3: 8, res4:
16, res5: 32); of several maps at one stride the last is taken. Both are checked by running it once
on a small blank image when it is built. timm is optional (``pip install kd_detectron[timm]``) and
imported only when such a backbone is built.

Images (N, 3, H, W), features (N, C, H/stride, W/stride). timm's networks were trained on RGB images
with their own mean and std; where a config normalises otherwise, a warning is logged. timm's
weights are read when the model is built, but not where ``MODEL.WEIGHTS`` names a checkpoint that
replaces them (evaluation, fine-tuning). ``MODEL.RESNETS.NORM`` holds here too: "FrozenBN" freezes
the network's BatchNorm layers, "BN" trains them, "SyncBN" does so over all GPUs.
``MODEL.BACKBONE.FREEZE_AT`` has no meaning for timm's networks and must be 0.
"""

import difflib
from collections.abc import Sequence
from functools import partial
from types import ModuleType

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from torch import nn

from kd_detectron.backbones.pixel_statistics import warn_of_pretrained_statistics
from kd_detectron.backbones.pyramid import (
    STAGE_STRIDES,
    NetworkBackbone,
    build_network_pyramid,
    check_norm,
)
from kd_detectron.errors import ConfigError


class TimmBackbone(NetworkBackbone):
    """A timm network as a Detectron2 backbone."""

    name_key = "MODEL.TIMM.NAME"
    examples = "'mobilenetv3_large_100' or 'convnext_tiny'"

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        norm: str = "FrozenBN",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
    ):
        """
        Args:
            name: timm's name of the network.
            pretrained: load timm's weights for it (downloaded and cached by timm).
            norm: what becomes of its BatchNorm layers: "FrozenBN", "BN" or "SyncBN".
            out_features: the stages to return, of "res2".."res5".

        Raises:
            ConfigError: timm is not installed, has no such network or weights, or the network has
                no feature maps at the strides asked for.
        """
        super().__init__()
        check_norm(norm)
        timm = _import_timm()
        _check_name(timm, name)
        # Which feature maps there are is known only from the network itself.
        maps = _create(timm, name).feature_info
        index_at = dict(zip(maps.reduction(), maps.out_indices, strict=True))
        self._check_stages(name, out_features, index_at)
        indices = tuple(index_at[STAGE_STRIDES[stage]] for stage in out_features)
        self.net = _create(timm, name, pretrained=pretrained, out_indices=indices)
        if norm == "FrozenBN":
            self.net = timm.layers.freeze_batch_norm_2d(self.net)
        elif norm == "SyncBN":
            self.net = timm.layers.convert_sync_batchnorm(self.net)
        channels = self.net.feature_info.channels()
        self._set_outputs(dict(zip(out_features, channels, strict=True)))
        self._check_output(name)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps images (N, 3, H, W) to the features of each stage, by its name."""
        return dict(zip(self._out_features, self.net(images), strict=True))

    def _check_output(self, name: str) -> None:
        """Refuses networks for one image size, or with other maps than timm's table says."""
        height, width = 64, 96
        with self._trial(self.net, name):
            outputs = self(torch.zeros(1, 3, height, width))
        found = [tuple(output.shape[1:]) for output in outputs.values()]
        expected = [
            (shape.channels, height // shape.stride, width // shape.stride)
            for shape in self.output_shape().values()
        ]
        if found != expected:
            raise ConfigError(
                f"MODEL.TIMM.NAME '{name}' returns maps of shapes {found} for an image of"
                f" {height}x{width} where {expected} are needed: name another network"
            )


def _import_timm() -> ModuleType:
    try:
        import timm
        import timm.layers
    except ImportError as error:
        raise ConfigError(
            "MODEL.BACKBONE.NAME is a timm backbone but timm is not installed: pip install"
            " kd_detectron[timm]"
        ) from error
    return timm


def _check_name(timm: ModuleType, name: str) -> None:
    """Refuses names that timm does not have, and shows the near ones (it has over a thousand)."""
    architecture = name.split(".")[0]  # "resnet18.a1_in1k" names the weights as well
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
        raise ConfigError(
            f"MODEL.TIMM.NAME '{name}' is no network of timm {timm.__version__}; "
            + (f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them")
        )


def _create(timm: ModuleType, name: str, *, pretrained: bool = False, **options) -> nn.Module:
    """Builds the network that returns its feature maps; ``options`` are timm's."""
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    except Exception as error:  # what fails, and how, is up to each network and each download
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if pretrained:
            raise ConfigError(
                f"MODEL.TIMM.PRETRAINED is True but timm's weights for '{name}' could not be loaded"
                f" ({reason}): set it to False, or MODEL.WEIGHTS to a checkpoint of this student"
            ) from error
        raise ConfigError(
            f"MODEL.TIMM.NAME '{name}' cannot return feature maps ({reason}): name another network"
        ) from error


def _network(cfg: CfgNode, stages: Sequence[str]) -> TimmBackbone:
    bottom_up = TimmBackbone(
        cfg.MODEL.TIMM.NAME,
        pretrained=cfg.MODEL.TIMM.PRETRAINED and not cfg.MODEL.WEIGHTS,
        norm=cfg.MODEL.RESNETS.NORM,
        out_features=stages,
    )
    if cfg.MODEL.TIMM.PRETRAINED:
        trained = getattr(bottom_up.net, "pretrained_cfg", None) or {}
        warn_of_pretrained_statistics(
            f"MODEL.TIMM.NAME '{cfg.MODEL.TIMM.NAME}'",
            *([255 * value for value in trained.get(key, ())] for key in ("mean", "std")),
            input_format=cfg.INPUT.FORMAT,
            mean=cfg.MODEL.PIXEL_MEAN,
            std=cfg.MODEL.PIXEL_STD,
        )
    return bottom_up


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a timm network with an FPN from ``MODEL.TIMM``, ``MODEL.FPN`` and ``RESNETS.NORM``."""
    return build_network_pyramid(cfg, partial(_network, cfg), retinanet=False)


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same with RetinaNet's p6 and p7; ``MODEL.FPN.IN_FEATURES`` starts at res3."""
    return build_network_pyramid(cfg, partial(_network, cfg), retinanet=True)
