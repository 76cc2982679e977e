"""Result tables: what each method gains over its baseline, beside published numbers.

One row is one group of runs (:mod:`kd_detectron.runs.groups`): mean and sample standard deviation
(n - 1) over its seeds. Gain is the student's AP minus the baseline's, in AP points, paired by seed
where both have the same ones (:mod:`kd_detectron.runs.paired`); gap closed is that gain as a share
of the teacher's AP minus the baseline's. A baseline belongs to a row if it is the same detector
with the same student on the same test data; a teacher, if it is the row's teacher. A value that is
not known is None here, "-" in a table and empty in a CSV file, never 0.

The published numbers (``published.json``: arXiv 2404.14109, Tables IV and V) are box AP of
Faster R-CNN and mask AP of Mask R-CNN on COCO val2017; they stand only beside rows measured there.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from statistics import fmean

from tabulate import tabulate

from kd_detectron.errors import ConfigError
from kd_detectron.runs.groups import (
    MISSING,
    TEACHER,
    confounders,
    group_names,
    group_runs,
    teacher_folders,
)
from kd_detectron.runs.paired import Estimate, mean_and_deviation, ratio_with_interval
from kd_detectron.runs.run import BASELINE, METRICS, TASKS, Run, known_values, load_run

_TIME = "training seconds"


@dataclass
class Row:
    """One line of a table.

    Attributes:
        method, pair, detector: what it is about.
        runs: number of seeds.
        distilled: whether it is neither a baseline nor a teacher.
        values: what is known, by column: "box AP", "box gain", "box gap closed" (in percent),
            "training seconds", "paper box AP" and so on.
    """

    method: str
    pair: str
    detector: str
    runs: int
    distilled: bool
    values: dict[str, Estimate]


@dataclass
class ResultTable:
    """Rows, and the notes that belong under them."""

    rows: list[Row]
    notes: list[str]

    def text(self) -> str:
        """Renders one table per detector, and the notes, for a terminal."""
        return self._render("simple", title="{}\n", line_break="\n", bullet="* ")

    def markdown(self) -> str:
        """Renders one table per detector, and the notes, as Markdown."""
        return self._render("pipe", title="### {}\n", line_break=" ", bullet="- ")

    def _render(self, style: str, *, title: str, line_break: str, bullet: str) -> str:
        blocks = []
        for detector in dict.fromkeys(row.detector for row in self.rows):
            rows = [row for row in self.rows if row.detector == detector]
            columns = _columns(rows)
            body = tabulate(
                [
                    [
                        row.method + (f" (n={row.runs})" if row.runs > 1 else ""),
                        row.pair,
                        *(_shown(column, row.values.get(column)) for column in columns),
                    ]
                    for row in rows
                ],
                headers=[
                    header.replace("seconds", "time").replace(" ", line_break)
                    for header in ("method", "pair", *columns)
                ],
                tablefmt=style,
                colalign=["left", "left", *["right"] * len(columns)],
                disable_numparse=True,
            )
            blocks.append(f"{title.format(detector)}\n{body}")
        if self.notes:
            blocks.append("\n".join(bullet + note for note in self.notes))
        return "\n\n".join(blocks)

    def csv(self) -> str:
        """Renders the rows as CSV: means, deviations and bounds in columns of their own."""
        lines, parts = [], {"": "mean", " sd": "deviation", " low": "low", " high": "high"}
        for row in self.rows:
            line = {"method": row.method, "pair": row.pair, "detector": row.detector}
            line["runs"] = row.runs
            for column in _columns(self.rows):
                for suffix, part in parts.items():
                    value = getattr(row.values.get(column), part, None)
                    line[column + suffix] = None if value is None else round(value, 4)
            lines.append(line)
        # Of columns that hold nothing, those of means alone are kept.
        used = [
            name
            for name in lines[0]
            if not name.endswith(tuple(parts)[1:]) or any(line[name] is not None for line in lines)
        ]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, used, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return buffer.getvalue()


def _columns(rows: Sequence[Row]) -> list[str]:
    """The columns of rows: box AP always, mask AP and published numbers where a row has them."""
    known = {column for row in rows for column in row.values}
    tasks = [name for name in TASKS.values() if name == "box" or f"{name} AP" in known]
    columns = [f"{name} {what}" for name in tasks for what in (*METRICS, "gain", "gap closed")]
    paper = [f"paper {name} {what}" for name in TASKS.values() for what in (*METRICS, "gain")]
    return [*columns, _TIME, *(column for column in paper if column in known)]


def _shown(column: str, value: Estimate | None) -> str:
    """A value as text: "34.10 ± 0.52", "+1.20 (+0.80 to +1.60)", "40%", "1:02:03"."""
    if value is None:
        return MISSING
    if column == _TIME:
        return str(timedelta(seconds=round(value.mean)))
    style = "{:.2f}"
    if column.endswith("gain"):
        style = "{:+.2f}"
    elif column.endswith("gap closed"):
        style = "{:.0f}%"
    text = style.format(value.mean)
    if value.deviation is not None:
        text += f" ± {value.deviation:.2f}"
    if value.low is not None:
        text += f" ({style} to {style})".format(value.low, value.high)
    return text


def build_table(
    runs: Sequence[Run],
    *,
    teachers: Sequence[Run] = (),
    published: Mapping | None = None,
    names: Mapping[Path, str] = {},
) -> ResultTable:
    """Compares runs.

    Args:
        runs: the runs to compare, at least one; those without distillation serve as baselines.
        teachers: what ``load_teacher`` returned; they get a row each.
        published: what ``published_numbers`` returns; None shows none.
        names: what to call the row of a run, by its folder; by default its method, and what sets it
            apart from others of that method.

    Returns:
        The table: for each detector teachers first, then by student baseline and distilled runs.

    """
    groups = group_runs(runs)
    first = groups[0][0]
    detectors = {group[0].detector for group in groups}
    rows, notes = [], []
    teachers = [
        replace(
            teacher,
            detector=teacher.detector or _detector_of_file(teacher, detectors),
            test_dataset=teacher.test_dataset or first.test_dataset,
        )
        for teacher in teachers
    ]
    for teacher in teachers:
        if not teacher.results:
            notes.append(
                f"The teacher {teacher.path} has no AP: it was not evaluated, or its evaluation "
                "found no object. No share of its gap is shown."
            )
        paper = _paper(published, teacher, f"{teacher.student}-*", "Teacher")
        values, pair = _measured([teacher]) | paper, teacher.student or MISSING
        rows.append(Row(TEACHER, pair, teacher.detector, 1, distilled=False, values=values))
    for group, label in zip(groups, group_names(groups), strict=True):
        run = group[0]
        distilled = run.method != BASELINE
        row = Row(
            method=names.get(run.path, label),
            pair=run.pair,
            detector=run.detector,
            runs=len(group),
            distilled=distilled,
            values=_measured(group),
        )
        rows.append(row)
        student = _paper(published, run, f"*-{run.student}", "Student")
        if not distilled:
            row.values |= student
            continue
        row.values |= _paper(published, run, run.pair, run.method)
        for name in TASKS.values():
            own, base = row.values.get(f"paper {name} AP"), student.get(f"paper {name} AP")
            if own and base:
                row.values[f"paper {name} gain"] = Estimate(own.mean - base.mean)
        teacher = _teacher_of(run, teachers, notes)
        baseline = _baseline_of(run, groups, notes)
        if baseline is not None:
            notes += confounders(f"{row.method} {run.pair}", run, baseline[0])
            _add_gains(row, group, baseline, teacher, notes)

    rows.sort(
        key=lambda row: (
            row.detector,
            row.method != TEACHER,
            row.pair.split("-")[-1],
            row.distilled,
            row.pair,
        )
    )
    values = [value for row in rows for value in row.values.values()]
    if any(row.runs > 1 for row in rows):
        notes.append("± is the sample standard deviation over n runs that differ in their seed.")
    if any(value.low is not None for value in values):
        notes.append(
            "gain and gap closed: paired by seed, in brackets the 95 % confidence interval "
            "(Student's t); the teacher's AP counts as given."
        )
    if any(column.startswith("paper") for row in rows for column in row.values):
        notes.append(f"paper: {published['source']}.")
    return ResultTable(rows, list(dict.fromkeys(notes)))


def differences(methods: Mapping[str, Sequence[Run]], against: Mapping[str, str]) -> str:
    """A Markdown table of the difference in AP between rows, paired by seed.

    Args:
        methods: the runs (seeds) by the name of their row.
        against: the row that another one is compared with, by that one's name.

    Returns:
        The table; for each pair and task the mean difference with its 95 % confidence interval and
        the number of shared seeds in which it is positive. Rows that are not in ``methods`` are
        left out.
    """
    lines = []
    for name, other in against.items():
        for task, label in TASKS.items():
            own, base = (_ap_by_seed(methods.get(row, ()), task) for row in (name, other))
            gains = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
            if not gains:
                continue
            estimate = _shown("gain", ratio_with_interval(gains, [1.0] * len(gains)))
            positive = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
            lines.append([name, other, label, estimate, positive])
    headers = ["row", "against", "AP", "difference", "seeds in which it is higher"]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True) if lines else ""


def _detector_of_file(teacher: Run, detectors: set[str]) -> str:
    """The table's detector; in a mixed table box AP alone is that of a Faster R-CNN."""
    if len(detectors) == 1:
        return next(iter(detectors))
    return "Mask R-CNN" if "segm" in teacher.results else "Faster R-CNN"


