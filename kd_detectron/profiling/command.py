"""What ``tools/benchmark.py`` does."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from kd_detectron.commands import (
    add_import_option,
    exit_code,
    import_user_code,
    parse_arguments,
)
from kd_detectron.config import get_config

from .benchmark import run_benchmark
from .report import compare_reports, format_report, load_report, save_report


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="What a distilled step costs against its parts: times, ratios; on a GPU peak "
        "memory. Random weights (nothing is downloaded), on MODEL.DEVICE, or the CPU without a GPU."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", metavar="NAME", help="a config by path or bare name")
    what.add_argument(
        "--compare", nargs="+", type=Path, metavar="JSON", help="print reports side by side"
    )
    parser.add_argument("--images", type=int, default=2, help="images per batch (%(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(480, 640),
        metavar=("HEIGHT", "WIDTH"),
        help="of each image, in pixels (480 640)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="also write the report here")
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def benchmark(args: argparse.Namespace) -> str:
    """Measures what the arguments say and returns the report as text."""
    for name in args.imports:
        import_user_code(name)
    opts = ["MODEL.WEIGHTS", "", "KD.TEACHER.WEIGHTS", "none"]
    if not torch.cuda.is_available():
        opts += ["MODEL.DEVICE", "cpu"]
    cfg = get_config(args.config_file, [*opts, *args.opts])
    report = run_benchmark(
        cfg,
        name=Path(args.config_file).stem,
        images=args.images,
        size=tuple(args.size),
        repeats=args.repeats,
    )
    if args.output:
        save_report(report, args.output)
    return format_report(report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_arguments(build_parser(), arguments)
    if args.compare:
        return exit_code(lambda: print(compare_reports([load_report(p) for p in args.compare])))
    return exit_code(lambda: print(benchmark(args)))
