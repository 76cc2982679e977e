"""ReviewKD: the student's feature levels, fused from coarse to fine, against the teacher's.

Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044. Attention
based fusion (ABF) runs from the coarsest level to the finest, each level seeing what the coarser
ones know; the hierarchical context loss (``hcl_loss``) compares its outputs with the teacher.

Features are (N, C, H, W) maps, fine to coarse (p2..p6 of an FPN); running features inside the
fusion have ``mid_channels`` channels. The fusion trains with the student and is dropped on export.

Differences from the release: the loss is float32 also under autocast, and so is the fusion, except
on CUDA, where its layers follow the student's autocast; a batch of one image whose coarsest map is
1x1, which batch normalisation refuses in training, is normalised by the running statistics
(``tests/distillers/test_reviewkd.py``).
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from kd_detectron.losses import hcl_loss

from .base import DISTILLER_REGISTRY, Distiller
from .checks import check_whole_number, level_channels


class _BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that falls back to its running statistics on one value a channel."""

    def forward(self, maps):
        if self.training and maps.numel() == maps.shape[1]:
            return F.batch_norm(
                maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(maps)


class AttentionFusion(nn.Module):
    """One level of the fusion (the paper's ABF).

    Args:
        in_channels: channels of the student's map.
        mid_channels: channels of the running feature.
        out_channels: channels of the teacher's map.
        fuse: whether there is a coarser level to fuse with; the coarsest has no attention.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, fuse: bool):
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, kernel_size=1, bias=False),
            _BatchNorm2d(mid_channels),
        )
        self.attention = (
            nn.Sequential(nn.Conv2d(2 * mid_channels, 2, kernel_size=1), nn.Sigmoid())
            if fuse
            else None
        )
        self.output = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, kernel_size=3, padding=1, bias=False),
            _BatchNorm2d(out_channels),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(
        self, feature: torch.Tensor, coarser: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuses one level with the running feature of the next coarser one.

        Args:
            feature: (N, in_channels, H, W), the student's map.
            coarser: (N, mid_channels, H', W') running feature; None at the coarsest level.

        Returns:
            This level's output (N, out_channels, H, W) and running feature (N, mid_channels, H, W).
        """
        running = self.reduce(feature)
        if self.attention is not None:
            size = running.shape[-2:]
            # The paper's 1x1 convolution of both maps side by side, as a sum of two: so they need
            # not be copied into one, and the coarser one's share is computed at its own size.
            convolution, sigmoid = self.attention
            own, other = convolution.weight.split(running.shape[1], dim=1)
            logits = F.interpolate(F.conv2d(coarser, other), size=size, mode="nearest")
            maps = sigmoid(F.conv2d(running, own, convolution.bias) + logits)
            coarser = F.interpolate(coarser, size=size, mode="nearest")
            running = running * maps[:, :1] + coarser * maps[:, 1:]
        return self.output(running), running


@DISTILLER_REGISTRY.register()
class ReviewKD(Distiller):
    """Hierarchical context loss between the fused student features and the teacher's."""

    requires = frozenset({"features"})

    def __init__(
        self,
        in_channels: Sequence[int] = (256,) * 5,
        out_channels: Sequence[int] = (256,) * 5,
        mid_channels: int = 256,
    ):
        """
        Args:
            in_channels: channels of the student's levels, fine to coarse.
            out_channels: channels of the teacher's levels, in the same order.
            mid_channels: channels of the running feature inside the fusion.
        """
        super().__init__()
        check_whole_number("KD.REVIEWKD.MID_CHANNELS", mid_channels, at_least=1)
        coarsest = len(in_channels) - 1
        self.fusions = nn.ModuleList(
            AttentionFusion(student, mid_channels, teacher, fuse=level < coarsest)
            for level, (student, teacher) in enumerate(zip(in_channels, out_channels, strict=True))
        )

    @classmethod
    def from_specs(cls, student, teacher, **options):
        return cls(*level_channels("ReviewKD", student, teacher), **options)

    def fuse(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The fusion alone: student maps to maps comparable with the teacher's.

        Args:
            features: (N, in_channels[l], H_l, W_l) of each level l, fine to coarse.

        Returns:
            (N, out_channels[l], H_l, W_l) of each level, in the order given: float32, or autocast's
            type on CUDA under autocast.
        """
        outputs, running = [], None
        device = features[0].device.type
        half = device == "cuda" and torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=half):
            for fusion, feature in zip(reversed(self.fusions), reversed(features), strict=True):
                # float32 layers take 1.5 times as long on channels-last maps, which a bf16 student
                # on the CPU has (docs/performance.md).
                feature = feature if half else feature.float().contiguous()
                output, running = fusion(feature, running)
                outputs.append(output)
        return outputs[::-1]

    def forward(self, context):
        features = context.student.features
        fused = self.fuse(list(features.values()))
        teacher = [context.teacher.features[level] for level in features]
        return {"loss_reviewkd": hcl_loss(fused, teacher)}
