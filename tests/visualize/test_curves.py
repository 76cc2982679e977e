import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kd_detectron.errors import ConfigError
from kd_detectron.runs.groups import named_groups
from kd_detectron.runs.run import load_run
from kd_detectron.visualize.curves import plot_curves


def metrics(distillers=(), *, mask=False, length=30):
    for iteration in range(length):
        values = {"iteration": iteration, "total_loss": 3.0 - iteration / 20, "loss_cls": 1.0}
        values |= {f"loss_{name.lower()}": 0.5 for name in distillers}
        if iteration % 10 == 9:
            values["bbox/AP"] = float(iteration)
            if mask:
                values["segm/AP"] = iteration / 2
        yield values


def curve_run(write_run, name, distillers=(), **options):
    lines = list(metrics(distillers, mask=options.get("mask_ap") is not None))
    return load_run(write_run(name, distillers=distillers, ap=[30.0], metrics=lines, **options))


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_one_panel_per_quantity_and_one_colour_per_method(write_run, tmp_path, check_picture):
    runs = [
        curve_run(write_run, "a"),
        curve_run(write_run, "b", ["CKD", "ReviewKD"], seed=1),
        curve_run(write_run, "c", ["CKD", "ReviewKD"], seed=2),
    ]
    figure = plot_curves(named_groups(runs), tmp_path / "curves.png", teacher_ap={"bbox": 42.0})
    assert titles(figure) == [
        "Box AP on the test data",
        "total_loss",
        "loss_cls",
        "loss_ckd",
        "loss_reviewkd",
    ]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["baseline", "CKD+ReviewKD", "teacher"]
    ap = figure.axes[0]
    colours = [line.get_color() for line in ap.get_lines()]
    assert colours[1] == colours[2] != colours[0]
    assert ap.get_lines()[0].get_ydata().tolist() == [9.0, 19.0, 29.0]
    assert {axes.get_xlabel() for axes in figure.axes} == {"iteration"}
    check_picture(tmp_path / "curves.png")


def test_mask_ap_has_a_panel_of_its_own(write_run):
    figure = plot_curves(named_groups([curve_run(write_run, "a", mask_ap=[20.0])]))
    assert titles(figure)[:2] == ["Box AP on the test data", "Mask AP on the test data"]


def test_pairs_are_named_where_there_are_several(write_run):
    runs = [curve_run(write_run, "a", ["CKD"]), curve_run(write_run, "b", ["CKD"], depth=50)]
    (legend,) = plot_curves(named_groups(runs)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["CKD, R101-R18", "CKD, R101-R50"]


def test_spike_does_not_flatten_a_loss_panel(write_run):
    lines = [{"iteration": i, "total_loss": 1e4 if i == 0 else 1.0 + i / 100} for i in range(100)]
    figure = plot_curves(named_groups([load_run(write_run("a", metrics=lines))]))
    assert figure.axes[0].get_ylim()[1] < 3


def test_panel_texts_do_not_overlap(write_run):
    figure = plot_curves(
        named_groups([curve_run(write_run, "a", ["CKD"]), curve_run(write_run, "b")])
    )
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    boxes.append(figure.legends[0].get_window_extent(renderer))
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_runs_without_metrics_get_one_sentence(write_run):
    with pytest.raises(ConfigError, match="neither AP nor losses"):
        plot_curves(named_groups([load_run(write_run("a"))]))
