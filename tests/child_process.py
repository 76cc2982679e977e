"""The command line as the target of a child process (tests/engine/test_faults.py)."""

import sys


def train(*argv: str) -> None:
    """Runs ``tools/train_net.py`` with these arguments; its exit code is the process's."""
    from kd_detectron.engine.main import main

    sys.exit(main(list(argv)))
