"""Training curves of several runs in one figure: AP over the iterations, and every loss.

One panel per quantity, one colour per method in all panels; the seeds of a method share its colour.
Losses are drawn as they stand in ``metrics.json`` (faint) and as a moving average over 1/20 of the
points (bold); AP is never smoothed. Distillation losses are logged weighted, as they enter the sum.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kd_detectron.errors import ConfigError
from kd_detectron.runs.run import TASKS, Run, distiller_names
from kd_detectron.visualize.figures import PALETTE, new_figure, save_figure

_TITLES = {
    "total_loss": "Total loss",
    "loss_cls": "Box classification loss",
    "loss_box_reg": "Box regression loss",
    "loss_mask": "Mask loss",
    "loss_rpn_cls": "RPN classification loss",
    "loss_rpn_loc": "RPN box regression loss",
}


def plot_curves(
    groups: Mapping[str, Sequence[Run]],
    path: str | Path | None = None,
    *,
    teacher_ap: Mapping[str, float] = {},
) -> Figure:
    """Draws the training curves of several runs.

    Args:
        groups: the runs (seeds) of each method, by the name to show; those that logged nothing of a
            quantity are absent from its panel.
        path: an image file to write, if any.
        teacher_ap: the teacher's AP by task ("bbox", "segm"), a dashed line in the AP panels.

    Returns:
        The figure, one axes per panel.

    Raises:
        ConfigError: no run has logged an AP or a loss.
    """
    runs = [run for group in groups.values() for run in group]
    panels = [f"{task}/AP" for task in TASKS if any(run.series(f"{task}/AP")[0] for run in runs)]
    losses = dict.fromkeys(name for run in runs for name in run.loss_names())
    # The detector's own losses first, in training order; then the distillers'.
    panels += [name for name in _TITLES if name in losses]
    panels += [name for name in losses if name not in _TITLES]
    if not panels:
        folders = ", ".join(str(run.path) for run in runs) or "no run at all"
        raise ConfigError(f"metrics.json holds neither AP nor losses in {folders}")

    names = list(groups)
    styles = {name: _style(index) for index, name in enumerate(names)}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.6 * columns, 3.3 * rows + 0.9)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name, group in groups.items():
            for run in group:
                _draw(axes, *run.series(panel), styles[name], smooth="/" not in panel)
        task, _, metric = panel.partition("/")
        if metric:
            axes.set_title(f"{TASKS[task].capitalize()} AP on the test data")
            axes.set_ylabel("AP (points)")
            if task in teacher_ap:
                axes.axhline(teacher_ap[task], color="black", linestyle="--", linewidth=1.2)
        else:
            axes.set_title(_TITLES.get(panel) or _distillation_title(panel, runs))
            axes.set_ylabel("loss" if panel in _TITLES else "weighted loss")
            axes.set_ylim(**_robust_limits([run.series(panel)[1] for run in runs]))
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], linewidth=2.4, **styles[name]) for name in names]
    if teacher_ap:
        handles.append(Line2D([], [], color="black", linestyle="--"))
        names.append("teacher")
    figure.legend(
        handles,
        names,
        loc="outside upper center",
        ncols=min(len(names), 4),
        frameon=False,
        fontsize=11,
    )
    return save_figure(figure, path)


def _draw(
    axes: Axes, iterations: Sequence[int], values: Sequence[float], style: Mapping, *, smooth: bool
) -> None:
    if not iterations:
        return
    window = len(values) // 20
    if smooth and window > 1:
        axes.plot(iterations, values, linewidth=0.8, alpha=0.25, **style)
        axes.plot(iterations, _moving_average(values, window), linewidth=1.8, **style)
    else:
        marker = "o" if len(iterations) <= 40 else None
        axes.plot(iterations, values, linewidth=1.8, marker=marker, markersize=3.5, **style)


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average; the window shrinks at both ends, so that nothing is shifted."""
    averages = []
    for index in range(len(values)):
        half = min(window // 2, index, len(values) - 1 - index)
        averages.append(statistics.fmean(values[index - half : index + half + 1]))
    return averages


def _distillation_title(loss: str, runs: Sequence[Run]) -> str:
    """Names a distiller's loss as its config does: ``loss_reviewkd`` is ReviewKD's."""
    names = {name.lower(): name for run in runs for name in distiller_names(run.config)}
    key = loss.removeprefix("loss_")
    return f"Distillation loss {names.get(key, key)}"


def _style(index: int) -> dict:
    linestyles = ("-", "--", ":", "-.")
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": linestyles[index // len(PALETTE) % len(linestyles)],
    }


def _robust_limits(series: Sequence[Sequence[float]]) -> dict[str, float]:
    """The y range of a loss panel: a spike at the start must not flatten everything else."""
    values = sorted(value for one in series for value in one)
    if len(values) < 20:
        return {}
    low, high = values[0], values[int(0.98 * (len(values) - 1))]
    is_spike = values[-1] - low > 2 * (high - low) > 0
    margin = 0.08 * (high - low)
    return {"bottom": low - margin, "top": high + margin} if is_spike else {}
