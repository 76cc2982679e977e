"""Does everything work on this GPU, and what does it cost? About ten minutes on one GPU.

    tools/gpu_report.py --output gpu_report.json
    tools/gpu_report.py --parts checks
    tools/gpu_report.py --parts tables teacher --configs ckd_rcnn_r101_r18.yaml --images 2 8

Needs no data and no weights. Without a GPU it runs small models on the CPU, to see that the script
works. docs/gpu.md says what the output means.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from detectron2.utils.collect_env import collect_env_info

from kd_detectron.commands import add_import_option, exit_code, import_user_code
from kd_detectron.profiling import gpu_report
from kd_detectron.profiling.report import compare_reports, format_report, save_report

PARTS = ("checks", "tables", "teacher")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to do (all)")
    parser.add_argument(
        "--configs",
        nargs="+",
        default=gpu_report.TABLE_CONFIGS,
        metavar="NAME",
        help="distilled configs for the tables (CKD, CKD + ReviewKD and the recipe, three pairs)",
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="distillers for the checks (all registered)"
    )
    parser.add_argument("--images", type=int, nargs="+", help="images of a batch (2 8)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of an image (800 1333)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--small", action="store_true", help="small models and images on a GPU too")
    parser.add_argument("--output", metavar="JSON", help="also write everything here")
    add_import_option(parser)
    return parser


def report(args: argparse.Namespace) -> bool:
    """Runs what was asked for; returns whether no check failed."""
    for name in args.imports:
        import_user_code(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = args.small or device == "cpu"
    sizes = {"device": device, "small": small}
    size = tuple(args.size or ((96, 128) if small else (800, 1333)))
    images = args.images or ([2] if small else [2, 8])
    if device == "cpu":
        print("There is no CUDA GPU: small models on the CPU, whose times say nothing of a GPU.")
    content = {"environment": collect_env_info(), **sizes}
    content |= {part: [] for part in PARTS}
    print(content["environment"])

    def keep(key: str, rows: Iterable[dict]) -> Iterator[dict]:
        # Written after each row, so that an interrupted report keeps what it has.
        for row in rows:
            content[key].append(row)
            if args.output:
                save_report(content, args.output)
            yield row

    if "checks" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            steps = gpu_report.method_checks(**sizes, methods=args.methods)
            for check in keep("checks", chain(steps, gpu_report.command_checks(folder, **sizes))):
                print(f"{check['check']}: {check['result']}", flush=True)
    failed = [check for check in content["checks"] if check["result"].startswith("failed")]
    if content["checks"]:
        print(f"\n{len(content['checks'])} checks, {len(failed)} failed")
        print("".join(f"  {check['check']}: {check['result']}\n" for check in failed))
    if "tables" in args.parts:
        shape = {"size": size, "images": images, "repeats": args.repeats}
        for row in keep("tables", gpu_report.measure_configs(args.configs, **sizes, **shape)):
            what = f"{row['name']}, {row['images']} images: {row.get('failed')}"
            print(f"{format_report(row['report']) if 'report' in row else what}\n", flush=True)
        reports = [row["report"] for row in content["tables"] if "report" in row]
        print(f"{compare_reports(reports)}\n")
    if "teacher" in args.parts:
        shape = {"size": size, "images": images[0], "repeats": args.repeats}
        print(f"{args.configs[0]}, {images[0]} images, milliseconds")
        for row in keep("teacher", gpu_report.teacher_variants(args.configs[0], **sizes, **shape)):
            result = row.get("failed") or f"{1000 * row['seconds']:.4g}"
            print(f"{row['variant']}: {result}", flush=True)
    return not failed


def main(arguments: list[str] | None = None) -> int:
    """``tools/gpu_report.py``; exit code 0, 1 where a check failed, or 2 for a user's error."""
    args = build_parser().parse_args(arguments)
    passed = []
    code = exit_code(lambda: passed.append(report(args)))
    return code or int(not all(passed))
