"""The command ``tools/train_torchvision.py``: options in, a run folder out."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode

from kd_detectron.commands import (
    FAILED_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    add_import_option,
    import_user_code,
)
from kd_detectron.errors import ConfigError, NonFiniteLossError

from .options import TrainingOptions


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a torchvision detector on COCO-format data, distilled or not."
    )
    parser.add_argument(
        "--config",
        metavar="YAML",
        help="a file of these options, by name; _BASE_ names another one",
    )
    parser.add_argument("--output", help="the run folder")
    for split in ("train", "val"):
        parser.add_argument(
            f"--{split}", nargs=2, metavar=("JSON", "IMAGES"), help="annotations and image folder"
        )
    parser.add_argument("--student", help="e.g. fasterrcnn_mobilenet_v3_large_320_fpn")
    parser.add_argument("--teacher", help="e.g. fasterrcnn_resnet50_fpn_v2")
    parser.add_argument("--teacher-weights", help="its trained weights")
    parser.add_argument("--teacher-run", help="instead of both: the folder of its training")
    parser.add_argument(
        "--distillers",
        nargs="+",
        metavar="NAME[=WEIGHT]",
        help="e.g. CKD=0.1 ReviewKD; options of each in --config",
    )
    parser.add_argument("--inherit", nargs="+", metavar="PART", help="e.g. rpn roi_heads")
    parser.add_argument("--weights", help="of the student to start from")
    parser.add_argument("--backbone-weights", help="e.g. IMAGENET1K_V1")
    for which in ("student", "teacher"):
        parser.add_argument(
            f"--{which}-options",
            type=_read_yaml,
            metavar="YAML",
            help="arguments of the detector, e.g. '{min_size: 480}'",
        )
    for one in fields(TrainingOptions):
        if one.type in (int, float):
            option = f"--{one.name.replace('_', '-')}"
            parser.add_argument(option, type=one.type, help=f"default {one.default:g}")
    parser.add_argument("--steps", nargs="+", type=int)
    for name in ("precision", "devices", "accelerator"):
        parser.add_argument(f"--{name}", help="Lightning's")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    add_import_option(parser)
    return parser


def read_options(args: argparse.Namespace) -> TrainingOptions:
    """The options of ``--config``, overridden by those of the command line."""
    values = {}
    if args.config:
        if not Path(args.config).is_file():
            raise ConfigError(f"--config '{args.config}' is not a file")
        if Path(args.config).stat().st_size:
            try:
                values = CfgNode.load_yaml_with_base(args.config)
            except (OSError, yaml.YAMLError) as error:
                raise ConfigError(
                    f"--config '{args.config}' is not readable YAML: {error}"
                ) from error
    given = {k: v for k, v in vars(args).items() if v is not None}
    for key in ("config", "resume", "imports"):
        given.pop(key, None)
    return TrainingOptions.from_mapping(values | given)


def _read_yaml(text: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not readable YAML") from error


def training_exit_code(work: Callable[[], None], same_command: str) -> int:
    """Runs ``work()`` and returns the exit code; says how to go on with what was interrupted.

    It is 2 for errors of the user, 1 for what makes a training fail: a loss that is not finite, a
    full disk, an image that cannot be read.

    Args:
        work: the training.
        same_command: "the same command", and what is to be added to it.
    """
    try:
        work()
    except (ConfigError, NonFiniteLossError, OSError) as error:
        print(f"error: {_message(error)}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE if isinstance(error, ConfigError) else FAILED_EXIT_CODE
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning sets it where it starts several.
            print(f"interrupted; {same_command} continues from the last checkpoint")
        return INTERRUPTED_EXIT_CODE
    return 0


def _message(error: Exception) -> str:
    """What an error says, without the stack that a process which reads images puts before it."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return text.rstrip().splitlines()[-1].partition(": ")[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says; returns the exit code."""
    args = build_parser().parse_args(argv)

    def work() -> None:
        for name in args.imports:
            import_user_code(name)
        options = read_options(args)
        try:
            from lightning.pytorch.utilities import rank_zero_only

            from .training import train
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"training needs {error.name}, which is not installed; pip install "
                "lightning==2.6.6 torchmetrics==1.9.0"
            ) from error
        results = train(options, resume=args.resume)
        say = rank_zero_only(print)  # Lightning starts this command once per device.
        for task, scores in results.items():
            say(task, ", ".join(f"{name} {value:.1f}" for name, value in scores.items()))
        say(f"run folder: {options.output}")

    return training_exit_code(work, "the same command with --resume")
