"""The report of a study: its result table, training curves, and detections side by side.

Called by ``tools/run_study.py`` and ``make demo`` when the runs are done; made of the same parts as
``tools/results_table.py`` and ``tools/visualize.py``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_detectron.runs.run import Run
from kd_detectron.runs.tables import published_numbers
from kd_detectron.visualize.models import choose_records, dataset_records, load_models
from kd_detectron.visualize.predictions import draw_predictions
from kd_detectron.visualize.report import write_table_and_curves

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
    published = published_numbers()
    text = write_table_and_curves(folder, methods, teacher=teacher, published=published)
    names = {run.path: name for name, seeds in methods.items() for run in seeds}
    runs = [run for seeds in methods.values() for run in seeds]
    first = list({run.method: run for run in reversed(runs)}.values())[::-1]
    models = load_models(
        [run.path for run in first],
        labels=[names[run.path] for run in first],
        teacher=teacher,
    )
    records, class_names = dataset_records(models[-1].cfg)
    chosen = choose_records(records, images, seed=0)
    draw_predictions(models, chosen, class_names, folder / "predictions.png")
    return text
