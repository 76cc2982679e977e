"""Files that are either complete or not there: writing through a temporary file and a rename.

A checkpoint is written to ``.<name>.<host>.<process id>.partial`` in the folder it belongs to,
flushed to the disk, and renamed to its name. A failed write (disk full, quota, a signal) removes
the temporary file and leaves whatever stood under that name before; a killed process leaves its
temporary file behind, which :func:`remove_stale_files` clears when the next run starts.

:class:`AtomicPathManager` puts this under fvcore's ``Checkpointer``, which opens both its
checkpoints and its ``last_checkpoint`` tag through ``self.path_manager``, so that nothing of
Detectron2's saving has to be rewritten. Tests: ``tests/test_checkpoint.py``.
"""

import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

_PARTIAL = re.compile(r"^\.(?P<name_and_host>.+)\.(?P<process>\d+)\.partial$")
_ABANDONED_AFTER_SECONDS = 3600.0


class CheckpointWriteError(OSError):
    """A file could not be written; what stood under its name before is intact."""


@contextmanager
def atomic_open(path: str, mode: str = "wb") -> Iterator[IO]:
    """Opens ``path`` for writing so that it appears complete or not at all.

    Args:
        path: the file to write; its folder must exist.
        mode: "wb" or "w".

    Raises:
        CheckpointWriteError: it could not be written; the temporary file is gone.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
    except BaseException as error:
        with suppress(OSError):
            os.remove(temporary)
        # torch.save reports a failed write as a RuntimeError of its zip writer.
        if isinstance(error, (OSError, RuntimeError)):
            reason = str(error).split("\n")[0]
            raise CheckpointWriteError(
                f"{path} could not be written ({reason}): the unfinished file was removed and the"
                " checkpoints already in that folder are intact; free some disk space or move"
                " OUTPUT_DIR to another disk, then continue with --resume"
            ) from error
        raise


def _sync_folder(folder: str) -> None:
    """Makes a rename durable; file systems that cannot do this are left as they are."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_stale_files(folder: str) -> list[str]:
    """Removes the temporary files that killed processes left in ``folder``; returns their names.

    A run that is still writing (say, a training whose folder an evaluation also opens) is left
    alone: a file goes when its process on this machine is gone, or when nothing was written to it
    for an hour.
    """
    removed = []
    if not os.path.isdir(folder):
        return removed
    for name in sorted(os.listdir(folder)):
        match = _PARTIAL.match(name)
        if match is None:
            continue
        path = os.path.join(folder, name)
        with suppress(OSError):
            written_here = match["name_and_host"].endswith(f".{socket.gethostname()}")
            if (written_here and not _is_running(int(match["process"]))) or (
                time.time() - os.path.getmtime(path) > _ABANDONED_AFTER_SECONDS
            ):
                os.remove(path)
                removed.append(name)
    if removed:
        logging.getLogger(__name__).info(
            "removed %d unfinished file(s) of a killed process from %s", len(removed), folder
        )
    return removed


def _is_running(process: int) -> bool:
    """Whether another process of this machine has this id; this one has just started."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class AtomicPathManager:
    """Detectron2's PathManager with one difference: files opened for writing are atomic."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        """Opens a file as PathManager does; see :func:`atomic_open` for the writing modes."""
        if mode in ("w", "wb"):
            return atomic_open(path, mode)
        return self._path_manager.open(path, mode, **kwargs)
