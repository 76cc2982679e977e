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
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from statistics import fmean

from tabulate import tabulate

from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import read_result
from kd_detectron.runs.groups import (
    MISSING,
    TEACHER,
    confounders,
    group_names,
    group_runs,
    teacher_folders,
)
from kd_detectron.runs.paired import Estimate, mean_with_interval, share_with_interval
from kd_detectron.runs.run import BASELINE, METRICS, TASKS, Run, known_values, load_run


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation of one quantity over ``count`` seeds."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Statistic | None":
        """Returns the statistic of the known values, None if there are none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        deviation = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), deviation, len(known))


@dataclass(frozen=True)
class TeacherResult:
    """A teacher's AP.

    Attributes:
        results: AP by task and metric, as in ``Run``.
        name: its backbone, such as "R101"; None if it is any row's teacher.
        detector: such as "Faster R-CNN"; None if it is any row's teacher.
        run: the run that trained it, if known.
    """

    results: Mapping[str, Mapping[str, float]]
    name: str | None = None
    detector: str | None = None
    run: Run | None = None


@dataclass
class Row:
    """One line of a table; keys of ``metrics`` and ``paper`` are (task, metric), others tasks."""

    method: str
    pair: str
    detector: str
    runs: int
    distilled: bool
    metrics: dict[tuple[str, str], Statistic]
    gain: dict[str, Estimate] = field(default_factory=dict)
    gap_closed: dict[str, Estimate] = field(default_factory=dict)
    seconds: Statistic | None = None
    paper: dict[tuple[str, str], float] = field(default_factory=dict)
    paper_gain: dict[str, float] = field(default_factory=dict)


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
            rows = _printed([row for row in self.rows if row.detector == detector])
            body = tabulate(
                [row.values() for row in rows],
                headers=[header.replace(" ", line_break) for header in rows[0]],
                tablefmt=style,
                colalign=["left", "left", *["right"] * (len(rows[0]) - 2)],
                disable_numparse=True,
            )
            blocks.append(f"{title.format(detector)}\n{body}")
        if self.notes:
            blocks.append("\n".join(bullet + note for note in self.notes))
        return "\n\n".join(blocks)

    def csv(self) -> str:
        """Renders the rows as CSV: means, deviations and bounds in columns of their own."""
        rows = _numbers(self.rows)
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            cells = row.values()
            writer.writerow(round(cell, 4) if isinstance(cell, float) else cell for cell in cells)
        return buffer.getvalue()


def build_table(
    runs: Sequence[Run],
    *,
    baselines: Sequence[Run] = (),
    teachers: Sequence[TeacherResult] = (),
    published: Mapping | None = None,
    names: Mapping[Path, str] = {},
) -> ResultTable:
    """Compares runs.

    Args:
        runs: the runs to compare; those without distillation serve as baselines.
        baselines: further runs to measure gains against; they get a row, too, and take precedence
            over those among ``runs``.
        teachers: the teachers' AP, for the share of the gap that is closed; they get a row each.
        published: the published numbers, as ``published_numbers`` returns them; None shows none.
        names: what to call the row of a run, by its folder; by default its method, and what sets it
            apart from others of that method.

    Returns:
        The table: for each detector teachers first, then by student baseline and distilled runs.

    Raises:
        ConfigError: there is no run, or one of ``baselines`` was trained with distillation.
    """
    if not runs and not baselines:
        raise ConfigError("there is no run to put into a table: name at least one run folder")
    for run in baselines:
        if run.method != BASELINE:
            raise ConfigError(
                f"the baseline {run.path} was trained with KD.DISTILLERS {run.method}: a baseline "
                "is the same student trained with KD.ENABLED False"
            )
    named = {run.path.resolve() for run in baselines}
    groups = group_runs([*baselines, *(run for run in runs if run.path.resolve() not in named)])
    if len({group[0].detector for group in groups}) > 1:
        teachers = [_with_detector(teacher) for teacher in teachers]
    notes: list[str] = []
    rows = [_teacher_row(teacher, groups[0][0], published) for teacher in teachers]
    notes += [
        f"The teacher {teacher.run.path} has no AP: its evaluation found no object. No share of "
        "its gap is shown."
        for teacher in teachers
        if teacher.run and not teacher.results
    ]
    for group, label in zip(groups, group_names(groups), strict=True):
        run = group[0]
        label = names.get(run.path, label)
        row = Row(
            method=label,
            pair=run.pair,
            detector=run.detector,
            runs=len(group),
            distilled=run.method != BASELINE,
            metrics=_statistics(group),
            seconds=Statistic.of(run.seconds for run in group),
        )
        rows.append(row)
        pair, method = (
            (f"*-{run.student}", "Student") if run.method == BASELINE else (run.pair, run.method)
        )
        row.paper = _paper(published, run.test_dataset, run.detector, pair, method)
        if run.method != BASELINE:
            student = _paper(published, run.test_dataset, run.detector, pair, "Student")
            row.paper_gain = {
                task: row.paper[task, "AP"] - student[task, "AP"]
                for task in TASKS
                if (task, "AP") in row.paper and (task, "AP") in student
            }
            teacher = _teacher_of(run, teachers, notes)
            baseline = _baseline_of(run, groups, named, notes)
            if baseline is not None:
                notes += confounders(f"{label} {run.pair}", run, baseline[0])
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
    if any(row.runs > 1 for row in rows):
        notes.append("± is the sample standard deviation over n runs that differ in their seed.")
    if any(gain.low is not None for row in rows for gain in row.gain.values()):
        notes.append(
            "gain and gap closed: paired by seed, in brackets the 95 % confidence interval "
            "(Student's t); the teacher's AP counts as given."
        )
    if any(row.paper for row in rows):
        notes.append(f"paper: {published['source']}.")
    return ResultTable(rows, list(dict.fromkeys(notes)))


def load_teacher_result(path: str | Path, dataset: str = "") -> TeacherResult:
    """Reads a teacher's AP from a run folder or from a JSON file.

    Args:
        path: a run folder (of a teacher that detected nothing there are no results), or a JSON
            object with ``"AP"`` (box AP) and any other metrics, or with
            ``"bbox"`` and ``"segm"`` objects of them, or with these under ``"results"``; an
            optional ``"name"`` ("R101") and ``"detector"`` ("Mask R-CNN") limit it to the rows of
            that teacher and that detector.
        dataset: whose AP to read of a run folder, as in ``load_run``.

    Raises:
        ConfigError: there is no such file, or it holds no AP.
    """
    path = Path(path)
    if path.is_dir():
        run = load_run(path, dataset)
        if not run.results and not _was_evaluated(run):
            raise ConfigError(
                f"the teacher's run folder {path} holds no AP: it was never evaluated"
            )
        return TeacherResult(run.results, run.student, run.detector, run)
    if not path.is_file():
        raise ConfigError(f"the teacher {path} is neither a run folder nor a JSON file")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"the teacher's file {path} is not readable JSON: {error}") from error
    if isinstance(record, dict):
        results = record.get("results", record)
        if isinstance(results, dict) and "AP" in results:
            results = {"bbox": results}
        kept = {task: values for task, values in known_values(results).items() if "AP" in values}
        if kept:
            return TeacherResult(kept, record.get("name"), record.get("detector"))
    raise ConfigError(f'the teacher\'s file {path} holds no "AP": write {{"AP": 42.0}} into it')


def _was_evaluated(run: Run) -> bool:
    """Whether the run has results; Detectron2's AP is NaN where nothing was detected."""
    return bool(read_result(run.path).get("results")) or any(
        f"{task}/AP" in values for values in run.history.values() for task in TASKS
    )


