"""Torchvision detectors small enough for tests: a few convolutions, an FPN, 64x96-pixel images."""

import torch
from torch import nn
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    KeypointRCNN,
    MaskRCNN,
    RetinaNet,
)
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import (
    KeypointRCNNHeads,
    KeypointRCNNPredictor,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

NUM_CLASSES = 3
KEYPOINTS = 4


def backbone(width: int, out_channels: int, first_stride: int = 4, levels: int = 3) -> nn.Module:
    """Strided convolutions with an FPN and a pooled level on top of it."""
    layers, channels = [], 3
    for index in range(levels):
        stride = first_stride if index == 0 else 2
        layers.append(
            nn.Sequential(
                nn.Conv2d(channels, width, 2 * stride - 1, stride, stride - 1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
        )
        channels = width
    body = nn.Sequential(*layers)
    names = {str(index): str(index) for index in range(levels)}
    return BackboneWithFPN(body, names, [width] * levels, out_channels, LastLevelMaxPool())


def detector(
    kind: str = "mask",
    *,
    seed: int = 0,
    width: int = 8,
    out_channels: int = 16,
    box_channels: int = 24,
    num_classes: int = NUM_CLASSES,
    **options,
) -> nn.Module:
    """A detector: "faster", "mask", "keypoint", "retinanet", "fcos" or "ssd"."""
    torch.manual_seed(seed)
    if kind == "fcos":
        out_channels = 32  # Its head normalises in 32 groups.
    first_stride, levels = options.pop("first_stride", 4), options.pop("levels", 3)
    body = backbone(width, out_channels, first_stride, levels)
    sizes = tuple((8 * 2**index,) for index in range(levels + 1))
    options = {"min_size": 64, "max_size": 128, **options}
    if kind in ("retinanet", "fcos"):
        ratios = ((1.0,),) * (levels + 1)
        generator = AnchorGenerator(sizes, ratios)
        cls = {"retinanet": RetinaNet, "fcos": FCOS}[kind]
        return cls(body, num_classes + 1, anchor_generator=generator, **options)
    if kind == "ssd":
        generator = DefaultBoxGenerator([[2]] * 4)
        body.out_channels = [out_channels] * 4
        return SSD(body, generator, (64, 64), num_classes + 1)
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * (levels + 1))
    cls = {"faster": FasterRCNN, "mask": MaskRCNN, "keypoint": KeypointRCNN}[kind]
    heads = {}
    if kind == "mask":
        heads = {
            "mask_head": MaskRCNNHeads(out_channels, (8,), 1),
            "mask_predictor": MaskRCNNPredictor(8, 8, num_classes + 1),
        }
    if kind == "keypoint":
        heads = {
            "keypoint_head": KeypointRCNNHeads(out_channels, (8,)),
            "keypoint_predictor": KeypointRCNNPredictor(8, KEYPOINTS),
        }
    pooled = 7 * 7 * out_channels
    few = {
        "rpn_pre_nms_top_n_train": 100,
        "rpn_post_nms_top_n_train": 50,
        "rpn_pre_nms_top_n_test": 100,
        "rpn_post_nms_top_n_test": 50,
        "box_batch_size_per_image": 16,
        "box_score_thresh": 0.0,
    }
    return cls(
        body,
        rpn_anchor_generator=generator,
        box_head=TwoMLPHead(pooled, box_channels),
        box_predictor=FastRCNNPredictor(box_channels, num_classes + 1),
        **heads,
        **few | options,
    )


def batch(sizes=((64, 96), (48, 64)), boxes_per_image=(2, 1), seed: int = 0):
    """Images in [0, 1] and targets with boxes, labels, box-shaped masks and keypoints."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for (height, width), count in zip(sizes, boxes_per_image, strict=True):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        extent = torch.rand(count, 2, generator=generator) * torch.tensor([width / 3, height / 3])
        boxes = torch.cat([corner, corner + extent + 6], dim=1)
        masks = torch.zeros(count, height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        points = torch.rand(count, KEYPOINTS, 2, generator=generator) * (
            boxes[:, None, 2:] - boxes[:, None, :2]
        )
        points = torch.cat([points + boxes[:, None, :2], torch.ones(count, KEYPOINTS, 1)], dim=2)
        images.append(torch.rand(3, height, width, generator=generator))
        targets.append(
            {
                "boxes": boxes,
                "labels": torch.randint(1, NUM_CLASSES + 1, (count,), generator=generator),
                "masks": masks,
                "keypoints": points,
            }
        )
    return images, targets
