"""Correlations between the classes' logits, of several models on the same boxes.

Every model classifies the same ground-truth boxes, so that logits compare box by box. Correlation
(one of the analyses of CKD, arXiv 2404.14109): the correlation between the logits of every two
classes over the boxes, (K+1, K+1) with background last; the closer a student's matrix is to the
teacher's, the more of the relations between classes it has taken over.
Shapes: R boxes over all images, K foreground classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.figures import new_figure, save_figure
from kd_detectron.visualize.models import LoadedModel, check_classes
from kd_detectron.visualize.predictions import ground_truth

_MAX_CLASS_LABELS = 21


def box_logits(model: LoadedModel, records: Sequence[dict]) -> torch.Tensor:
    """Returns a model's logits (R, K+1) for all annotated boxes.

    Raises:
        ConfigError: the images have no annotated box, or the model has no box head.
    """
    logits = []
    for record in records:
        objects = ground_truth(record)
        if objects.classes:
            logits.append(model.logits(record, objects.boxes))
    if not logits:
        raise ConfigError("there is no box to classify: the chosen images have no annotations")
    return torch.cat(logits)


def class_correlation(logits: torch.Tensor) -> np.ndarray:
    """Returns the correlations (K+1, K+1) of the columns of logits (R, K+1).

    A class whose logit never changes correlates with nothing: NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(logits.double().numpy(), rowvar=False)


def draw_correlations(
    teacher: LoadedModel,
    students: Sequence[LoadedModel],
    records: Sequence[dict],
    class_names: Sequence[str],
    path: str | Path | None = None,
) -> Figure:
    """Draws every model's class correlations, and below each student's its distance to the teacher.

    Args:
        teacher: what the students are compared with.
        students: one column each, the baseline first.
        records: the images whose annotated boxes are classified; at least two boxes in all.
        class_names: names of the K classes.
        path: an image file to write, if any.

    Returns:
        The figure: the teacher's matrix, then each student's matrix and its difference.

    Raises:
        ConfigError: as ``box_logits``, there is no student, fewer than two boxes, or the class
            counts differ.
    """
    if not students:
        raise ConfigError("there is no student to compare with the teacher")
    matrices = []
    for model in (teacher, *students):
        check_classes(model, class_names)
        logits = box_logits(model, records)
        if len(logits) < 2:
            raise ConfigError("correlations need two boxes, the chosen images have one")
        matrices.append(class_correlation(logits))
    names = [*class_names, "background"]
    figure = new_figure(3.9 * len(matrices) + 1.5, 8.8)
    axes = figure.subplots(2, len(matrices), squeeze=False)
    differences = [np.abs(matrix - matrices[0]) for matrix in matrices[1:]]
    top = Normalize(-1, 1)
    low = Normalize(0, max(float(np.nanmax(d, initial=0.0)) for d in differences) or 1.0)
    for column, model in enumerate((teacher, *students)):
        _draw_matrix(axes[0, column], matrices[column], "RdBu_r", top)
        axes[0, column].set_title(f"{model.label}\n{model.ap}".strip(), fontsize=13)
        if column:
            difference = differences[column - 1]
            _draw_matrix(axes[1, column], difference, "magma", low)
            axes[1, column].set_title(f"distance to the teacher: {np.nanmean(difference):.3f}")
    # Each class is named once per row and once per column.
    _name_classes(axes[0, 0].yaxis, names)
    _name_classes(axes[1, 1].yaxis, names)
    for panel in (axes[0, 0], *axes[1, 1:]):
        _name_classes(panel.xaxis, names, rotation=90)
    axes[1, 0].axis("off")
    axes[1, 0].text(
        0.5,
        0.5,
        f"Correlation between the logits\nof every two classes over\n{len(logits)} annotated boxes"
        f" of {len(records)} images.\n\nBelow each student: the absolute\ndifference to the"
        " teacher's matrix\nand its mean.",
        ha="center",
        va="center",
        fontsize=11,
    )
    bar = figure.colorbar(ScalarMappable(top, "RdBu_r"), ax=axes[0], shrink=0.8, pad=0.01)
    bar.set_label("correlation")
    bar = figure.colorbar(ScalarMappable(low, "magma"), ax=axes[1], shrink=0.8, pad=0.01)
    bar.set_label("absolute difference")
    return save_figure(figure, path)


def _draw_matrix(axes: Axes, matrix: np.ndarray, cmap: str, norm: Normalize) -> None:
    axes.set_facecolor("0.8")
    axes.imshow(matrix, cmap=cmap, norm=norm, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def _name_classes(axis: Axis, names: list[str], *, rotation: float = 0) -> None:
    if len(names) <= _MAX_CLASS_LABELS:
        axis.set_ticks(range(len(names)), names, rotation=rotation, fontsize=9)
    else:
        axis.set_ticks(range(0, len(names), 10))
        axis.set_label_text("class index, background last")