def published_numbers() -> dict:
    """Returns the published results that ship with the package, as in ``published.json``."""
    source = files("kd_detectron.runs").joinpath("published.json")
    return json.loads(source.read_text(encoding="utf-8"))


def _statistics(group: Sequence[Run]) -> dict[tuple[str, str], Statistic]:
    found = {
        (task, metric): Statistic.of(run.results.get(task, {}).get(metric) for run in group)
        for task in TASKS
        for metric in METRICS
    }
    return {key: value for key, value in found.items() if value is not None}


def _baseline_of(
    run: Run, groups: Sequence[list[Run]], named: set[Path], notes: list[str]
) -> list[Run] | None:
    """Returns the runs to measure this one against; notes why where there are none."""
    taught = teacher_folders([run for group in groups for run in group]) - named
    candidates = [
        group
        for group in groups
        if group[0].method == BASELINE
        and group[0].path.resolve() not in taught
        and (group[0].student, group[0].detector, group[0].test_dataset)
        == (run.student, run.detector, run.test_dataset)
    ]
    chosen = [group for group in candidates if any(r.path.resolve() in named for r in group)]
    candidates = chosen or candidates
    if len(candidates) == 1:
        return candidates[0]
    what = f"{run.detector} with student {run.student} on {run.test_dataset}"
    if candidates:
        notes.append(f"Several different baselines fit {what}: name one with --baseline.")
    else:
        notes.append(f"No baseline run for {what}: no gain is shown.")
    return None


