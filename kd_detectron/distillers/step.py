"""The losses of one training step: each distiller's, times its weight and the schedule's factor."""

from collections.abc import Mapping

import torch
from torch import nn

from kd_detectron.context import DistillationContext
from kd_detectron.errors import ConfigError


def distillation_losses(
    distillers: nn.ModuleDict,
    weights: Mapping[str, float],
    factor: float,
    context: DistillationContext,
    detector_losses: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What distillation adds to a detector's losses, weighted.

    Args:
        distillers: by name.
        weights: loss weight by distiller name.
        factor: multiplies all weights; at 0 no distiller and no part of the teacher runs.
        context: the step.
        detector_losses: the detector's own, whose names the distillers may not use.

    Raises:
        ConfigError: two losses of the step have one name.
    """
    if factor == 0:
        # Nothing is computed, but every distiller parameter and every feature level still gets a
        # (zero) gradient, since DistributedDataParallel waits for each parameter, and some levels
        # may be read by distillation alone.
        levels = (maps[:, :1, :1, :1] for maps in context.student.features.values())
        trained = [*distillers.parameters(), *levels]
        return {"loss_distillation": sum(x.sum() * 0 for x in trained)}
    losses = {}
    for name, distiller in distillers.items():
        scale = weights[name] * factor
        for key, value in distiller(context).items():
            if key in losses or key in detector_losses:
                raise ConfigError(
                    f"the distiller '{name}' (KD.DISTILLERS) returns '{key}', which another loss "
                    "of this step is already called; rename it"
                )
            losses[key] = value * scale
    return losses
