"""KD: the softened class distributions of the teacher as targets, on the sampled proposals.

Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. Both models'
logits, (R, K+1), are of the student's R sampled proposals, background ones included. The detection
code behind the published KD rows was never released; see ``docs/methods.md`` for what was chosen.
"""

from kd_detectron.losses import kd_loss

from .argument_checks import check_number
from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class KD(Distiller):
    """Kullback-Leibler divergence of softened class distributions (arXiv 1503.02531)."""

    requires = frozenset({"logits"})

    def __init__(self, *, temperature: float = 1.0):
        """
        Args:
            temperature: divides the logits before the softmax; above 0. The loss is multiplied by
                its square.
        """
        super().__init__()
        self.temperature = check_number("KD.KD.TEMPERATURE", temperature, above=0)

    def forward(self, context):
        loss = kd_loss(context.student.logits, context.teacher.logits, self.temperature)
        return {"loss_kd": loss}
