"""Trainer hooks: what distillation adds around Detectron2's own."""

import contextlib
import glob
import logging
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

import numpy as np
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from kd_detectron.atomic_files import atomic_open
from kd_detectron.commands import INTERRUPTED_EXIT_CODE
from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import FINAL_CHECKPOINTS, LAST_CHECKPOINT, RESULT, write_result

logger = logging.getLogger(__name__)


class StepSeed(HookBase):
    """Seeds python, numpy and torch before each step from the run's seed, process and iteration.

    So a resumed run follows the uninterrupted one with nothing to store.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        sequence = np.random.SeedSequence([self.seed, comm.get_rank(), self.trainer.iter])
        seed_all_rng(int(sequence.generate_state(1)[0]))


class TeacherGuard(HookBase):
    """Raises an error where the training changed the teacher's weights or buffers.

    At its end, and before each checkpoint (``DistillationCheckpointer.before_save``), so that no
    run can be resumed from one after the change.
    """

    def __init__(self, teacher):
        self._teacher = teacher

    def before_train(self) -> None:
        self._fingerprint = self._teacher.fingerprint()

    def check(self) -> None:
        """Raises RuntimeError where the teacher is not as it was before the first step."""
        if self._teacher.fingerprint() != self._fingerprint:
            raise RuntimeError(
                f"the teacher {self._teacher.name} changed during training; something trained or "
                "overwrote its weights or buffers"
            )

    def after_train(self) -> None:
        self.check()
        logger.info("The teacher is unchanged (sha256 %s...)", self._fingerprint[:12])


class LRScheduler(hooks.LRScheduler):
    """Detectron2's, which logs the rate of the group with the most parameters.

    Here of the group with the most that are not inherited, whose rate is that of the config. The
    class keeps its name, under which checkpoints hold the state of schedulers.

    Args:
        inherited: parameters with ``KD.TEACHER.INHERIT_LR_FACTOR`` on their rate.
    """

    def __init__(self, inherited: Iterable[torch.nn.Parameter]):
        super().__init__()
        self._inherited = {id(parameter) for parameter in inherited}

    def before_train(self) -> None:
        super().before_train()
        groups = self._optimizer.param_groups
        own = [sum(id(p) not in self._inherited for p in group["params"]) for group in groups]
        if self._inherited and any(own):
            self._best_param_group_id = own.index(max(own))


@contextlib.contextmanager
def without_distillation(model) -> Iterator[None]:
    """Within it a step distils nothing, and the distillers' BatchNorm statistics stay."""
    factor, model.distillation_factor = model.distillation_factor, 0.0
    model.distillers.eval()
    try:
        yield
    finally:
        model.distillation_factor = factor
        model.distillers.train()


class EvaluateTrained(hooks.EvalHook):
    """Detectron2's, which would also evaluate after a training that failed in its last iteration.

    There an evaluation hides the error, and waits for ever where one of several processes failed.
    """

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class KeepNewest(HookBase):
    """Removes all but the newest ``model_<iteration>.pth`` after each periodic checkpoint.

    Those that a signal or an earlier start of the run left count too, which Detectron2's own
    ``max_to_keep`` forgets. Other files are left alone.

    Args:
        folder: ``OUTPUT_DIR``.
        period: ``SOLVER.CHECKPOINT_PERIOD``.
        keep: how many stay.
    """

    def __init__(self, folder: str, period: int, keep: int):
        self._pattern = os.path.join(glob.escape(folder), f"model_{'[0-9]' * 7}.pth")
        self._period = period
        self._keep = keep

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._period == 0:
            for path in sorted(glob.glob(self._pattern), key=os.path.getmtime)[: -self._keep]:
                os.remove(path)


class KeepBest(HookBase):
    """Writes ``model_best.pth`` after each evaluation whose result is better than all before.

    The file holds its own result, so that a resumed run can compare. In place of Detectron2's
    ``BestCheckpointer``, which forgets the best result over a resume and makes its file the one to
    resume from.

    Args:
        checkpointer: writes the file.
        eval_period: ``TEST.EVAL_PERIOD``.
        metric: what is compared, as it stands in ``metrics.json``: "bbox/AP".
    """

    def __init__(self, checkpointer, eval_period: int, metric: str):
        self._checkpointer = checkpointer
        self._period = eval_period
        self._metric = metric
        self._best = -math.inf

    def before_train(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, "model_best.pth")
        if self.trainer.start_iter and os.path.isfile(path):
            try:
                saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                iteration, best = saved["iteration"], saved.get("best", {})
            except Exception as error:  # A damaged file can fail in any way.
                logger.warning("%s cannot be read and will be replaced: %s", path, error)
                return
            if iteration < self.trainer.start_iter:
                self._best = best.get(self._metric, -math.inf)

    def after_step(self) -> None:
        done = self.trainer.iter + 1  # as EvalHook counts
        if done % self._period == 0 and done != self.trainer.max_iter:
            self._compare(self.trainer.iter)

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._compare(self.trainer.max_iter - 1)

    def _compare(self, iteration: int) -> None:
        value, _ = self.trainer.storage.latest().get(self._metric, (math.nan, iteration))
        if not math.isfinite(value):
            logger.warning("The evaluation gives no %s: model_best.pth stays", self._metric)
        elif value > self._best:
            self._best = value
            best = {self._metric: value}
            self._checkpointer.save("model_best", iteration=iteration, best=best)


