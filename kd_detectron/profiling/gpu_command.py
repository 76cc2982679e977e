"""Does everything work on this GPU, and what does it cost? About ten minutes on one GPU.

    tools/gpu_report.py --output gpu_report.json
    tools/gpu_report.py --parts checks
    tools/gpu_report.py --parts tables teacher --configs ckd_rcnn_r101_r18.yaml --images 2 8

Needs no data and no weights. Without a GPU it runs small models on the CPU, to see that the script
works. docs/gpu.md says what the output means.
"""

import argparse
import tempfile

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
    shape = {
        "device": device,
        "small": small,
        "size": tuple(args.size or ((96, 128) if small else (800, 1333))),
    }
    images = args.images or ([2] if small else [2, 8])
    if device == "cpu":
        print("There is no CUDA GPU: small models on the CPU, whose times say nothing of a GPU.")
    print(collect_env_info())
    content = {"environment": collect_env_info(), "device": device, "small": small}

    def keep(key: str, value) -> None:
        # After each part, so that an interrupted report keeps what it has.
        content[key] = value
        if args.output:
            save_report(content, args.output)

    checks = []
    if "checks" in args.parts:
        sizes = {"device": device, "small": small}
        for check in gpu_report.method_checks(**sizes, methods=args.methods):
            checks.append(check)
            print(f"{check['check']}: {check['result']}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for check in gpu_report.command_checks(folder, **sizes):
                checks.append(check)
                print(f"{check['check']}: {check['result']}", flush=True)
        print(f"\n{gpu_report.format_checks(checks)}\n")
        keep("checks", checks)
    if "tables" in args.parts:
        rows = []
        for row in gpu_report.measure_configs(
            args.configs, **shape, images=images, repeats=args.repeats
        ):
            rows.append(row)
            keep("tables", rows)
            if "report" in row:
                print(f"{format_report(row['report'])}\n", flush=True)
        reports = [row["report"] for row in rows if "report" in row]
        if reports:
            print(f"{compare_reports(reports)}\n")
        print(f"{gpu_report.format_memory(rows)}\n")
    if "teacher" in args.parts:
        rows = list(gpu_report.teacher_variants(args.configs[0], **shape, images=images[0]))
        keep("teacher", rows)
        print(f"{args.configs[0]}, {images[0]} images\n{gpu_report.format_variants(rows)}")
    return not any(str(check["result"]).startswith("failed") for check in checks)


def main(arguments: list[str] | None = None) -> int:
    """``tools/gpu_report.py``; exit code 0, 1 where a check failed, or 2 for a user's error."""
    args = build_parser().parse_args(arguments)
    passed = []
    code = exit_code(lambda: passed.append(report(args)))
    return code or int(not all(passed))
