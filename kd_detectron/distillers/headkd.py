"""HeadKD: the student's RPN and box head compute what the teacher's do.

A method of this project, not of a paper. Maps that are nearly the teacher's can still lead the
heads astray; this compares what the heads make of them, densely and without labels. Objectness
(N, H*W*A) and anchor deltas (N, H*W*A, 4) of each level, box features (R, D) of the student's R
sampled proposals. Both models must have the same anchors and box-feature channels; box features are
compared as they are, so the student's box head should start from the teacher's
(``KD.TEACHER.INHERIT``). ``MaskKD`` with ``FORM "relative"`` does the same for masks.
"""

from kd_detectron.errors import ConfigError
from kd_detectron.losses import head_kd_loss

from .base import DISTILLER_REGISTRY, Distiller
from .embedding import box_channels
from .levels import join_levels


@DISTILLER_REGISTRY.register()
class HeadKD(Distiller):
    """Relative squared errors of objectness, anchor deltas and box features, summed."""

    default_weight = 6.0
    requires = frozenset({"objectness", "box_features"})

    @classmethod
    def from_specs(cls, student, teacher, **options):
        own, others = box_channels("HeadKD", student, teacher)
        if own != others:
            raise ConfigError(
                "KD.DISTILLERS names HeadKD, which compares box features as they are, but those "
                f"of the student have {own} channels (MODEL.ROI_BOX_HEAD.FC_DIM or CONV_DIM) and "
                f"the teacher's {others}; give both the same width (without fully connected layers "
                "POOLER_RESOLUTION counts too), or use DCD, which adapts it"
            )
        return cls(**options)

    def forward(self, context):
        student, teacher = context.student, context.teacher
        loss = head_kd_loss(
            *join_levels(
                student.objectness,
                teacher.objectness,
                student.anchor_deltas,
                teacher.anchor_deltas,
            ),
            student.box_features,
            teacher.box_features,
        )
        return {"loss_headkd": loss}