class ExportStudent(HookBase):
    """Has the trainer write ``student_final.pth`` when training is complete.

    For a student that plain Detectron2 cannot build, such as a user's own class with additional
    layers, an error is logged instead.
    """

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter or not comm.is_main_process():
            return
        try:
            self.trainer.export()
        except ConfigError as error:
            logger.error("student_final.pth was not written: %s", error)


class WriteResult(HookBase):
    """Writes ``result.json``: final AP, iterations, seconds and sizes of a finished run."""

    def __init__(self, output_dir: str, facts: dict):
        self._output_dir = output_dir
        self._facts = facts
        self._seconds = 0.0

    def before_train(self) -> None:
        self._start = time.perf_counter()
        goes_on = 0 < self.trainer.start_iter < self.trainer.max_iter
        finished = os.path.isfile(os.path.join(self._output_dir, RESULT))
        if goes_on and finished and comm.is_main_process():
            reopen_run(self._output_dir, self.trainer.start_iter - 1)

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter or not comm.is_main_process():
            return
        results = getattr(self.trainer, "_last_eval_results", None) or {}
        write_result(
            self._output_dir,
            self._facts
            | {
                "seed": self.trainer.seed,  # of a resumed run, that of its checkpoint
                "results": results,
                "iterations": self.trainer.max_iter,
                "seconds": round(self._elapsed(), 1),
                "finished": True,
            },
        )

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._start

    def state_dict(self) -> dict:
        # Time spent before an interruption counts too.
        return {"seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict) -> None:
        self._seconds = state_dict["seconds"]


def reopen_run(folder: str, iteration: int) -> None:
    """Removes what marks a run as finished; its last checkpoint becomes that of its iteration."""
    final, kept = (os.path.join(folder, f"model_{x}.pth") for x in ("final", f"{iteration:07d}"))
    if os.path.isfile(final) and not os.path.isfile(kept):
        os.replace(final, kept)
    # A resume that finds the tag's file missing takes the newest of the others.
    with atomic_open(os.path.join(folder, LAST_CHECKPOINT), "w") as file:
        file.write(os.path.basename(kept))
    for name in (*FINAL_CHECKPOINTS, "student_final.yaml", RESULT):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))
    logger.info("The run in %s is extended: its old result is removed", folder)


class StopOnSignal(HookBase):
    """On SIGTERM or SIGINT: finish the iteration, write a checkpoint, raise :class:`Interrupted`.

    In a single process an evaluation (:meth:`at_once`) is left at once; the resumed run repeats
    only a final one. A second SIGINT stops at once, as usual. Forked processes, such as data
    workers, inherit the handlers: SIGTERM ends them as usual, since a pool's ``terminate()`` waits
    for that; SIGINT, which a terminal sends to all of them, does not, since the iteration needs
    them.
    """

    def __init__(self, checkpointer):
        self._checkpointer = checkpointer
        self._process = os.getpid()
        self._received: int | None = None
        self._evaluating = False
        self._previous = {}

    def before_train(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if os.getpid() != self._process:
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._received = number
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
        logger.warning(
            "Received %s: %s, then writing a checkpoint",
            signal.Signals(number).name,
            "leaving the evaluation" if self._evaluating else "finishing this iteration",
        )
        if self._evaluating:
            self._interrupt()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends the run without waiting for the end of the block.

        Only of one process: several must leave an evaluation together, so they finish it.
        """
        if comm.get_world_size() > 1:
            yield
            return
        try:
            self._evaluating = True
            if self._received:
                self._interrupt()
            yield
        except Interrupted:
            self._evaluating = False
            if self.trainer.iter < self.trainer.max_iter:  # else model_final.pth is written
                self._save()
            self.after_train()
            raise
        finally:
            self._evaluating = False

    def after_step(self) -> None:
        # Every process must leave at the same iteration, whichever of them got the signal.
        received = self._received or 0
        if comm.get_world_size() > 1:
            received = max(comm.all_gather(received))
        last = self.trainer.iter == self.trainer.max_iter - 1
        if received and not last:
            if comm.is_main_process():
                self._save()
            # A parent process kills the others soon after the first one has left.
            comm.synchronize()
            raise Interrupted(received, self.trainer.iter)

    def _save(self) -> None:
        self._checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)

    def _interrupt(self) -> NoReturn:
        raise Interrupted(self._received, min(self.trainer.iter, self.trainer.max_iter - 1))

    def after_train(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Interrupted(SystemExit):
    """Training stopped on a signal with a checkpoint written; ``--resume`` continues it.

    A ``SystemExit``: the process ends without a traceback, with :data:`INTERRUPTED_EXIT_CODE`.
    """

    def __init__(self, number: int, iteration: int):
        super().__init__(INTERRUPTED_EXIT_CODE)
        self.message = (
            f"stopped by {signal.Signals(number).name} after iteration {iteration}, checkpoint "
            "written; start the same command with --resume to go on"
        )
