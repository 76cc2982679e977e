"""DKD: divergence of the target class and of the non-target classes, weighted apart.

Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, eq. 7. The target of
a proposal is the class that the student's ROI heads assigned to it, background included; logits
are (R, K+1) of the same R proposals.
"""

from kd_detectron.losses import dkd_loss

from .argument_checks import check_number
from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class DKD(Distiller):
    """Divergence of the target class and of the others, weighted separately (CVPR 2022)."""

    requires = frozenset({"logits"})

    def __init__(self, *, alpha: float = 1.0, beta: float = 0.25, temperature: float = 1.0):
        """
        Args:
            alpha: factor on the divergence of (target class, all others).
            beta: factor on the divergence among the other classes.
            temperature: divides the logits before the softmax; above 0. The loss is multiplied by
                its square.
        """
        super().__init__()
        self.alpha = check_number("KD.DKD.ALPHA", alpha, at_least=0)
        self.beta = check_number("KD.DKD.BETA", beta, at_least=0)
        self.temperature = check_number("KD.DKD.TEMPERATURE", temperature, above=0)

    def forward(self, context):
        loss = dkd_loss(
            context.student.logits,
            context.teacher.logits,
            context.targets,
            self.alpha,
            self.beta,
            self.temperature,
        )
        return {"loss_dkd": loss}
