"""The benchmark's reports as JSON and as text, and what ``tools/benchmark.py`` does."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from kd_detectron.commands import (
    add_import_option,
    exit_code,
    import_user_code,
    parse_arguments,
)
from kd_detectron.config import get_config
from kd_detectron.errors import ConfigError
from kd_detectron.profiling.benchmark import DISTILLED, STUDENT, run_benchmark

# Of the parts of a report.
KINDS = ("student", "teacher", "distiller", "distilled")


def save_report(report: dict, path: str | os.PathLike) -> None:
    """Writes a report as JSON; makes its folder if needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def load_report(path: str | os.PathLike) -> dict:
    """Reads a report that :func:`save_report` wrote.

    Raises:
        ConfigError: it is none of these reports.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        report = None
    if not isinstance(report, dict) or "parts" not in report:
        raise ConfigError(f"'{path}' is not a report of tools/benchmark.py")
    return report


def format_report(report: dict) -> str:
    """The report as text: machine, a table of the parts, and the ratios."""
    batch, facts, memory = report["batch"], report["machine"], report["memory"]
    plain = report["parts"][STUDENT]["median"]
    rows = [
        [
            name,
            f"{part['median']:.4g}",
            f"{part['low']:.4g} .. {part['high']:.4g}",
            f"{part['median'] / plain:.3f}",
        ]
        for name, part in report["parts"].items()
    ]
    headers = ["part", "seconds", "quartiles", "/ student step"]
    versions = ", ".join(f"{key} {facts[key]}" for key in facts if key != "device")
    lines = [
        f"{report['name']}: {batch['images']} images of {batch['height']}x{batch['width']}, "
        f"{batch['proposals']} proposals, {report['amp'] or 'float32'}, "
        f"{report['repeats']} rounds",
        f"{facts['device']}; {versions}",
        "",
        tabulate(rows, headers=headers, disable_numparse=True),
        "",
        f"overhead ratio  {_ratio(report, 'overhead')}  "
        "distilled step / (student step + teacher + distillers)",
        f"to plain step   {_ratio(report, 'to_plain')}  distilled step / student step",
        f"throughput      {batch['images'] / report['parts'][DISTILLED]['median']:.3g} images/s",
    ]
    if memory:
        lines.append("peak MiB        " + ", ".join(f"{k} {_mib(v)}" for k, v in memory.items()))
    return "\n".join(lines)


def compare_reports(reports: Sequence[dict]) -> str:
    """Several reports as one table, one row each."""
    rows = [
        [
            report["name"],
            report["machine"]["device"],
            report["amp"] or "float32",
            "{images} x {height}x{width}".format(**report["batch"]),
            report["batch"]["proposals"],
            *(f"{_total(report, kind):.4g}" for kind in KINDS),
            _ratio(report, "overhead"),
            _ratio(report, "to_plain"),
            *(_mib(report["memory"].get(step)) for step in (STUDENT, DISTILLED)),
        ]
        for report in reports
    ]
    headers = ["config", "device", "precision", "images", "R", *(f"{kind} s" for kind in KINDS)]
    headers += ["overhead ratio", "to plain step", "student MiB", "distilled MiB"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def _total(report: dict, kind: str) -> float:
    return sum(part["median"] for part in report["parts"].values() if part["kind"] == kind)


def _ratio(report: dict, name: str) -> str:
    return "{median:.3f} ({low:.3f} .. {high:.3f})".format(**report["ratios"][name])


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.0f}"


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
