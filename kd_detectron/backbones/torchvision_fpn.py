"""Any convolutional classification network of torchvision with an FPN as the student.

``MODEL.TORCHVISION.NAME`` is a name of ``torchvision.models.list_models()`` whose network takes
images of any size and has feature maps at the strides that ``MODEL.FPN.IN_FEATURES`` asks for
(res2: 4, res3: 8, res4: 16, res5: 32). Which of its blocks give them is found by running it once on
a small blank image: the last block at each stride. torchvision's own ``create_feature_extractor``
then cuts the network there, so that what comes after, the classifier, is gone.

Images (N, 3, H, W), features (N, C, H/stride, W/stride). The layers keep torchvision's names, below
``net.``: ``MODEL.WEIGHTS: torchvision://efficientnet_b0``, or a file of torchvision's, loads
(:mod:`kd_detectron.checkpoint.torchvision_weights`). ``MODEL.RESNETS.NORM`` holds here too:
"FrozenBN" freezes the network's BatchNorm layers, "BN" trains them, "SyncBN" does so over all GPUs.
``MODEL.BACKBONE.FREEZE_AT`` has no common meaning for torchvision's networks and must be 0. Tests:
``tests/backbones/test_torchvision_fpn.py``.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from kd_detectron.backbones.pyramid import (
    STAGE_STRIDES,
    NetworkBackbone,
    build_network_pyramid,
    check_norm,
)
from kd_detectron.errors import ConfigError, did_you_mean

# A blank image on which feature maps are found: every map's two sides differ, so that channels-last
# maps are not taken for others.
_IMAGE_SIZE = (128, 192)


class TorchvisionBackbone(NetworkBackbone):
    """A torchvision network as a Detectron2 backbone.

    Attributes:
        torchvision_name: torchvision's name of the network.
        net: its layers up to the last map, under torchvision's names.
        tensor_names: names in the state dict of the whole network, classifier included.
    """

    name_key = "MODEL.TORCHVISION.NAME"
    examples = "'mobilenet_v3_large' or 'convnext_tiny'"

    def __init__(
        self,
        name: str,
        *,
        norm: str = "FrozenBN",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
    ):
        """
        Args:
            name: torchvision's name of the network.
            norm: what becomes of its BatchNorm layers: "FrozenBN", "BN" or "SyncBN".
            out_features: the stages to return, of "res2".."res5".

        Raises:
            ConfigError: torchvision has no such network, it is for one image size, or it has no
                feature maps at the strides asked for.
        """
        super().__init__()
        check_norm(norm)
        self.torchvision_name = name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GoogLeNet's and Inception's on their initialisation
            network = _create(name)
            self.tensor_names = frozenset(network.state_dict())
            with self._trial(network, name):
                found = _last_blocks(network)
            self._check_stages(name, out_features, found)
            blocks = {found[STAGE_STRIDES[stage]][0]: stage for stage in out_features}
            self.net = create_feature_extractor(
                network, return_nodes=blocks, suppress_diff_warning=True
            )
        if norm == "FrozenBN":
            self.net = FrozenBatchNorm2d.convert_frozen_batchnorm(self.net)
        elif norm == "SyncBN":
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
        self._set_outputs({stage: found[STAGE_STRIDES[stage]][1] for stage in out_features})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps images (N, 3, H, W) to the features of each stage, by its name."""
        return self.net(images)


def _create(name: str) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(
            f"MODEL.TORCHVISION.NAME '{name}' is no classification network of torchvision "
            f"{torchvision.__version__}{did_you_mean(name, known)}"
        )
    return torchvision.models.get_model(name, weights=None)


def _blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts that a network runs one after the other: its children, and those of Sequentials.

    A residual block is one part: the maps inside it, wider and at the previous stride, are no
    stage's output. So is a layer of ``torchvision.ops``, into which the extractor does not look.
    """
    for name, child in module.named_children():
        is_layer = type(child).__module__.startswith(torchvision.ops.__name__)
        if isinstance(child, nn.Sequential) and not is_layer:
            yield from _blocks(child, f"{path}{name}.")
        else:
            yield f"{path}{name}", child


def _last_blocks(network: nn.Module) -> dict[int, tuple[str, int]]:
    """Runs a network on a blank image; the last block at each stride with its channels."""
    found: dict[int, tuple[str, int]] = {}
    height, width = _IMAGE_SIZE

    def note(path: str, output) -> None:
        for stride in STAGE_STRIDES.values():
            size = (height // stride, width // stride)
            if isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[2:] == size:
                found[stride] = (path, output.shape[1])

    handles = [
        block.register_forward_hook(lambda module, args, output, path=path: note(path, output))
        for path, block in _blocks(network)
    ]
    try:
        network(torch.zeros(1, 3, height, width))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _network(cfg: CfgNode, stages: Sequence[str]) -> TorchvisionBackbone:
    name, norm = cfg.MODEL.TORCHVISION.NAME, cfg.MODEL.RESNETS.NORM
    return TorchvisionBackbone(name, norm=norm, out_features=stages)


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a torchvision network with an FPN from ``MODEL.TORCHVISION``, ``FPN`` and the norm."""
    return build_network_pyramid(cfg, partial(_network, cfg), retinanet=False)


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same with RetinaNet's p6 and p7; ``MODEL.FPN.IN_FEATURES`` starts at res3."""
    return build_network_pyramid(cfg, partial(_network, cfg), retinanet=True)
