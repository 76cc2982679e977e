"""Detections of several trained torchvision detectors side by side, beside the ground truth."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from kd_detectron.visualize.figures import PALETTE, new_figure, save_figure

from .data import DetectionData

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
            _draw(panel, image, objects, data.class_names)
        row[0].set_ylabel(data.file_names[number], fontsize=8)
    for panel, title in zip(axes[0], columns, strict=True):
        panel.set_title(title, fontsize=12)
    figure.suptitle(f"Detections with a score of at least {score_threshold:.2f}", fontsize=10)
    return save_figure(figure, path)


def _draw(axes: Axes, image: torch.Tensor, objects: Mapping, class_names: Sequence[str]) -> None:
    """Draws an image and boxes with class names and scores on it."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])
    for index, (x0, y0, x1, y1) in enumerate(objects["boxes"].tolist()):
        number = int(objects["labels"][index])
        colour = PALETTE[number % len(PALETTE)]
        label = class_names[number - 1]
        if "scores" in objects:
            label += f" {100 * float(objects['scores'][index]):.0f}"
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2)
        )
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1}
        axes.text(x0, y0, label, fontsize=7, color="white", bbox=box, clip_on=True)
