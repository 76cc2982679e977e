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

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kd_detectron.losses import hcl_loss

from .argument_checks import check_whole_number, level_channels
from .base import DISTILLER_REGISTRY, Distiller


class _BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that falls back to its running statistics on one value per channel.

    While ``recomputing``, in backward, its running statistics stay as forward left them.
    """

    recomputing = False

    def forward(self, maps):
        if self.training and maps.numel() == maps.shape[1]:
            return F.batch_norm(
                maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if self.recomputing:
            statistics = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(
                maps, *statistics, self.weight, self.bias, training=True, eps=self.eps
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
        # The attention's convolution keeps PyTorch's initialisation, as in the release.
        for convolution in (self.reduce[0], self.output[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def mix(self, reduced: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
        """Mixes this level's reduced map with the running feature of the next coarser one.

        Args:
            reduced: (N, mid_channels, H, W), what ``reduce`` makes of the student's map.
            coarser: (N, mid_channels, H', W') running feature.

        Returns:
            This level's running feature (N, mid_channels, H, W); ``output`` makes of it what is
            compared with the teacher.
        """
        size = reduced.shape[-2:]
        # The paper's 1x1 convolution of both maps side by side, as a sum of two: so they need
        # not be copied into one, and the coarser one's share is computed at its own size.
        convolution, sigmoid = self.attention
        own, other = convolution.weight.split(reduced.shape[1], dim=1)
        logits = F.interpolate(F.conv2d(coarser, other), size=size, mode="nearest")
        maps = sigmoid(F.conv2d(reduced, own, convolution.bias) + logits)
        coarser = F.interpolate(coarser, size=size, mode="nearest")
        return torch.addcmul(reduced * maps[:, :1], coarser, maps[:, 1:])

    def loss(self, running: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The hierarchical context loss of this level's output against the teacher's map."""
        return hcl_loss([self.output(running)], [teacher])


@DISTILLER_REGISTRY.register()
class ReviewKD(Distiller):
    """Fused student features against the teacher's, hierarchical context loss (CVPR 2021)."""

    requires = frozenset({"features"})

    def __init__(
        self,
        in_channels: Sequence[int] = (256,) * 5,
        out_channels: Sequence[int] = (256,) * 5,
        *,
        mid_channels: int = 256,
        use_act_checkpoint: bool = True,
    ):
        """
        Args:
            in_channels: channels of the student's levels, fine to coarse.
            out_channels: channels of the teacher's levels, in the same order.
            mid_channels: channels of the running feature inside the fusion.
            use_act_checkpoint: compute maps inside the fusion again in backward in place of
                keeping them: less memory, a little more time (docs/performance.md), the same
                gradients.
        """
        super().__init__()
        check_whole_number("KD.REVIEWKD.MID_CHANNELS", mid_channels, at_least=1)
        self.use_act_checkpoint = use_act_checkpoint
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
        fusions = reversed(self.fusions)
        with _fusion_precision(features[0].device.type):
            running = self._running_features(features)
            outputs = [fusion.output(one) for fusion, one in zip(fusions, running, strict=True)]
        return outputs[::-1]

    def forward(self, context):
        student, teacher = context.student.features, context.teacher.features
        features = list(student.values())
        fusions = reversed(list(zip(self.fusions, student, strict=True)))
        with _fusion_precision(features[0].device.type):
            losses = [
                self._loss(fusion, running, teacher[level])
                for (fusion, level), running in zip(
                    fusions, self._running_features(features), strict=True
                )
            ]
        return {"loss_reviewkd": sum(reversed(losses))}

    def _loss(self, fusion: AttentionFusion, *maps: torch.Tensor) -> torch.Tensor:
        # The finest level is the last of forward and the first of backward: nothing is gained by
        # dropping its output, by far the most expensive one, in between.
        return fusion.loss(*maps) if fusion is self.fusions[0] else self._part(fusion.loss, *maps)

    def _running_features(self, features: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The running feature of each level, coarse to fine; ``features`` are fine to coarse."""
        running = None
        for fusion, feature in zip(reversed(self.fusions), reversed(features), strict=True):
            if not torch.is_autocast_enabled(feature.device.type):
                # float32 layers take 1.5 times as long on channels-last maps, which a bf16 student
                # on the CPU has (docs/performance_log.md).
                feature = feature.float().contiguous()
            reduced = self._part(fusion.reduce, feature)
            running = reduced if running is None else self._part(fusion.mix, reduced, running)
            yield running

    def _part(self, function: Callable, *maps: torch.Tensor) -> torch.Tensor:
        """Runs a part of the fusion; its inner maps are kept for backward or computed again."""
        if not self.use_act_checkpoint:
            return function(*maps)
        return checkpoint(
            function,
            *maps,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), self._recomputing()),
        )

    @contextlib.contextmanager
    def _recomputing(self):
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm2d)]
        for norm in norms:
            norm.recomputing = norm.training
        try:
            yield
        finally:  # PyTorch ends a recomputation by an exception, once it has all it needs.
            for norm in norms:
                norm.recomputing = False


def _fusion_precision(device: str) -> contextlib.AbstractContextManager:
    """Autocast as the student has it on CUDA, none on the CPU."""
    half = device == "cuda" and torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=half)
