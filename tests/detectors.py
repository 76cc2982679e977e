"""Tiny detectors of every kind that can be distilled, and inputs that suit all of them."""

import torch
from detectron2.config import CfgNode
from detectron2.structures import Keypoints
from tiny import tiny_batch, tiny_cfg, write_tiny_teacher

RETINANET = [
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.RETINANET.NUM_CLASSES", 3),
    *("MODEL.RETINANET.NUM_CONVS", 1),
    *("MODEL.RETINANET.IOU_LABELS", [0, -1, 1]),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
]
PANOPTIC = [
    *("MODEL.MASK_ON", True),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 16),
    *("MODEL.SEM_SEG_HEAD.NORM", ""),
]
KEYPOINT = [
    *("MODEL.KEYPOINT_ON", True),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16]),
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5),
    # Untrained heat maps of unscaled images overflow in Detectron2's keypoint decoding.
    *("MODEL.PIXEL_STD", [500.0, 500.0, 500.0]),
]
CASCADE = [
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
]
FEATURE_DISTILLERS = ("FGFI", "FitNet", "ReviewKD")
# Detector: the distilled architecture, the plain one, its options, distillers that must work.
DETECTORS = {
    "Faster R-CNN": ("DistilledRCNN", "GeneralizedRCNN", [], (*FEATURE_DISTILLERS, "CKD", "DCD")),
    "Mask R-CNN": (
        "DistilledRCNN",
        "GeneralizedRCNN",
        ["MODEL.MASK_ON", True],
        (*FEATURE_DISTILLERS, "CKD", "DCD"),
    ),
    "RetinaNet": ("DistilledRetinaNet", "RetinaNet", RETINANET, FEATURE_DISTILLERS),
    "Panoptic FPN": (
        "DistilledPanopticFPN",
        "PanopticFPN",
        PANOPTIC,
        (*FEATURE_DISTILLERS, "CKD", "DCD"),
    ),
    "Keypoint R-CNN": (
        "DistilledRCNN",
        "GeneralizedRCNN",
        KEYPOINT,
        (*FEATURE_DISTILLERS, "CKD", "DCD"),
    ),
    "Cascade R-CNN": ("DistilledRCNN", "GeneralizedRCNN", CASCADE, FEATURE_DISTILLERS),
}


def detector_cfg(folder, detector: str, distillers=None) -> CfgNode:
    """A tiny distilled student of a kind, with a random teacher of the same kind."""
    distilled, plain, opts, working = DETECTORS[detector]
    teacher = write_tiny_teacher(folder, [*opts, "MODEL.META_ARCHITECTURE", plain])
    return tiny_cfg(
        [
            *opts,
            *("MODEL.META_ARCHITECTURE", distilled),
            *("KD.DISTILLERS", list(working if distillers is None else distillers)),
            *("KD.TEACHER.CONFIG_FILE", teacher),
            *("KD.TEACHER.WEIGHTS", "none"),
            *("KD.REVIEWKD.MID_CHANNELS", 16),
        ]
    )


def batch_for_all(**kwargs) -> list[dict]:
    """Inputs with what every detector here asks for."""
    batch = tiny_batch(**kwargs)
    for item in batch:
        count = len(item["instances"])
        centers = item["instances"].gt_boxes.get_centers()
        points = torch.cat([centers, torch.full((count, 1), 2.0)], dim=1)
        item["instances"].gt_keypoints = Keypoints(points[:, None].repeat(1, 5, 1))
        item["sem_seg"] = torch.arange(item["height"])[:, None].repeat(1, item["width"]) % 4
    return batch
