"""Learning rates of parts of a model, for any optimizer and engine."""

import math
from collections.abc import Iterable

import torch

from .errors import ConfigError


def scale_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], factor: float
) -> None:
    """Multiplies the learning rate of some parameters, in parameter groups of their own.

    To be called before a scheduler is built, which reads each group's rate as its base.

    Args:
        optimizer: changed in place; left as it is with a factor of 1.
        parameters: those whose rate changes.
        factor: not negative; at 0 they stay as they are.

    Raises:
        ConfigError: the factor is negative or not a finite number.
    """
    if not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 0:
        raise ConfigError(
            f"KD.TEACHER.INHERIT_LR_FACTOR is {factor}; it must be a finite number, not negative"
        )
    chosen = {id(parameter) for parameter in parameters}
    if factor == 1 or not chosen:
        return
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in chosen]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.add_param_group(group | {"params": moved, "lr": group["lr"] * factor})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
