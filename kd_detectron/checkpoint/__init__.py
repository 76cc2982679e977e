"""Weights in and out: resumable runs, torchvision's ImageNet networks, students for Detectron2.

Importing this package registers ``torchvision://`` with Detectron2's PathManager.
"""

from kd_detectron.atomic_files import CheckpointWriteError, atomic_open
from kd_detectron.checkpoint.checkpointer import (
    DistillationCheckpointer,
    UnreadableCheckpointError,
    refuse_misfit,
)
from kd_detectron.checkpoint.plain_export import (
    export_student,
    find_checkpoint,
    load_plain_student,
    student_config,
)
from kd_detectron.checkpoint.torchvision_weights import torchvision_layout, torchvision_url

__all__ = [
    "CheckpointWriteError",
    "DistillationCheckpointer",
    "UnreadableCheckpointError",
    "atomic_open",
    "export_student",
    "find_checkpoint",
    "load_plain_student",
    "refuse_misfit",
    "student_config",
    "torchvision_layout",
    "torchvision_url",
]
