#!/usr/bin/env python
"""Sets up the virtual environment for the Makefile: the index's packages, then Detectron2.

    tools/install.py                     with Detectron2, or exit code 1
    tools/install.py --otherwise "..."   where Detectron2 cannot be installed, says so, and goes on
    tools/install.py --base              without Detectron2

The cheapest question comes first: is Detectron2's source there (tools/check_source.py, seconds)?
Then torch and all else that the index has, then Detectron2, compiled against the installed torch.
A source that the user names with --source has to work. What is installed stays: the environment
holds ``.base`` and ``.installed``, as new as what was installed, and ``.failed`` after a build of
Detectron2 that failed. Standard library only; runs in the root of the repository.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import check_source

BASE = ["requirements.txt", "requirements-dev.txt", "setup.py"]
DETECTRON2 = "requirements-detectron2.txt"


class Environment:
    """The virtual environment: what it holds, and what is installed into it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.base, self.installed, self.failed = (
            folder / name for name in (".base", ".installed", ".failed")
        )

    def run(self, *arguments: str, quiet: bool = False) -> bool:
        """Runs its Python; whether that went well."""
        output = subprocess.DEVNULL if quiet else None
        command = [str(self.python), *arguments]
        return subprocess.run(command, stdout=output, stderr=output).returncode == 0

    def pip_install(self, *arguments: str) -> bool:
        return self.run("-m", "pip", "install", *arguments)

    def install_base(self) -> bool:
        """Installs all but Detectron2; False if that failed, which pip has then explained."""
        if is_newer(self.base, *BASE):
            return True
        made = subprocess.run([sys.executable, "-m", "venv", str(self.folder)]).returncode == 0
        requirements = ["-r", "requirements.txt", "-r", "requirements-dev.txt"]
        if not (
            made
            and self.pip_install(*requirements)
            and self.pip_install("--no-build-isolation", "--no-deps", "-e", ".")
        ):
            return False
        self.base.touch()
        return True

    def has_detectron2(self, quiet: bool = True) -> bool:
        """Whether Detectron2 runs with the torch that is installed, wherever it came from."""
        if is_newer(self.installed, self.base, DETECTRON2):
            return True
        program = "import detectron2, torch, detectron2._C"
        if not self.python.exists() or not self.run("-W", "ignore", "-c", program, quiet=quiet):
            return False
        self.installed.touch()
        return True

    def install_detectron2(self, source: str | None) -> bool:
        """Builds and installs Detectron2; False if that failed, and the error was shown."""
        # pip would take a build against another torch for the same version, and keep it.
        self.remove_broken_detectron2()
        what = [source] if source else ["-r", DETECTRON2]
        if self.pip_install("--no-build-isolation", *what) and self.has_detectron2(quiet=False):
            self.failed.unlink(missing_ok=True)
            return True
        if not source:
            self.failed.touch()
        return False

    def remove_broken_detectron2(self) -> None:
        """Removes what would be found and does not run, such as a build against another torch."""
        if self.run("-c", "import detectron2", quiet=True):
            self.run("-m", "pip", "uninstall", "-y", "detectron2", quiet=True)


def is_newer(file: Path, *others: str | Path) -> bool:
    """Whether a file is there, as are the others, and none of them was changed since."""
    others = [Path(other) for other in others]
    if not all(path.exists() for path in (file, *others)):
        return False
    return file.stat().st_mtime >= max(other.stat().st_mtime for other in others)


def main() -> int:
    parser = argparse.ArgumentParser(description="Sets up the virtual environment.")
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--source", help="of Detectron2, in place of requirements-detectron2.txt")
    parser.add_argument("--base", action="store_true", help="without Detectron2")
    parser.add_argument("--otherwise", help="what happens where Detectron2 cannot be installed")
    args = parser.parse_args()
    environment = Environment(args.venv)
    if args.base:
        return 0 if environment.install_base() else 1

    demanded = bool(args.source) or not args.otherwise
    problem = ""
    if environment.has_detectron2():
        if args.source:
            print(f"Detectron2 is installed in {args.venv} already; {args.source} is not used")
    elif not demanded and is_newer(environment.failed, environment.base, DETECTRON2):
        problem = "its build failed before; make install tries again"
    else:
        problem = check_source.check(args.source or DETECTRON2)[1]
    if problem and demanded:
        return refuse(problem)
    if not environment.install_base():
        return 1
    # Asked again, for a new torch may need a new Detectron2.
    build = not problem and not environment.has_detectron2()
    if build and not environment.install_detectron2(args.source):
        problem = "the error stands above"
        if demanded:
            return refuse(problem)
    if problem:
        environment.remove_broken_detectron2()
        print(f"Detectron2 cannot be installed ({problem}), so {args.otherwise}", flush=True)
    return 0


def refuse(problem: str) -> int:
    fix = "name another source: DETECTRON2=<wheel, folder or git URL>"
    print(f"error: Detectron2 cannot be installed ({problem}); {fix}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
