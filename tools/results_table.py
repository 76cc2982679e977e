#!/usr/bin/env python
"""Compares runs: AP, gain over the baseline, share of the teacher's gap, published numbers.

    python tools/results_table.py output/baseline_rcnn_r18 output/ckd_rcnn_r101_r18 \\
        --teacher teacher.json --markdown results.md
"""

import argparse
import sys
from pathlib import Path

from kd_detectron.commands import exit_code
from kd_detectron.runs.run import load_run
from kd_detectron.runs.tables import build_table, load_teacher_result, published_numbers


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (OUTPUT_DIR)")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="RUN",
        help="undistilled run to measure gains against, once for each student or seed "
        "(default: the undistilled ones among RUN)",
    )
    parser.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="RUN|JSON",
        help='teacher\'s run folder, or a JSON file such as {"AP": 42.0}; once for each teacher',
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table as CSV")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the table as Markdown"
    )
    return parser


def write_table(args: argparse.Namespace) -> None:
    table = build_table(
        [load_run(path) for path in args.runs],
        baselines=[load_run(path) for path in args.baseline],
        teachers=[load_teacher_result(path) for path in args.teacher],
        published=published_numbers(),
    )
    print(table.text())
    if args.csv:
        args.csv.write_text(table.csv(), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table.markdown() + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    return exit_code(lambda: write_table(args))


if __name__ == "__main__":
    sys.exit(main())
