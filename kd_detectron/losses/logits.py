"""Losses on the logits of the box head: KD (Hinton et al.) and DKD (Zhao et al., CVPR 2022).

Sources: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, eq. 1; "Decoupled
Knowledge Distillation", arXiv 2203.08679, eq. 5-7.

Shapes: R sampled proposals over the whole batch, K foreground classes; logits are (R, K+1), the
last column background. Student and teacher logits belong to the same R proposals. The distillers
``KD`` and ``DKD`` feed these functions.

Differences from the textbook, each pinned in ``tests/losses/test_logits.py``: everything is
computed in float32 from log-softmax and log-sum-exp, never from the log of a probability, so that
logits of +-1e4 and 16-bit logits give finite values; no proposals give a zero with a graph; with
two logits DKD has no non-target distribution left and drops that term with a warning.
"""

import warnings

import torch
from torch.nn import functional as F

from .numerics import in_float32, mean_over_rows


@in_float32
def kd_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """KL(softmax(t / T) || softmax(s / T)) * T^2, mean over the proposals.

    Args:
        student_logits, teacher_logits: (R, K+1). The teacher's are detached.
        temperature: T > 0, softens both distributions.

    Returns:
        A float32 scalar; a zero with a graph if R is 0.
    """
    student_log_probs = F.log_softmax(student_logits / temperature, dim=1)
    teacher_log_probs = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    divergence = _kl_of_logs(teacher_log_probs, student_log_probs)
    return mean_over_rows(divergence) * temperature**2


@in_float32
def dkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    alpha: float = 1.0,
    beta: float | torch.Tensor = 0.25,
    temperature: float = 1.0,
) -> torch.Tensor:
    """alpha * TCKD + beta * NCKD, both times T^2, mean over the proposals.

    TCKD is the KL divergence of the two-way distributions (target, everything else); NCKD that of
    the distributions over the non-target classes alone. With beta = alpha * (1 - p_t[target]) for
    each proposal this is alpha * :func:`kd_loss`.

    Args:
        student_logits, teacher_logits: (R, K+1). The teacher's are detached.
        targets: (R,) assigned class of each proposal, K = background.
        alpha: weight of TCKD.
        beta: weight of NCKD, one number, or (R,), one per proposal.
        temperature: T > 0, softens all distributions.

    Returns:
        A float32 scalar; a zero with a graph if R is 0.
    """
    student_logits = student_logits / temperature
    teacher_logits = teacher_logits.detach() / temperature
    divergence = alpha * _kl_of_logs(
        _target_against_rest(teacher_logits, targets), _target_against_rest(student_logits, targets)
    )
    if student_logits.shape[1] > 2:
        divergence = divergence + beta * _kl_of_logs(
            F.log_softmax(_without_target(teacher_logits, targets), dim=1),
            F.log_softmax(_without_target(student_logits, targets), dim=1),
        )
    else:
        warnings.warn(
            "DKD: with a single foreground class one non-target class is left, whose probability"
            " is always 1; NCKD is switched off and KD.DKD.BETA has no effect",
            stacklevel=3,  # past in_float32
        )
    return mean_over_rows(divergence) * temperature**2


def _kl_of_logs(log_target: torch.Tensor, log_input: torch.Tensor) -> torch.Tensor:
    """KL(target || input) of each row, both given as (R, n) log-probabilities. Returns (R,)."""
    return F.kl_div(log_input, log_target, reduction="none", log_target=True).sum(dim=1)


def _without_target(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Drops each row's target column: (R, K+1) to (R, K)."""
    # Column j of the result is column j left of the target and j + 1 right of it. Gathering needs
    # no boolean mask, whose size the GPU would have to tell the CPU.
    columns = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(targets), -1)
    return logits.gather(1, columns + (columns >= targets[:, None]))


def _target_against_rest(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of (target, any other class): (R, K+1) to (R, 2)."""
    # log(1 - p) from p would lose everything once p rounds to 1.
    target = logits.gather(1, targets[:, None])
    rest = _without_target(logits, targets).logsumexp(dim=1, keepdim=True)
    return F.log_softmax(torch.cat([target, rest], dim=1), dim=1)
