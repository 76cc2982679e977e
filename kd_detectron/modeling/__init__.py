"""The distilled meta-architectures, the frozen teacher and the context between them."""

from kd_detectron.context import DistillationContext

from .distilled_panoptic_fpn import DistilledPanopticFPN
from .distilled_rcnn import DistilledRCNN
from .distilled_retinanet import DistilledRetinaNet
from .frozen_teacher import FrozenTeacher

__all__ = [
    "DistillationContext",
    "DistilledPanopticFPN",
    "DistilledRCNN",
    "DistilledRetinaNet",
    "FrozenTeacher",
]
