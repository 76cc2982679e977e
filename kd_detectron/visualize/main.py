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

    models, records, class_names = load_models_and_records(args)
    draw_predictions(models, records, class_names, args.output, score_threshold=args.threshold)


def cam(args: argparse.Namespace) -> None:
    from kd_detectron.visualize.cams import draw_cams

    models, records, class_names = load_models_and_records(args)
    draw_cams(models, records, class_names, args.output)


def features(args: argparse.Namespace) -> None:
    from kd_detectron.visualize.features import draw_feature_differences

    models, records, _ = load_models_and_records(args)
    if not models[0].is_teacher:
        raise ConfigError("none of the runs names a teacher to compare with: give --teacher")
    draw_feature_differences(models[0], models[1:], records, args.output)


def load_models_and_records(args: argparse.Namespace) -> tuple:
    """The models, the teacher's first; the images to draw; and the names of the classes."""
    from kd_detectron.visualize import models as loading

    models = loading.load_models(args.runs, teacher=args.teacher, dataset=args.dataset)
    # The last model is a run's student, whose config names the dataset.
    records, class_names = loading.dataset_records(models[-1].cfg, args.dataset)
    if args.images:
        return models, loading.find_records(records, args.images), class_names
    return models, loading.choose_records(records, args.count, seed=args.seed), class_names


# What each command draws, and by default of how many images.
COMMANDS = {
    ap: ("final AP of each method, one dot per seed", None),
    curves: ("AP and every loss over the iterations", None),
    predictions: ("detections beside the ground truth", 4),
    cam: ("class-activation maps for the same object", 3),
    features: ("distance of each student's features to the teacher's, by FPN level", 16),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pictures of runs: each command writes one image file.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, (summary, images) in COMMANDS.items():
        name = function.__name__
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(function=function)
        add = sub.add_argument
        add("runs", nargs="+", metavar="RUN", help="run folder (OUTPUT_DIR)")
        add("--output", type=Path, default=f"{name}.png", help="image file (%(default)s)")
        add(
            "--teacher",
            metavar="RUN",
            help="the teacher's run folder (default: the teacher that the distilled runs name)",
        )
        add("--dataset", default="", metavar="NAME", help=DATASET_HELP)
        if images:
            add("--images", nargs="+", default=[], help="file names or image ids")
            add(
                "--count",
                type=int,
                default=images,
                help="number of images, without --images (%(default)s)",
            )
            add("--seed", type=int, default=0, help="chooses the images (%(default)s)")
        if function is predictions:
            add(
                "--threshold",
                type=float,
                default=0.5,
                help="least score that is drawn (%(default)s)",
            )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = build_parser().parse_args(arguments)

    def draw() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.function(args)
        print(f"wrote {args.output}")

    return exit_code(draw)