def _teacher_of(
    run: Run, teachers: Sequence[TeacherResult], notes: list[str]
) -> TeacherResult | None:
    fitting = [t for t in teachers if t.name in (None, run.teacher)]
    fitting = [t for t in fitting if t.detector in (None, run.detector)]
    if teachers and len(fitting) != 1:
        notes.append(
            f"{'Several teachers fit' if fitting else 'No teacher fits'} {run.detector} "
            f"{run.pair}: no share of its gap is shown."
        )
    return fitting[0] if len(fitting) == 1 else None


def _add_gains(
    row: Row,
    runs: Sequence[Run],
    baseline: Sequence[Run],
    teacher: TeacherResult | None,
    notes: list[str],
) -> None:
    """Fills in the row's gain over the baseline and the share of the gap that it closes."""
    for task in TASKS:
        own, start = _ap_by_seed(runs, task), _ap_by_seed(baseline, task)
        if not own or not start:
            continue
        shared = sorted(own.keys() & start.keys())
        if len(shared) < 2:
            # Nothing to pair: the difference of the means.
            shared, own, start = [0], {0: fmean(own.values())}, {0: fmean(start.values())}
        elif own.keys() != start.keys():
            notes.append(
                f"{row.method} {row.pair}: the {TASKS[task]} gain is over the {len(shared)} seeds "
                "that the row and its baseline share."
            )
        gains = [own[seed] - start[seed] for seed in shared]
        row.gain[task] = mean_with_interval(gains)
        top = teacher.results.get(task, {}).get("AP") if teacher else None
        if top is None:
            continue
        gaps = [top - start[seed] for seed in shared]
        if fmean(gaps) > 0:
            row.gap_closed[task] = share_with_interval([100 * gain for gain in gains], gaps)
        else:
            notes.append(
                f"{row.method} {row.pair}: the teacher's {TASKS[task]} AP {top:.2f} is not above "
                f"the baseline's {top - fmean(gaps):.2f}, there is no gap to close."
            )


def _ap_by_seed(runs: Sequence[Run], task: str) -> dict[object, float]:
    """AP of each run by its seed; by its folder where seeds are doubled or not fixed."""
    runs = [run for run in runs if "AP" in run.results.get(task, {})]
    seeds = {run.seed for run in runs if run.seed is not None and run.seed >= 0}
    paired = len(seeds) == len(runs)
    return {run.seed if paired else run.path: run.results[task]["AP"] for run in runs}


def _with_detector(teacher: TeacherResult) -> TeacherResult:
    """Says which detector a teacher is, where a file left it open: box AP alone is Faster R-CNN."""
    guess = "Mask R-CNN" if "segm" in teacher.results else "Faster R-CNN"
    return replace(teacher, detector=teacher.detector or guess)


def _teacher_row(teacher: TeacherResult, run: Run, published: Mapping | None) -> Row:
    """A teacher's row; what a JSON file does not say is taken from ``run``, the table's first."""
    detector = teacher.detector or run.detector
    dataset = (teacher.run or run).test_dataset
    return Row(
        method=TEACHER,
        pair=teacher.name or MISSING,
        detector=detector,
        runs=1,
        distilled=False,
        metrics={
            (task, metric): Statistic(value, None, 1)
            for task, values in teacher.results.items()
            for metric, value in values.items()
        },
        seconds=Statistic.of([teacher.run.seconds] if teacher.run else []),
        paper=_paper(published, dataset, detector, f"{teacher.name}-*", "Teacher"),
    )


