"""``make demo`` on torchvision's detectors; an unreachable source is noticed in seconds."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_process import git_repository
from test_without_detectron2 import python_without_detectron2

from kd_detectron.errors import NonFiniteLossError
from kd_detectron.studies import demo
from kd_detectron.torchvision.demo import demo_runs

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "tools" / "check_source.py"


def test_demo_runs_where_detectron2_is_not_installed_and_goes_on_from_where_it_was(tmp_path):
    small = ["--train-images", "4", "--val-images", "2", "--iterations", "1"]
    command = [str(ROOT / "tools" / "demo.py"), "--output", str(tmp_path / "demo"), *small]
    done = python_without_detectron2(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        line.split()[0] for line in done.stdout.splitlines() if "R34" in line or " R18 " in line
    ]
    assert rows[:4] == ["teacher", "baseline", "ckd_reviewkd", "recipe"]
    names = ["results.md", "results.csv", "ap.png", "curves.png", "predictions.png"]
    before = {name: (tmp_path / "demo" / name).stat().st_size for name in names}
    assert all(before.values())
    log = (tmp_path / "demo" / "recipe" / "metrics.json").read_text()
    assert python_without_detectron2(*command).returncode == 0
    assert (tmp_path / "demo" / "recipe" / "metrics.json").read_text() == log


def test_demo_students_share_everything_but_distillation(tmp_path):
    runs = demo_runs(tmp_path / "demo", tmp_path / "data")
    assert list(runs) == ["teacher", "baseline", "ckd_reviewkd", "recipe"]
    configs = {name: run.config(8) for name, run in runs.items()}
    for name in ("ckd_reviewkd", "recipe"):
        for node in ("SOLVER", "DATASETS", "TEST", "SEED"):
            assert configs[name][node] == configs["baseline"][node]
        distilled, baseline = configs[name]["MODEL"], configs["baseline"]["MODEL"]
        assert distilled["TORCHVISION"] == baseline["TORCHVISION"]
        assert runs[name].teacher_run == str(tmp_path / "demo" / "teacher")
    assert configs["recipe"]["KD"]["TEACHER"]["INHERIT"]
    assert {run.devices for run in runs.values()} == {"1"}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (NonFiniteLossError("loss_cls is not finite"), 1, "error: loss_cls is not finite"),
        (KeyboardInterrupt(), 75, "interrupted; the same command continues"),
    ],
)
def test_demo_that_stops_says_so_in_one_sentence(tmp_path, monkeypatch, capfd, error, code, words):
    def stops(*_, **__):
        raise error

    monkeypatch.setattr("kd_detectron.torchvision.demo.run_demo", stops)
    arguments = ["--engine", "torchvision", "--output", str(tmp_path)]
    assert demo.main([*arguments, "--train-images", "1", "--val-images", "1"]) == code
    output = capfd.readouterr()
    assert words in output.out + output.err and "Traceback" not in output.err


def check_source(argument) -> int:
    return subprocess.run([sys.executable, str(CHECK), str(argument)]).returncode


@pytest.mark.parametrize("form", ["{}", "detectron2 @ {}", "requirements"])
def test_git_source_that_answers_is_reachable_and_another_is_not_in_seconds(tmp_path, form):
    git_repository(tmp_path / "there")
    for name, expected in (("there", 0), ("gone", 1)):
        source = f"git+file://{tmp_path / name}@main"
        argument = form.format(source)
        if form == "requirements":
            argument = tmp_path / f"{name}.txt"
            argument.write_text(f"# Built against torch.\ndetectron2 @ {source}\n")
        begun = time.monotonic()
        assert check_source(argument) == expected
        assert time.monotonic() - begun < 20


def test_folders_and_names_are_left_to_pip(tmp_path):
    for argument in ("detectron2==0.6", str(tmp_path)):
        assert check_source(argument) == 0
