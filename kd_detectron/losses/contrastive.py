"""Contrastive losses on box-head embeddings: DCD, SupCon and CRD, all in-batch.

Sources: "Discriminative and Consistent Representation Distillation" (DCD), arXiv 2407.11802;
"Supervised Contrastive Learning" (SupCon), arXiv 2004.11362, eq. 2; "Contrastive Representation
Distillation" (CRD), arXiv 1910.10699. The last two are rows of Table VI of CKD, arXiv 2404.14109.

Shapes: R sampled proposals over the whole batch, E embedding channels; embeddings are (R, E), from
the linear layers of the distillers ``DCD``, ``SupCon`` and ``CRD``, and are L2-normalised here.
The teacher's embeddings carry a graph, because the distiller's own layer made them; the distiller
detaches the teacher's features before that layer.

Differences from the papers, pinned in ``tests/losses/test_contrastive.py``: SupCon and CRD have no
memory bank: positives and negatives are proposals of the same step. Background is a class like any
other. The (R, R) similarities are computed whole.
"""

import torch
from torch.nn import functional as F

from .numerics import in_float32, mean_over_rows, unit_rows


@in_float32
def dcd_loss(
    student_embeddings: torch.Tensor,
    teacher_embeddings: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    consistency_weight: float = 0.5,
) -> torch.Tensor:
    """Contrastive + consistency_weight * consistency, mean over the proposals.

    With ``logits = cos(student, teacher) * clamp(exp(scale), 0, 10) + bias``, (R, R): the first is
    the cross entropy of the rows against the diagonal; the second KL(q || p), p the softmax of the
    rows and q that of the columns, the direction of the authors' release: what the student's
    proposal i sees in the teacher and what the teacher's sees in the student should agree. It is 0
    where the similarity is symmetric.

    Args:
        student_embeddings, teacher_embeddings: (R, E).
        scale, bias: learnable scalars. The bias is the paper's; being added to every logit, it
            cancels in each softmax and stays where it starts.
        consistency_weight: weight of the consistency term.

    Returns:
        A float32 scalar; a zero with a graph if R is 0.
    """
    similarity = unit_rows(student_embeddings) @ unit_rows(teacher_embeddings).T
    logits = similarity * scale.exp().clamp(0, 10) + bias
    log_rows, log_columns = F.log_softmax(logits, dim=1), F.log_softmax(logits.T, dim=1)
    contrastive = mean_over_rows(-log_rows.diagonal())
    divergence = F.kl_div(log_rows, log_columns, reduction="none", log_target=True).sum(dim=1)
    return contrastive + consistency_weight * mean_over_rows(divergence)


@in_float32
def supcon_loss(
    student_embeddings: torch.Tensor, targets: torch.Tensor, *, temperature: float = 0.1
) -> torch.Tensor:
    """Supervised contrast among the student's own proposals; the teacher has no part in it.

    For each proposal i, the mean over the other proposals p of its class of
    ``-log(exp(cos_ip / tau) / sum over a != i of exp(cos_ia / tau))``; then the mean over the
    proposals that have another one of their class.

    Args:
        student_embeddings: (R, E).
        targets: (R,) assigned class of each proposal, K = background.
        temperature: tau > 0.

    Returns:
        A float32 scalar; a zero with a graph if no two proposals share a class.
    """
    unit = unit_rows(student_embeddings)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    same_class = (targets[:, None] == targets) & ~itself
    # The proposal itself is no candidate. Not minus infinity: with one proposal in all, its row
    # would have no candidate left, and a softmax over nothing is NaN.
    similarity = (unit @ unit.T / temperature).masked_fill(itself, torch.finfo(unit.dtype).min)
    log_probability = F.log_softmax(similarity, dim=1).masked_fill(~same_class, 0.0)
    positives = same_class.sum(dim=1)
    losses = -log_probability.sum(dim=1) / positives.clamp(min=1)
    return losses.sum() / (positives > 0).sum().clamp(min=1)


@in_float32
def crd_loss(
    student_embeddings: torch.Tensor,
    teacher_embeddings: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 0.1,
) -> torch.Tensor:
    """Contrast of each teacher proposal with the student's same one and those of other classes.

    The anchor is the teacher's embedding of proposal i, the positive the student's of i, the
    negatives the student's of every proposal of another class: cross entropy of ``cos / tau``
    among them, mean over i. A softmax (InfoNCE) in place of CRD's noise-contrastive estimate, which
    draws its many negatives from a memory bank.

    Args:
        student_embeddings, teacher_embeddings: (R, E).
        targets: (R,) assigned class of each proposal, K = background.
        temperature: tau > 0.

    Returns:
        A float32 scalar; a zero with a graph if all proposals share a class.
    """
    similarity = unit_rows(teacher_embeddings) @ unit_rows(student_embeddings).T / temperature
    same_class = targets[:, None] == targets
    same_class.fill_diagonal_(False)
    candidates = similarity.masked_fill(same_class, float("-inf"))
    return mean_over_rows(candidates.logsumexp(dim=1) - similarity.diagonal())
