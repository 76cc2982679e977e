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
from kd_detectron.profiling.benchmark import CLOCKS, DISTILLED, STUDENT, run_benchmark


def save_report(report: dict, path: str | os.PathLike) -> None:
    """Writes a report as JSON; makes its folder if needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def load_report(path: str | os.PathLike) -> dict:
    """Reads a report that :func:`save_report` wrote.

    Raises:
        ConfigError: there is no such file, or it is none of these reports.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{path}' is not a report of tools/benchmark.py: {error}") from None
    if not isinstance(report, dict) or "parts" not in report or "ratios" not in report:
        raise ConfigError(f"'{path}' is not a report of tools/benchmark.py: it has no parts")
    if "floor" in report["ratios"]:  # As version 0.1 called it.
        report["ratios"]["overhead"] = report["ratios"].pop("floor")
    return report


def format_report(report: dict) -> str:
    """The report as text: machine, a table of the parts, and the ratios."""
    batch, facts, memory = report["batch"], report["machine"], report["memory"]
    plain = report["parts"][STUDENT]["median"]
    rows = []
    for name, part in report["parts"].items():
        peak = memory.get(name)
        rows.append(
            [
                name,
                f"{part['median']:.4g}",
                f"{part['low']:.4g} .. {part['high']:.4g}",
                f"{part['median'] / plain:.3f}",
                "" if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    if "teacher" in memory:
        rows.append(["teacher, all parts", "", "", "", f"{memory['teacher'] / 2**20:.0f}"])
    if "idle" in memory:
        rows.append(["idle process", "", "", "", f"{memory['idle'] / 2**20:.0f}"])
    headers = ["part", f"s ({report['clock']})", "quartiles", "/ student step", "peak MiB"]
    versions = ", ".join(f"{key} {facts[key]}" for key in facts if key != "device")
    return "\n".join(
        [
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
            *(
                [
                    f"memory ratio    {report['ratios']['memory']:.3f}  distilled step / (student "
                    "step + teacher weights + teacher features + fused features), above idle"
                ]
                if memory
                else []
            ),
            f"throughput      {throughput(report):.3g} images/s",
        ]
    )


def throughput(report: dict) -> float:
    """Images per second of the distilled step."""
    return report["batch"]["images"] / report["parts"][DISTILLED]["median"]


def compare_reports(reports: Sequence[dict]) -> str:
    """Several reports as one table, one row each; with two, how many times the second's time."""
    rows = [
        [
            report["name"],
            report["machine"]["device"],
            report["amp"] or "float32",
            "{images} x {height}x{width}".format(**report["batch"]),
            report["batch"]["proposals"],
            f"{report['parts'][STUDENT]['median']:.4g}",
            f"{_total(report, 'teacher'):.4g}",
            f"{_total(report, 'distiller'):.4g}",
            f"{report['parts'][DISTILLED]['median']:.4g}",
            _ratio(report, "overhead"),
            _ratio(report, "to_plain"),
        ]
        for report in reports
    ]
    headers = ["config", "device", "precision", "images", "R", "student s", "teacher s"]
    headers += ["distillers s", "distilled s", "overhead ratio", "to plain step"]
    lines = [tabulate(rows, headers=headers, disable_numparse=True)]
    if len(reports) == 2:
        first, second = (report["parts"] for report in reports)
        lines += ["", f"{reports[1]['name']} against {reports[0]['name']}, medians:"]
        lines += [
            f"  {name}: {second[name]['median'] / first[name]['median']:.3f} times"
            for name in first
            if name in second
        ]
    return "\n".join(lines)


def _total(report: dict, kind: str) -> float:
    return sum(part["median"] for part in report["parts"].values() if part["kind"] == kind)


def _ratio(report: dict, name: str) -> str:
    return "{median:.3f} ({low:.3f} .. {high:.3f})".format(**report["ratios"][name])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="What a distilled step costs against its parts: times, ratios, peak memory. "
        "On random weights (nothing is downloaded), on MODEL.DEVICE, or the CPU without a GPU."
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
    parser.add_argument("--proposals", type=int, help="sampled proposals per image (the config's)")
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
    """Measures what the arguments say and returns the report as text."""
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
        save_report(report, args.output)
    return format_report(report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse_arguments(build_parser(), arguments)
    if args.compare:
        return exit_code(lambda: print(compare_reports([load_report(p) for p in args.compare])))
    return exit_code(lambda: print(benchmark(args)))
