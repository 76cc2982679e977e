#!/usr/bin/env python
"""Whether a package's source can be reached, in seconds; exit code 0 if so, or if pip may know.

    python tools/check_source.py git+https://example.org/package.git@main
    python tools/check_source.py requirements-detectron2.txt

Standard library only: it runs before anything is installed. A git URL is asked for its first
reference, as pip will ask (so proxies count); a slow answer is waited for, a refused or unresolved
connection is not.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

# A slow network answers within this; a firewall that drops packets never does.
PATIENCE_SECONDS = 40


def source_of(argument: str) -> str:
    """The source that an argument of pip, or the one in a requirements file, names."""
    path = Path(argument)
    if path.suffix == ".txt" and path.is_file():
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
        argument = next(line for line in lines if line)
    return argument.partition(" @ ")[2].strip() or argument


def is_reachable(source: str) -> bool:
    """Whether git answers for a git URL; True for all else, which pip finds out by itself."""
    if not source.startswith("git+"):
        return True
    url = re.sub(r"(?<=.)@[^/@]+$", "", source.removeprefix("git+").partition("#")[0])
    try:
        done = subprocess.run(
            ["git", "ls-remote", url, "HEAD"],
            env=os.environ | {"GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE_SECONDS,
        )
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return False
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(0 if is_reachable(source_of(sys.argv[1])) else 1)
