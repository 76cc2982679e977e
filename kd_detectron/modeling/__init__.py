"""The distilled meta-architectures, the frozen teacher and the context between them."""

from .context import DistillationContext
from .distilled_rcnn import DistilledRCNN
from .teacher import FrozenTeacher

__all__ = ["DistillationContext", "DistilledRCNN", "FrozenTeacher"]
