"""RPN outputs of all levels in one tensor, for the distillers that compare anchors."""

from collections.abc import Mapping

import torch


def join_levels(*outputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Joins the levels of each output along its anchors, in the order of the first output's levels.

    Args:
        outputs: level name -> (N, H*W*A, ...).

    Returns:
        One tensor (N, P, ...) per output, P anchors over all levels.
    """
    return [torch.cat([output[level] for level in outputs[0]], dim=1) for output in outputs]
