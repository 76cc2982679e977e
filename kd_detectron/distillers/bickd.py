"""BicKD: vanilla KD and a contrast of probabilities, class by class and sample by sample.

"BicKD: Bilateral Contrastive Knowledge Distillation", arXiv 2602.01265. The formula is this
project's reading of the abstract, spelled out in ``kd_detectron.losses.bickd``. Both models'
logits, (R, K+1), are of the student's R sampled proposals. KD is part of it: do not list both.
"""

from kd_detectron.losses import bickd_loss
from kd_detectron.losses.bickd import check_form

from .argument_checks import check_number
from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class BicKD(Distiller):
    """KD and a contrast of probabilities by class and by sample (arXiv 2602.01265)."""

    requires = frozenset({"logits"})

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        contrast_temperature: float = 0.1,
        contrast_weight: float = 1.0,
        form: str = "contrastive",
    ):
        """
        Args:
            temperature: divides the logits before the softmax, also in KD; above 0.
            contrast_temperature: divides the cosine similarities of the contrastive form; above 0.
            contrast_weight: factor on the class-wise and the sample-wise contrast, against KD.
            form: "contrastive" (cross entropy) or "orthogonal" (diagonal to 1, the rest to 0,
                squared).
        """
        super().__init__()
        check_form(form)
        self.temperature = check_number("KD.BICKD.TEMPERATURE", temperature, above=0)
        self.contrast_temperature = check_number(
            "KD.BICKD.CONTRAST_TEMPERATURE", contrast_temperature, above=0
        )
        self.contrast_weight = check_number("KD.BICKD.CONTRAST_WEIGHT", contrast_weight, at_least=0)
        self.form = form

    def forward(self, context):
        loss = bickd_loss(
            context.student.logits,
            context.teacher.logits,
            self.temperature,
            self.contrast_temperature,
            self.contrast_weight,
            self.form,
        )
        return {"loss_bickd": loss}
