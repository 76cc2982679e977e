"""What all pictures share: resolution, colours, and how a figure is laid out and written."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's palette, also for the colour-blind; black is kept for the teacher.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")
DPI = 150
PANEL_INCHES = 3.5


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of this size in inches whose parts make room for each other."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def image_grid(records: Sequence[dict], titles: Sequence[str]) -> tuple[Figure, np.ndarray]:
    """Returns a figure and its axes: a row per record, as high as its image, a column per title."""
    heights = [record["height"] / record["width"] for record in records]
    height = PANEL_INCHES * sum(heights) + 0.35 * len(records) + 1.0
    figure = new_figure(PANEL_INCHES * len(titles) + 0.8, height)
    axes = figure.subplots(
        len(records),
        len(titles),
        squeeze=False,
        subplot_kw={"xticks": [], "yticks": []},
        gridspec_kw={"height_ratios": heights},
    )
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=13)
    for panel, record in zip(axes[:, 0], records, strict=True):
        panel.set_ylabel(Path(record["file_name"]).name, fontsize=8)
    return figure, axes


def save_figure(figure: Figure, path: str | Path | None) -> Figure:
    """Writes a figure to an image file, if one is named, and returns it."""
    if path is not None:
        # Panels of a fixed shape need a second pass of the layout, without which texts at the
        # border are cut off.
        figure.draw_without_rendering()
        figure.savefig(path)
    return figure
