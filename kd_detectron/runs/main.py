"""What ``tools/results_table.py`` does: reads run folders, prints and writes their table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_detectron.commands import exit_code
from kd_detectron.runs.run import load_run
from kd_detectron.runs.tables import build_table, load_teacher, published_numbers

DATASET_HELP = "whose AP, where DATASETS.TEST has several (default: the first)"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compares runs: AP, gain over the baseline, share of the teacher's gap, "
        "published numbers."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder (OUTPUT_DIR); runs without distillation are baselines",
    )
    parser.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="RUN|JSON",
        help='teacher\'s run folder, or a JSON file such as {"AP": 42.0}; once for each teacher',
    )
    parser.add_argument("--dataset", default="", metavar="NAME", help=DATASET_HELP)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table as CSV")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the table as Markdown"
    )
    return parser


def write_table(args: argparse.Namespace) -> None:
    """Prints the table of the runs, and writes it to the files that are named."""
    table = build_table(
        [load_run(path, args.dataset) for path in args.runs],
        teachers=[load_teacher(path, args.dataset) for path in args.teacher],
        published=published_numbers(),
    )
    print(table.text())
    if args.csv:
        args.csv.write_text(table.csv(), encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table.markdown() + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = build_parser().parse_args(arguments)
    return exit_code(lambda: write_table(args))
