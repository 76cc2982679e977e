#!/usr/bin/env python
"""Pictures of runs: each subcommand writes one image file.

    python tools/visualize.py ap          output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18
    python tools/visualize.py curves      output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18
    python tools/visualize.py predictions output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18
    python tools/visualize.py cam         output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18
    python tools/visualize.py features    output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18
    python tools/visualize.py logits      output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18

RUN is a run folder (OUTPUT_DIR). The teacher is the one that the first distilled run names; the
images are those of its DATASETS.TEST, chosen by --seed.
"""

import argparse
import sys
from pathlib import Path

from kd_detectron.commands import exit_code
from kd_detectron.errors import ConfigError
from kd_detectron.runs.run import Run, load_run
from kd_detectron.runs.tables import load_teacher_result
from kd_detectron.visualize import models as loading
from kd_detectron.visualize.ap import plot_ap
from kd_detectron.visualize.cams import draw_cams
from kd_detectron.visualize.curves import plot_curves
from kd_detectron.visualize.features import draw_feature_differences
from kd_detectron.visualize.logits import draw_correlations, draw_tsne
from kd_detectron.visualize.predictions import draw_predictions


def ap(args: argparse.Namespace) -> None:
    groups: dict[str, list[Run]] = {}
    for run in map(load_run, args.runs):
        groups.setdefault(run.method, []).append(run)
    plot_ap(groups, args.output, teacher_ap=teacher_ap(args))


def curves(args: argparse.Namespace) -> None:
    runs = [load_run(run) for run in args.runs]
    plot_curves(runs, args.output, teacher_ap=teacher_ap(args))


def teacher_ap(args: argparse.Namespace) -> dict[str, float]:
    results = load_teacher_result(args.teacher).results if args.teacher else {}
    return {task: values["AP"] for task, values in results.items() if "AP" in values}


def predictions(args: argparse.Namespace) -> None:
    models = load_models(args)
    records, class_names = load_records(args, models)
    draw_predictions(models, records, class_names, args.output, score_threshold=args.threshold)


def cam(args: argparse.Namespace) -> None:
    models = load_models(args)
    records, class_names = load_records(args, models)
    draw_cams(models, records, class_names, args.output)


def features(args: argparse.Namespace) -> None:
    teacher, students = teacher_and_students(args)
    records, _ = load_records(args, students)
    draw_feature_differences(teacher, students, records, args.output)


def logits(args: argparse.Namespace) -> None:
    teacher, students = teacher_and_students(args)
    records, class_names = load_records(args, students)
    if args.tsne:
        draw_tsne([teacher, *students], records, class_names, args.output, seed=args.seed)
    else:
        draw_correlations(teacher, students, records, class_names, args.output)


def teacher_and_students(args: argparse.Namespace) -> tuple[loading.LoadedModel, list]:
    models = load_models(args)
    if len(models) == len(args.runs):
        raise ConfigError("none of the runs names a teacher to compare with: give --teacher")
    return models[0], models[1:]


def load_models(args: argparse.Namespace) -> list[loading.LoadedModel]:
    return loading.load_models(
        args.runs,
        labels=args.labels,
        teacher=args.teacher,
        teacher_weights=args.teacher_weights,
        with_teacher=not getattr(args, "no_teacher", False),
    )


def load_records(args: argparse.Namespace, models: list) -> tuple[list[dict], list[str]]:
    """The images to draw; the last model is a run's student, whose config names the dataset."""
    records, class_names = loading.dataset_records(models[-1].cfg, args.dataset)
    if args.images:
        return loading.find_records(records, args.images), class_names
    return loading.choose_records(records, args.count, seed=args.seed), class_names


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        (ap, "final AP of each method, a dot a seed"),
        (curves, "AP and every loss over the iterations"),
    ):
        sub = command(function, summary)
        sub.add_argument("--teacher", metavar="RUN|JSON", help="draws the teacher's AP as a line")

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
    sub.add_argument("--tsne", action="store_true", help="t-SNE instead (needs scikit-learn)")
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


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)

    def draw() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.function(args)
        print(f"wrote {args.output}")

    return exit_code(draw)


if __name__ == "__main__":
    sys.exit(main())
