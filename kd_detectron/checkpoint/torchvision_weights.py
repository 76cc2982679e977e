"""torchvision's ImageNet weights as ``MODEL.WEIGHTS``: by name, by file, under Detectron2's names.

``torchvision://resnet18`` (or ``torchvision://resnet50/IMAGENET1K_V2``) is resolved to the URL
that torchvision gives, and downloaded and cached by Detectron2's PathManager. A state dict in
torchvision's layout, from there or from a local file, is renamed when it is loaded: ResNets to
Detectron2's ``ResNet``, MobileNetV2 to :class:`kd_detectron.backbones.MobileNetV2`, under the
prefix that the model has; any network to :class:`kd_detectron.backbones.TorchvisionBackbone`,
which keeps torchvision's names. The classifier is dropped. The default version is IMAGENET1K_V1,
which the papers start from.

Two mistakes that load without error are refused: a file of a deeper ResNet, and Detectron2's
default of the stride in the 1x1 convolution (torchvision has it in the 3x3; ``STRIDE_IN_1X1`` must
be False). Tests: ``tests/checkpoint/test_torchvision_weights.py``.
"""

import re
from collections.abc import Iterable, Mapping

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

# Those that Detectron2's ResNet and this project's MobileNetV2 are.
TORCHVISION_NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "mobilenet_v2",
)
_DEPTH_OF_BLOCKS = {
    (2, 2, 2, 2): (18, 18),
    (3, 4, 6, 3): (34, 50),
    (3, 4, 23, 3): (101, 101),
    (3, 8, 36, 3): (152, 152),
}


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


def _torchvision_backbone(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The model's TorchvisionBackbone, if it has one, and the prefix of its network's tensors."""
    for path, module in model.named_modules():
        if hasattr(module, "torchvision_name"):
            return f"{path}.net." if path else "net.", module
    return "", None


def _convert_by_own_names(
    state: Mapping[str, torch.Tensor], model: nn.Module, *, source: str
) -> dict[str, torch.Tensor]:
    """As :func:`convert_torchvision_state`, for a backbone that keeps torchvision's names."""
    prefix, backbone = _torchvision_backbone(model)
    # torchvision's files of DenseNets have the names of its first version.
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=\d\.)")
    state = {old.sub(r"\1", name): tensor for name, tensor in state.items()}
    own = {name: tensor.shape for name, tensor in backbone.net.state_dict().items()}
    optional = "num_batches_tracked"  # FrozenBN has none, and old files have none
    unfit = [name for name in own.keys() - state.keys() if not name.endswith(optional)]
    unfit += [name for name in own.keys() & state.keys() if state[name].shape != own[name]]
    # Blocks of a larger network of the same family.
    unfit += state.keys() - backbone.tensor_names
    if unfit:
        raise ConfigError(
            f"{source} does not fit MODEL.TORCHVISION.NAME '{backbone.torchvision_name}':"
            f" {len(unfit)} tensors differ in presence or shape, the first '{sorted(unfit)[0]}';"
            f" set MODEL.WEIGHTS to torchvision://{backbone.torchvision_name}, or the name to that"
            " of the network in the file"
        )
    return {prefix + name: tensor for name, tensor in state.items() if name in own}


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
    _, backbone = _torchvision_backbone(model)
    if backbone is not None and backbone.tensor_names & state.keys():
        _warn_of_other_normalisation(model, source)
        return _convert_by_own_names(state, model, source=source)
    layout = torchvision_layout(state)
    model_state = model.state_dict()
    anchor = "stem.conv1.weight" if layout == "resnet" else "features.0.0.weight"
    prefix = next((key.removesuffix(anchor) for key in model_state if key.endswith(anchor)), None)
    if prefix is None:
        network = "ResNet" if layout == "resnet" else "MobileNetV2"
        raise ConfigError(
            f"{source} holds a torchvision {network}, but the model's backbone is none: set"
            " MODEL.BACKBONE.NAME to "
            + ("a ResNet" if layout == "resnet" else "'build_mobilenetv2_fpn_backbone'")
            + " or MODEL.WEIGHTS to weights of its own backbone"
        )
    rename = _resnet_name if layout == "resnet" else _mobilenet_name
    named = {rename(name): tensor for name, tensor in state.items() if rename(name) is not None}
    own_names = {key.removeprefix(prefix) for key in model_state if key.startswith(prefix)}
    # A detector may use only the network's first stages (OUT_FEATURES); their extra ones go.
    stages = {_stage(name) for name in own_names}
    optional = "num_batches_tracked"  # FrozenBN has none, and old files have none
    named = {
        name: tensor
        for name, tensor in named.items()
        if _stage(name) in stages and (name in own_names or not name.endswith(optional))
    }
    unfit = [name for name in named if name not in own_names]
    unfit += [
        name
        for name in named
        if name in own_names and named[name].shape != model_state[prefix + name].shape
    ]
    unfit += [name for name in own_names - named.keys() if not name.endswith(optional)]
    if unfit:
        raise ConfigError(
            f"{source} does not fit the model's backbone: {len(unfit)} tensors differ in presence"
            f" or shape, the first '{prefix}{sorted(unfit)[0]}'; "
            + _fix(layout, named.keys(), own_names)
        )
    if layout == "resnet":
        _check_stride(model.get_submodule(prefix.rstrip(".")) if prefix else model, source)
    _warn_of_other_normalisation(model, source)
    return {prefix + name: tensor for name, tensor in named.items()}


