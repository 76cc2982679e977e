"""Losses on feature maps: HCL (ReviewKD), FitNet's MSE, FGFI's masked imitation, PKD and PCKD.

Sources: "Distilling Knowledge via Knowledge Review" (ReviewKD, CVPR 2021, arXiv 2104.09044);
"FitNets", arXiv 1412.6550; "Distilling Object Detectors with Fine-grained Feature Imitation"
(FGFI, CVPR 2019, arXiv 1906.03609); "PKD: General Distillation Framework for Object Detectors via
Pearson Correlation Coefficient", NeurIPS 2022, arXiv 2207.02039.

Shapes: N images, C channels; one (N, C, H, W) map per level, fine to coarse; A anchors per
location, G ground-truth boxes of one image. The student's maps arrive adapted to the teacher's
channels by the distillers ``ReviewKD``, ``FitNet`` and ``FGFI``; ``PKD`` and ``PCKD`` compare them
as they are.

Difference from FGFI's single-map release: the mask and the loss are taken level by level, each
with its own best anchors, and the levels' losses are added (``tests/losses/test_features.py``).
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torchvision.ops import box_iou

_POOL_SIZES = (4, 2, 1)
# PKD's epsilon, 1e-6, squared: what has a smaller variance is constant.
_SMALLEST_VARIANCE = 1e-12


def hcl_loss(
    student_features: Sequence[torch.Tensor], teacher_features: Sequence[torch.Tensor]
) -> torch.Tensor:
    """ReviewKD's hierarchical context loss, summed over the levels.

    Of each level: the MSE of the maps and of the maps pooled (adaptive average) to 4x4, 2x2 and
    1x1, with weights 1, 1/2, 1/4, 1/8, divided by the sum of the weights used. A pool size is
    skipped where the map's height is not larger.

    Args:
        student_features, teacher_features: (N, C, H, W) of each level. The teacher's are detached.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the two sequences do not match in length or shapes.
    """
    _check_same_shapes(student_features, teacher_features)
    total = 0.0
    for student, teacher in zip(student_features, teacher_features, strict=True):
        student, teacher = student.float(), teacher.detach().float()
        level, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
        for size in _POOL_SIZES:
            if size >= student.shape[2]:
                continue
            weight /= 2
            weights += weight
            level = level + weight * F.mse_loss(
                F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
            )
        total = total + level / weights
    return total


def fitnet_loss(
    student_features: Sequence[torch.Tensor], teacher_features: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean squared error of each level, summed over the levels.

    Args:
        student_features, teacher_features: (N, C, H, W) of each level. The teacher's are detached.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the two sequences do not match in length or shapes.
    """
    _check_same_shapes(student_features, teacher_features)
    return sum(
        F.mse_loss(student.float(), teacher.detach().float())
        for student, teacher in zip(student_features, teacher_features, strict=True)
    )


@torch.no_grad()
def fgfi_mask(
    anchors: torch.Tensor, gt_boxes: torch.Tensor, height: int, width: int, psi: float = 0.5
) -> torch.Tensor:
    """The locations of one image's map that FGFI imitates: those with an anchor near an object.

    An anchor is near a box if their IoU is above psi times the best IoU that any anchor of this
    level has with that box; a location is in the mask if any of its anchors is near any box.

    Args:
        anchors: (height * width * A, 4) XYXY of this level, those of one location side by side:
            index (y * width + x) * A + a.
        gt_boxes: (G, 4) XYXY of the image, in the anchors' pixels; G may be 0.
        height, width: size of the level's map.
        psi: in [0, 1); the larger, the fewer locations.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: the number of anchors is no multiple of the number of locations.
    """
    if len(anchors) == 0 or len(anchors) % (height * width) != 0:
        raise ValueError(
            f"{len(anchors)} anchors are not a whole number for each location of a"
            f" {height}x{width} map"
        )
    if len(gt_boxes) == 0:  # no box has a best anchor: max over nothing is an error
        return anchors.new_zeros((height, width), dtype=torch.bool)
    iou = box_iou(anchors.float(), gt_boxes.to(anchors.device).float())
    near = iou > psi * iou.amax(dim=0)
    return near.view(height, width, -1).any(dim=2)


