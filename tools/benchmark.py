#!/usr/bin/env python
"""What a distilled step costs against its parts: times, ratios and peak memory.

    python tools/benchmark.py --config-file ckd_rcnn_r101_r18.yaml --output ckd.json
    python tools/benchmark.py --config-file ckd_rcnn_r101_r18.yaml --size 800 1333 --proposals 256
    python tools/benchmark.py --compare before.json after.json

Runs on random weights (nothing is downloaded) and on MODEL.DEVICE, or the CPU without a GPU.
"""

import argparse
import sys
from pathlib import Path

import torch

from kd_detectron.commands import (
    add_import_option,
    exit_code,
    import_user_code,
    parse_arguments,
)
from kd_detectron.config import get_config
from kd_detectron.profiling.benchmark import (
    CLOCKS,
    compare_reports,
    format_report,
    load_report,
    run_benchmark,
    save_report,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", metavar="NAME", help="a config by path or bare name")
    what.add_argument(
        "--compare", nargs="+", type=Path, metavar="JSON", help="print reports side by side"
    )
    parser.add_argument("--images", type=int, default=2, help="images a batch (%(default)s)")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(480, 640),
        metavar=("HEIGHT", "WIDTH"),
        help="of each image, in pixels (480 640)",
    )
    parser.add_argument("--proposals", type=int, help="sampled proposals an image (the config's)")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="on the CPU: wall time, or this process's processor time, for a machine that is "
        "shared with other programs (%(default)s)",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument(
        "--unfolded",
        action="store_true",
        help="also time the teacher's backbone with its BatchNorm not folded into convolutions",
    )
    parser.add_argument("--output", type=Path, metavar="JSON", help="also write the report here")
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def benchmark(args: argparse.Namespace) -> str:
    for name in args.imports:
        import_user_code(name)
    opts = ["MODEL.WEIGHTS", "", "KD.TEACHER.WEIGHTS", "none"]
    if args.proposals is not None:
        opts += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", args.proposals]
    if not torch.cuda.is_available():
        opts += ["MODEL.DEVICE", "cpu"]
    cfg = get_config(args.config_file, [*opts, *args.opts])
    report = run_benchmark(
        cfg,
        name=Path(args.config_file).stem,
        images=args.images,
        size=tuple(args.size),
        repeats=args.repeats,
        clock=args.clock,
        memory=not args.no_memory,
        unfolded=args.unfolded,
        imports=args.imports,
    )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        save_report(report, args.output)
    return format_report(report)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(build_parser(), arguments)
    if args.compare:
        return exit_code(lambda: print(compare_reports([load_report(p) for p in args.compare])))
    return exit_code(lambda: print(benchmark(args)))


if __name__ == "__main__":
    sys.exit(main())
