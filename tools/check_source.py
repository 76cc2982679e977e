#!/usr/bin/env python
"""Whether a package's source is there, in seconds; exit code 0 if so, or if only pip can tell.

    python tools/check_source.py git+https://example.org/package.git@main
    python tools/check_source.py requirements-detectron2.txt

Else one sentence, and exit code 1 if a URL does not answer, 3 if git is needed and is not
installed, 4 if there is no such file or folder, or if the requirements file names nothing.

Standard library only: it runs before anything is installed. A git URL is asked for its first
reference and a web address for its headers, as pip will ask (so proxies count). A slow answer is
waited for; a refused or unresolved connection is not. Names such as ``package==1.0`` are left to
pip, and so is a server that answers but wants a password.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

THERE, UNREACHABLE, NO_GIT, MISSING = 0, 1, 3, 4
# A slow network answers within this; a firewall that drops packets never does.
PATIENCE_SECONDS = 40
ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def source_of(argument: str) -> str:
    """The source that an argument of pip, or the first line of a requirements file, names."""
    path = Path(argument)
    if path.suffix == ".txt" and path.is_file():
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        argument = next((line for line in lines if line), "")
    # "detectron2 @ URL ; python_version > '3'": the URL alone.
    argument = re.sub(r"^[\w.-]+(\[[^]]*\])?\s*@\s*(?=[a-z+]+:)", "", argument.strip())
    return argument.partition(" ;")[0].strip()


def check(argument: str, patience: float = PATIENCE_SECONDS) -> tuple[int, str]:
    """Returns the exit code, and what is wrong in words (empty if nothing is)."""
    source = source_of(argument)
    if not source:
        return MISSING, f"{argument} names no package"
    scheme = urlsplit(source).scheme
    if scheme.startswith("git+"):
        return _check_git(source, patience)
    if scheme in ("http", "https"):
        return _check_web(source, patience)
    if scheme == "file" or _is_path(source):
        path = unquote(urlsplit(source).path) if scheme == "file" else source
        # pip takes "folder[extra]" too.
        if not Path(path).exists() and not Path(re.sub(r"\[[^]]*\]$", "", path)).exists():
            return MISSING, f"there is no file or folder {path}"
    return THERE, ""


def _is_path(source: str) -> bool:
    """Whether pip takes this for a path: see ``_get_url_from_path`` in its sources."""
    is_url = re.match(r"[a-z+]+://", source)
    return not is_url and (os.sep in source or source.startswith(".") or source.endswith(ARCHIVES))


def _check_git(source: str, patience: float) -> tuple[int, str]:
    if shutil.which("git") is None:
        return NO_GIT, "git, which fetches it, is not installed"
    url = urlsplit(source.removeprefix("git+"))
    # The branch or commit stands behind the last @ of the path, and may hold a slash.
    path = url.path.rpartition("@")[0] or url.path
    url = url._replace(path=path, fragment="").geturl()
    try:
        done = subprocess.run(
            ["git", "ls-remote", url, "HEAD"],
            env=os.environ | {"GIT_TERMINAL_PROMPT": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        return UNREACHABLE, f"{url} does not answer"
    return (THERE, "") if done.returncode == 0 else (UNREACHABLE, f"{url} cannot be reached")


def _check_web(url: str, patience: float) -> tuple[int, str]:
    parts = urlsplit(url)
    if "@" in parts.netloc:  # a password, which pip knows how to send
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        urllib.request.urlopen(url, timeout=patience).close()
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            return UNREACHABLE, f"{url} does not exist"
    except TimeoutError:
        return UNREACHABLE, f"{url} does not answer"
    except (OSError, ValueError) as error:
        # pip brings certificates of its own.
        if "CERTIFICATE" not in str(error):
            return UNREACHABLE, f"{url} cannot be reached"
    return THERE, ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Whether a package's source is there.")
    parser.add_argument("source", help="anything that pip installs, or a requirements file")
    parser.add_argument("--patience", type=float, default=PATIENCE_SECONDS, help="in seconds")
    args = parser.parse_args()
    code, problem = check(args.source, args.patience)
    if problem:
        print(problem, file=sys.stderr)
    sys.exit(code)