def fgfi_loss(
    student_features: Sequence[torch.Tensor],
    teacher_features: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Squared difference at the masked locations, over 2 * (their number), summed over the levels.

    Args:
        student_features, teacher_features: (N, C, H, W) of each level. The teacher's are detached.
        masks: (N, H, W) bool of each level, see :func:`fgfi_mask`. A level without any masked
            location adds a zero with a graph.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the sequences do not match in length or shapes.
    """
    _check_same_shapes(student_features, teacher_features)
    total = 0.0
    for student, teacher, mask in zip(student_features, teacher_features, masks, strict=True):
        squared = (student.float() - teacher.detach().float()).square().sum(dim=1)
        total = total + (squared * mask).sum() / (2 * mask.sum().clamp(min=1))
    return total


def pkd_loss(
    student_features: Sequence[torch.Tensor], teacher_features: Sequence[torch.Tensor]
) -> torch.Tensor:
    """PKD: 1 - Pearson's correlation of the two maps, mean over channels, summed over the levels.

    That is half the mean squared difference of the maps whose channels were each normalised over
    (N, H, W) to mean 0 and standard deviation 1. A constant channel is normalised to 0 and gets no
    gradient.

    Args:
        student_features, teacher_features: (N, C, H, W) of each level. The teacher's are detached.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the two sequences do not match in length or shapes.
    """
    _check_same_shapes(student_features, teacher_features)
    total = 0.0
    for student, teacher in zip(student_features, teacher_features, strict=True):
        student, teacher = student.float(), teacher.detach().float()
        student_var, student_mean = torch.var_mean(student, dim=(0, 2, 3), correction=0)
        teacher_var, teacher_mean = torch.var_mean(teacher, dim=(0, 2, 3), correction=0)
        # The student's mean need not be subtracted for the covariance, but keeps it precise.
        student = student - student_mean.detach()[:, None, None]
        covariance = (student * (teacher - teacher_mean[:, None, None])).mean(dim=(0, 2, 3))
        # A variance of NaN counts as one, so that the loss is NaN too.
        varies = [~(v <= _SMALLEST_VARIANCE) for v in (student_var, teacher_var)]
        deviations = [v.clamp(min=_SMALLEST_VARIANCE).sqrt() for v in (student_var, teacher_var)]
        pearson = covariance / (deviations[0] * deviations[1])
        pearson = torch.where(varies[0] & varies[1], pearson, 0 * student_var)
        # Of a constant map nothing is left but the other one's variance, 1.
        total = total + ((varies[0].float() + varies[1].float()) / 2 - pearson).mean()
    return total


def pckd_loss(
    student_features: Sequence[torch.Tensor],
    teacher_features: Sequence[torch.Tensor],
    *,
    floor: float = 0.01,
) -> torch.Tensor:
    """PCKD: relative squared error of each principal component of the teacher's map, sum of levels.

    The components are the eigenvectors v_i, with eigenvalues (variances) l_i, of the covariance of
    the C channels of the teacher's map, over the locations of the images given. With both maps less
    the teacher's mean, s_i and t_i their projections onto v_i, E the mean over (N, H, W) and
    e = floor * mean(l), a level has

        sum_i w_i E[(s_i - t_i)^2] / (E[s_i^2] + E[t_i^2] + e) / sum_i w_i,   w_i = l_i / (l_i + e):

    0 for equal maps, about 1 for unrelated ones, at most 2. Without e each quotient is 1 minus the
    concordance correlation coefficient of s_i and t_i (Lin, Biometrics 1989). Far from the teacher
    its gradient is small, as the student's own power is in the denominator. A constant map of the
    teacher has no components: its loss is 0.

    Args:
        student_features, teacher_features: (N, C, H, W) of each level. The teacher's are detached.
        floor: a component with this share of the level's mean variance has half the weight, those
            far below it hardly any. Below 1e-6 float32 is not exact enough.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the two sequences do not match in length or shapes.
    """
    _check_same_shapes(student_features, teacher_features)
    total = 0.0
    for student, teacher in zip(student_features, teacher_features, strict=True):
        # Autocast would round the moments, and with them the small components, to 16 bits.
        with torch.autocast(student.device.type, enabled=False):
            total = total + _component_error(
                student.float().transpose(0, 1).flatten(1),
                teacher.detach().float().transpose(0, 1).flatten(1),
                floor,
            )
    return total


def _component_error(student: torch.Tensor, teacher: torch.Tensor, floor: float) -> torch.Tensor:
    """``pckd_loss`` of one level, from (C, N * H * W)."""
    error = student - teacher
    mean = teacher.mean(dim=1, keepdim=True)
    rounding = _SMALLEST_VARIANCE * (1 + teacher.square().mean())
    student, teacher = student - mean, teacher - mean
    # What is C x C is computed in float64: a small component is the difference of large numbers.
    covariance = _second_moments(teacher).double()
    # eigh refuses what is not finite; the errors below still carry it into the loss.
    covariance = torch.where(covariance.isfinite().all(), covariance, 0.0)
    variances, components = torch.linalg.eigh(covariance)
    variances = variances.clamp(min=0)

    def along_components(moments: torch.Tensor) -> torch.Tensor:
        # v_i^T M v_i of each component: no projected map is needed.
        return (components * (moments.double() @ components)).sum(dim=0)

    smallest = (floor * variances.mean()).clamp(min=rounding)
    power = along_components(_second_moments(student)) + variances + smallest
    errors = along_components(_second_moments(error)) / power
    weights = variances / (variances + smallest) * (variances.mean() > rounding)
    # Nothing is compared, and so the loss 0, where all weights are 0.
    total = weights.sum()
    return ((weights * errors).sum() / torch.where(total > 0, total, 1.0)).float()


def _second_moments(rows: torch.Tensor) -> torch.Tensor:
    """Means of the products of all pairs of rows: (C, M) -> (C, C)."""
    return rows @ rows.T / rows.shape[1]


def _check_same_shapes(
    student_features: Sequence[torch.Tensor], teacher_features: Sequence[torch.Tensor]
) -> None:
    # Broadcasting would turn a mismatch into a wrong number instead of an error.
    student_shapes = [tuple(feature.shape) for feature in student_features]
    teacher_shapes = [tuple(feature.shape) for feature in teacher_features]
    if student_shapes != teacher_shapes:
        raise ValueError(
            f"student features {student_shapes} and teacher features {teacher_shapes} must have"
            " the same levels and shapes"
        )
