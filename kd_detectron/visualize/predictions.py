"""Side-by-side detections of several models on the same images, beside the ground truth.

Rows are images, columns are the ground truth and the models. One score threshold holds for all
models, and a class has the same colour in every panel (the legend below names them), so that two
panels differ only where the detections do. Drawn by Detectron2's ``Visualizer``.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.figures import image_grid, save_figure
from kd_detectron.visualize.models import LoadedModel, check_classes, read_rgb

# An untrained model gives as many as TEST.DETECTIONS_PER_IMAGE, which would hide the image.
MOST_DETECTIONS = 30
_PANEL_PIXELS = 720


@dataclass
class Objects:
    """What one panel shows, G objects: boxes (G, 4) XYXY in pixels, classes, scores and masks.

    ``scores`` is None for ground truth; ``masks`` is None, or one entry per object in any form that
    Detectron2's ``Visualizer`` draws.
    """

    boxes: np.ndarray
    classes: list[int]
    scores: list[float] | None = None
    masks: list | None = None


def draw_predictions(
    models: Sequence[LoadedModel],
    records: Sequence[dict],
    class_names: Sequence[str],
    path: str | Path | None = None,
    *,
    score_threshold: float = 0.5,
) -> Figure:
    """Draws the detections of every model on every record, beside the ground truth.

    Detections below the score threshold are not drawn.

    Raises:
        ConfigError: there is no image, or a model has another number of classes.
    """
    if not records:
        raise ConfigError("there is no image to draw: the dataset has no annotated image")
    for model in models:
        check_classes(model, class_names)
    titles = ["ground truth", *(model.title for model in models)]
    figure, axes = image_grid(records, titles)
    used = set()
    for row, record in zip(axes, records, strict=True):
        truth = ground_truth(record)
        found = [detections(model.detect(record), score_threshold) for model in models]
        if all(objects.masks is None for objects in found):
            # Masks that no model could give would only hide the image.
            truth.masks = None
        for panel, objects in zip(row, [truth, *found], strict=True):
            panel.imshow(draw_objects(read_rgb(record), objects))
            used.update(objects.classes)
    figure.legend(
        handles=[Patch(color=class_colour(c)) for c in sorted(used)],
        labels=[class_names[c] for c in sorted(used)],
        loc="outside lower center",
        ncols=min(max(len(used), 1), 2 * len(titles)),
        title=f"Detections with a score of at least {score_threshold:.2f}, at most the best "
        f"{MOST_DETECTIONS} per image; numbers are scores in %",
        frameon=False,
        fontsize=10,
    )
    return save_figure(figure, path)


def ground_truth(record: dict) -> Objects:
    """Returns the annotated objects of a record; crowd regions are left out."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    masks = [a.get("segmentation") for a in annotations]
    return Objects(
        boxes=np.array(boxes, dtype=float).reshape(-1, 4),
        classes=[a["category_id"] for a in annotations],
        masks=masks if masks and all(masks) else None,
    )


def detections(instances: Instances, score_threshold: float) -> Objects:
    """Returns the detections that reach the threshold, at most the MOST_DETECTIONS best ones."""
    kept = instances[instances.scores >= score_threshold]
    kept = kept[kept.scores.argsort(descending=True)[:MOST_DETECTIONS]]
    return Objects(
        boxes=kept.pred_boxes.tensor.numpy(),
        classes=kept.pred_classes.tolist(),
        scores=kept.scores.tolist(),
        masks=list(kept.pred_masks.numpy()) if kept.has("pred_masks") else None,
    )


def draw_objects(image: np.ndarray, objects: Objects) -> np.ndarray:
    """Draws objects on an image (H, W, 3), uint8 RGB, and scales it to a panel's width."""
    visualizer = Visualizer(image, scale=_PANEL_PIXELS / image.shape[1], font_size_scale=2.5)
    visualizer.overlay_instances(
        boxes=objects.boxes,
        labels=objects.scores and [f"{100 * score:.0f}" for score in objects.scores],
        masks=objects.masks,
        assigned_colors=[class_colour(c) for c in objects.classes],
        alpha=0.4,
    )
    return visualizer.get_output().get_image()


def class_colour(index: int) -> tuple[float, float, float]:
    """Returns a class's colour (RGB, 0 to 1): steps of the golden ratio around the hues."""
    return colorsys.hsv_to_rgb((index * 0.618034) % 1.0, 0.85, 1.0)
