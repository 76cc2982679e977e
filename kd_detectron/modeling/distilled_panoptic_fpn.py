"""DistilledPanopticFPN: Detectron2's ``PanopticFPN`` with a frozen teacher and distillers.

The step is :class:`DistillationMixin`'s, as for R-CNN: all distillers work, since Panoptic FPN has
R-CNN's box head. The semantic branch learns from the ground truth, and from the teacher through
the features that it shares. Tests: ``tests/modeling/test_other_detectors.py``.
"""

from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN

from .distilled_rcnn import DistillationMixin


@META_ARCH_REGISTRY.register()
class DistilledPanopticFPN(DistillationMixin, PanopticFPN):
    """``PanopticFPN`` as a distilled student."""