def load_teacher(path: str | Path, dataset: str = "") -> Run:
    """Reads a teacher's AP from a run folder, as ``load_run``, or from a JSON file.

    The file holds an object with ``"AP"`` (box AP) and any other metrics, or with ``"bbox"`` and
    ``"segm"`` objects of them; an optional ``"name"`` ("R101") and ``"detector"`` ("Mask R-CNN")
    limit it to the rows of that teacher and that detector.

    Raises:
        ConfigError: there is no such file, or it holds no AP.
    """
    path = Path(path)
    if path.is_dir():
        return load_run(path, dataset)
    if not path.is_file():
        raise ConfigError(f"the teacher {path} is neither a run folder nor a JSON file")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"the teacher's file {path} is not readable JSON: {error}") from error
    if not isinstance(record, dict):
        record = {}
    results = known_values({"bbox": record} if "AP" in record else record)
    if not any("AP" in values for values in results.values()):
        raise ConfigError(f'the teacher\'s file {path} holds no "AP": write {{"AP": 42.0}} into it')
    return Run(
        path=path,
        method=TEACHER,
        student=record.get("name"),
        teacher=None,
        detector=record.get("detector"),
        results=results,
        history={},
        config={},
    )


def published_numbers() -> dict:
    """Returns the published results that ship with the package, as in ``published.json``."""
    source = files("kd_detectron.runs").joinpath("published.json")
    return json.loads(source.read_text(encoding="utf-8"))


