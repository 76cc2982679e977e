"""torchvision's ImageNet weights as ``MODEL.WEIGHTS``: by name, by file, under Detectron2's names.

``torchvision://resnet18`` (or ``torchvision://resnet50/IMAGENET1K_V2``) is resolved to the URL
that torchvision gives, and downloaded and cached by Detectron2's PathManager. A state dict in
torchvision's layout, from there or from a local file, is renamed when it is loaded: ResNets to
Detectron2's ``ResNet``, MobileNetV2 to :class:`kd_detectron.backbones.MobileNetV2`, any network to
:class:`kd_detectron.backbones.TorchvisionBackbone`. The classifier is dropped. The default version
is IMAGENET1K_V1, which the papers start from.

Two mistakes that load without error are refused: a file of a deeper ResNet, and Detectron2's
default of the stride in the 1x1 convolution (torchvision has it in the 3x3; ``STRIDE_IN_1X1`` must
be False). Tests: ``tests/checkpoint/test_torchvision_weights.py``.
"""

import re
from collections.abc import Mapping

import torch
import torchvision
from detectron2.utils.file_io import PathHandler, PathManager
from torch import nn

from kd_detectron.backbones.pixel_statistics import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    warn_of_pretrained_statistics,
)
from kd_detectron.errors import ConfigError, did_you_mean

# What Detectron2's ResNet and this project's MobileNetV2 call their first tensor.
_FIRST_TENSORS = {"resnet": "stem.conv1.weight", "mobilenet_v2": "features.0.0.weight"}


def torchvision_url(name: str) -> str:
    """Returns the URL of ``"resnet18"`` or ``"resnet18/IMAGENET1K_V1"``.

    Raises:
        ConfigError: the network or the version of its weights is unknown.
    """
    network, _, version = name.strip("/").partition("/")
    known = torchvision.models.list_models(module=torchvision.models)
    if network not in known:
        raise ConfigError(
            f"'torchvision://{name}' names no classification network of torchvision"
            f"{did_you_mean(network, known)}"
        )
    weights = torchvision.models.get_model_weights(network)
    version = version or "IMAGENET1K_V1"
    if version not in weights.__members__:
        raise ConfigError(
            f"torchvision has no weights '{version}' for {network}"
            f"{did_you_mean(version, weights.__members__)}"
        )
    return weights[version].url


class TorchvisionHandler(PathHandler):
    """Resolves ``torchvision://NETWORK[/VERSION]`` for Detectron2's PathManager."""

    PREFIX = "torchvision://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **kwargs) -> str:
        return PathManager.get_local_path(torchvision_url(path[len(self.PREFIX) :]), **kwargs)

    def _open(self, path: str, mode: str = "r", **kwargs):
        return PathManager.open(self._get_local_path(path), mode, **kwargs)


PathManager.register_handler(TorchvisionHandler(), allow_override=True)


def torchvision_layout(state: Mapping[str, object]) -> str | None:
    """Returns "resnet" or "mobilenet_v2" if the tensors are named as torchvision does, or None."""
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        return "resnet"
    if "features.0.0.weight" in state and "features.1.conv.0.0.weight" in state:
        return "mobilenet_v2"
    return None


def is_torchvision_state(state: Mapping[str, object], model: nn.Module) -> bool:
    """Whether the tensors are named as torchvision does, so that they are to be renamed."""
    _, backbone = _torchvision_backbone(model)
    if backbone is not None and backbone.tensor_names & state.keys():
        return True
    return torchvision_layout(state) is not None


