"""SupCon: the student's proposals of the same class close together, without a teacher.

"Supervised Contrastive Learning", arXiv 2004.11362, as a row of Table VI of CKD, arXiv 2404.14109:
the control that shows what contrast alone gives. Box-head outputs, (R, D), of the R sampled
proposals go through a linear embedding. In-batch: there is no memory bank.
"""

from kd_detectron.losses import supcon_loss

from .argument_checks import check_number, check_whole_number
from .base import DISTILLER_REGISTRY, Distiller
from .embedding import Embedding, box_channels


@DISTILLER_REGISTRY.register()
class SupCon(Distiller):
    """Supervised contrast of student box-head embeddings, without a memory bank."""

    requires = frozenset({"box_features"})

    def __init__(self, student_channels: int, *, temperature: float = 0.1, embed_dim: int = 128):
        """
        Args:
            student_channels: width D of the student's box-head output.
            temperature: divides the cosine similarities; above 0.
            embed_dim: width of the embedding.
        """
        super().__init__()
        check_whole_number("KD.SUPCON.EMBED_DIM", embed_dim, at_least=1)
        self.temperature = check_number("KD.SUPCON.TEMPERATURE", temperature, above=0)
        self.student_embedding = Embedding(student_channels, embed_dim)

    @classmethod
    def from_specs(cls, student, teacher, **options):
        student_channels, _ = box_channels("SupCon", student, teacher)
        return cls(student_channels, **options)

    def forward(self, context):
        embeddings = self.student_embedding(context.student.box_features)
        loss = supcon_loss(embeddings, context.targets, temperature=self.temperature)
        return {"loss_supcon": loss}
