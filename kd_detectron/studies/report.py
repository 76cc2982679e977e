"""The report of a study: its result table, training curves, and detections side by side.

Called by ``tools/run_study.py`` and ``make demo`` when the runs are done; made of the same parts as
``tools/results_table.py`` and ``tools/visualize.py``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_detectron.runs.run import Run
from kd_detectron.runs.tables import build_table, load_teacher_result, published_numbers
from kd_detectron.visualize.ap import plot_ap
from kd_detectron.visualize.curves import plot_curves
from kd_detectron.visualize.models import choose_records, dataset_records, load_models
from kd_detectron.visualize.predictions import draw_predictions

TEACHER = "teacher"


def write_report(
    folder: str | Path,
    methods: Mapping[str, Sequence[Run]],
    *,
    teacher: Path | None = None,
    images: int = 4,
) -> str:
    """Writes ``results.md``, ``results.csv`` and the pictures ap, curves and predictions (PNG).

    Args:
        folder: where to write them.
        methods: the finished students' runs by the name of their row; detections are drawn of the
            first run of each combination of distillers.
        teacher: the run folder of the teacher.
        images: rows of the picture of detections.

    Returns:
        The table as text, to be printed.
    """
    folder = Path(folder)
    runs = [run for seeds in methods.values() for run in seeds]
    names = {run.path: name for name, seeds in methods.items() for run in seeds}
    teachers = [load_teacher_result(teacher)] if teacher else []
    table = build_table(runs, teachers=teachers, published=published_numbers(), names=names)
    (folder / "results.md").write_text(table.markdown() + "\n", encoding="utf-8")
    (folder / "results.csv").write_text(table.csv(), encoding="utf-8")
    teacher_ap = {
        task: values["AP"]
        for one in teachers
        for task, values in one.results.items()
        if "AP" in values
    }
    plot_ap(methods, folder / "ap.png", teacher_ap=teacher_ap)
    plot_curves(methods, folder / "curves.png", teacher_ap=teacher_ap)
    first = list({run.method: run for run in reversed(runs)}.values())[::-1]
    models = load_models(
        [run.path for run in first],
        labels=[names[run.path] for run in first],
        teacher=teacher,
        with_teacher=bool(teacher),
    )
    records, class_names = dataset_records(models[-1].cfg)
    chosen = choose_records(records, images, seed=0)
    draw_predictions(models, chosen, class_names, folder / "predictions.png")
    return table.text()
