"""What a study's runs are expected to reach: ranges of AP from an earlier study, in a JSON file.

``tools/run_study.py STUDY --write-expected FILE`` records the APs of a finished study; a study file
that names such a file (``expected:``) is compared with it at its end, and a run outside its range
makes the command fail. A range is mean plus or minus three sample standard deviations over the
seeds, at least :data:`LEAST_MARGIN` AP points to each side: rounding differs between machines, and
in a training from scratch this can change AP by points.
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from kd_detectron.runs.run import TASKS, Run

LEAST_MARGIN = 3.0


def write_expected(path: str | Path, runs: Mapping[str, list[Run]]) -> None:
    """Writes the ranges of finished runs: name -> task -> "values", "low" and "high".

    Args:
        path: the file to write.
        runs: the finished runs of a study (its seeds) by name.
    """
    ranges: dict = {name: {} for name in runs}
    for name, seeds in runs.items():
        for task in TASKS:
            values = [run.results[task]["AP"] for run in seeds if "AP" in run.results.get(task, {})]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                margin = max(3 * deviation, LEAST_MARGIN)
                mean = statistics.fmean(values)
                ranges[name][task] = {
                    "values": [round(value, 2) for value in values],
                    "low": round(max(mean - margin, 0.0), 1),
                    "high": round(mean + margin, 1),
                }
    Path(path).write_text(json.dumps(ranges, indent=1) + "\n", encoding="utf-8")


def outside_expected(path: str | Path, runs: Mapping[str, list[Run]]) -> list[str]:
    """Says, one sentence each, which finished runs are outside the ranges of a file."""
    ranges = json.loads(Path(path).read_text(encoding="utf-8"))
    sentences = []
    for name, seeds in runs.items():
        for task, expected in ranges.get(name, {}).items():
            low, high = expected["low"], expected["high"]
            for run in seeds:
                value = run.results.get(task, {}).get("AP")
                if value is None or not low <= value <= high:
                    shown = "no AP" if value is None else f"{value:.1f}"
                    what = f"{run.path}: {TASKS[task]} AP is {shown}"
                    sentences.append(f"{what}, expected {low} to {high}")
    return sentences
