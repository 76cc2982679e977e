"""How far each student's features are from the teacher's, level by level.

Two measures, because one alone misleads. Difference: 1 - cosine of the channel vectors of student
and teacher at each location (0: same direction, 1: unrelated, 2: opposite); it depends on which
channel carries what, so two networks that learnt apart stand near 1 even if they see the same.
CKA (linear centred kernel alignment, arXiv 1905.00414) compares what the locations have in common
and ignores the order and rotation of the channels (1: same up to rotation and scale).

The student's features are the FPN outputs that its heads use, not what a distiller makes of them:
ReviewKD compares the teacher with its own fusion of these maps, so it lowers the difference less
than its loss suggests. Shapes: C channels, P locations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.figures import PALETTE, new_figure, save_figure
from kd_detectron.visualize.models import LoadedModel, read_rgb

_PANEL_INCHES = 2.6


@dataclass(frozen=True)
class FeatureComparison:
    """One student against the teacher, over several images, by level name.

    Attributes:
        difference: mean of 1 - cosine over all locations.
        cka: linear CKA over all locations of all images.
        maps: the difference (H_l, W_l) at each location of the first image.
    """

    difference: dict[str, float]
    cka: dict[str, float]
    maps: dict[str, np.ndarray]


def compare_features(
    student: LoadedModel, teacher: LoadedModel, records: Sequence[dict]
) -> FeatureComparison:
    """Compares the feature maps of two models on the same images.

    Raises:
        ConfigError: there is no image, the models share no level, or a level's sizes differ.
    """
    if not records:
        raise ConfigError("there is no image to compare features on")
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for record in records:
        own, other = student.features(record), teacher.features(record)
        for level in (level for level in own if level in other):
            if own[level].shape != other[level].shape:
                raise ConfigError(
                    f"level {level} is {tuple(own[level].shape)} in {student.label} and "
                    f"{tuple(other[level].shape)} in {teacher.label}: compare models of the same "
                    "FPN channels, strides and INPUT sizes"
                )
            pairs.setdefault(level, []).append((own[level], other[level]))
    if not pairs:
        raise ConfigError(
            f"{student.label} has the levels {', '.join(own)} and {teacher.label} "
            f"{', '.join(other)}: none to compare"
        )
    difference, cka, maps = {}, {}, {}
    for level, both in pairs.items():
        each = [feature_difference(own, other) for own, other in both]
        difference[level] = float(torch.cat([one.flatten() for one in each]).mean())
        own, other = zip(*both, strict=True)
        cka[level] = linear_cka(
            *(torch.cat([x.flatten(1).T for x in side]) for side in (own, other))
        )
        maps[level] = each[0].numpy()
    return FeatureComparison(difference, cka, maps)


def feature_difference(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Returns 1 - cosine of the channel vectors of two maps (C, H, W): (H, W), 0 to 2."""
    return 1 - torch.nn.functional.cosine_similarity(student.float(), teacher.float(), dim=0)


def linear_cka(student: torch.Tensor, teacher: torch.Tensor) -> float:
    """Linear centred kernel alignment of two sets of features (P, C): 0 to 1.

    Returns NaN where one of them is constant. Source: arXiv 1905.00414, eq. 3 and section 3.
    """
    student = (student - student.mean(dim=0)).double()
    teacher = (teacher - teacher.mean(dim=0)).double()
    shared = (teacher.T @ student).square().sum()
    own = (student.T @ student).norm() * (teacher.T @ teacher).norm()
    return float(shared / own) if own > 0 else float("nan")


def draw_feature_differences(
    teacher: LoadedModel,
    students: Sequence[LoadedModel],
    records: Sequence[dict],
    path: str | Path | None = None,
) -> Figure:
    """Draws the difference maps of the first image, and the means over all images as bars.

    Returns:
        The figure: one row per student (the image, the maps level by level), a colour bar, and two
        bar charts.
    """
    found = [compare_features(student, teacher, records) for student in students]
    levels = list(found[0].difference)
    image = read_rgb(records[0])
    ratio = image.shape[0] / image.shape[1]
    maps_height = (_PANEL_INCHES * ratio + 0.3) * len(students) + 0.9
    figure = new_figure(_PANEL_INCHES * (len(levels) + 1) + 1.0, maps_height + 4.0)
    top, bottom = figure.subfigures(2, 1, height_ratios=[maps_height, 4.0])

    scale = Normalize(0, max(one.maps[level].max() for one in found for level in levels))
    no_ticks = {"xticks": [], "yticks": []}
    panels = top.subplots(len(students), len(levels) + 1, squeeze=False, subplot_kw=no_ticks)
    for row, student, one in zip(panels, students, found, strict=True):
        row[0].imshow(image)
        row[0].set_ylabel(student.title, fontsize=11)
        for panel, level in zip(row[1:], levels, strict=True):
            # Drawn over the whole image's extent, so that all levels have its shape.
            extent = {"extent": (0, 1, 0, 1), "aspect": ratio}
            panel.imshow(one.maps[level], cmap="magma", norm=scale, **extent)
            panel.set_xlabel(f"mean {one.maps[level].mean():.2f}", fontsize=10)
    for panel, level in zip(panels[0, 1:], levels, strict=True):
        panel.set_title(level, fontsize=13)
    top.suptitle(f"Feature difference to the {teacher.label}, by level", fontsize=14)
    bar = ScalarMappable(norm=scale, cmap="magma")
    top.colorbar(bar, ax=panels, shrink=0.8, pad=0.01, label="1 - cosine (0: same)")

    charts = bottom.subplots(1, 2)
    _draw_bars(charts[0], [one.difference for one in found], "1 - cosine")
    charts[0].set_title(f"Mean difference over {len(records)} images (lower: closer)")
    _draw_bars(charts[1], [one.cka for one in found], "linear CKA")
    charts[1].set_title(f"Alignment over {len(records)} images (higher: closer)")
    names = [student.label for student in students]
    bottom.legend(charts[0].containers, names, loc="outside lower center", ncols=4, frameon=False)
    return save_figure(figure, path)


def _draw_bars(axes: Axes, values: Sequence[dict[str, float]], label: str) -> None:
    """One group of bars per level, one colour per student."""
    width = 0.8 / len(values)
    positions = np.arange(len(values[0]))
    for index, one in enumerate(values):
        offset = (index - (len(values) - 1) / 2) * width
        colour = PALETTE[index % len(PALETTE)]
        bars = axes.bar(positions + offset, one.values(), 0.92 * width, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks(positions, values[0])
    axes.set(xlabel="FPN level", ylabel=label)
    axes.margins(y=0.12)
