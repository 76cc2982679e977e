"""Signals in the processes that load data: those of a terminal or a scheduler are not for them."""

import multiprocessing
import os
import signal
import threading


def heed_the_training_alone(worker: int) -> None:
    """A ``worker_init_fn``: SIGINT and SIGTERM are ignored, but for the training's own SIGTERM.

    Terminals and schedulers send them to all processes of a job. The training then finishes its
    iteration and needs its data for that; where a worker died, it would end with an error.

    Args:
        worker: the worker's number, which is not used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS has none.
        # A handler could not tell who sent the signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        # Not getppid(), which is a server's where processes are started by one.
        training = multiprocessing.parent_process().pid
        threading.Thread(target=_end_when_told_by, args=[training], daemon=True).start()


def _end_when_told_by(training: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)
