"""CKD: each proposal's logits close to the teacher's of the same one, far from those of others.

"CKD: Contrastive Knowledge Distillation from A Sample-Wise Perspective", arXiv 2404.14109,
eq. 13-14. Both models' logits, (R, K+1), are of the student's R sampled proposals of the whole
batch, background ones included; the maths and its differences are in ``kd_detectron.losses.ckd``.
"""

from kd_detectron.losses import ckd_loss
from kd_detectron.losses.ckd import check_triple

from .argument_checks import check_number, check_whole_number
from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class CKD(Distiller):
    """Contrast of L2-normalised logits, proposal against proposal (arXiv 2404.14109)."""

    default_weight = 0.1
    requires = frozenset({"logits"})

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        triple: str = "tss",
        group_size: int = 0,
        chunk_size: int = 0,
    ):
        """
        Args:
            temperature: divides the cosine similarities; above 0. At 1 the loss stays near ln R.
            triple: whose are anchor, positive and negatives, the student's (s) or the teacher's
                (t): "tss" (the method), "sts" or "stt".
            group_size: contrast inside random groups of this many proposals; 0: all proposals of
                the step together.
            chunk_size: rows of the similarity matrix computed at a time; 0: chosen by size.
        """
        super().__init__()
        check_triple(triple)
        self.temperature = check_number("KD.CKD.TEMPERATURE", temperature, above=0)
        self.triple = triple
        self.group_size = check_whole_number("KD.CKD.GROUP_SIZE", group_size, at_least=0)
        self.chunk_size = check_whole_number("KD.CKD.CHUNK_SIZE", chunk_size, at_least=0)

    def forward(self, context):
        loss = ckd_loss(
            context.student.logits,
            context.teacher.logits,
            self.temperature,
            self.triple,
            self.group_size,
            self.chunk_size,
        )
        return {"loss_ckd": loss}
