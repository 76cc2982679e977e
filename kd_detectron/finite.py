"""Losses and weights that are not finite."""

import math
from collections.abc import Mapping

import torch


def non_finite_key(state: Mapping[str, torch.Tensor]) -> str | None:
    """The first weight or buffer of a state dict that holds NaN or infinity."""
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            return key
    return None


def read_losses(losses: Mapping[str, torch.Tensor]) -> tuple[dict[str, float], list[str]]:
    """Scalar losses as numbers, read from the device at once, and the names of those not finite."""
    read = torch.stack([value.detach().float() for value in losses.values()]).tolist()
    values = dict(zip(losses, read, strict=True))
    return values, [name for name, value in values.items() if not math.isfinite(value)]
