"""Class-activation maps of several models for the same object: where each model looks.

Grad-CAM (arXiv 1610.02391). All models explain the same ground-truth
box and class, whether they detected it or not: the box head classifies that box, and the gradient
of the class's logit weighs the channels of the FPN level that the box is pooled from. So the maps
of teacher, baseline and student differ in the models alone (the comparison of CKD, arXiv
2404.14109, Fig. 10). Each map is scaled to its own range, 0 to 1; below it stands the probability
that the model gives to the class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.nn.functional import interpolate

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.figures import image_grid, save_figure
from kd_detectron.visualize.models import LoadedModel, check_classes, read_rgb
from kd_detectron.visualize.predictions import ground_truth


@dataclass(frozen=True)
class ActivationMap:
    """One model's map (H, W), 0 to 1, on one FPN level, and its probability of the class."""

    values: np.ndarray
    level: str
    probability: float


def draw_cams(
    models: Sequence[LoadedModel],
    records: Sequence[dict],
    class_names: Sequence[str],
    path: str | Path | None = None,
) -> Figure:
    """Draws the maps of every model for the largest object of every record, one row per record.

    Raises:
        ConfigError: there is no annotated image, or a model has no box head.
    """
    records = [record for record in records if ground_truth(record).classes]
    if not records:
        raise ConfigError("there is no object to explain: the chosen images have no annotations")
    for model in models:
        check_classes(model, class_names)
    figure, axes = image_grid(records, ["object", *(model.title for model in models)])
    for row, record in zip(axes, records, strict=True):
        box, category = largest_object(record)
        for panel in row:
            panel.imshow(read_rgb(record))
            width, height = box[2:] - box[:2]
            panel.add_patch(Rectangle(box[:2], width, height, fill=False, edgecolor="w", lw=2))
        row[0].set_xlabel(class_names[category], fontsize=11)
        for panel, model in zip(row[1:], models, strict=True):
            found = activation_map(model, record, box, category)
            panel.imshow(found.values, cmap="turbo", alpha=0.5, vmin=0, vmax=1)
            text = f"p({class_names[category]}) = {found.probability:.2f}, level {found.level}"
            panel.set_xlabel(text, fontsize=11)
    label = "class activation, relative to the map's maximum"
    figure.colorbar(ScalarMappable(cmap="turbo"), ax=axes, shrink=0.6, pad=0.01, label=label)
    return save_figure(figure, path)


def activation_map(
    model: LoadedModel, record: dict, box: np.ndarray, category: int
) -> ActivationMap:
    """Computes one model's Grad-CAM map for a box (4,), XYXY in pixels of the image file."""
    logits, maps, batch = model.classify(record, box[None])
    gradients = torch.autograd.grad(
        logits[0, category], list(maps.values()), allow_unused=True, materialize_grads=True
    )
    gradients = dict(zip(maps, gradients, strict=True))
    # The box is pooled from one level; the others have no gradient.
    level = max(maps, key=lambda level: gradients[level].abs().sum().item())
    weights = gradients[level].mean(dim=(2, 3), keepdim=True)
    values = (weights * maps[level]).sum(dim=1, keepdim=True).relu().detach().cpu()
    values = interpolate(values, batch.tensor.shape[-2:], mode="bilinear")
    height, width = batch.image_sizes[0]
    # The padding beside the image is no place to look at: the image alone sets the scale.
    values = values[..., :height, :width]
    values = values / values.max().clamp(min=1e-12)
    values = interpolate(values, (record["height"], record["width"]), mode="bilinear")
    probability = logits[0].detach().softmax(dim=0)[category].item()
    return ActivationMap(values[0, 0].numpy(), level, probability)


def largest_object(record: dict) -> tuple[np.ndarray, int]:
    """Returns box (4,) XYXY and class of the largest annotated object of a record."""
    objects = ground_truth(record)
    sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
    index = int(sides.prod(axis=1).argmax())
    return objects.boxes[index], objects.classes[index]
