"""Losses on what a detector's other heads give: RPN, box regression, mask.

Sources: Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation",
NeurIPS 2017, for RPN and boxes; the mask loss is Mask R-CNN's own (arXiv 1703.06870) with the
teacher's probabilities in place of the labels. The relative errors are this project's.

Shapes: N images, P anchors of an image over all levels, R sampled proposals over the whole batch,
F foreground ones among them, K foreground classes, D box-feature channels, M mask pixels per side.
Student and teacher tensors belong to the same anchors and the same boxes. The distillers ``RPNKD``,
``BoxKD``, ``MaskKD`` and ``HeadKD`` feed these functions.

Sums over anchors and proposals are divided as the detector's own losses are: by the number of
sampled ones, so that an image with few objects does not count as much as one with many. A relative
error is divided by the power of what it compares.
"""

import torch
from torch.nn import functional as F

from .numerics import in_float32

# Where smooth L1 turns from squared to linear: Faster R-CNN's value for its RPN.
RPN_SMOOTH_L1_BETA = 1 / 9

# Added to the mean power in a relative error: what is far smaller counts as 0.
SMALLEST_POWER = 1e-6


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
    student_mask_logits: torch.Tensor,
    teacher_mask_logits: torch.Tensor,
    classes: torch.Tensor,
    *,
    form: str = "cross_entropy",
) -> torch.Tensor:
    """Binary cross entropy or relative error of mask probabilities against the teacher's.

    "relative" is :func:`relative_error` of the probabilities less 0.5.

    Args:
        student_mask_logits, teacher_mask_logits: (F, K, M, M), of which the masks of the assigned
            class count, or (F, 1, M, M) of a class-agnostic head. The teacher's are detached.
        classes: (F,) assigned class of each foreground proposal.
        form: "cross_entropy", the mean over pixels, or "relative".

    Returns:
        A float32 scalar; a zero with a graph if F is 0.
    """
    student = _of_assigned_class(student_mask_logits, classes)
    probabilities = _of_assigned_class(teacher_mask_logits.detach(), classes).sigmoid()
    if form == "relative":
        return relative_error(student.sigmoid() - 0.5, probabilities - 0.5)
    entropies = F.binary_cross_entropy_with_logits(student, probabilities, reduction="sum")
    return entropies / max(student.numel(), 1)


@in_float32
def head_kd_loss(
    student_objectness: torch.Tensor,
    teacher_objectness: torch.Tensor,
    student_deltas: torch.Tensor,
    teacher_deltas: torch.Tensor,
    student_box_features: torch.Tensor,
    teacher_box_features: torch.Tensor,
) -> torch.Tensor:
    """Relative errors of objectness, anchor deltas and box features, each from 0 to 2, summed.

    Objectness is compared as probabilities. Deltas are weighted by the teacher's probability that
    there is an object; no label is read.

    Args:
        student_objectness, teacher_objectness: (N, P) logits. The teacher's are detached.
        student_deltas, teacher_deltas: (N, P, 4). The teacher's are detached.
        student_box_features, teacher_box_features: (R, D). The teacher's are detached.

    Returns:
        A float32 scalar; a part without anchors or proposals is a zero with a graph.
    """
    probabilities = teacher_objectness.detach().sigmoid()
    return (
        relative_error(student_objectness.sigmoid(), probabilities)
        + relative_error(student_deltas, teacher_deltas.detach(), probabilities[..., None])
        + relative_error(student_box_features, teacher_box_features.detach())
    )


def relative_error(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """E[w (s - t)^2] / (E[w s^2] + E[w t^2] + 1e-6), E the mean over all elements.

    0 for equal tensors, about 1 for unrelated ones, at most 2, whatever the unit: one weight suits
    outputs of any size.

    Args:
        student, teacher: of one shape.
        weights: w, not negative, broadcast to that shape.

    Returns:
        A scalar; a zero with a graph if there are no elements.
    """
    power = (weights * (student.square() + teacher.square())).sum()
    error = (weights * (student - teacher).square()).sum()
    return error / (power + SMALLEST_POWER * max(student.numel(), 1))


def _of_assigned_class(values: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """(n, K, ...) to (n, ...): of each row its own class; (n, 1, ...) has one for all of them."""
    if values.shape[1] == 1:
        return values[:, 0]
    # Background rows, which the caller leaves out, take any class.
    rows = torch.arange(len(classes), device=classes.device)
    return values[rows, classes.clamp(max=values.shape[1] - 1)]
