"""The command ``tools/visualize.py``: reads the runs, draws one picture, writes it to a file.

RUN is a run folder (OUTPUT_DIR). The teacher is the one that the first distilled run names; the
images are those of its DATASETS.TEST, chosen by --seed. Pictures of models import Detectron2 when
they are drawn; AP and curves need none of it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_detectron.commands import exit_code
from kd_detectron.errors import ConfigError
from kd_detectron.runs.groups import named_groups, teacher_folders
from kd_detectron.runs.main import DATASET_HELP
from kd_detectron.runs.run import Run, load_run
from kd_detectron.runs.tables import load_teacher
from kd_detectron.visualize.ap import plot_ap
from kd_detectron.visualize.curves import plot_curves

EXAMPLE = """
examples:
  python tools/visualize.py ap          output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18
  python tools/visualize.py curves      output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18
  python tools/visualize.py predictions output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18
"""


def ap(args: argparse.Namespace) -> None:
    groups, teacher_ap = load_groups(args)
    plot_ap(groups, args.output, teacher_ap=teacher_ap)


def curves(args: argparse.Namespace) -> None:
    groups, teacher_ap = load_groups(args)
    plot_curves(groups, args.output, teacher_ap=teacher_ap)


def load_groups(args: argparse.Namespace) -> tuple[dict[str, list[Run]], dict[str, float]]:
    """The runs by the names of their methods, and the teacher's AP by task.

    The teacher is the one that is named, or else the run folder that all distilled runs name; its
    own run is a line and no method.
    """
    runs = [load_run(run, args.dataset) for run in args.runs]
    folders = teacher_folders(runs)
    teacher = args.teacher or (next(iter(folders)) if len(folders) == 1 else None)
    results = load_teacher(teacher, args.dataset).results if teacher else {}
    groups = {
        name: group
        for name, group in named_groups(runs).items()
        if not any(run.path.resolve() == Path(teacher or "").resolve() for run in group)
    }
    return groups, {task: values["AP"] for task, values in results.items() if "AP" in values}


def predictions(args: argparse.Namespace) -> None:
    from kd_detectron.visualize.predictions import draw_predictions

    models = load_models(args)
    records, class_names = load_records(args, models)
    draw_predictions(models, records, class_names, args.output, score_threshold=args.threshold)


def cam(args: argparse.Namespace) -> None:
    from kd_detectron.visualize.cams import draw_cams

    models = load_models(args)
    records, class_names = load_records(args, models)
    draw_cams(models, records, class_names, args.output)


def features(args: argparse.Namespace) -> None:
    from kd_detectron.visualize.features import draw_feature_differences

    teacher, students = teacher_and_students(args)
    records, _ = load_records(args, students)
    draw_feature_differences(teacher, students, records, args.output)


def logits(args: argparse.Namespace) -> None:
    from kd_detectron.visualize.logits import draw_correlations

    teacher, students = teacher_and_students(args)
    records, class_names = load_records(args, students)
    draw_correlations(teacher, students, records, class_names, args.output)


def teacher_and_students(args: argparse.Namespace) -> tuple:
    models = load_models(args)
    if not models[0].is_teacher:
        raise ConfigError("none of the runs names a teacher to compare with: give --teacher")
    return models[0], models[1:]


def load_models(args: argparse.Namespace) -> list:
    from kd_detectron.visualize import models as loading

    return loading.load_models(
        args.runs,
        labels=args.labels,
        teacher=args.teacher,
        teacher_weights=args.teacher_weights,
        with_teacher=not getattr(args, "no_teacher", False),
        dataset=args.dataset,
    )


def load_records(args: argparse.Namespace, models: list) -> tuple[list[dict], list[str]]:
    """The images to draw; the last model is a run's student, whose config names the dataset."""
    from kd_detectron.visualize import models as loading

    records, class_names = loading.dataset_records(models[-1].cfg, args.dataset)
    if args.images:
        return loading.find_records(records, args.images), class_names
    return loading.choose_records(records, args.count, seed=args.seed), class_names


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pictures of runs: each command writes one image file.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, summary: str) -> argparse.ArgumentParser:
        name = function.__name__
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument("runs", nargs="+", metavar="RUN", help="run folder (OUTPUT_DIR)")
        sub.add_argument(
            "--output", type=Path, default=Path(f"{name}.png"), help="image file (%(default)s)"
        )
        sub.set_defaults(function=function)
        return sub

    for function, summary in (
        (ap, "final AP of each method, one dot per seed"),
        (curves, "AP and every loss over the iterations"),
    ):
        sub = command(function, summary)
        sub.add_argument(
            "--teacher",
            metavar="RUN|JSON",
            help="whose AP is drawn as a line (default: the run that the distilled ones name)",
        )
        sub.add_argument("--dataset", default="", metavar="NAME", help=DATASET_HELP)

    sub = command(predictions, "detections beside the ground truth")
    add_model_arguments(sub, images=4)
    sub.add_argument("--no-teacher", action="store_true", help="leave the teacher out")
    sub.add_argument(
        "--threshold", type=float, default=0.5, help="least score that is drawn (%(default)s)"
    )

    sub = command(cam, "class-activation maps for the same object (needs grad-cam)")
    add_model_arguments(sub, images=3)

    sub = command(features, "distance of each student's features to the teacher's, by FPN level")
    add_model_arguments(sub, images=16)

    sub = command(logits, "class correlations of the box logits, teacher against students")
    add_model_arguments(sub, images=50)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser, *, images: int) -> None:
    parser.add_argument("--labels", nargs="+", default=[], help="what to call the runs, one each")
    parser.add_argument(
        "--teacher", metavar="RUN|CONFIG", help="another teacher: its run folder or config"
    )
    parser.add_argument("--teacher-weights", default="", metavar="FILE", help="its checkpoint")
    parser.add_argument("--dataset", default="", help="registered dataset (DATASETS.TEST)")
    parser.add_argument("--images", nargs="+", default=[], help="file names or image ids")
    parser.add_argument(
        "--count", type=int, default=images, help="number of images, without --images (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="chooses the images, without --images (%(default)s)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = build_parser().parse_args(arguments)

    def draw() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.function(args)
        print(f"wrote {args.output}")

    return exit_code(draw)