def _measured(group: Sequence[Run]) -> dict[str, Estimate]:
    """AP by task and metric, and the training time, over the seeds of one row."""
    found = {_TIME: [run.seconds for run in group if run.seconds is not None]}
    for task, name in TASKS.items():
        for metric in METRICS:
            known = [run.results[task] for run in group if metric in run.results.get(task, {})]
            found[f"{name} {metric}"] = [values[metric] for values in known]
    return {column: mean_and_deviation(values) for column, values in found.items() if values}


def _baseline_of(run: Run, groups: Sequence[list[Run]], notes: list[str]) -> list[Run] | None:
    """Returns the runs to measure this one against; notes why where there are none."""
    taught = teacher_folders([run for group in groups for run in group])
    candidates = [
        group
        for group in groups
        if group[0].method == BASELINE
        and group[0].path.resolve() not in taught
        and (group[0].student, group[0].detector, group[0].test_dataset)
        == (run.student, run.detector, run.test_dataset)
    ]
    if len(candidates) == 1:
        return candidates[0]
    what = f"{run.detector} with student {run.student} on {run.test_dataset}"
    if candidates:
        notes.append(f"Several different baselines fit {what}: leave out all but one.")
    else:
        notes.append(f"No baseline run for {what}: no gain is shown.")
    return None


