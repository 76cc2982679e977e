"""Starting a command's processes, by Detectron2's ``launch`` or ``torchrun``, and how they end.

A mistake of the user ends in one sentence and exit code 2 (``--debug`` shows the traceback), a
failed training in one sentence and exit code 1.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator

import torch
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from kd_detectron.checkpoint import CheckpointWriteError
from kd_detectron.commands import FAILED_EXIT_CODE, USER_ERROR_EXIT_CODE
from kd_detectron.errors import ConfigError, CorruptImageError, NonFiniteLossError

from .hooks import Interrupted


def start(args, run: Callable) -> int:
    """Runs ``run(args)`` in each process that the arguments ask for; returns the exit code."""
    try:
        if "LOCAL_WORLD_SIZE" in os.environ:
            join_torchrun()
            run_process(args, run)
            torch.distributed.destroy_process_group()
        else:
            several = args.num_gpus * args.num_machines > 1
            with signals_for_children() if several else contextlib.nullcontext():
                launch(
                    run_process,
                    args.num_gpus,
                    num_machines=args.num_machines,
                    machine_rank=args.machine_rank,
                    dist_url=args.dist_url,
                    args=(args, run),
                )
    except ProcessExitedException as error:
        if error.signal_name is None:  # The process has printed its own error.
            return error.exit_code
        print(
            f"error: process {error.error_index} was ended by {error.signal_name}, and the others "
            "with it; the last checkpoint is intact, --resume continues the run",
            file=sys.stderr,
        )
        return FAILED_EXIT_CODE
    except SystemExit as stop:
        return stop.code
    return 0


@contextlib.contextmanager
def signals_for_children() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT have the child processes stop in order, and this one waits.

    If it died first, its children would be ended before their checkpoint is written. Before there
    are children a signal ends this process as usual.
    """

    def forward(number, frame) -> None:
        children = multiprocessing.active_children()
        if not children:
            signal.signal(number, previous[number])
            os.kill(os.getpid(), number)
        for child in children:
            child.terminate()

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_process(args, run: Callable) -> None:
    """``run(args)``, whose foreseen ends are one sentence and an exit code."""
    try:
        run(args)
    except (ConfigError, NonFiniteLossError, CorruptImageError, CheckpointWriteError) as error:
        if args.debug:
            raise
        by_user = isinstance(error, ConfigError)
        if comm.is_main_process() or not by_user:
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR_EXIT_CODE if by_user else FAILED_EXIT_CODE) from None
    except Interrupted as stop:
        if comm.is_main_process():
            print(stop.message, file=sys.stderr)
        raise


def join_torchrun() -> None:
    """Joins the process group of a ``torchrun`` start, as Detectron2's ``launch`` would."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # Ten minutes, NCCL's own, are short for what the main process does alone, such as COCO AP.
    torch.distributed.init_process_group(backend, timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
