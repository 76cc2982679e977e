"""Shared by the commands in ``tools/``: ``--import``, exit codes, errors in one sentence."""

import argparse
import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from kd_detectron.errors import ConfigError

# A run failed for a reason that a restart alone does not mend: a loss that is not finite, a full
# disk, a corrupt image. Its last checkpoint is kept.
FAILED_EXIT_CODE = 1
# The user's mistake, said in one sentence; nothing was trained.
USER_ERROR_EXIT_CODE = 2
# EX_TEMPFAIL of sysexits.h: stopped by a signal with a checkpoint written; --resume continues.
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
        ConfigError: there is no such file or module, it cannot be run, or the file's name is that
            of another module, which it would replace.
    """
    try:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            importlib.import_module(name)
    except ConfigError:
        raise
    except Exception as error:  # Any Python error: the file is a program.
        raise ConfigError(
            f"--import '{name}' cannot be imported ({type(error).__name__}: {error}); give a .py "
            "file or the name of an installed module, and try it alone with python first"
        ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"--import '{path}' is not a file")
    name, known = path.stem, None
    with contextlib.suppress(ImportError, ValueError):  # It is the name of no module.
        known = importlib.util.find_spec(name)
    if known and known.origin and Path(known.origin).resolve() != path.resolve():
        raise ConfigError(
            f"--import '{path}' would replace the module '{name}' ({known.origin}); rename the file"
        )
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Registered by name first, so that its classes can be pickled.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> argparse.Namespace:
    """``parser.parse_args`` for a command that ends in ``KEY VALUE`` overrides, ``args.opts``.

    An option among the overrides ends the program with exit code 2 and one sentence.
    """
    args = parser.parse_args(argv)
    late = [opt for opt in args.opts if opt.startswith("--")]
    if late:
        parser.exit(
            USER_ERROR_EXIT_CODE,
            f"error: {late[0]} stands after KEY VALUE overrides; options go before them\n",
        )
    return args


def exit_code(work: Callable[[], None]) -> int:
    """Runs ``work()`` and returns the exit code; errors of the user and of files are one line."""
    try:
        work()
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0
