"""The files that every comparison of runs ends with are written whatever the runs' AP is."""

from kd_detectron.runs.run import load_run
from kd_detectron.visualize.report import write_table_and_curves

METRICS = [{"iteration": 9, "total_loss": 1.0}, {"iteration": 19, "total_loss": 0.5}]


def test_report_of_a_teacher_that_detected_nothing_is_complete(write_run, tmp_path):
    teacher = write_run("teacher", depth=101, ap=[None], metrics=METRICS)
    student = load_run(write_run("ckd", distillers=["CKD"], ap=[34.0], metrics=METRICS))
    text = write_table_and_curves(tmp_path, {"CKD": [student]}, teacher=teacher)
    assert "found no object" in text and "34.00" in text
    for name in ("results.md", "results.csv", "ap.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_rows_are_compared_with_others_paired_by_seed(write_run, tmp_path):
    aps = {"heads": [20.0, 30.0, 34.0], "both": [21.0, 32.0, 33.0], "new": [40.0]}
    methods = {
        name: [
            load_run(write_run(f"{name}{seed}", ap=[ap], seed=seed, metrics=METRICS))
            for seed, ap in enumerate(values)
        ]
        for name, values in aps.items()
    }
    against = {"both": "heads", "new": "both", "gone": "heads"}
    text = write_table_and_curves(tmp_path, methods, against=against)
    lines = [" ".join(line.replace("|", " ").split()) for line in text.splitlines()[-4:]]
    # +1, +2 and -1: standard deviation 1.528, t with two degrees of freedom 4.303.
    assert lines[2] == "both heads box +0.67 (-3.13 to +4.46) 2 of 3"
    assert lines[3] == "new both box +19.00 1 of 1"
    assert (tmp_path / "results.md").read_text().endswith(text.splitlines()[-1] + "\n")
    assert "against" not in write_table_and_curves(tmp_path, methods)


def test_report_of_students_that_detected_nothing_has_no_picture_of_their_ap(write_run, tmp_path):
    (tmp_path / "ap.png").write_text("of an earlier report")
    student = load_run(write_run("ckd", distillers=["CKD"], ap=[None], metrics=METRICS))
    assert "CKD" in write_table_and_curves(tmp_path, {"CKD": [student]})
    assert (tmp_path / "curves.png").is_file() and not (tmp_path / "ap.png").exists()
