"""What the losses on logits and embeddings share: float32 arithmetic and L2 normalisation.

In 16 bits the differences that these losses are made of, of cosines and of log-probabilities,
drown in rounding. So they leave autocast and compute in float32, whatever the dtype of their
inputs; the gradients return in the inputs' own dtype (``tests/losses/test_ckd.py``).
"""

import functools
from collections.abc import Callable

import torch

# Rows shorter than this have no direction worth following.
_SMALLEST_NORM = 1e-6


def in_float32(loss: Callable) -> Callable:
    """Decorator: the loss sees float32 tensors and runs outside autocast."""

    def cast(value):
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.float() if is_float else value

    @functools.wraps(loss)
    def wrapped(*args, **kwargs):
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return loss(*map(cast, args), **{key: cast(v) for key, v in kwargs.items()})

    return wrapped


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """L2-normalises along the last dimension; a zero row stays zero and gets a zero gradient.

    A row with NaN or infinity stays so, for the loss to be refused.

    ``F.normalize`` divides a zero row by its epsilon, 1e-12, and so multiplies that row's gradient
    by 1e12: finite, and enough to ruin the weights in one step.
    """
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    unit = rows / norm.clamp(min=_SMALLEST_NORM)
    return torch.where(norm <= _SMALLEST_NORM, torch.zeros_like(unit), unit)


def mean_over_rows(values: torch.Tensor) -> torch.Tensor:
    """Mean of (n,); for no rows a zero that keeps its graph, where ``mean`` is NaN."""
    return values.sum() / max(len(values), 1)
