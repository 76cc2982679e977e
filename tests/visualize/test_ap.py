import pytest

from kd_detectron.errors import ConfigError
from kd_detectron.runs.groups import named_groups
from kd_detectron.runs.run import load_run
from kd_detectron.visualize.ap import plot_ap


@pytest.fixture
def groups(write_run):
    def seeds(name, aps, **options):
        return [
            load_run(write_run(f"{name}{seed}", ap=[ap], mask_ap=[ap / 2], seed=seed, **options))
            for seed, ap in enumerate(aps)
        ]

    return {
        "worse": seeds("w", [20.0, 21.0], distillers=["CKD"]),
        "plain": seeds("p", [30.0, 34.0]),
        "better": seeds("b", [40.0], distillers=["CKD", "ReviewKD"]),
    }


def test_one_panel_per_task_and_the_best_method_on_top(groups, tmp_path, check_picture):
    figure = plot_ap(groups, tmp_path / "ap.png", teacher_ap={"bbox": 45.0, "segm": 23.0})
    assert [axes.get_title() for axes in figure.axes] == [
        "Box AP on the test data",
        "Mask AP on the test data",
    ]
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == ["worse", "plain", "better"]
    check_picture(tmp_path / "ap.png")


def test_every_seed_is_a_dot_beside_the_mean_and_the_teacher_is_a_line(groups):
    axes = plot_ap(groups, teacher_ap={"bbox": 45.0}).axes[0]
    *methods, teacher = axes.get_lines()
    drawn = [line.get_xdata() for line in methods]
    assert [list(values) for values in drawn] == [[20, 21], [20.5], [30, 34], [32], [40], [40]]
    assert list(teacher.get_xdata()) == [45.0, 45.0]
    (band,) = axes.patches
    deviation = 8**0.5
    assert band.get_x() == pytest.approx(32 - deviation)
    assert band.get_width() == pytest.approx(2 * deviation)


def test_students_of_different_backbones_are_rows_of_their_own(write_run):
    runs = [
        load_run(write_run(f"{method}{depth}", ap=[20.0 + depth], depth=depth, distillers=names))
        for depth in (18, 50)
        for method, names in (("b", []), ("c", ["CKD"]))
    ]
    groups = named_groups(runs)
    assert {name: [run.student for run in group] for name, group in groups.items()} == {
        "baseline, R18": ["R18"],
        "CKD, R101-R18": ["R18"],
        "baseline, R50": ["R50"],
        "CKD, R101-R50": ["R50"],
    }


def test_one_seed_has_no_deviation_in_picture_and_legend(groups):
    groups["plain"] = groups["plain"][:1]
    figure = plot_ap(groups)
    assert [band.get_width() for band in figure.axes[0].patches] == [0]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["one seed", "mean of the seeds", "baseline"]


def test_runs_without_an_ap_are_named(write_run):
    run = load_run(write_run("none"))
    with pytest.raises(ConfigError, match="none"):
        plot_ap({"none": [run]})
