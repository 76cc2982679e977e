"""CRD: each teacher proposal against the student's same one and the student's of other classes.

"Contrastive Representation Distillation", arXiv 1910.10699, as a row of Table VI of CKD,
arXiv 2404.14109. Box-head outputs, (R, D), of the student's R sampled proposals go through one
linear embedding per model. In-batch: there is no memory bank.
"""

from kd_detectron.losses import crd_loss

from .argument_checks import check_number, check_whole_number
from .base import DISTILLER_REGISTRY, Distiller
from .embedding import Embedding, box_channels


@DISTILLER_REGISTRY.register()
class CRD(Distiller):
    """Contrast with negatives of other classes only, without a memory bank (arXiv 1910.10699)."""

    requires = frozenset({"box_features"})

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        temperature: float = 0.1,
        embed_dim: int = 128,
    ):
        """
        Args:
            student_channels, teacher_channels: widths D of the two models' box-head outputs.
            temperature: divides the cosine similarities; above 0.
            embed_dim: width of the two embeddings.
        """
        super().__init__()
        check_whole_number("KD.CRD.EMBED_DIM", embed_dim, at_least=1)
        self.temperature = check_number("KD.CRD.TEMPERATURE", temperature, above=0)
        self.student_embedding = Embedding(student_channels, embed_dim)
        self.teacher_embedding = Embedding(teacher_channels, embed_dim)

    @classmethod
    def from_specs(cls, student, teacher, **options):
        return cls(*box_channels("CRD", student, teacher), **options)

    def forward(self, context):
        loss = crd_loss(
            self.student_embedding(context.student.box_features),
            self.teacher_embedding(context.teacher.box_features.detach()),
            context.targets,
            temperature=self.temperature,
        )
        return {"loss_crd": loss}
