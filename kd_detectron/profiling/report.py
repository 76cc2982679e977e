"""The benchmark's reports as JSON and as text."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from kd_detectron.errors import ConfigError

from .timing import DISTILLED, STUDENT

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
