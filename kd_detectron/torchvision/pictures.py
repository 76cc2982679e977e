"""Detections of several trained torchvision detectors side by side, beside the ground truth."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torchvision.transforms.v2 import functional as transforms
from torchvision.utils import draw_bounding_boxes

from kd_detectron.visualize.figures import PALETTE, new_figure, save_figure

from .data import DetectionData

_PANEL_PIXELS = 480
_PANEL_INCHES = 3.2


def draw_detections(
    models: Mapping[str, nn.Module],
    data: DetectionData,
    path: str | Path,
    *,
    images: int = 4,
    score_threshold: float = 0.5,
    seed: int = 0,
) -> Figure:
    """Draws ground truth and every model's detections: one row per image.

    Args:
        models: detectors in eval mode by the title of their column.
        data: where the images are from.
        path: the image file to write.
        images: rows, chosen by ``seed``.
        score_threshold: detections below it are not drawn.
    """
    numbers = sorted(random.Random(seed).sample(range(len(data)), min(images, len(data))))
    columns = ["ground truth", *models]
    figure = new_figure(_PANEL_INCHES * len(columns), _PANEL_INCHES * len(numbers) + 0.6)
    axes = figure.subplots(len(numbers), len(columns), squeeze=False)
    for row, number in zip(axes, numbers, strict=True):
        image, target = data[number]
        with torch.no_grad():
            found = [model([image])[0] for model in models.values()]
        kept = [{k: x[k][x["scores"] >= score_threshold] for k in x} for x in found]
        for panel, objects in zip(row, [target, *kept], strict=True):
            panel.imshow(_drawn(image, objects, data.class_names).permute(1, 2, 0).numpy())
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(data.file_names[number], fontsize=8)
    for panel, title in zip(axes[0], columns, strict=True):
        panel.set_title(title, fontsize=12)
    figure.suptitle(f"Detections with a score of at least {score_threshold:.2f}", fontsize=10)
    return save_figure(figure, path)


def _drawn(image: torch.Tensor, objects: Mapping, class_names: Sequence[str]) -> torch.Tensor:
    """The image, enlarged, with boxes, class names and scores on it: (3, H, W) uint8."""
    scale = _PANEL_PIXELS / image.shape[-1]
    size = [round(side * scale) for side in image.shape[-2:]]
    pixels = transforms.to_dtype(transforms.resize(image, size), torch.uint8, scale=True)
    if not len(objects["boxes"]):
        return pixels
    labels = [class_names[number - 1] for number in objects["labels"].tolist()]
    colours = [PALETTE[number % len(PALETTE)] for number in objects["labels"].tolist()]
    if "scores" in objects:
        scores = objects["scores"].tolist()
        labels = [f"{name} {100 * x:.0f}" for name, x in zip(labels, scores, strict=True)]
    boxes = objects["boxes"] * scale
    return draw_bounding_boxes(pixels, boxes, labels, colours, width=3)