def _resnet_name(name: str) -> str | None:
    """torchvision's name of a ResNet tensor to Detectron2's; None for the classifier."""
    stem = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
    first, _, rest = name.partition(".")
    if first in stem:
        return f"{stem[first]}.{rest}"
    match = re.fullmatch(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(\w+)", name)
    if match is None:
        return None
    layer, block, kind, number, shortcut, tensor = match.groups()
    module = "shortcut" if shortcut else f"conv{number}"
    norm = ".norm" if kind == "bn" or shortcut == "1" else ""
    return f"res{int(layer) + 1}.{block}.{module}{norm}.{tensor}"


def _mobilenet_name(name: str) -> str | None:
    """The name of a MobileNetV2 tensor, unchanged; None for the classifier."""
    return name if name.startswith("features.") else None


def _stage(name: str) -> str:
    """The part of the network that a tensor belongs to: "stem", "res2"..., "features.3"."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "features" else parts[0]


def _resnet_depth(names: Iterable[str]) -> int | None:
    """The depth of the ResNet that has these Detectron2 names; None if it has not four stages."""
    names = list(names)
    blocks = {match[1] for match in map(re.compile(r"(res\d\.\d+)\.").match, names) if match}
    counts = tuple(sum(block.startswith(f"res{i}.") for block in blocks) for i in range(2, 6))
    basic, bottleneck = _DEPTH_OF_BLOCKS.get(counts, (None, None))
    return bottleneck if "res2.0.conv3.weight" in names else basic


def _fix(layout: str, file_names: Iterable[str], own_names: Iterable[str]) -> str:
    if layout == "mobilenet_v2":
        return (
            "set MODEL.MOBILENETV2.WIDTH_MULT to 1.0, the only width that torchvision has weights"
            " for, or MODEL.WEIGHTS to '' to train from scratch"
        )
    in_file, in_model = _resnet_depth(file_names), _resnet_depth(own_names)
    if in_file != in_model:
        return f"the file holds a ResNet-{in_file} and MODEL.RESNETS.DEPTH is {in_model}"
    return (
        "set MODEL.RESNETS.RES2_OUT_CHANNELS (64 for ResNet-18 and 34, else 256), NORM"
        " ('FrozenBN', 'BN' or 'SyncBN') and the group and stem widths as torchvision's ResNet has"
        " them"
    )


def _check_stride(resnet: nn.Module, source: str) -> None:
    """Refuses the stride in a bottleneck's 1x1 convolution: same shapes, other activations."""
    block = resnet.get_submodule("res3.0") if hasattr(resnet, "res3") else None
    if hasattr(block, "conv3") and tuple(block.conv1.stride) != (1, 1):
        raise ConfigError(
            f"{source} holds a torchvision ResNet, whose bottlenecks have their stride in the 3x3"
            " convolution, but MODEL.RESNETS.STRIDE_IN_1X1 is True: set it to False"
        )


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
