"""MaskKD: the teacher's mask probabilities as targets, on the student's foreground proposals.

Mask logits are (F, K, M, M) or, of class-agnostic heads, (F, 1, M, M), of the F proposals that the
student's mask head is trained on; the mask of the assigned class is compared.
"""

from kd_detectron.losses import mask_kd_loss

from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class MaskKD(Distiller):
    """Binary cross entropy of the student's masks against the teacher's, pixel by pixel."""

    requires = frozenset({"mask_logits"})

    def forward(self, context):
        loss = mask_kd_loss(
            context.student.mask_logits, context.teacher.mask_logits, context.mask_classes
        )
        return {"loss_maskkd": loss}
