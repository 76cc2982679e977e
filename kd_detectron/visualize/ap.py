"""AP of several methods in one picture: one dot per seed, a bar for their mean, best at the top.

The baseline is a band (mean and standard deviation over its seeds; a line for one seed) behind all
rows, the teacher a dashed line: what lies between the two is the gap that distillation is to close.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kd_detectron.errors import ConfigError
from kd_detectron.runs.run import BASELINE, TASKS, Run
from kd_detectron.visualize.figures import PALETTE, new_figure, save_figure

_BASELINE, _DISTILLED = PALETTE[6], PALETTE[0]


def plot_ap(
    groups: Mapping[str, Sequence[Run]],
    path: str | Path | None = None,
    *,
    teacher_ap: Mapping[str, float] = {},
) -> Figure:
    """Draws the final AP of each method, one panel per task.

    Args:
        groups: the runs (seeds) of each method, by the name to show.
        path: an image file to write, if any.
        teacher_ap: the teacher's AP by task ("bbox", "segm").

    Raises:
        ConfigError: no run holds an AP.
    """
    found = {
        task: {name: values for name, runs in groups.items() if (values := _values(runs, task))}
        for task in TASKS
    }
    found = {task: methods for task, methods in found.items() if methods}
    if not found:
        folders = ", ".join(str(run.path) for runs in groups.values() for run in runs)
        raise ConfigError(f"there is no AP to draw in {folders or 'no run at all'}")
    plain = [name for name, runs in groups.items() if all(r.method == BASELINE for r in runs)]
    rows = max(len(methods) for methods in found.values())
    figure = new_figure(7.2 * len(found), 0.36 * rows + 1.5)
    for column, (task, methods) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), column)
        order = sorted(methods, key=lambda name: fmean(methods[name]))
        for row, name in enumerate(order):
            values, colour = methods[name], _BASELINE if name in plain else _DISTILLED
            mean = fmean(values)
            if name in plain:
                spread = stdev(values) if len(values) > 1 else 0.0
                line = 0 if spread else 2
                axes.axvspan(mean - spread, mean + spread, color=colour, alpha=0.3, linewidth=line)
            axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.6)
            axes.plot(mean, row, "|", color=colour, markersize=16, markeredgewidth=2.5)
        axes.set_yticks(range(len(order)), [fill(name, 32) for name in order])
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(f"{TASKS[task].capitalize()} AP on the test data")
        axes.set_xlabel("AP (points)")
        if task in teacher_ap:
            axes.axvline(teacher_ap[task], color="black", linestyle="--", linewidth=1.2)
    handles = {
        "one seed": Line2D([], [], color=_DISTILLED, marker="o", linestyle=""),
        "mean of the seeds": Line2D(
            [], [], color=_DISTILLED, marker="|", markersize=14, linestyle="", linewidth=2
        ),
    }
    if plain:
        several = any(len(groups[name]) > 1 for name in plain)
        label = "baseline ± standard deviation" if several else "baseline"
        handles[label] = Line2D([], [], color=_BASELINE, linewidth=8 if several else 2, alpha=0.3)
    if teacher_ap:
        handles["teacher"] = Line2D([], [], color="black", linestyle="--")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2, frameon=False)
    return save_figure(figure, path)


def _values(runs: Sequence[Run], task: str) -> list[float]:
    return [run.results[task]["AP"] for run in runs if "AP" in run.results.get(task, {})]
