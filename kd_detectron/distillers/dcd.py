"""DCD: contrast and consistency of box-head embeddings, with learnable scale and bias.

"Discriminative and Consistent Representation Distillation", arXiv 2407.11802. Box-head outputs,
(R, D), of the student's R sampled proposals go through one linear embedding per model. The paper's
DCD+KD is ``KD.DISTILLERS: ["KD", "DCD"]``.
"""

import torch
from torch import nn

from kd_detectron.losses import dcd_loss

from .argument_checks import check_number, check_whole_number
from .base import DISTILLER_REGISTRY, Distiller
from .embedding import Embedding, box_channels


@DISTILLER_REGISTRY.register()
class DCD(Distiller):
    """Contrast and consistency of box-head embeddings in a batch (arXiv 2407.11802)."""

    requires = frozenset({"box_features"})

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        embed_dim: int = 128,
        consistency_weight: float = 0.5,
    ):
        """
        Args:
            student_channels, teacher_channels: widths D of the two models' box-head outputs.
            embed_dim: width of the two embeddings.
            consistency_weight: factor on the consistency term, against the contrastive one.
        """
        super().__init__()
        check_whole_number("KD.DCD.EMBED_DIM", embed_dim, at_least=1)
        self.consistency_weight = check_number(
            "KD.DCD.CONSISTENCY_WEIGHT", consistency_weight, at_least=0
        )
        self.student_embedding = Embedding(student_channels, embed_dim)
        self.teacher_embedding = Embedding(teacher_channels, embed_dim)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(0.0))

    @classmethod
    def from_specs(cls, student, teacher, **options):
        return cls(*box_channels("DCD", student, teacher), **options)

    def forward(self, context):
        loss = dcd_loss(
            self.student_embedding(context.student.box_features),
            self.teacher_embedding(context.teacher.box_features.detach()),
            self.scale,
            self.bias,
            consistency_weight=self.consistency_weight,
        )
        return {"loss_dcd": loss}
