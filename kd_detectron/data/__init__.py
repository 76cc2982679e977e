"""Datasets: the user's own in COCO format, the training loader, a synthetic set."""

from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.data.loader import (
    ResumableLoader,
    build_lazy_train_loader,
    build_train_loader,
)
from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic

__all__ = [
    "ResumableLoader",
    "SYNTHETIC_CLASSES",
    "build_lazy_train_loader",
    "build_train_loader",
    "make_synthetic",
    "register_coco_format",
]
