"""Training curves of several runs in one figure: AP over the iterations, and every loss.

One panel per quantity, one colour per method in all panels; the seeds of a method share its colour.
Losses have the names and values of ``metrics.json`` (faint) and a moving average over 1/20 of the
points (bold); AP is never smoothed. Distillation losses are logged weighted, as they enter the sum.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kd_detectron.errors import ConfigError
from kd_detectron.runs.run import TASKS, Run
from kd_detectron.visualize.figures import PALETTE, new_figure, save_figure


def plot_curves(
    groups: Mapping[str, Sequence[Run]],
    path: str | Path | None = None,
    *,
    teacher_ap: Mapping[str, float] = {},
) -> Figure:
    """Draws the training curves of several runs.

    Args:
        groups: the runs (seeds) of each method, by the name to show.
        path: an image file to write, if any.
        teacher_ap: the teacher's AP by task ("bbox", "segm"), a dashed line in the AP panels.

    Raises:
        ConfigError: no run has logged an AP or a loss.
    """
    runs = [run for group in groups.values() for run in group]
    panels = [f"{task}/AP" for task in TASKS if any(run.series(f"{task}/AP")[0] for run in runs)]
    losses = [name for run in runs for name in run.loss_names() if run.series(name)[0]]
    panels += dict.fromkeys(losses)
    if not panels:
        folders = ", ".join(str(run.path) for run in runs) or "no run at all"
        raise ConfigError(f"metrics.json holds neither AP nor losses in {folders}")

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.6 * columns, 3.3 * rows + 0.9)
    styles = cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=PALETTE)
    styles = {name: style for name, style in zip(groups, styles(), strict=False)}
    for index, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, index)
        task, _, metric = panel.partition("/")
        for name, group in groups.items():
            for run in group:
                _draw(axes, *run.series(panel), styles[name], smooth=not metric)
        if metric:
            axes.set_title(f"{TASKS[task].capitalize()} AP on the test data")
            if task in teacher_ap:
                axes.axhline(teacher_ap[task], color="black", linestyle="--", linewidth=1.2)
        else:
            axes.set_title(panel)
            # A spike at the start must not flatten everything else.
            values = np.concatenate([run.series(panel)[1] for run in runs])
            low, high = values.min(), np.quantile(values, 0.98)
            if values.max() - low > 2 * (high - low) > 0:
                axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    handles = {name: Line2D([], [], linewidth=2.4, **style) for name, style in styles.items()}
    if teacher_ap:
        handles["teacher"] = Line2D([], [], color="black", linestyle="--")
    figure.legend(
        handles.values(),
        handles,
        loc="outside upper center",
        ncols=min(len(handles), 4),
        frameon=False,
        fontsize=11,
    )
    return save_figure(figure, path)


def _draw(
    axes: Axes, iterations: Sequence[int], values: Sequence[float], style: Mapping, *, smooth: bool
) -> None:
    window = len(values) // 20
    if smooth and window > 1:
        axes.plot(iterations, values, linewidth=0.8, alpha=0.25, **style)
        iterations = iterations[window // 2 : window // 2 + len(values) - window + 1]
        values = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(iterations, values, linewidth=1.8, **style)
    else:
        marker = "o" if len(iterations) <= 40 else None
        axes.plot(iterations, values, linewidth=1.8, marker=marker, markersize=3.5, **style)
