"""Result tables: what each method gains over the undistilled student, beside published numbers.

One row is one method on one pair. Runs that differ in their seed alone share a row: mean and sample
standard deviation (n - 1) over the seeds. Runs of one method that differ in anything else stay
apart, and the row names the difference, so that an ablation is never averaged away.

Gain is the student's AP minus the baseline's, in AP points; gap closed is that gain as a share of
the teacher's AP minus the baseline's. A baseline belongs to a row if it is the same detector with
the same student on the same test data; a teacher, if it is the row's teacher. A value that is not
known is None here, "-" in a table and empty in a CSV file, never 0.

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

from tabulate import tabulate

from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import flatten
from kd_detectron.runs.run import BASELINE, METRICS, TASKS, Run, distiller_names, load_run

MISSING = "-"
TEACHER = "teacher"
_TEXT_COLUMNS = ("method", "pair")

# What may differ between two runs of one experiment: it changes nothing that a row is about.
_NOT_THE_EXPERIMENT = frozenset(
    {
        "CUDNN_BENCHMARK",
        "DATALOADER.NUM_WORKERS",
        "MODEL.DEVICE",
        "OUTPUT_DIR",
        "SEED",
        "SOLVER.CHECKPOINT_PERIOD",
        "TEST.EVAL_PERIOD",
        "VERSION",
        "VIS_PERIOD",
    }
)
_ARCHITECTURE = "MODEL.META_ARCHITECTURE"
_SHARED_KD_NODES = frozenset({"TEACHER", "SCHEDULE", "OPTIONS"})


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
    """One line of a table; keys of ``metrics`` and ``paper`` are (task, metric)."""

    method: str
    pair: str
    detector: str
    runs: int
    distilled: bool
    metrics: dict[tuple[str, str], Statistic]
    gain: dict[str, float] = field(default_factory=dict)
    gap_closed: dict[str, float] = field(default_factory=dict)
    seconds: Statistic | None = None
    paper: dict[tuple[str, str], float] = field(default_factory=dict)
    paper_gain: dict[str, float] = field(default_factory=dict)


@dataclass
class ResultTable:
    """Rows, and the notes that belong under them."""

    rows: list[Row]
    notes: list[str]

    def text(self) -> str:
        """Renders one table a detector, and the notes, for a terminal."""
        return self._render("simple", title="{}\n", line_break="\n", bullet="* ")

    def markdown(self) -> str:
        """Renders one table a detector, and the notes, as Markdown."""
        return self._render("pipe", title="### {}\n", line_break=" ", bullet="- ")

    def _render(self, style: str, *, title: str, line_break: str, bullet: str) -> str:
        blocks = []
        for detector in dict.fromkeys(row.detector for row in self.rows):
            headers, cells = _cells([row for row in self.rows if row.detector == detector])
            alignment = ["left" if header in _TEXT_COLUMNS else "right" for header in headers]
            body = tabulate(
                cells,
                headers=[header.replace(" ", line_break) for header in headers],
                tablefmt=style,
                colalign=alignment,
                disable_numparse=True,
            )
            blocks.append(f"{title.format(detector)}\n{body}")
        if self.notes:
            blocks.append("\n".join(bullet + note for note in self.notes))
        return "\n\n".join(blocks)

    def csv(self) -> str:
        """Renders the rows as CSV: means and deviations in columns of their own."""
        tasks, published = _tasks(self.rows), _published(self.rows)
        headers = ["method", "pair", "detector", "runs"]
        for task in tasks:
            for metric in METRICS:
                headers += [f"{TASKS[task]} {metric}", f"{TASKS[task]} {metric} sd"]
            headers += [f"{TASKS[task]} gain", f"{TASKS[task]} gap closed %"]
        headers.append("training seconds")
        headers += [f"paper {TASKS[task]} {metric}" for task, metric in published]

        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(headers)
        for row in self.rows:
            cells: list[str | int | float | None] = [row.method, row.pair, row.detector, row.runs]
            for task in tasks:
                for metric in METRICS:
                    value = row.metrics.get((task, metric))
                    cells += [_rounded(value and value.mean), _rounded(value and value.deviation)]
                cells += [_rounded(row.gain.get(task)), _rounded(row.gap_closed.get(task))]
            cells.append(_rounded(row.seconds and row.seconds.mean))
            cells += [_rounded(row.paper.get(key)) for key in published]
            writer.writerow("" if cell is None else cell for cell in cells)
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
        runs: the runs to compare; undistilled ones among them serve as baselines.
        baselines: further runs to measure gains against; they get a row, too, and take precedence
            over the undistilled ones among ``runs``.
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
    groups = _group([*baselines, *(run for run in runs if run.path.resolve() not in named)])
    if len({group[0].detector for group in groups}) > 1:
        teachers = [_with_detector(teacher) for teacher in teachers]
    notes: list[str] = []
    rows = [_teacher_row(teacher, groups[0][0], published) for teacher in teachers]
    for group, label in zip(groups, _labels(groups), strict=True):
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
                notes += _unfair(f"{label} {run.pair}", run, baseline[0])
                _add_gains(row, _statistics(baseline), teacher, notes)

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
    if any(row.paper for row in rows):
        notes.append(f"paper: {published['source']}.")
    return ResultTable(rows, list(dict.fromkeys(notes)))


def load_teacher_result(path: str | Path) -> TeacherResult:
    """Reads a teacher's AP from a run folder or from a JSON file.

    Args:
        path: a run folder, or a JSON object with ``"AP"`` (box AP) and any other metrics, or with
            ``"bbox"`` and ``"segm"`` objects of them, or with these under ``"results"``; an
            optional ``"name"`` ("R101") and ``"detector"`` ("Mask R-CNN") limit it to the rows of
            that teacher and that detector.

    Raises:
        ConfigError: there is no such file, or it holds no AP.
    """
    path = Path(path)
    if path.is_dir():
        run = load_run(path)
        if not run.results:
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
        if "AP" in results:
            results = {"bbox": results}
        kept = {
            task: {
                metric: float(results[task][metric])
                for metric in METRICS
                if metric in results[task]
            }
            for task in TASKS
            if isinstance(results.get(task), dict) and "AP" in results[task]
        }
        if kept:
            return TeacherResult(kept, record.get("name"), record.get("detector"))
    raise ConfigError(f'the teacher\'s file {path} holds no "AP": write {{"AP": 42.0}} into it')


def published_numbers() -> dict:
    """Returns the published results that ship with the package, as in ``published.json``."""
    source = files("kd_detectron.runs").joinpath("published.json")
    return json.loads(source.read_text(encoding="utf-8"))


def _group(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups runs that differ in their seed alone, in the order in which they were given."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        key = (run.finished or run.iterations, *sorted(_experiment(run).items()))
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def _experiment(run: Run) -> dict[str, str]:
    """Returns the flattened config, without what does not distinguish two experiments."""
    config = dict(run.config)
    names = distiller_names(config)
    kd = dict(config.pop("KD", None) or {})
    model = dict(config["MODEL"])
    if names:
        used = {name.upper() for name in names} | _SHARED_KD_NODES
        config["KD"] = {
            key: value for key, value in kd.items() if key in used or not isinstance(value, Mapping)
        }
        config["KD"]["DISTILLERS"] = sorted(names)
    else:
        # An undistilled student is the same model under both meta-architectures.
        model["META_ARCHITECTURE"] = run.detector
    config["MODEL"] = model
    flat = flatten(config)
    return {key: str(value) for key, value in flat.items() if key not in _NOT_THE_EXPERIMENT}


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Names each row by its method, and by what sets it apart from its namesakes."""
    labels = []
    for group in groups:
        run = group[0]
        namesakes = [
            _experiment(other[0])
            for other in groups
            if (other[0].method, other[0].pair, other[0].detector)
            == (run.method, run.pair, run.detector)
        ]
        own = _experiment(run)
        keys = sorted({key for other in namesakes for key in other})
        differing = [key for key in keys if len({other.get(key) for other in namesakes}) > 1]
        parts = [
            f"{key.removeprefix('KD.').removeprefix('MODEL.')} {_short(own.get(key))}"
            for key in differing[:3]
        ]
        if len(differing) > 3:
            parts.append(f"and {len(differing) - 3} more")
        if not run.finished:
            parts.append(f"unfinished, {run.iterations or 0} iterations")
        labels.append(run.method + (f" ({', '.join(parts)})" if parts else ""))
    return labels


