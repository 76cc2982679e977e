"""``tools/export_student.py``: a run's student for plain Detectron2, as TorchScript or as ONNX."""

import argparse
from collections.abc import Sequence

from detectron2.utils.logger import setup_logger

from kd_detectron.checkpoint.plain_export import export_student
from kd_detectron.checkpoint.traced_export import export_onnx, export_torchscript
from kd_detectron.commands import add_import_option, exit_code, import_user_code
from kd_detectron.errors import ConfigError

TRACED = {"torchscript": export_torchscript, "onnx": export_onnx}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="export_student.py",
        description="Export the student of a run without its distillation.",
    )
    parser.add_argument("run", help="a run's output folder, or a checkpoint file in it")
    parser.add_argument("out", help="the folder or file to write")
    parser.add_argument("--format", choices=("detectron2", *TRACED), default="detectron2")
    parser.add_argument(
        "--checkpoint",
        default="final",
        metavar="final|best|FILE",
        help="which checkpoint of the folder: model_final.pth (default), model_best.pth, or a file",
    )
    parser.add_argument("--config-file", help="the run's config, if not config.yaml beside it")
    parser.add_argument("--image", help="an image with objects, to trace on (torchscript, onnx)")
    add_import_option(parser)
    options = parser.parse_args(arguments)
    setup_logger(name="kd_detectron")
    source = {"checkpoint": options.checkpoint, "cfg": options.config_file}

    def export() -> None:
        for name in options.imports:
            import_user_code(name)
        if options.format == "detectron2":
            export_student(options.run, options.out, **source)
        elif options.image is None:
            raise ConfigError(f"--format {options.format} needs --image, an image to trace on")
        else:
            TRACED[options.format](options.run, options.out, options.image, **source)

    return exit_code(export)
