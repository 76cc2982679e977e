"""``python -m kd_detectron COMMAND ...``: the commands of ``tools/``, for installations by pip."""

import importlib
import sys

# Modules whose ``main`` takes the rest of the command line; each is also a file in ``tools/``.
COMMANDS = {
    "train": "kd_detectron.engine.main",
    "train_lazy": "kd_detectron.engine.lazy",
    "train_torchvision": "kd_detectron.torchvision.main",
    "export": "kd_detectron.checkpoint.export_command",
    "study": "kd_detectron.studies.study",
    "table": "kd_detectron.runs.main",
    "visualize": "kd_detectron.visualize.main",
    "benchmark": "kd_detectron.profiling.command",
    "benchmark_torchvision": "kd_detectron.torchvision.benchmark",
    "gradient_norms": "kd_detectron.profiling.gradient_norms",
    "principal_components": "kd_detectron.profiling.principal_components",
    "gpu_report": "kd_detectron.profiling.gpu_command",
    "label": "kd_detectron.labelling.main",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        try:
            command = importlib.import_module(COMMANDS[name])
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("detectron2"):
                raise
            print(
                f"error: '{name}' needs Detectron2, which is not installed in {sys.prefix}; "
                "train_torchvision needs none",
                file=sys.stderr,
            )
            return 2
        return command.main(rest)
    print(f"python -m kd_detectron COMMAND [--help], one of: {', '.join(COMMANDS)}")
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
