"""BoxKD: the student's box head moves foreground proposals as the teacher's does, or as well.

Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017.
Box deltas are (R, 4K) or, of class-agnostic heads, (R, 4), of the student's R sampled proposals;
both models must code boxes with the same weights.
"""

from kd_detectron.errors import ConfigError
from kd_detectron.losses import box_kd_loss

from .argument_checks import check_number
from .base import DISTILLER_REGISTRY, Distiller


@DISTILLER_REGISTRY.register()
class BoxKD(Distiller):
    """Box deltas of the assigned class, towards the teacher's or no worse than the teacher's."""

    requires = frozenset({"box_deltas"})

    def __init__(self, *, form: str = "teacher", margin: float = 0.0):
        """
        Args:
            form: "teacher": smooth L1 to the teacher's deltas; "bounded": the squared error to the
                ground truth counts where the student is not better than the teacher (the paper's;
                its weight there is 0.5).
            margin: by how much the student has to be better in the form "bounded".
        """
        super().__init__()
        if form not in ("teacher", "bounded"):
            raise ConfigError(f"KD.BOXKD.FORM is {form!r}; give 'teacher' or 'bounded'")
        self.form = form
        self.margin = check_number("KD.BOXKD.MARGIN", margin, at_least=0)

    def forward(self, context):
        loss = box_kd_loss(
            context.student.box_deltas,
            context.teacher.box_deltas,
            context.targets,
            context.box_targets,
            context.num_classes,
            form=self.form,
            margin=self.margin,
        )
        return {"loss_boxkd": loss}
