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
            logits.append(model.classify(record, objects.boxes)[0].detach().cpu())
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

    Raises:
        ConfigError: as ``box_logits``, fewer than two boxes, or the class counts differ.
    """
    models = [teacher, *students]
    for model in models:
        check_classes(model, class_names)
    logits = [box_logits(model, records) for model in models]
    boxes = len(logits[0])
    if boxes < 2:
        raise ConfigError("correlations need two boxes, the chosen images have one")
    matrices = [class_correlation(one) for one in logits]
    differences = [np.abs(matrix - matrices[0]) for matrix in matrices[1:]]
    figure = new_figure(3.9 * len(models) + 1.5, 9.0)
    axes = figure.subplots(2, len(models), squeeze=False)
    top = Normalize(-1, 1)
    low = Normalize(0, max(float(np.nanmax(d, initial=0.0)) for d in differences) or 1.0)
    names = [*class_names, "background"]
    for panel, model, matrix in zip(axes[0], models, matrices, strict=True):
        _draw_matrix(panel, matrix, "RdBu_r", top, names)
        panel.set_title(model.title, fontsize=13)
    for panel, difference in zip(axes[1, 1:], differences, strict=True):
        _draw_matrix(panel, difference, "magma", low, names)
        panel.set_title(f"distance to the teacher: {np.nanmean(difference):.3f}")
    axes[1, 0].axis("off")
    figure.suptitle(
        "Correlation between the logits of every two classes\n"
        f"over {boxes} boxes of {len(records)} images; below: difference to the teacher's"
    )
    bar = {"shrink": 0.8, "pad": 0.01}
    figure.colorbar(ScalarMappable(top, "RdBu_r"), ax=axes[0], label="correlation", **bar)
    figure.colorbar(ScalarMappable(low, "magma"), ax=axes[1], label="absolute difference", **bar)
    return save_figure(figure, path)


def _draw_matrix(
    axes: Axes, matrix: np.ndarray, cmap: str, norm: Normalize, names: Sequence[str]
) -> None:
    axes.set_facecolor("0.8")
    axes.imshow(matrix, cmap=cmap, norm=norm, interpolation="nearest")
    if len(names) <= _MAX_CLASS_LABELS:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
