"""What the commands in ``tools/`` share: ``--import``, exit codes, a mistake as one sentence."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from kd_detectron.errors import ConfigError

# What a cluster's scheduler may decide by.
# A run failed for a reason that a restart alone does not mend: a loss that is not finite, a full
# disk, a corrupt image. What it had learnt until its last checkpoint is kept.
FAILED_EXIT_CODE = 1
# The user's mistake, said in one sentence; nothing was trained.
USER_ERROR_EXIT_CODE = 2
# EX_TEMPFAIL of sysexits.h: stopped by a signal with a checkpoint written; --resume goes on.
INTERRUPTED_EXIT_CODE = 75


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--import FILE``, into ``imports``, for a command that builds distillers."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE",
        help="a python file or module to import first, e.g. one that registers your distiller",
    )


def import_user_code(name: str) -> None:
    """Imports a module by name, or a ``.py`` file by path.

    Raises:
        ConfigError: there is no such file.
    """
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--import '{name}' is not a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Registered by name first, so that its classes can be pickled.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


def exit_code(work: Callable[[], None]) -> int:
    """Runs ``work()`` and returns the exit code; errors of the user and of files are one line."""
    try:
        work()
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0
