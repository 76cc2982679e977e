"""What a torchvision detector is made of: its parts, feature levels, widths and class count.

Sizes are measured: one image of zeros is run through the backbone and one pooled box of zeros
through the box head, in eval mode and without gradient.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from kd_detectron.distillers import ModelSpec
from kd_detectron.errors import ConfigError

from .conventions import level_names

# Pixels per side of the image that strides are measured on; more than any usual stride.
_MEASURED_SIZE = 256


@dataclass(frozen=True)
class Anatomy:
    """What the adapter and the distillers need to know about a detector.

    Attributes:
        levels: the context's name of each feature level, in the backbone's order.
        spec: channels and strides by these names, class count, width of the box head.
        anchors_per_location: A by level name.
        has_boxes: whether there are ROI heads (and an RPN).
        has_masks: whether these have a mask head.
    """

    levels: list[str]
    spec: ModelSpec
    anchors_per_location: dict[str, int]
    has_boxes: bool
    has_masks: bool


def read_anatomy(model: nn.Module, who: str) -> Anatomy:
    """Finds out a detector's parts and sizes.

    Args:
        model: a torchvision Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS.
        who: "student" or "teacher", for messages.
    """
    has_boxes = (
        isinstance(model, GeneralizedRCNN)
        and isinstance(model.rpn, RegionProposalNetwork)
        and isinstance(model.roi_heads, RoIHeads)
    )
    if not has_boxes and not isinstance(model, RetinaNet | FCOS):
        raise ConfigError(
            f"the {who} is a {type(model).__name__}, which cannot be distilled; give torchvision's "
            "Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS"
        )
    parameter = next(model.parameters())
    with _measuring(model):
        zeros = parameter.new_zeros(1, 3, _MEASURED_SIZE, _MEASURED_SIZE)
        maps = features_of(model.backbone(zeros))
        num_classes = box_channels = None
        if has_boxes:
            heads = model.roi_heads
            shape = (1, model.backbone.out_channels, *heads.box_roi_pool.output_size)
            box_features = heads.box_head(parameter.new_zeros(shape))
            box_channels = box_features.flatten(1).shape[1]
            num_classes = heads.box_predictor(box_features)[0].shape[1] - 1
    strides = [round(_MEASURED_SIZE / one.shape[-1]) for one in maps.values()]
    levels = level_names(strides)
    spec = ModelSpec(
        channels={level: one.shape[1] for level, one in zip(levels, maps.values(), strict=True)},
        strides=dict(zip(levels, strides, strict=True)),
        num_classes=num_classes,
        box_channels=box_channels,
    )
    anchors = anchor_generator_of(model).num_anchors_per_location()
    return Anatomy(
        levels=levels,
        spec=spec,
        anchors_per_location=dict(zip(levels, anchors, strict=True)),
        has_boxes=has_boxes,
        has_masks=has_boxes and model.roi_heads.has_mask(),
    )


def anchor_generator_of(model: nn.Module) -> nn.Module:
    """The anchor generator of a two-stage or single-stage detector."""
    return getattr(model, "rpn", model).anchor_generator


def features_of(output) -> dict[str, torch.Tensor]:
    """A backbone's output as a dict; a backbone without FPN returns one map."""
    return {"0": output} if isinstance(output, torch.Tensor) else dict(output)


@contextlib.contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        for module, training in modes:
            module.training = training
