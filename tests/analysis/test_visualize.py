import importlib.util
from pathlib import Path

import pytest


@pytest.fixture
def visualize():
    path = Path(__file__).parents[2] / "tools" / "visualize.py"
    spec = importlib.util.spec_from_file_location("visualize", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def runs(write_trained_run):
    """A teacher, a baseline, and a distilled run that names the teacher."""
    teacher = write_trained_run("teacher", depth=101, seed=5, ap=[40.0])
    metrics = [{"iteration": 9, "bbox/AP": 1.0, "total_loss": 2.0}]
    baseline = write_trained_run("baseline", ap=[30.0], metrics=metrics)
    weights = ["KD.TEACHER.WEIGHTS", str(teacher / "student_final.pth")]
    distilled = write_trained_run(
        "distilled",
        distillers=["CKD"],
        teacher=str(teacher / "config.yaml"),
        opts=weights,
        ap=[34.0],
        seed=3,
        metrics=metrics,
    )
    return [str(path) for path in (teacher, baseline, distilled)]


@pytest.mark.parametrize(
    "command",
    [
        ["predictions", "--count", "2", "--threshold", "0.1"],
        ["predictions", "--no-teacher", "--labels", "before", "after"],
        ["cam", "--count", "1"],
        ["features", "--images", "3.png", "1.png"],
        ["logits"],
        ["logits", "--tsne"],
        ["curves"],
    ],
    ids=" ".join,
)
def test_every_subcommand_writes_its_picture(
    visualize, runs, command, tmp_path, capsys, check_picture
):
    output = tmp_path / "pictures" / "picture.png"
    _, baseline, distilled = runs
    name, *options = command
    assert visualize([name, baseline, distilled, "--output", str(output), *options]) == 0
    check_picture(output)
    assert str(output) in capsys.readouterr().out


def test_teacher_can_be_named(visualize, runs, tmp_path):
    teacher, baseline, _ = runs
    output = str(tmp_path / "picture.png")
    assert visualize(["features", baseline, "--teacher", teacher, "--output", output]) == 0
    weights = ["--teacher-weights", f"{teacher}/student_final.pth", "--output", output]
    assert visualize(["features", baseline, "--teacher", f"{teacher}/config.yaml", *weights]) == 0
    assert visualize(["curves", baseline, "--teacher", teacher, "--output", output]) == 0


def test_user_error_is_one_sentence_and_exit_code_2(visualize, runs, tmp_path, capsys):
    _, baseline, distilled = runs
    output = ["--output", str(tmp_path / "picture.png")]
    assert visualize(["features", baseline, *output]) == 2
    assert "give --teacher" in capsys.readouterr().err
    assert visualize(["predictions", baseline, distilled, "--labels", "one", *output]) == 2
    assert "give one label each" in capsys.readouterr().err
    assert not (tmp_path / "picture.png").exists()