def convert_torchvision_state(
    state: Mapping[str, torch.Tensor], model: nn.Module, *, source: str
) -> dict[str, torch.Tensor]:
    """Renames a torchvision state dict to the names that ``model``'s backbone has.

    Args:
        state: a state dict for which :func:`is_torchvision_state` is true.
        model: a detector, or a backbone alone.
        source: where the tensors come from, as error messages name it ("MODEL.WEIGHTS 'x.pth'").

    Returns:
        the tensors that the model has, by the model's names.

    Raises:
        ConfigError: the model's backbone is another network than the one in the file.
    """
    model_state = model.state_dict()
    prefix, backbone = _torchvision_backbone(model)
    if backbone is not None:
        named = {_torchvision_name(name): tensor for name, tensor in state.items()}
        classifier = backbone.tensor_names - backbone.net.state_dict().keys()
    else:
        layout = torchvision_layout(state)
        rename = _resnet_name if layout == "resnet" else str
        named = {rename(name): tensor for name, tensor in state.items()}
        classifier = {name for name in named if name.startswith(("stem.fc.", "classifier."))}
        first = _FIRST_TENSORS[layout]
        prefix = next((key.removesuffix(first) for key in model_state if key.endswith(first)), "?")
    named = {name: tensor for name, tensor in named.items() if name not in classifier}
    own = {
        key.removeprefix(prefix): tensor
        for key, tensor in model_state.items()
        if key.startswith(prefix)
    }
    if backbone is None and own:
        # A detector may use only the network's first stages (OUT_FEATURES).
        stages = {_stage(name) for name in own}
        named = {name: tensor for name, tensor in named.items() if _stage(name) in stages}
    unfit = [
        name
        for name in sorted(own.keys() | named.keys())
        # FrozenBN has none, and old files have none.
        if not name.endswith("num_batches_tracked")
        and (name not in own or name not in named or own[name].shape != named[name].shape)
    ]
    if unfit:
        raise ConfigError(
            f"{source} does not fit the model's backbone: {len(unfit)} tensors differ in presence"
            f" or shape, the first '{unfit[0]}'; set MODEL.BACKBONE.NAME, MODEL.RESNETS (DEPTH;"
            " RES2_OUT_CHANNELS 64 for ResNet-18 and 34, else 256; STEM_OUT_CHANNELS 64; NORM"
            " 'FrozenBN', 'BN' or 'SyncBN'), MODEL.MOBILENETV2.WIDTH_MULT 1.0 or"
            " MODEL.TORCHVISION.NAME as the network in the file has them, or MODEL.WEIGHTS to"
            " weights of this backbone"
        )
    if "res3.0.conv3.weight" in own:
        block = model.get_submodule(f"{prefix}res3.0")
        if tuple(block.conv1.stride) != (1, 1):  # the same shapes, other activations
            raise ConfigError(
                f"{source} holds a torchvision ResNet, whose bottlenecks have their stride in the"
                " 3x3 convolution, but MODEL.RESNETS.STRIDE_IN_1X1 is True: set it to False"
            )
    _warn_of_other_normalisation(model, source)
    return {prefix + name: tensor for name, tensor in named.items() if name in own}


def _torchvision_backbone(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The model's TorchvisionBackbone, if it has one, and the prefix of its network's tensors."""
    for path, module in model.named_modules():
        if hasattr(module, "torchvision_name"):
            return f"{path}.net." if path else "net.", module
    return "", None


def _torchvision_name(name: str) -> str:
    """torchvision's name; its files of DenseNets have the names of an earlier version."""
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=\d\.)", r"\1", name)


def _resnet_name(name: str) -> str:
    """torchvision's name of a ResNet tensor to Detectron2's."""
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _stage(name: str) -> str:
    """The part of the network that a tensor belongs to: "stem", "res2"..., "features.3"."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "features" else parts[0]


def _warn_of_other_normalisation(model: nn.Module, source: str) -> None:
    if hasattr(model, "pixel_mean") and hasattr(model, "input_format"):
        warn_of_pretrained_statistics(
            source,
            IMAGENET_MEAN["RGB"],
            IMAGENET_STD["RGB"],
            input_format=model.input_format,
            mean=model.pixel_mean.flatten().tolist(),
            std=model.pixel_std.flatten().tolist(),
        )
