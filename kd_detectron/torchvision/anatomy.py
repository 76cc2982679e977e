"""What a torchvision detector is made of: its parts, feature levels, widths and class count.

Sizes are measured: one image of zeros is run through the backbone and one pooled box of zeros
through the box head and the mask head, in eval mode and without gradient.
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
        anchors: sizes and aspect ratios by level name; every size has every ratio.
        anchors_per_location: A by level name.
        has_boxes: whether there are ROI heads (and an RPN).
        mask_size: pixels per side of the mask head's logits; None without a mask head.
    """

    levels: list[str]
    spec: ModelSpec
    anchors: dict[str, tuple[tuple, tuple]]
    anchors_per_location: dict[str, int]
    has_boxes: bool
    mask_size: int | None

    @property
    def has_masks(self) -> bool:
        return self.mask_size is not None


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
        num_classes = box_channels = mask_size = None
        if has_boxes:
            heads = model.roi_heads

            def pooled(pool: nn.Module) -> torch.Tensor:
                return parameter.new_zeros(1, model.backbone.out_channels, *pool.output_size)

            box_features = heads.box_head(pooled(heads.box_roi_pool))
            box_channels = box_features.flatten(1).shape[1]
            num_classes = heads.box_predictor(box_features)[0].shape[1] - 1
            if heads.has_mask():
                masks = heads.mask_predictor(heads.mask_head(pooled(heads.mask_roi_pool)))
                mask_size = masks.shape[-1]
    strides = [round(_MEASURED_SIZE / one.shape[-1]) for one in maps.values()]
    levels = level_names(strides)
    spec = ModelSpec(
        channels={level: one.shape[1] for level, one in zip(levels, maps.values(), strict=True)},
        strides=dict(zip(levels, strides, strict=True)),
        num_classes=num_classes,
        box_channels=box_channels,
    )
    generator = anchor_generator_of(model)
    anchors = [
        (tuple(sizes), tuple(ratios))
        for sizes, ratios in zip(generator.sizes, generator.aspect_ratios, strict=True)
    ]
    counts = generator.num_anchors_per_location()
    return Anatomy(
        levels=levels,
        spec=spec,
        anchors=dict(zip(levels, anchors, strict=True)),
        anchors_per_location=dict(zip(levels, counts, strict=True)),
        has_boxes=has_boxes,
        mask_size=mask_size,
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
