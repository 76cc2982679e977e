"""Detectors small enough for tests: ResNet-18, 32-channel FPN, 64x96-pixel images, 3 classes."""

import os

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BitMasks, Boxes, Instances

from kd_detectron import add_kd_config
from kd_detectron.distillers import DISTILLER_REGISTRY

NUM_CLASSES = 3
# The configs of the main job.
MAIN_ROWS = [
    f"{method}_{detector}_{pair}.yaml"
    for detector in ("rcnn", "mask_rcnn")
    for method, pairs in (
        ("baseline", ("r18", "r50", "mv2")),
        ("ckd", ("r101_r18", "r101_r50", "r50_mv2")),
        ("reviewkd", ("r101_r18", "r101_r50", "r50_mv2")),
        ("ckd_reviewkd", ("r101_r18", "r101_r50", "r50_mv2")),
    )
    for pair in pairs
]


def tiny_cfg(opts: list | None = None) -> CfgNode:
    """A plain student of a few hundred thousand parameters on the CPU."""
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu"),
            *("MODEL.WEIGHTS", ""),
            *("MODEL.META_ARCHITECTURE", "DistilledRCNN"),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
            *("MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.DEPTH", 18),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RESNETS.STEM_OUT_CHANNELS", 16),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 64),
            *("MODEL.RESNETS.NORM", "BN"),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.OUT_CHANNELS", 32),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
            *("MODEL.RPN.PRE_NMS_TOPK_TEST", 100),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 50),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
            *("MODEL.ROI_HEADS.NUM_CLASSES", NUM_CLASSES),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            *("MODEL.ROI_BOX_HEAD.NUM_FC", 1),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 48),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
            *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
            *("INPUT.MIN_SIZE_TRAIN", (64,)),
            *("INPUT.MIN_SIZE_TEST", 64),
            *("DATALOADER.NUM_WORKERS", 0),
            *("SOLVER.IMS_PER_BATCH", 2),
            *("SOLVER.BASE_LR", 0.005),
            *("SEED", 7),
            *(opts or []),
        ]
    )
    return cfg


def write_tiny_teacher(folder, opts: list | None = None) -> str:
    """Writes the config of a tiny teacher, other than the student in width and box head."""
    cfg = tiny_cfg(
        [
            *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            *("MODEL.FPN.OUT_CHANNELS", 40),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 56),
            *(opts or []),
        ]
    )
    path = os.path.join(folder, "teacher.yaml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(cfg.dump())
    return path


def distilled_cfg(folder, distillers=("CKD", "ReviewKD"), opts: list | None = None) -> CfgNode:
    """A tiny student with a random tiny teacher and the given distillers."""
    return tiny_cfg(
        [
            *("KD.DISTILLERS", list(distillers)),
            *("KD.TEACHER.CONFIG_FILE", write_tiny_teacher(folder)),
            *("KD.TEACHER.WEIGHTS", "none"),
            *("KD.REVIEWKD.MID_CHANNELS", 16),
            *(opts or []),
        ]
    )


def all_distillers() -> list[str]:
    """Names of the project's own distillers."""
    return sorted(n for n, cls in DISTILLER_REGISTRY if cls.__module__.startswith("kd_detectron."))


def every_distiller_cfg(folder, opts: list | None = None) -> CfgNode:
    """A tiny Mask R-CNN student with all distillers, and a teacher with what they require."""
    cfg = distilled_cfg(folder, all_distillers(), ["MODEL.MASK_ON", True, *(opts or [])])
    # PKD, PCKD and HeadKD compare maps and box features as they are.
    same = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 48]
    cfg.KD.TEACHER.OPTS += ["MODEL.MASK_ON", True, *same]
    return cfg


def tiny_batch(sizes=((64, 96), (48, 64)), boxes_per_image=(2, 1), seed: int = 0) -> list[dict]:
    """Detectron2 training inputs: random images, boxes, classes and box-shaped masks."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for index, ((height, width), count) in enumerate(zip(sizes, boxes_per_image, strict=True)):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        extent = torch.rand(count, 2, generator=generator) * torch.tensor([width / 3, height / 3])
        boxes = torch.cat([corner, corner + extent + 6], dim=1)
        masks = torch.zeros(count, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(NUM_CLASSES, (count,), generator=generator)
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append(
            {
                "image": image,
                "instances": instances,
                "height": height,
                "width": width,
                "file_name": f"image_{index}.png",
                "image_id": index,
            }
        )
    return batch
