"""Any convolutional classification network of torchvision with an FPN as the student.

``MODEL.TORCHVISION.NAME`` is a name of ``torchvision.models.list_models()`` whose network takes
images of any size and has feature maps at the strides that ``MODEL.FPN.IN_FEATURES`` asks for
(res2: 4, res3: 8, res4: 16, res5: 32): the outputs of the last block at each stride. torchvision's
own ``create_feature_extractor`` cuts the network there, so that the classifier is gone.

The layers keep torchvision's names, below ``net.``: ``MODEL.WEIGHTS:
torchvision://efficientnet_b0``, or a file of torchvision's, loads
(:mod:`kd_detectron.checkpoint.torchvision_weights`). ``MODEL.RESNETS.NORM`` says what becomes of
the network's BatchNorm layers.
"""

import warnings
from collections.abc import Iterator, Sequence

import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from kd_detectron.backbones.pyramid import NetworkBackbone, check_not_frozen, register_builders
from kd_detectron.errors import ConfigError, did_you_mean


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
            norm: "FrozenBN", "BN" or "SyncBN".
            out_features: the stages to return, of "res2".."res5".

        Raises:
            ConfigError: torchvision has no such network, it is for one image size, or it has no
                feature maps at the strides asked for.
        """
        super().__init__(norm)
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise ConfigError(
                f"MODEL.TORCHVISION.NAME '{name}' is no classification network of torchvision "
                f"{torchvision.__version__}{did_you_mean(name, known)}"
            )
        self.torchvision_name = name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GoogLeNet's and Inception's on their initialisation
            network = torchvision.models.get_model(name, weights=None)
            self.tensor_names = frozenset(network.state_dict())
            blocks = self._find_stages(network, name, out_features)
            self.net = create_feature_extractor(
                network,
                return_nodes={block: stage for stage, block in blocks.items()},
                suppress_diff_warning=True,
            )
        if norm == "FrozenBN":
            self.net = FrozenBatchNorm2d.convert_frozen_batchnorm(self.net)
        elif norm == "SyncBN":
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)

    def _maps(self, network: nn.Module, images: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        found = []
        handles = [
            block.register_forward_hook(lambda *args, path=path: found.append((path, args[-1])))
            for path, block in _blocks(network)
        ]
        network(images)
        for handle in handles:
            handle.remove()
        return [(path, output) for path, output in found if isinstance(output, torch.Tensor)]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps images (N, 3, H, W) to the features of each stage, by its name."""
        return self.net(images)


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


def _network(cfg: CfgNode, stages: Sequence[str]) -> TorchvisionBackbone:
    check_not_frozen(cfg)
    name, norm = cfg.MODEL.TORCHVISION.NAME, cfg.MODEL.RESNETS.NORM
    return TorchvisionBackbone(name, norm=norm, out_features=stages)


register_builders("torchvision", _network)
