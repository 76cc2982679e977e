"""A teacher labels images that nobody has labelled, into a COCO-format file to train on.

    tools/label_images.py --teacher bccd/teacher_r50.yaml \\
        --weights output/bccd/teacher_r50/model_final.pth \\
        --images datasets/cells/new_images --output datasets/cells/new_labels.json
    tools/label_images.py --config-file bccd/ckd_reviewkd_r18.yaml --images FOLDER --output FILE

The second takes the teacher from KD.TEACHER of a config. Boxes are written, and masks (RLE: train
with INPUT.MASK_FORMAT bitmask) where the teacher has a mask head, each with its score. The same
command continues after an interruption.
"""

import argparse
from collections import Counter

from detectron2.utils.logger import setup_logger

from kd_detectron.commands import add_import_option, exit_code, import_user_code
from kd_detectron.labelling.labels import (
    categories_of,
    find_images,
    label_images,
    load_labeller,
    parse_thresholds,
    teacher_cfg_from,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", default="", metavar="NAME", help="a config with KD.TEACHER"
    )
    parser.add_argument("--teacher", default="", metavar="NAME", help="the teacher's own config")
    parser.add_argument("--weights", default="", metavar="FILE", help="the teacher's checkpoint")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="the images")
    parser.add_argument("--output", required=True, metavar="JSON", help="the file to write")
    parser.add_argument(
        "--score-threshold",
        action="append",
        default=[],
        metavar="NUMBER",
        help="lowest score of a label: NUMBER for all classes, CLASS=NUMBER for one; may be given "
        "several times (0.5)",
    )
    parser.add_argument(
        "--images-from", default="", metavar="JSON", help="only the images of this COCO-format file"
    )
    parser.add_argument(
        "--skip-labelled",
        action="append",
        default=[],
        metavar="JSON",
        help="leave out the images of this COCO-format file; may be given several times",
    )
    parser.add_argument(
        "--categories",
        default="",
        metavar="JSON",
        help="names and ids of the classes from this COCO-format file (by default from the "
        "dataset that the teacher's config trains on)",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="images at once (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that read images (%(default)s)"
    )
    add_import_option(parser)
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides of the config")
    return parser


def label(args: argparse.Namespace) -> None:
    """Labels the images and prints how many labels of which classes there are."""
    setup_logger(name="kd_detectron")
    for name in args.imports:
        import_user_code(name)
    images = find_images(args.images, listed_in=args.images_from, labelled_in=args.skip_labelled)
    cfg = teacher_cfg_from(
        config_file=args.config_file, teacher=args.teacher, weights=args.weights, opts=args.opts
    )
    model, mapper = load_labeller(cfg)
    categories = categories_of(cfg, model, args.categories)
    thresholds = parse_thresholds(args.score_threshold, [each["name"] for each in categories])
    teacher = cfg.KD.TEACHER
    content = label_images(
        model,
        mapper,
        images,
        args.output,
        categories=categories,
        thresholds=thresholds,
        source=" ".join(map(str, (teacher.CONFIG_FILE, teacher.WEIGHTS, *teacher.OPTS))).strip(),
        batch_size=args.batch_size,
        workers=args.workers,
    )
    count = Counter(label["category_id"] for label in content["annotations"])
    classes = ", ".join(f"{each['name']} {count[each['id']]}" for each in categories)
    with_labels = {label["image_id"] for label in content["annotations"]}
    labelled = len(content["images"])
    print(
        f"{args.output}: {count.total()} labels on {labelled} images "
        f"({labelled - len(with_labels)} of them without any), "
        f"{len(images) - labelled} images skipped\nlabels by class: {classes}"
    )


def main(arguments: list[str] | None = None) -> int:
    """``tools/label_images.py``; returns the exit code: 0, or 2 for a user's error."""
    args = build_parser().parse_args(arguments)
    return exit_code(lambda: label(args))
