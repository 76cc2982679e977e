"""BicKD, bilateral contrast of predicted probabilities, on top of vanilla KD.

Source: "BicKD: Bilateral Contrastive Knowledge Distillation", arXiv 2602.01265. **The formula is
this project's reading of the abstract**, which is all that it has of the paper: vanilla KD plus a
loss on predicted probabilities, compared sample by sample and class by class between teacher and
student, that drives the spaces of different classes towards orthogonality and keeps those of the
same class consistent. Numbers obtained with it are not the paper's.

Shapes: R sampled proposals over the whole batch, K foreground classes; logits are (R, K+1), the
last column background; the distiller ``BicKD`` feeds them. A class's vector is its column: its
probability in each of the R proposals. ``tests/losses/test_bickd.py`` pins both forms.
"""

import torch

from kd_detectron.errors import ConfigError, did_you_mean

from .ckd import row_contrast
from .logits import kd_loss
from .numerics import in_float32, unit_rows

FORMS = ("contrastive", "orthogonal")


def check_form(form: str) -> None:
    """Raises ConfigError unless ``form`` is one of :data:`FORMS`."""
    if form not in FORMS:
        raise ConfigError(f"KD.BICKD.FORM is '{form}'{did_you_mean(str(form), FORMS)}")


@in_float32
def bickd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    contrast_temperature: float = 0.1,
    contrast_weight: float = 1.0,
    form: str = "contrastive",
) -> torch.Tensor:
    """KD + contrast_weight * (class-wise + sample-wise term), see :func:`kd_loss` for the first.

    P = softmax(logits / T). Class-wise: the columns of P, L2-normalised, of the classes that carry
    weight in the teacher's predictions of this step; sample-wise: the rows of P, L2-normalised.
    Of the cosines M between the teacher's vectors and the student's, the form "contrastive" is the
    cross entropy of M / contrast_temperature against the diagonal; "orthogonal" is the mean of
    (M_ii - 1)^2 plus the mean of M_ij^2 over i != j.

    Args:
        student_logits, teacher_logits: (R, K+1). The teacher's are detached.
        temperature: T > 0, softens the predictions, also in KD.
        contrast_temperature: divides the cosines of the contrastive form; > 0.
        contrast_weight: weight of the two terms together.
        form: "contrastive" or "orthogonal".

    Returns:
        A float32 scalar; a zero with a graph if R is 0.

    Raises:
        ConfigError: the form is unknown.
    """
    check_form(form)
    kd = kd_loss(student_logits, teacher_logits, temperature)
    if len(student_logits) == 0:
        return kd  # a zero; classes without proposals have nothing to contrast
    student = (student_logits / temperature).softmax(dim=1)
    teacher = (teacher_logits.detach() / temperature).softmax(dim=1)
    present = _present_classes(teacher)
    views = (student[:, present].T, teacher[:, present].T), (student, teacher)
    bilateral = sum(
        _contrast(unit_rows(student_view), unit_rows(teacher_view), contrast_temperature, form)
        for student_view, teacher_view in views
    )
    return kd + contrast_weight * bilateral


def _present_classes(probabilities: torch.Tensor) -> torch.Tensor:
    """(K+1,) bool: classes with at least a tenth of an even share of the total probability.

    Normalising the column of a class that no proposal shows would blow up noise. The largest share
    is never below an even one, so that at least one class is present.
    """
    share = probabilities.sum(dim=0)
    return share * len(share) * 10 >= share.sum()


def _contrast(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, form: str
) -> torch.Tensor:
    """One term: (n, D) unit vectors of student and teacher to a scalar."""
    if form == "contrastive":
        return row_contrast(teacher, student, student, temperature)
    count, dimensions = student.shape
    diagonal = (student * teacher).sum(dim=1)
    if count <= dimensions:
        squares = (teacher @ student.T).square().sum()
    else:
        # The same sum as the trace of (T' T)(S' S), D x D matrices, where R x R would not fit.
        squares = ((teacher.T @ teacher) * (student.T @ student)).sum()
    off_diagonal = (squares - diagonal.square().sum()) / max(count * (count - 1), 1)
    return (1 - diagonal).square().mean() + off_diagonal
