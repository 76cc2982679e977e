"""RPNKD: the student's RPN judges and moves its anchors as the teacher's does.

Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017.
Objectness (N, H*W*A) and anchor deltas (N, H*W*A, 4) of each level; both models must have the same
anchors.
"""

from kd_detectron.errors import ConfigError
from kd_detectron.losses import rpn_kd_loss

from .argument_checks import check_number
from .base import DISTILLER_REGISTRY, Distiller
from .levels import join_levels


@DISTILLER_REGISTRY.register()
class RPNKD(Distiller):
    """Cross entropy of objectness, and smooth L1 of the deltas on positive anchors."""

    requires = frozenset({"objectness"})

    def __init__(self, *, anchors: str = "sampled", delta_weight: float = 1.0):
        """
        Args:
            anchors: whose objectness is compared: "sampled", those of the RPN's own loss, or
                "all", weighted by the teacher's probability.
            delta_weight: weight of the deltas, against the objectness.
        """
        super().__init__()
        if anchors not in ("sampled", "all"):
            raise ConfigError(f"KD.RPNKD.ANCHORS is {anchors!r}; give 'sampled' or 'all'")
        self.anchors = anchors
        self.delta_weight = check_number("KD.RPNKD.DELTA_WEIGHT", delta_weight, at_least=0)

    def forward(self, context):
        student, teacher = context.student, context.teacher
        loss = rpn_kd_loss(
            *join_levels(
                student.objectness,
                teacher.objectness,
                student.anchor_deltas,
                teacher.anchor_deltas,
                context.anchor_labels,
            ),
            anchors=self.anchors,
            delta_weight=self.delta_weight,
        )
        return {"loss_rpnkd": loss}
