"""The linear layer that takes box-head outputs to the space where DCD, SupCon and CRD contrast.

Student and teacher box heads may differ in width D; after this layer both are (R, E). It belongs to
the distiller: it trains with the student and is dropped on export.
"""

import torch
from torch import nn
from torch.nn import functional as F

from kd_detectron.errors import ConfigError

from .base import ModelSpec


class Embedding(nn.Linear):
    """``nn.Linear`` in float32, also under autocast and for 16-bit features."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(R, D) box features to (R, E)."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.weight, self.bias)


def box_channels(name: str, student: ModelSpec, teacher: ModelSpec) -> tuple[int, int]:
    """Widths of the student's and the teacher's box-head outputs.

    Args:
        name: the distiller, for the message.
        student, teacher: what is known of the two models.

    Raises:
        ConfigError: a model has not exactly one box head.
    """
    for who, spec in (("student", student), ("teacher", teacher)):
        if spec.box_channels is None:
            raise ConfigError(
                f"KD.DISTILLERS names {name}, which reads box-head outputs, but the {who} has not"
                " exactly one box head; use a Faster or Mask R-CNN with FPN, or feature distillers"
                " such as ReviewKD"
            )
    return student.box_channels, teacher.box_channels
