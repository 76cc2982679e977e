"""Weights that are not finite, in checkpoints that are written or loaded."""

from collections.abc import Mapping

import torch


def non_finite_key(state: Mapping[str, torch.Tensor]) -> str | None:
    """The first weight or buffer of a state dict that holds NaN or infinity."""
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            return key
    return None
