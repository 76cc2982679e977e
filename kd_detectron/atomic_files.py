"""Files that are either complete or not there: writing through a temporary file and a rename.

A checkpoint is written to ``.<name>.<process id>.partial`` in the folder it belongs to, flushed to
the disk, and renamed to its name. A failed write (disk full, quota, a signal) removes the temporary
file and leaves whatever stood under that name before; a killed process leaves its temporary file
behind, which :func:`remove_unfinished_files` removes when the training is resumed.
Tests: ``tests/checkpoint/test_checkpointer.py``.
"""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO


class CheckpointWriteError(OSError):
    """A file could not be written; what stood under its name before is intact."""


@contextmanager
def atomic_open(path: str, mode: str = "wb") -> Iterator[IO]:
    """Opens ``path`` for writing ("wb" or "w") so that it appears complete or not at all.

    Raises:
        CheckpointWriteError: it could not be written; the temporary file is gone. Other errors of
            the block pass unchanged.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.partial")
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
        if isinstance(error, OSError) or _is_of_zip_writer(error):
            reason = str(error).split("\n")[0]
            raise CheckpointWriteError(
                f"{path} could not be written ({reason}): the unfinished file was removed and the"
                " checkpoints already in that folder are intact; free some disk space or move"
                " the run's folder to another disk, then continue with --resume"
            ) from error
        raise


def _is_of_zip_writer(error: BaseException) -> bool:
    """Whether torch.save could not write, a RuntimeError that its text alone tells from others."""
    texts = ("inline_container", "PytorchStreamWriter", "unexpected pos")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _sync_folder(folder: str) -> None:
    """Makes a rename durable; file systems that cannot do this are left as they are."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished_files(folder: str) -> None:
    """Removes the temporary files that killed processes left in ``folder``.

    For the process that alone writes there: those of a living one would go as well.
    """
    for path in glob.glob(os.path.join(glob.escape(folder), ".*.partial")):
        os.remove(path)


class AtomicPathManager:
    """Detectron2's PathManager, through which fvcore opens checkpoints, with atomic writing."""

    def __init__(self, path_manager):
        self._path_manager = path_manager

    def __getattr__(self, name: str):
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs):
        if mode in ("w", "wb"):
            return atomic_open(path, mode)
        return self._path_manager.open(path, mode, **kwargs)
