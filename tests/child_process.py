"""The command line as the target of a child process (tests/engine/test_faults.py)."""

import os
import sys


def train(*argv: str, **environment: str) -> None:
    """Runs ``tools/train_net.py`` with these arguments; its exit code is the process's.

    ``environment``: variables to set, such as those by which torchrun names a process.
    """
    from kd_detectron.engine.main import main

    os.environ.update(environment)
    sys.exit(main(list(argv)))
