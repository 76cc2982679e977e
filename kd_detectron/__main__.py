"""``python -m kd_detectron``: lists what there is, and runs the commands without ``tools/``.

Without a command it lists the configs, the distillers and the model zoo's teachers: what the config
key or argument takes, with a config's first comment or the first line of a distiller's docstring.
``python -m kd_detectron train ...`` is ``tools/train_net.py ...``, for installations by pip.
"""

import argparse
import ast
import importlib
import os
import sys
from pathlib import Path

from detectron2.config import get_cfg

from kd_detectron import __version__, add_kd_config
from kd_detectron.config import config_dir
from kd_detectron.distillers import DISTILLER_REGISTRY
from kd_detectron.modeling.teacher_loading import zoo_configs

KINDS = ("configs", "distillers", "teachers")
# Modules whose ``main`` takes the rest of the command line; each is also a file in ``tools/``.
COMMANDS = {
    "train": "kd_detectron.engine.main",
    "train_lazy": "kd_detectron.engine.lazy",
    "train_torchvision": "kd_detectron.torchvision.main",
    "export": "kd_detectron.checkpoint.export_command",
    "study": "kd_detectron.studies.study",
    "table": "kd_detectron.runs.main",
    "visualize": "kd_detectron.visualize.main",
    "benchmark": "kd_detectron.profiling.report",
    "gradient_norms": "kd_detectron.profiling.gradient_norms",
    "gpu_report": "kd_detectron.profiling.gpu_command",
    "label": "kd_detectron.labelling.main",
}


def main(argv: list[str] | None = None) -> int:
    """Prints what was asked for, or runs a command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m kd_detectron",
        description=f"kd_detectron {__version__}: what there is, and its commands.",
        epilog=f"commands: {', '.join(COMMANDS)}; python -m kd_detectron COMMAND --help",
    )
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: all three)"
    )
    args = parser.parse_args(argv)
    for kind in args.kinds:
        if kind not in KINDS:
            parser.error(f"'{kind}' is none of {', '.join(KINDS)} and no command")
    lists = {"configs": configs, "distillers": distillers, "teachers": teachers}
    print("\n\n".join(lists[kind]() for kind in args.kinds or KINDS))
    return 0


def configs() -> str:
    """Every config by the name that ``--config-file`` takes, with its first comment."""
    root = config_dir()
    files = [*root.rglob("*.yaml"), *root.rglob("*.py")]
    names = {path.relative_to(root).as_posix(): path for path in files}
    rows = [
        (name, summary(path))
        for name, path in names.items()
        if not name.startswith(("_base_/", "studies/"))
    ]
    # Those of the main folder first.
    rows.sort(key=lambda row: (row[0].count("/"), row[0]))
    return (
        "Configs: python -m kd_detectron train --config-file NAME "
        f"(lazy/: train_lazy)\n{_table(rows)}"
    )


def summary(path: Path) -> str:
    """The first line of a config: its comment, or its docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return text.partition("\n")[0].lstrip("# ")


def distillers() -> str:
    """Every registered distiller with its config node, the node's defaults and its summary."""
    cfg = get_cfg()
    add_kd_config(cfg)
    rows = []
    for name, cls in sorted(DISTILLER_REGISTRY):
        line = (cls.__doc__ or "").strip().partition("\n")[0]
        options = cfg.KD.get(name.upper(), {})
        rows.append((name, line))
        rows.append(
            ("", f"KD.{name.upper()}: " + ", ".join(f"{k} {v}" for k, v in options.items()))
        )
    return f"Distillers: KD.DISTILLERS takes any list of them\n{_table(rows)}"


def teachers() -> str:
    """The model zoo's configs that have a checkpoint."""
    rows = [(name, "") for name in zoo_configs()]
    return (
        "Teachers: KD.TEACHER.CONFIG_FILE takes these of Detectron2's model zoo, whose weights are "
        "downloaded,\nor your own .yaml or LazyConfig .py with KD.TEACHER.WEIGHTS. Feature "
        "distillers need a\nteacher with the student's levels: for an FPN student one with FPN.\n"
        + _table(rows)
    )


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {text}".rstrip() for name, text in rows)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        # The reader, e.g. ``head``, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
