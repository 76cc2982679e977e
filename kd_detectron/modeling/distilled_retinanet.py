"""DistilledRetinaNet: Detectron2's ``RetinaNet`` with a frozen teacher and feature distillers.

The step is :class:`DistillationMixin`'s, as for R-CNN. RetinaNet has neither sampled proposals nor
a box head, so distillers that read box-head logits or features are refused when the model is built;
ReviewKD, FitNet and FGFI work on its levels p3..p7, FGFI with RetinaNet's own anchors. The teacher
may be any detector with the same levels. Tests: ``tests/modeling/test_other_detectors.py``.
"""

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet

from .distilled_rcnn import DistillationMixin


@META_ARCH_REGISTRY.register()
class DistilledRetinaNet(DistillationMixin, RetinaNet):
    """``RetinaNet`` as a distilled student."""
