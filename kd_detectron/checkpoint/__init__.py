"""Weights in and out: resumable runs, torchvision's ImageNet networks, students for Detectron2.

Importing this package registers ``torchvision://`` with Detectron2's PathManager.
"""

from kd_detectron.atomic_files import CheckpointWriteError, atomic_open, remove_unfinished_files
from kd_detectron.checkpoint.checkpointer import (
    DistillationCheckpointer,
    UnreadableCheckpointError,
    refuse_misfit,
)
from kd_detectron.checkpoint.plain_export import (
    ExportedStudent,
    export_student,
    find_checkpoint,
    load_plain_student,
    student_config,
)
from kd_detectron.checkpoint.torchvision_weights import (
    convert_torchvision_state,
    torchvision_layout,
    torchvision_url,
)

__all__ = [
    "CheckpointWriteError",
    "DistillationCheckpointer",
    "ExportedStudent",
    "UnreadableCheckpointError",
    "atomic_open",
    "convert_torchvision_state",
    "export_student",
    "find_checkpoint",
    "load_plain_student",
    "refuse_misfit",
    "remove_unfinished_files",
    "student_config",
    "torchvision_layout",
    "torchvision_url",
]
