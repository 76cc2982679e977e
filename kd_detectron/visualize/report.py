"""The files that every comparison of runs ends with: result table, AP picture and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_detectron.runs.run import Run
from kd_detectron.runs.tables import build_table, differences, load_teacher
from kd_detectron.visualize.ap import plot_ap
from kd_detectron.visualize.curves import plot_curves


def write_table_and_curves(
    folder: Path,
    methods: Mapping[str, Sequence[Run]],
    *,
    teacher: Path | None = None,
    published: Mapping | None = None,
    against: Mapping[str, str] = {},
) -> str:
    """Writes ``results.md``, ``results.csv``, ``ap.png`` (where a run has an AP), ``curves.png``.

    Args:
        folder: where to write them.
        methods: the finished students' runs (seeds) by the name of their row.
        teacher: the run folder of the teacher.
        published: as in :func:`build_table`.
        against: rows to compare with one another, as in :func:`differences`.

    Returns:
        The tables as text.
    """
    runs = [run for seeds in methods.values() for run in seeds]
    names = {run.path: name for name, seeds in methods.items() for run in seeds}
    teachers = [load_teacher(teacher)] if teacher else []
    table = build_table(runs, teachers=teachers, published=published, names=names)
    compared = differences(methods, against)
    compared = f"\n\n{compared}" if compared else ""
    (folder / "results.md").write_text(table.markdown() + compared + "\n", encoding="utf-8")
    (folder / "results.csv").write_text(table.csv(), encoding="utf-8")
    results = teachers[0].results if teachers else {}
    teacher_ap = {task: values["AP"] for task, values in results.items() if "AP" in values}
    (folder / "ap.png").unlink(missing_ok=True)
    if any("AP" in values for run in runs for values in run.results.values()):
        plot_ap(methods, folder / "ap.png", teacher_ap=teacher_ap)
    plot_curves(methods, folder / "curves.png", teacher_ap=teacher_ap)
    return table.text() + compared