def _paper(
    published: Mapping | None, dataset: str | None, detector: str, pair: str, method: str
) -> dict[tuple[str, str], float]:
    """Returns the published numbers of one row, where it was measured on COCO val2017.

    ``pair`` may be a pattern: a student or a teacher has the same numbers under each of its pairs.
    """
    tables = {"Faster R-CNN": ("table_iv", "bbox"), "Mask R-CNN": ("table_v", "segm")}
    if published is None or dataset != "coco_2017_val" or detector not in tables:
        return {}
    name, task = tables[detector]
    table = published[name]
    for known, methods in table["pairs"].items():
        if fnmatchcase(known, pair) and method in methods:
            values = zip(table["metrics"], methods[method], strict=True)
            return {(task, metric): value for metric, value in values if value is not None}
    return {}


def _tasks(rows: Sequence[Row]) -> list[str]:
    """Tasks that any row has a value for; box AP always."""
    found = {task for row in rows for task, _ in (*row.metrics, *row.paper)}
    return [task for task in TASKS if task == "bbox" or task in found]


def _paper_columns(rows: Sequence[Row]) -> tuple[list[tuple[str, str]], list[str]]:
    """The (task, metric) pairs and the tasks' gains that any row has a published number for."""
    metrics = [
        (task, metric)
        for task in TASKS
        for metric in METRICS
        if any((task, metric) in row.paper for row in rows)
    ]
    return metrics, [task for task in TASKS if any(task in row.paper_gain for row in rows)]


def _printed(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows as text, by column."""
    tasks, (paper, paper_gains) = _tasks(rows), _paper_columns(rows)
    table = []
    for row in rows:
        seeds = f" (n={row.runs})" if row.runs > 1 else ""
        cells = {"method": row.method + seeds, "pair": row.pair}
        for task in tasks:
            name = TASKS[task]
            for metric in METRICS:
                cells[f"{name} {metric}"] = _show(row.metrics.get((task, metric)))
            cells[f"{name} gain"] = _show_estimate(row.gain.get(task), "{:+.2f}")
            cells[f"{name} gap closed"] = _show_estimate(row.gap_closed.get(task), "{:.0f}%")
        cells["training time"] = _show_time(row.seconds)
        for task, metric in paper:
            number = row.paper.get((task, metric))
            cells[f"paper {TASKS[task]} {metric}"] = MISSING if number is None else f"{number:.2f}"
        for task in paper_gains:
            number = row.paper_gain.get(task)
            cells[f"paper {TASKS[task]} gain"] = MISSING if number is None else f"{number:+.2f}"
        table.append(cells)
    return table


def _numbers(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The rows as numbers, by column of a CSV file."""
    tasks, (paper, paper_gains) = _tasks(rows), _paper_columns(rows)
    table = []
    for row in rows:
        cells = {"method": row.method, "pair": row.pair, "detector": row.detector, "runs": row.runs}
        for task in tasks:
            name = TASKS[task]
            for metric in METRICS:
                value = row.metrics.get((task, metric))
                cells[f"{name} {metric}"] = value and value.mean
                cells[f"{name} {metric} sd"] = value and value.deviation
            for column, unit, estimate in (
                (f"{name} gain", "", row.gain.get(task)),
                (f"{name} gap closed", " %", row.gap_closed.get(task)),
            ):
                cells[f"{column}{unit}"] = estimate and estimate.mean
                cells[f"{column} low{unit}"] = estimate and estimate.low
                cells[f"{column} high{unit}"] = estimate and estimate.high
        cells["training seconds"] = row.seconds and row.seconds.mean
        for task, metric in paper:
            cells[f"paper {TASKS[task]} {metric}"] = row.paper.get((task, metric))
        for task in paper_gains:
            cells[f"paper {TASKS[task]} gain"] = row.paper_gain.get(task)
        table.append(cells)
    return table


def _show(value: Statistic | None) -> str:
    if value is None:
        return MISSING
    deviation = "" if value.deviation is None else f" ± {value.deviation:.2f}"
    return f"{value.mean:.2f}{deviation}"


def _show_estimate(value: Estimate | None, style: str) -> str:
    """A value with its interval: "+1.20 (+0.80 to +1.60)"."""
    if value is None:
        return MISSING
    interval = (
        f" ({style} to {style})".format(value.low, value.high) if value.low is not None else ""
    )
    return style.format(value.mean) + interval


def _show_time(value: Statistic | None) -> str:
    """Mean training time as hours:minutes:seconds."""
    if value is None:
        return MISSING
    minutes, seconds = divmod(round(value.mean), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
