"""Expected AP ranges: three deviations over the seeds, never narrower than the least margin."""

import json
from types import SimpleNamespace

from kd_detectron.studies.expected import (
    LEAST_MARGIN,
    outside_expected,
    write_expected,
)


def run(ap, task="bbox", name="run"):
    return SimpleNamespace(path=name, results={task: {"AP": ap}})


def test_ranges_are_three_deviations_and_at_least_the_margin(tmp_path):
    runs = {"a": [run(28.0), run(30.0), run(32.0)], "b": [run(1.0, "segm")]}
    write_expected(tmp_path / "ranges.json", runs)
    ranges = json.loads((tmp_path / "ranges.json").read_text())
    assert ranges["a"]["bbox"] == {"values": [28.0, 30.0, 32.0], "low": 24.0, "high": 36.0}
    assert ranges["b"]["segm"] == {"values": [1.0], "low": 0.0, "high": 1.0 + LEAST_MARGIN}


def test_runs_outside_are_named_and_unknown_ones_left_alone(tmp_path):
    write_expected(tmp_path / "ranges.json", {"a": [run(30.0)]})
    runs = {"a": [run(32.0), run(20.0, name="bad"), run(30.0, "segm", "none")], "new": [run(0.0)]}
    sentences = outside_expected(tmp_path / "ranges.json", runs)
    assert [sentence.split(":")[0] for sentence in sentences] == ["bad", "none"]
    assert "20.0, expected 27.0 to 33.0" in sentences[0] and "no AP" in sentences[1]
