"""Datasets: the user's own in COCO format, their checks, the training loader, a synthetic set."""

from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.data.loader import (
    ResumableLoader,
    build_lazy_train_loader,
    build_train_loader,
)
from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.preflight.data import DatasetSummary, check_coco_files, check_datasets

__all__ = [
    "DatasetSummary",
    "ResumableLoader",
    "SYNTHETIC_CLASSES",
    "build_lazy_train_loader",
    "build_train_loader",
    "check_coco_files",
    "check_datasets",
    "make_synthetic",
    "register_coco_format",
]
