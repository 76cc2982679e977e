"""Torchvision detectors by name, and their checkpoints.

A name is one of torchvision's own (``fasterrcnn_resnet50_fpn_v2``), or
``<fasterrcnn|maskrcnn|retinanet|fcos>_<network>_fpn`` with any of torchvision's classification
networks that has feature maps of strides 4 to 32 (``fasterrcnn_resnet18_fpn``,
``fasterrcnn_mobilenet_v2_fpn``): the network with an FPN on the last layer of each stride.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
import torchvision
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.finite import non_finite_key

_DETECTORS = {
    "fasterrcnn": detection.FasterRCNN,
    "maskrcnn": detection.MaskRCNN,
    "retinanet": detection.RetinaNet,
    "fcos": detection.FCOS,
}
# Whose arguments each kind of detector takes.
_CLASSES = {
    "fasterrcnn": (detection.FasterRCNN,),
    "maskrcnn": (detection.MaskRCNN, detection.FasterRCNN),
    "keypointrcnn": (detection.KeypointRCNN, detection.FasterRCNN),
    "retinanet": (detection.RetinaNet,),
    "fcos": (detection.FCOS,),
}
_PIXELS = 64


def build_detector(
    name: str,
    num_classes: int | None,
    *,
    weights: str = "",
    backbone_weights: str = "",
    options: Mapping = {},
) -> nn.Module:
    """Builds a torchvision detector.

    Args:
        name: see above.
        num_classes: K, without the background; None: that of torchvision's trained detector.
        weights: a checkpoint file, or a name of torchvision's for its trained detectors
            ("COCO_V1"), which have 90 classes; empty: random weights. Where the BatchNorm of a file
            was frozen (torchvision freezes it on pretrained backbones), it is frozen here too.
        backbone_weights: a name of torchvision's for the backbone ("IMAGENET1K_V1"); or empty.
        options: keyword arguments of the detector (``min_size``, ``box_batch_size_per_image``),
            and ``anchor_sizes``, one per level; for ``<detector>_<network>_fpn`` also
            ``out_channels`` of the FPN and ``network``, arguments of the network.

    Raises:
        ConfigError: the name is unknown, or the weights are not found or do not fit.
    """
    options = dict(options)
    if sizes := options.pop("anchor_sizes", None):
        key = (
            "anchor_generator" if name.startswith(("retinanet", "fcos")) else "rpn_anchor_generator"
        )
        ratios = (1.0,) if name.startswith("fcos") else (0.5, 1.0, 2.0)
        options[key] = AnchorGenerator(tuple((size,) for size in sizes), (ratios,) * len(sizes))
    known = torchvision.models.list_models(module=detection)
    named = "" if Path(weights).is_file() else weights
    try:
        if name in known:
            _check_options(name, options, torchvision.models.get_model_builder(name))
            model = torchvision.models.get_model(
                name,
                weights=named or None,
                weights_backbone=backbone_weights or None,
                num_classes=None if num_classes is None else num_classes + 1,
                **options,
            )
        else:
            if named:
                raise ConfigError(f"weights '{weights}' of {name} is no file")
            model = _with_network(name, num_classes, backbone_weights, options, known)
    except (OSError, TypeError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{name} with {num_classes} classes, weights '{weights}', backbone weights "
            f"'{backbone_weights}' and options {sorted(options)} cannot be built: {error}"
        ) from error
    if weights and not named:
        load_weights(model, weights, name)
    return model


def load_weights(model: nn.Module, path: str | Path, name: str) -> None:
    """Loads a state dict, or one under "model" as torchvision's training scripts write it.

    Raises:
        ConfigError: the file is unreadable or does not fit in every key.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"the weights {path} of {name} cannot be read: {first}") from error
    state = state.get("model", state)
    _freeze_batch_norm(model, state)
    own = model.state_dict()
    wrong = [key for key in state if key not in own or own[key].shape != state[key].shape]
    missing = [key for key in own if key not in state]
    if wrong or missing:
        raise ConfigError(
            f"the weights {path} do not fit {name}: {len(missing)} keys missing, {len(wrong)} "
            f"unknown or of another shape, e.g. {(wrong + missing)[0]}; name the detector, the "
            "options and the classes that they were trained with"
        )
    if key := non_finite_key(state):
        raise ConfigError(
            f"the weights {path} of {name} hold NaN or infinity in '{key}'; give a checkpoint from "
            "before its training failed"
        )
    model.load_state_dict(state)


def _freeze_batch_norm(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Freezes the BatchNorm layers of which the state has no count of batches, as it was saved."""
    for name, layer in list(model.named_modules()):
        counted = f"{name}.num_batches_tracked" in state
        if isinstance(layer, nn.BatchNorm2d) and f"{name}.running_mean" in state and not counted:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, FrozenBatchNorm2d(layer.num_features))


def _with_network(
    name: str, num_classes: int, backbone_weights: str, options: dict, known: list[str]
) -> nn.Module:
    found = re.fullmatch(r"([a-z]+)_(\w+)_fpn", name)
    networks = torchvision.models.list_models(module=torchvision.models)
    if not found or found[1] not in _DETECTORS or found[2] not in networks:
        near = [*known, *(f"fasterrcnn_{network}_fpn" for network in networks)]
        raise ConfigError(f"there is no torchvision detector '{name}'{did_you_mean(name, near)}")
    cls = _DETECTORS[found[1]]
    _check_options(name, options, fpn_backbone)
    out_channels, network = options.pop("out_channels", 256), options.pop("network", {})
    body = torchvision.models.get_model(found[2], weights=backbone_weights or None, **network)
    backbone = fpn_backbone(body, out_channels)
    return cls(backbone, num_classes + 1, **options)


def _check_options(name: str, options: Mapping, builder: Callable) -> None:
    """Refuses what is no argument of the detector, which torchvision would take silently."""
    accepted = {
        key
        for one in (builder, *_CLASSES.get(name.split("_")[0], ()))
        for key, parameter in inspect.signature(one).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    for key in options:
        if key not in accepted:
            raise ConfigError(f"{name} has no option {key}{did_you_mean(key, accepted)}")


def fpn_backbone(network: nn.Module, out_channels: int) -> BackboneWithFPN:
    """An FPN on a network's last layers of stride 4, 8, 16 and 32, with a pooled level."""
    body = network.features if hasattr(network, "features") else network
    last: dict[int, tuple[str, int]] = {}
    maps = torch.zeros(1, 3, _PIXELS, _PIXELS)
    with torch.no_grad():
        body.eval()
        for name, layer in body.named_children():
            maps = layer(maps)
            if maps.dim() != 4 or maps.shape[-1] < 2:
                break
            last[_PIXELS // maps.shape[-1]] = (name, maps.shape[1])
        body.train()
    if not {4, 8, 16, 32} <= set(last):
        raise ConfigError(
            f"{type(network).__name__} has layers of strides {sorted(last)}; an FPN here needs 4, "
            "8, 16 and 32: choose a ResNet, a MobileNet or the like"
        )
    levels = [last[stride] for stride in (4, 8, 16, 32)]
    return BackboneWithFPN(
        body,
        {name: str(index) for index, (name, _) in enumerate(levels)},
        [channels for _, channels in levels],
        out_channels,
        LastLevelMaxPool(),
    )
