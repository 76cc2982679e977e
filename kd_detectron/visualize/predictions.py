"""Side-by-side detections of several models on the same images, beside the ground truth.

Rows are images, columns are the ground truth and the models. One score threshold holds for all
models, and a class has the same colour in every panel (the legend below names them), so that two
panels differ only where the detections do. Drawn by Detectron2's ``Visualizer``.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.figures import new_figure, save_figure
from kd_detectron.visualize.models import LoadedModel, check_classes, read_rgb

GROUND_TRUTH = "ground truth"
# An untrained model gives as many as TEST.DETECTIONS_PER_IMAGE, which would hide the image.
MOST_DETECTIONS = 30
_PANEL_INCHES = 3.6
_PANEL_PIXELS = 720
# Seen both on light and on dark images, and apart from each other.
_COLOURS = (
    (1.00, 0.15, 0.15),
    (0.10, 0.45, 1.00),
    (0.10, 0.80, 0.20),
    (1.00, 0.60, 0.00),
    (0.75, 0.10, 0.90),
    (0.00, 0.80, 0.85),
    (1.00, 0.95, 0.10),
    (1.00, 0.50, 0.75),
    (0.60, 0.40, 0.15),
    (0.55, 0.55, 1.00),
    (0.65, 1.00, 0.45),
    (0.00, 0.45, 0.35),
)


@dataclass(frozen=True)
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

    Args:
        models: the columns, after the ground truth.
        records: the rows; records without ``annotations`` show an empty ground truth.
        class_names: names of the K classes.
        path: an image file to write, if any.
        score_threshold: detections below it are not drawn.

    Returns:
        The figure, one axes per panel, row by row.

    Raises:
        ConfigError: there is no image, or a model has another number of classes.
    """
    if not records:
        raise ConfigError("there is no image to draw: the dataset has no annotated image")
    for model in models:
        check_classes(model, class_names)
    titles = [GROUND_TRUTH, *(f"{m.label}\n{m.ap}".strip() for m in models)]
    rows = []
    for record in records:
        panels = [ground_truth(record)]
        panels += [detections(model.detect(record), score_threshold) for model in models]
        if all(objects.masks is None for objects in panels[1:]):
            # Masks that no model could give would only hide the image.
            panels[0] = replace(panels[0], masks=None)
        rows.append((record, read_rgb(record), panels))

    used = sorted({c for _, _, panels in rows for objects in panels for c in objects.classes})
    colours = class_colours(used, len(class_names))
    heights = [image.shape[0] / image.shape[1] for _, image, _ in rows]
    figure = new_figure(_PANEL_INCHES * len(titles), _PANEL_INCHES * sum(heights) + 1.2)
    grid = figure.add_gridspec(len(rows), len(titles), height_ratios=heights)
    for row, (record, image, panels) in enumerate(rows):
        for column, objects in enumerate(panels):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(draw_objects(image, objects, colours))
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(titles[column], fontsize=13)
            if column == 0:
                axes.set_ylabel(Path(record["file_name"]).name, fontsize=8)
    figure.legend(
        handles=[Patch(color=colours[c]) for c in used],
        labels=[class_names[c] for c in used],
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


def draw_objects(image: np.ndarray, objects: Objects, colours: Mapping[int, tuple]) -> np.ndarray:
    """Draws objects on an image.

    Args:
        image: (H, W, 3) uint8, RGB.
        objects: what to draw.
        colours: colour by class.

    Returns:
        The drawn image, RGB, enlarged or reduced to a width that suits a panel.
    """
    visualizer = Visualizer(image, scale=_PANEL_PIXELS / image.shape[1], font_size_scale=2.5)
    scores = objects.scores
    visualizer.overlay_instances(
        boxes=objects.boxes,
        labels=None if scores is None else [f"{100 * score:.0f}" for score in scores],
        masks=objects.masks,
        assigned_colors=[colours[c] for c in objects.classes],
        alpha=0.4,
    )
    return visualizer.get_output().get_image()


def class_colours(used: Sequence[int], num_classes: int) -> dict[int, tuple]:
    """Returns a colour for each class that a figure uses.

    With few classes a class has the same colour in every figure; with many, the classes of one
    figure differ in colour instead.
    """
    few = num_classes <= len(_COLOURS)
    colours = {}
    for rank, index in enumerate(used):
        number = index if few else rank
        if number < len(_COLOURS):
            colours[index] = _COLOURS[number]
        else:
            # Steps of the golden ratio spread any number of hues evenly.
            colours[index] = colorsys.hsv_to_rgb((number * 0.618034) % 1.0, 0.8, 1.0)
    return colours
