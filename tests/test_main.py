"""``python -m kd_detectron`` runs the commands."""

import subprocess
import sys

import detectron2  # noqa: F401  most commands need it
import pytest

from kd_detectron.__main__ import COMMANDS, main


def test_unknown_command_is_answered_with_the_known_ones(capsys):
    assert (main([]), main(["trian"])) == (0, 2)
    assert capsys.readouterr().out.count(", ".join(COMMANDS)) == 2


def test_without_detectron2_a_command_says_so_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2.config", None)
    monkeypatch.delitem(sys.modules, "kd_detectron.engine.main", raising=False)
    assert main(["train"]) == 2
    assert "'train' needs Detectron2, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_run_without_the_tools_folder(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and "usage:" in capsys.readouterr().out


def test_deprecations_inside_detectron2_are_not_shown_and_others_are():
    code = "import kd_detectron, warnings; warnings.warn('own')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert line.endswith("UserWarning: own")


def test_the_training_command_is_a_module_that_studies_start():
    command = [sys.executable, "-m", "kd_detectron.engine.main", "--config-file", "nosuch.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "nosuch.yaml" in done.stderr