def _teacher_of(run: Run, teachers: Sequence[Run], notes: list[str]) -> Run | None:
    fitting = [t for t in teachers if t.student in (None, run.teacher)]
    fitting = [t for t in fitting if t.detector == run.detector]
    if teachers and len(fitting) != 1:
        notes.append(
            f"{'Several teachers fit' if fitting else 'No teacher fits'} {run.detector} "
            f"{run.pair}: no share of its gap is shown."
        )
    return fitting[0] if len(fitting) == 1 else None


def _add_gains(
    row: Row, runs: Sequence[Run], baseline: Sequence[Run], teacher: Run | None, notes: list[str]
) -> None:
    """Fills in the row's gain over the baseline and the share of the gap that it closes."""
    for task, name in TASKS.items():
        own, start = _ap_by_seed(runs, task), _ap_by_seed(baseline, task)
        if not own or not start:
            continue
        shared = sorted(own.keys() & start.keys())
        if not shared:
            # Nothing to pair: the difference of the means.
            if len(own) > 1 or len(start) > 1:
                notes.append(
                    f"{row.method} {row.pair}: the row and its baseline share no seed; the {name} "
                    "gain is the difference of their means."
                )
            shared, own, start = [0], {0: fmean(own.values())}, {0: fmean(start.values())}
        elif own.keys() != start.keys():
            notes.append(
                f"{row.method} {row.pair}: the {name} gain is over the {len(shared)} "
                f"seed{'s' * (len(shared) > 1)} that the row and its baseline share."
            )
        gains = [own[seed] - start[seed] for seed in shared]
        row.values[f"{name} gain"] = ratio_with_interval(gains, [1.0] * len(gains))
        top = teacher.results.get(task, {}).get("AP") if teacher else None
        if top is None:
            continue
        gaps = [top - start[seed] for seed in shared]
        if fmean(gaps) > 0:
            share = ratio_with_interval([100 * gain for gain in gains], gaps)
            row.values[f"{name} gap closed"] = share
        else:
            notes.append(
                f"{row.method} {row.pair}: the teacher's {name} AP {top:.2f} is not above "
                f"the baseline's {top - fmean(gaps):.2f}, there is no gap to close."
            )


def _ap_by_seed(runs: Sequence[Run], task: str) -> dict[object, float]:
    """AP of each run by its seed; by its folder where seeds are doubled or not fixed."""
    runs = [run for run in runs if "AP" in run.results.get(task, {})]
    seeds = {run.seed for run in runs if run.seed is not None and run.seed >= 0}
    paired = len(seeds) == len(runs)
    return {run.seed if paired else run.path: run.results[task]["AP"] for run in runs}


def _paper(published: Mapping | None, run: Run, pair: str, method: str) -> dict[str, Estimate]:
    """Returns the published numbers of a run's row, where it was measured on COCO val2017.

    ``pair`` may be a pattern: a student or a teacher has the same numbers under each of its pairs.
    """
    tables = {"Faster R-CNN": ("table_iv", "box"), "Mask R-CNN": ("table_v", "mask")}
    if published is None or run.test_dataset != "coco_2017_val" or run.detector not in tables:
        return {}
    key, name = tables[run.detector]
    for known, methods in published[key]["pairs"].items():
        if fnmatchcase(known, pair) and method in methods:
            values = zip(published[key]["metrics"], methods[method], strict=True)
            return {f"paper {name} {m}": Estimate(x) for m, x in values if x is not None}
    return {}
