"""What all pictures share: resolution, colours, and how a figure is laid out and written."""

from pathlib import Path

from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart also by the colour-blind; black is left for the teacher.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#F0E442")
DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of this size in inches whose parts make room for each other."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def save_figure(figure: Figure, path: str | Path | None) -> Figure:
    """Writes a figure to an image file, if one is named, and returns it."""
    if path is not None:
        # The layout is found step by step: panels of a fixed shape need a second pass, without
        # which texts at the border are cut off.
        figure.draw_without_rendering()
        figure.savefig(path)
    return figure
