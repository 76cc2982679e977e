"""One convolution per level, from the student's channels to the teacher's."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn


class LevelAdapters(nn.ModuleList):
    """One convolution per level, in float32: losses on features are too small for half precision.

    Args:
        in_channels: channels of the student's levels, fine to coarse.
        out_channels: channels of the teacher's levels, in the same order.
        kernel_size: of each convolution, odd; the maps keep their size.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int], kernel_size: int):
        super().__init__(
            nn.Conv2d(student, teacher, kernel_size, padding=kernel_size // 2)
            for student, teacher in zip(in_channels, out_channels, strict=True)
        )

    def forward(self, features: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Maps the student's levels (N, C, H, W) to (N, C', H, W), in their order."""
        with torch.autocast(next(iter(features.values())).device.type, enabled=False):
            return [
                adapter(feature.float())
                for adapter, feature in zip(self, features.values(), strict=True)
            ]
