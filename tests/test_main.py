"""``python -m kd_detectron`` lists what there is, by the names that configs and commands take."""

import subprocess
import sys

import pytest

from kd_detectron.__main__ import COMMANDS, main
from kd_detectron.config import find_config, list_configs
from kd_detectron.distillers import DISTILLER_REGISTRY
from kd_detectron.modeling.teacher_loading import zoo_configs


def rows(text):
    """The listed (name, text) rows; a row without a name belongs to the one above."""
    return [line[2:].split(None, 1) for line in text.splitlines() if line.startswith("  ")]


def test_everything_is_listed_in_one_command():
    command = [sys.executable, "-m", "kd_detectron"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = {row[0] for row in rows(result.stdout)}
    distillers = {name for name, c in DISTILLER_REGISTRY if c.__module__.startswith("kd_detectron")}
    assert listed >= set(list_configs()) | distillers | set(zoo_configs())


def test_every_config_has_a_summary_and_can_be_found(capsys):
    assert main(["configs"]) == 0
    listed = rows(capsys.readouterr().out)
    assert {"bccd/teacher_r50.yaml", "lazy/ckd_reviewkd_rcnn_r101_r18.py"} <= {x[0] for x in listed}
    for name, text in listed:
        assert find_config(name) and len(text) > 15, name


def test_distillers_come_with_summary_config_node_and_defaults(capsys):
    assert main(["distillers"]) == 0
    text = capsys.readouterr().out
    assert "KD.CKD: WEIGHT 0.1, TEMPERATURE 1.0, TRIPLE tss, GROUP_SIZE 0, CHUNK_SIZE 0" in text
    assert "hierarchical context loss" in text


def test_unknown_kind_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["models"])
    assert stop.value.code == 2
    assert (
        "'models' is none of configs, distillers, teachers and no command"
        in capsys.readouterr().err
    )


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
