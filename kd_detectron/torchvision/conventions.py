"""Torchvision's conventions, translated into those of the distillation context in this one place.

Torchvision has the background first (class 0 of K+1, in labels, logits, box deltas and masks), the
context last (class K of the logits, absent from box deltas and masks). Torchvision's RPN keeps its
predictions as maps, the context one row per anchor. Torchvision numbers its feature levels "0",
"1", ... whatever their strides; the context's names are made of the measured strides, so that
levels of the same name are comparable.

Legend: N images, R sampled proposals over the whole batch, F foreground ones among them, K
foreground classes, A anchors per location, M mask pixels per side.
"""

from collections.abc import Sequence

import torch


def background_last(logits: torch.Tensor) -> torch.Tensor:
    """Moves the background's column of (R, K+1) logits from the first place to the last."""
    return logits.roll(-1, 1)


def background_last_targets(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Torchvision's labels (0 background, 1..K) as classes 0..K-1, K for background."""
    return (labels - 1).remainder(num_classes + 1)


def without_background(tensor: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Drops the background from (R, 4(K+1)) box deltas or (F, K+1, M, M) mask logits."""
    return tensor[:, tensor.shape[1] // (num_classes + 1) :]


def rows_of_anchors(maps: torch.Tensor, columns: int) -> torch.Tensor:
    """(N, A*columns, H, W) maps as (N, H*W*A, columns), location-major, as the anchors are."""
    images, _, height, width = maps.shape
    rows = maps.reshape(images, -1, columns, height, width).permute(0, 3, 4, 1, 2)
    return rows.reshape(images, -1, columns)


def level_names(strides: Sequence[int]) -> list[str]:
    """Names levels by stride: "stride32"; of several with one stride, the last has that name.

    The ones before it are "stride32_2", "stride32_3", ..., counted from the last (MobileNetV3 has
    two levels of stride 32; the last is the deepest, as the one level of another backbone is).
    """
    names = []
    for index, stride in enumerate(strides):
        number = list(strides[index:]).count(stride)
        names.append(f"stride{stride}" if number == 1 else f"stride{stride}_{number}")
    return names


def renormalize(
    pixels: torch.Tensor,
    image_sizes: Sequence[tuple[int, int]],
    mean: Sequence[float],
    std: Sequence[float],
    new_mean: Sequence[float],
    new_std: Sequence[float],
) -> torch.Tensor:
    """Changes the normalisation of a padded batch; the padding stays 0.

    Args:
        pixels: (N, 3, H, W), normalised by ``mean`` and ``std``, 0 outside the images.
        image_sizes: height and width of each image before padding.
        mean, std: those that ``pixels`` are normalised by.
        new_mean, new_std: those to normalise by.
    """
    if list(mean) == list(new_mean) and list(std) == list(new_std):
        return pixels
    mean, std, new_mean, new_std = (
        torch.as_tensor(x, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        for x in (mean, std, new_mean, new_std)
    )
    scale, shift = std / new_std, (mean - new_mean) / new_std
    result = torch.zeros_like(pixels)
    for target, source, (height, width) in zip(result, pixels, image_sizes, strict=True):
        target[:, :height, :width] = source[:, :height, :width] * scale + shift
    return result
