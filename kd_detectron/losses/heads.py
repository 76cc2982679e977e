"""Losses on what a detector's other heads give: RPN, box regression, mask.

Sources: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation",
NeurIPS 2017, for RPN and boxes; the mask loss is Mask R-CNN's own (arXiv 1703.06870) with the
teacher's probabilities in place of the labels.

Shapes: N images, P anchors of an image over all levels, R sampled proposals over the whole batch,
F foreground ones among them, K foreground classes, M mask pixels per side. Student and teacher
tensors belong to the same anchors and the same boxes. The distillers ``RPNKD``, ``BoxKD`` and
``MaskKD`` feed these functions.

Sums over anchors and proposals are divided as the detector's own losses are: by the number of
sampled ones, so that an image with few objects does not count as much as one with many.
"""

import torch
from torch.nn import functional as F

from .numerics import in_float32

# Where smooth L1 turns from squared to linear: Faster R-CNN's value for its RPN.
RPN_SMOOTH_L1_BETA = 1 / 9


@in_float32
def rpn_kd_loss(
    student_objectness: torch.Tensor,
    teacher_objectness: torch.Tensor,
    student_deltas: torch.Tensor,
    teacher_deltas: torch.Tensor,
    labels: torch.Tensor,
    *,
    anchors: str = "sampled",
    delta_weight: float = 1.0,
) -> torch.Tensor:
    """Binary cross entropy of objectness + delta_weight * smooth L1 of the deltas.

    The targets are the teacher's probabilities and deltas. The deltas count on positive anchors,
    summed over the four coordinates and divided by the number of sampled anchors.

    Args:
        student_objectness, teacher_objectness: (N, P) logits. The teacher's are detached.
        student_deltas, teacher_deltas: (N, P, 4). The teacher's are detached.
        labels: (N, P), 1 for anchors sampled as positive, 0 for negative ones, -1 for the others.
        anchors: whose objectness counts. "sampled": mean over the sampled anchors; "all": mean
            over all anchors, weighted by the teacher's probability.
        delta_weight: weight of the deltas' part.

    Returns:
        A float32 scalar; a zero with a graph if no anchor is sampled ("all": if there is none).
    """
    # Masks in place of indices, whose number the GPU would have to tell the CPU.
    probabilities = teacher_objectness.detach().sigmoid()
    sampled = (labels >= 0).float()
    weights = probabilities if anchors == "all" else sampled
    entropies = F.binary_cross_entropy_with_logits(
        student_objectness, probabilities, reduction="none"
    )
    # A sum of probabilities may be anything above 0.
    smallest = 1e-6 if anchors == "all" else 1
    objectness = (entropies * weights).sum() / weights.sum().clamp(min=smallest)
    distances = F.smooth_l1_loss(
        student_deltas, teacher_deltas.detach(), reduction="none", beta=RPN_SMOOTH_L1_BETA
    )
    deltas = (distances * (labels == 1)[..., None]).sum() / sampled.sum().clamp(min=1)
    return objectness + delta_weight * deltas


@in_float32
def box_kd_loss(
    student_deltas: torch.Tensor,
    teacher_deltas: torch.Tensor,
    targets: torch.Tensor,
    box_targets: torch.Tensor,
    num_classes: int,
    *,
    form: str = "teacher",
    margin: float = 0.0,
) -> torch.Tensor:
    """Box regression towards the teacher, or no worse than the teacher, on foreground proposals.

    "teacher": smooth L1 (beta 1) of the student's deltas to the teacher's, summed over the four
    coordinates. "bounded": the squared error of the student's deltas to the ground truth's, summed
    likewise, where that error plus the margin exceeds the teacher's; else nothing (Chen et al.,
    eq. 4). Both are summed over the foreground proposals and divided by R.

    Args:
        student_deltas, teacher_deltas: (R, 4K), of which those of the assigned class count, or
            (R, 4) of a class-agnostic head. The teacher's are detached.
        targets: (R,) assigned class of each proposal, K = background.
        box_targets: (R, 4) deltas to the ground truth; only foreground rows are read.
        num_classes: K.
        form: "teacher" or "bounded".
        margin: m >= 0 of "bounded".

    Returns:
        A float32 scalar; a zero with a graph if no proposal is foreground.
    """
    foreground = targets < num_classes
    student = _of_assigned_class(student_deltas.unflatten(1, (-1, 4)), targets)
    teacher = _of_assigned_class(teacher_deltas.detach().unflatten(1, (-1, 4)), targets)
    if form == "teacher":
        errors = F.smooth_l1_loss(student, teacher, reduction="none").sum(dim=1)
    else:
        truth = torch.where(foreground[:, None], box_targets, 0)
        errors = (student - truth).square().sum(dim=1)
        bounds = (teacher - truth).square().sum(dim=1)
        # 0 * bounds: a teacher that is not finite makes the loss so.
        errors = errors * (errors + margin > bounds) + 0 * bounds
    return (errors * foreground).sum() / max(len(targets), 1)


@in_float32
def mask_kd_loss(
    student_mask_logits: torch.Tensor, teacher_mask_logits: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Binary cross entropy of the student's mask logits against the teacher's probabilities.

    Args:
        student_mask_logits, teacher_mask_logits: (F, K, M, M), of which the masks of the assigned
            class count, or (F, 1, M, M) of a class-agnostic head. The teacher's are detached.
        classes: (F,) assigned class of each foreground proposal.

    Returns:
        A float32 scalar, the mean over pixels; a zero with a graph if F is 0.
    """
    student = _of_assigned_class(student_mask_logits, classes)
    probabilities = _of_assigned_class(teacher_mask_logits.detach(), classes).sigmoid()
    entropies = F.binary_cross_entropy_with_logits(student, probabilities, reduction="sum")
    return entropies / max(student.numel(), 1)


def _of_assigned_class(values: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """(n, K, ...) to (n, ...): of each row its own class; (n, 1, ...) has one for all of them."""
    if values.shape[1] == 1:
        return values[:, 0]
    # Background rows, which the caller leaves out, take any class.
    rows = torch.arange(len(classes), device=classes.device)
    return values[rows, classes.clamp(max=values.shape[1] - 1)]
