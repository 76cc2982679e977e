"""MaskKD: the teacher's mask probabilities as targets, on the student's foreground proposals.

Mask logits are (F, K, M, M) or, of class-agnostic heads, (F, 1, M, M), of the F proposals that the
student's mask head is trained on; the mask of the assigned class is compared.
"""

from kd_detectron.errors import ConfigError
from kd_detectron.losses import mask_kd_loss

from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class MaskKD(Distiller):
    """Binary cross entropy, or relative error, of the student's masks against the teacher's."""

    requires = frozenset({"mask_logits"})

    def __init__(self, *, form: str = "cross_entropy"):
        """
        Args:
            form: "cross_entropy": Mask R-CNN's own loss with the teacher's probabilities as labels;
                "relative": squared error of the probabilities less 0.5, relative to their power.
        """
        super().__init__()
        if form not in ("cross_entropy", "relative"):
            raise ConfigError(f"KD.MASKKD.FORM is {form!r}; give 'cross_entropy' or 'relative'")
        self.form = form

    def forward(self, context):
        loss = mask_kd_loss(
            context.student.mask_logits,
            context.teacher.mask_logits,
            context.mask_classes,
            form=self.form,
        )
        return {"loss_maskkd": loss}
