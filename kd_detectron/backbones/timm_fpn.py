"""Any convolutional network of timm with an FPN as the student.

``MODEL.TIMM.NAME`` is a name of ``timm.list_models()`` whose network takes images of any size and
returns feature maps at the strides that ``MODEL.FPN.IN_FEATURES`` asks for (res2: 4, res3: 8, res4:
16, res5: 32); of several maps at one stride the last is taken. timm is optional
(``pip install timm``).

timm's weights are read when the model is built, but not where ``MODEL.WEIGHTS`` names a checkpoint
that replaces them (evaluation, fine-tuning). ``MODEL.RESNETS.NORM`` says what becomes of the
network's BatchNorm layers.
"""

from collections.abc import Iterable, Sequence

import torch
from detectron2.config import CfgNode
from torch import nn

from kd_detectron.backbones.pixel_statistics import warn_of_pretrained_statistics
from kd_detectron.backbones.pyramid import NetworkBackbone, check_not_frozen, register_builders
from kd_detectron.errors import ConfigError, did_you_mean


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
            norm: "FrozenBN", "BN" or "SyncBN".
            out_features: the stages to return, of "res2".."res5".

        Raises:
            ConfigError: timm is not installed, has no such network or weights, or the network has
                no feature maps at the strides asked for.
        """
        super().__init__(norm)
        indices = self._find_stages(_create(name), name, out_features).values()
        self.net = _create(name, pretrained=pretrained, out_indices=tuple(indices))
        from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

        if norm == "FrozenBN":
            self.net = freeze_batch_norm_2d(self.net)
        elif norm == "SyncBN":
            self.net = convert_sync_batchnorm(self.net)

    def _maps(self, network: nn.Module, images: torch.Tensor) -> Iterable[tuple[int, torch.Tensor]]:
        return zip(network.feature_info.out_indices, network(images), strict=True)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps images (N, 3, H, W) to the features of each stage, by its name."""
        return dict(zip(self._out_features, self.net(images), strict=True))


def _create(name: str, *, pretrained: bool = False, **options) -> nn.Module:
    """Builds the network that returns its feature maps; ``options`` are timm's."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            "MODEL.BACKBONE.NAME is a timm backbone but timm is not installed: pip install timm"
        ) from error
    architecture = name.split(".")[0]  # "resnet18.a1_in1k" names the weights as well
    if not timm.is_model(architecture):
        raise ConfigError(
            f"MODEL.TIMM.NAME '{name}' is no network of timm {timm.__version__}"
            f"{did_you_mean(architecture, timm.list_models())}"
        )
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    except Exception as error:  # what fails, and how, is up to each network and each download
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        advice = "name another network"
        if pretrained:
            advice = "set MODEL.TIMM.PRETRAINED to False, or MODEL.WEIGHTS to a checkpoint"
        raise ConfigError(
            f"MODEL.TIMM.NAME '{name}' with MODEL.TIMM.PRETRAINED {pretrained} cannot be built"
            f" ({reason}): {advice}"
        ) from error


def _network(cfg: CfgNode, stages: Sequence[str]) -> TimmBackbone:
    check_not_frozen(cfg)
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


register_builders("timm", _network)
