"""Child processes of tests: the command line as a target, and scripts that are one of several."""

import importlib.util
import io
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path


def load_script(path: Path, name: str):
    """The module of a script beside a test, whose functions the test calls as well."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A TCP port that nobody listens on, below those that the system gives to sockets by itself."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port


def git_repository(folder: Path) -> None:
    """Makes a repository of one commit, whatever the user's git is configured to do."""
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    folder.mkdir()
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=folder, env=os.environ | own, check=True)


def train(
    *argv: str,
    console: str | None = None,
    killed_after: int | None = None,
    disk_full_from: str | None = None,
    **environment: str,
) -> None:
    """Runs ``tools/train_net.py`` with these arguments; its exit code is the process's.

    Args:
        argv: its arguments.
        console: a file for all that it prints.
        killed_after: kill -9 in mid-write, when it has written so many bytes of checkpoints.
        disk_full_from: of the checkpoint of this name and all later ones, nothing can be written:
            the system says that the disk is full.
        environment: variables to set, such as those by which torchrun names a process.
    """
    from kd_detectron import atomic_files
    from kd_detectron.engine.main import main

    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of its own children, as a user's
    if console is not None:
        descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    if killed_after is not None:
        atomic_files.open = LastWords(killed_after)
    if disk_full_from is not None:
        atomic_files.open = FullDisk(disk_full_from)
    sys.exit(main(list(argv)))


class LastWords:
    """An ``open`` whose binary files end the process when this many bytes were written to them."""

    def __init__(self, left: int):
        self.left = left

    def __call__(self, path: str, mode: str):
        if mode != "wb":
            return open(path, mode)
        outer = self

        class File(io.FileIO):
            def write(self, data) -> int:
                written = super().write(memoryview(data)[: outer.left])
                outer.left -= written
                if outer.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return written

        return io.BufferedWriter(File(path, "wb"))


class FullDisk:
    """An ``open`` for a disk that is full from one file on; the kernel itself refuses the write."""

    def __init__(self, first: str):
        self.first = first

    def __call__(self, path: str, mode: str):
        full = mode == "wb" and os.path.basename(path).strip(".") >= self.first
        return open("/dev/full" if full else path, mode)
