"""CKD, sample-wise contrast of the box head's logits, and the row contrast that it is made of.

Source: "CKD: Contrastive Knowledge Distillation from A Sample-Wise Perspective", arXiv 2404.14109,
eq. 13-14 and Fig. 5 (loss), Table VII (triples), section III-B and eq. 25 (groups).

Shapes: R sampled proposals over the whole batch, K foreground classes; logits are (R, K+1), the
last column background; D is the width of the rows that are contrasted, here K+1. Student and
teacher logits belong to the same R proposals; the distiller ``CKD`` feeds them.

Differences from the authors' release, each pinned in ``tests/losses/test_ckd.py``: a large
similarity matrix is computed in blocks of rows, and again in the backward pass, so that memory
grows with R and not with R * R; the paper's groups, absent from its detection release, are here,
the last smaller one included; a row of zeros has similarity 0 to everything and gets no gradient.
"""

from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable

from kd_detectron.errors import ConfigError, did_you_mean

from .numerics import in_float32, mean_over_rows, unit_rows

TRIPLES = ("tss", "sts", "stt")


def check_triple(triple: str) -> None:
    """Raises ConfigError, with the reason, unless ``triple`` is one of :data:`TRIPLES`."""
    if triple in TRIPLES:
        return
    if triple == "tst":
        raise ConfigError(
            "KD.CKD.TRIPLE is 'tst' (teacher anchor, student positive, teacher negatives), which"
            " teaches nothing: the teacher is fixed, so its negatives are constants that the"
            " student cannot move away from; use one of " + ", ".join(TRIPLES)
        )
    raise ConfigError(f"KD.CKD.TRIPLE is '{triple}'{did_you_mean(str(triple), TRIPLES)}")


@in_float32
def ckd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    triple: str = "tss",
    group_size: int = 0,
    chunk_size: int = 0,
) -> torch.Tensor:
    """Cross entropy over rows of cos(anchor_i, .) / temperature, target the diagonal; mean over i.

    With "tss" the anchor is the teacher's row t_i, the positive the student's row s_i of the same
    proposal, the negatives the student's rows s_j of all others: the loss is
    ``-log(exp(cos(t_i, s_i) / tau) / sum_j exp(cos(t_i, s_j) / tau))``. Cosines lie in [-1, 1], so
    at temperature 1 the loss stays near ln R (ln of the group size) and moves little.

    Args:
        student_logits, teacher_logits: (R, K+1). The teacher's are detached.
        temperature: tau > 0.
        triple: anchor, positive, negatives: "tss" (the method), "sts" or "stt".
        group_size: contrast inside random, non-overlapping groups of this many proposals, drawn
            anew in each call from torch's random state; the last group holds what is left.
            0: all R together.
        chunk_size: rows of the similarity matrix held at a time; the loss and the gradients are
            those of the whole matrix. 0: chosen by size, see :func:`row_contrast`.

    Returns:
        A float32 scalar; a zero with a graph if R is 0.

    Raises:
        ConfigError: the triple is unknown, or "tst".
    """
    check_triple(triple)
    student, teacher = unit_rows(student_logits), unit_rows(teacher_logits.detach())
    rows = {"s": student, "t": teacher}
    if 0 < group_size < len(student):
        order = torch.randperm(len(student), device=student.device)
        rows = {name: row[order] for name, row in rows.items()}
    anchors, positives, candidates = (rows[name] for name in triple)
    return row_contrast(anchors, positives, candidates, temperature, group_size, chunk_size)


# Measured on one core of a busy CPU with "tss" and 81 classes, forward and backward, against cross
# entropy of the whole matrix: at R = 8192 blocks of 512 took 0.4 to 0.9 times the time in three
# pairs of runs, and 1/25 of the extra peak memory. Up to about R = 1024 they gain no time.
_FULL_MATRIX_ROWS = 1024
_BLOCK_ROWS = 512


