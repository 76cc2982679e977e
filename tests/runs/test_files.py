"""Files of a run folder: what a reader gets from whole, missing and damaged ones."""

import json
import subprocess
import sys

import pytest

from kd_detectron.errors import ConfigError
from kd_detectron.runs import files


def test_config_is_flattened_to_dotted_keys():
    assert files.flatten({"A": {"B": {"C": 1}, "D": [2]}, "E": None}) == {
        "A.B.C": 1,
        "A.D": [2],
        "E": None,
    }


def test_half_written_and_foreign_lines_of_metrics_are_skipped(tmp_path):
    lines = ['{"iteration": 1, "total_loss": 3.0}', "[1]", '{"lr": 1.0}', '{"iteration": 2, "to']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert files.read_metrics(tmp_path) == [{"iteration": 1, "total_loss": 3.0}]
    assert files.read_metrics(tmp_path / "none") == []


def test_result_is_read_as_written_and_nan_is_null(tmp_path):
    assert files.read_result(tmp_path) == {}
    results = {"bbox": {"AP": 30.0, "APs": float("nan")}}
    files.write_result(tmp_path, {"results": results, "finished": True})
    expected = {"results": {"bbox": {"AP": 30.0, "APs": None}}, "finished": True}
    assert files.read_result(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "content",
    [
        *("[1]", "{", {"results": [1]}, {"iterations": "many"}, {"seconds": "1h"}),
        *({"seed": "first"}, {"seed": [1]}),
    ],
)
def test_odd_result_is_one_sentence_with_the_fix(tmp_path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ConfigError, match=r"result\.json.*remove it"):
        files.read_result(tmp_path)


def test_finished_run_whose_result_does_not_tell_its_iterations_is_finished(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 9}\n')
    for record in ({"finished": True}, {"finished": True, "iterations": None}):
        files.write_result(tmp_path, record)
        assert files.is_finished(tmp_path)


def test_last_checkpoint_is_the_one_that_the_tag_names(tmp_path):
    assert files.last_checkpoint(tmp_path) is None
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth\n")
    assert files.last_checkpoint(tmp_path) == tmp_path / "model_0000009.pth"


def test_run_folders_are_read_without_detectron2():
    code = "import sys; sys.modules['detectron2'] = None; import kd_detectron.runs.tables"
    subprocess.run([sys.executable, "-c", code], check=True)