def _short(value: object, limit: int = 30) -> str:
    """A config value as text that fits into a row's name."""
    text = MISSING if value is None else str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


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
    candidates = [
        group
        for group in groups
        if group[0].method == BASELINE
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


def _unfair(name: str, run: Run, baseline: Run) -> list[str]:
    """Notes what else differs between a run and its baseline than the distillation."""
    own, base = _experiment(run), _experiment(baseline)
    if run.iterations and baseline.iterations:
        own["iterations trained"], base["iterations trained"] = run.iterations, baseline.iterations
    keys = [key for key in sorted({*own, *base}) if not key.startswith("KD.")]
    keys = [key for key in keys if own.get(key) != base.get(key) and key != _ARCHITECTURE]
    if not keys:
        return []
    shown = [f"{key} ({_short(own.get(key))}, baseline {_short(base.get(key))})" for key in keys]
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return [
        f"{name} differs from its baseline in {', '.join(shown[:3])}{more}: the gain is not the "
        "method's alone."
    ]


def _add_gains(
    row: Row,
    baseline: Mapping[tuple[str, str], Statistic],
    teacher: TeacherResult | None,
    notes: list[str],
) -> None:
    """Fills in the row's gain over the baseline and the share of the gap that it closes."""
    for task in TASKS:
        own, start = row.metrics.get((task, "AP")), baseline.get((task, "AP"))
        if own is None or start is None:
            continue
        row.gain[task] = own.mean - start.mean
        top = teacher.results.get(task, {}).get("AP") if teacher else None
        if top is not None and top > start.mean:
            row.gap_closed[task] = 100 * row.gain[task] / (top - start.mean)
        elif top is not None:
            notes.append(
                f"{row.method} {row.pair}: the teacher's {TASKS[task]} AP {top:.2f} is not above "
                f"the baseline's {start.mean:.2f}, there is no gap to close."
            )


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


def _published(rows: Sequence[Row]) -> list[tuple[str, str]]:
    found = {key for row in rows for key in row.paper}
    return [(task, metric) for task in TASKS for metric in METRICS if (task, metric) in found]


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of one printed table."""
    tasks, published = _tasks(rows), _published(rows)
    paper_gains = [task for task in tasks if any(task in row.paper_gain for row in rows)]
    headers = list(_TEXT_COLUMNS)
    for task in tasks:
        headers += [f"{TASKS[task]} {metric}" for metric in METRICS]
        headers += [f"{TASKS[task]} gain", f"{TASKS[task]} gap closed"]
    headers.append("training time")
    headers += [f"paper {TASKS[task]} {metric}" for task, metric in published]
    headers += [f"paper {TASKS[task]} gain" for task in paper_gains]

    cells = []
    for row in rows:
        line = [row.method + (f" (n={row.runs})" if row.runs > 1 else ""), row.pair]
        for task in tasks:
            line += [_show(row.metrics.get((task, metric))) for metric in METRICS]
            line += [_show_gain(row.gain.get(task)), _show_share(row.gap_closed.get(task))]
        line.append(_show_time(row.seconds))
        line += [_show_number(row.paper.get(key)) for key in published]
        line += [_show_gain(row.paper_gain.get(task)) for task in paper_gains]
        cells.append(line)
    return headers, cells


def _show(value: Statistic | None) -> str:
    if value is None:
        return MISSING
    if value.deviation is None:
        return f"{value.mean:.2f}"
    return f"{value.mean:.2f} ± {value.deviation:.2f}"


def _show_number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _show_gain(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.2f}"


def _show_share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0f}%"


def _show_time(value: Statistic | None) -> str:
    """Mean training time as hours:minutes:seconds."""
    if value is None:
        return MISSING
    minutes, seconds = divmod(round(value.mean), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