def row_contrast(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    candidates: torch.Tensor,
    temperature: float,
    group_size: int = 0,
    chunk_size: int = 0,
) -> torch.Tensor:
    """Mean of -log softmax of each anchor's similarity to its positive, among the candidates.

    Row i's similarities are ``anchors @ candidates.T`` with column i replaced by
    ``anchors_i . positives_i``: a candidate is a negative of every row but its own.

    Args:
        anchors, positives, candidates: (R, D) unit rows.
        temperature: divides the similarities.
        group_size: contrast inside consecutive groups of this many rows; 0: all together.
        chunk_size: rows of a group computed at a time. 0: groups of at most 1024 rows whole, larger
            ones in blocks of 512.

    Returns:
        A float32 scalar; a zero with a graph if R is 0.
    """
    size = group_size if 0 < group_size < len(anchors) else max(len(anchors), 1)
    block_rows = chunk_size or (size if size <= _FULL_MATRIX_ROWS else _BLOCK_ROWS)
    rows = (anchors / temperature, positives, candidates)
    if block_rows < size:
        groups = zip(*(row.split(size) for row in rows), strict=True)
        losses = [_BlockwiseContrast.apply(*group, block_rows) for group in groups]
    else:
        equal = len(anchors) - len(anchors) % size
        losses = [
            _full_matrix_contrast(
                *(row[:equal].unflatten(0, (-1, size)) for row in rows)
            ).flatten(),
            _full_matrix_contrast(*(row[equal:] for row in rows)),
        ]
    return mean_over_rows(torch.cat(losses))


def _full_matrix_contrast(
    anchors: torch.Tensor, positives: torch.Tensor, candidates: torch.Tensor
) -> torch.Tensor:
    """The losses of all rows of one or many groups: three times (..., G, D) to (..., G)."""
    positive = (anchors * positives).sum(dim=-1)
    similarity = anchors @ candidates.mT
    similarity.diagonal(dim1=-2, dim2=-1).copy_(positive)
    return similarity.logsumexp(dim=-1) - positive


class _BlockwiseContrast(torch.autograd.Function):
    """The losses of all rows of one group, in blocks of rows: takes three (R, D), returns (R,).

    Only each row's log-sum-exp is kept for the backward pass, which computes the similarities
    again: one more matrix product, and no (R, R) matrix in either pass.
    """

    @staticmethod
    def forward(ctx, anchors, positives, candidates, block_rows):
        positive = (anchors * positives).sum(dim=1)
        log_sums = torch.empty_like(positive)
        for block, similarity in _similarity_blocks(anchors, positive, candidates, block_rows):
            largest = similarity.amax(dim=1)
            sums = similarity.sub_(largest[:, None]).exp_().sum(dim=1)
            log_sums[block] = sums.log_().add_(largest)
        ctx.save_for_backward(anchors, positives, candidates, positive, log_sums)
        ctx.block_rows = block_rows
        return log_sums - positive

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        anchors, positives, candidates, positive, log_sums = ctx.saved_tensors
        need_anchors, need_positives, need_candidates, _ = ctx.needs_input_grad
        grad_anchors = torch.zeros_like(anchors) if need_anchors else None
        grad_candidates = torch.zeros_like(candidates) if need_candidates else None
        # d loss_i / d (anchor_i . positive_i) = softmax_ii - 1, the paper's -g_i.
        grad_positive = grad_losses * torch.expm1(positive - log_sums)
        with torch.autocast(anchors.device.type, enabled=False):
            blocks = _similarity_blocks(anchors, positive, candidates, ctx.block_rows)
            for block, similarity in blocks:
                grad = similarity.sub_(log_sums[block, None]).exp_().mul_(grad_losses[block, None])
                grad.diagonal(offset=block.start).zero_()  # grad_positive has that column
                if need_anchors:
                    torch.mm(grad, candidates, out=grad_anchors[block])
                if need_candidates:
                    grad_candidates.addmm_(grad.T, anchors[block])
        if need_anchors:
            grad_anchors.addcmul_(grad_positive[:, None], positives)
        grad_positives = grad_positive[:, None] * anchors if need_positives else None
        return grad_anchors, grad_positives, grad_candidates, None


def _similarity_blocks(
    anchors: torch.Tensor, positive: torch.Tensor, candidates: torch.Tensor, block_rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields (rows, their similarities), each row's own column its positive's.

    The similarities, (rows, R), share one buffer: the next block overwrites them.
    """
    buffer = anchors.new_empty(block_rows, len(candidates))
    for start in range(0, len(anchors), block_rows):
        block = slice(start, min(start + block_rows, len(anchors)))
        similarity = buffer[: block.stop - start]
        torch.mm(anchors[block], candidates.T, out=similarity)
        similarity.diagonal(offset=start).copy_(positive[block])
        yield block, similarity
