"""Trainer hooks: what distillation adds around Detectron2's own.

- :class:`StepSeed`: the random state of an iteration depends on (seed, process, iteration) alone,
  so that a resumed run follows the uninterrupted one with nothing to store.
- :class:`LossHistory`: the running medians of the losses go on over a resume.
- :class:`DistillationSchedule`: warm-up, decay and stop of all distillation weights.
- :class:`TeacherGuard`: the teacher's weights are the same at the end as at the start.
- :class:`ExportStudent`: ``student_final.pth`` for plain Detectron2.
- :class:`WriteResult`: ``result.json``, what result tables read.
- :class:`StopOnSignal`: SIGTERM and SIGINT finish the iteration, write a checkpoint, and stop.
"""

import logging
import math
import os
import random
import signal
import time

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils import comm

from kd_detectron.checkpoint import export_student
from kd_detectron.commands import INTERRUPTED_EXIT_CODE
from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import read_metrics, write_result

logger = logging.getLogger(__name__)

DECAYS = ("none", "linear", "cosine")


class StepSeed(HookBase):
    """Seeds python, numpy and torch before each step from the run's seed, process and iteration."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self) -> None:
        sequence = np.random.SeedSequence([self.seed, comm.get_rank(), self.trainer.iter])
        state = int(sequence.generate_state(1)[0])
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)


def schedule_factor(
    iteration: int, *, warmup_iters: int, decay: str, stop_iter: int, max_iter: int
) -> float:
    """The factor on all distillation weights at one iteration, between 0 and 1.

    Args:
        iteration: 0-based.
        warmup_iters: linear rise over this many iterations; the first one already gets a share.
        decay: "none", "linear" or "cosine", from the end of the warm-up to the end.
        stop_iter: 0 from here on; 0 means never.
        max_iter: the end of the decay where ``stop_iter`` is 0.
    """
    if stop_iter and iteration >= stop_iter:
        return 0.0
    if iteration < warmup_iters:
        return (iteration + 1) / (warmup_iters + 1)
    end = stop_iter or max_iter
    progress = (iteration - warmup_iters) / max(end - warmup_iters, 1)
    if decay == "linear":
        return 1 - progress
    if decay == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


class DistillationSchedule(HookBase):
    """Sets ``model.distillation_factor`` before each step, as ``KD.SCHEDULE`` says."""

    def __init__(self, model, schedule, max_iter: int):
        if schedule.DECAY not in DECAYS:
            raise ConfigError(
                f"KD.SCHEDULE.DECAY is '{schedule.DECAY}'; known: {', '.join(DECAYS)}"
            )
        for key in ("WARMUP_ITERS", "STOP_ITER"):
            if schedule[key] < 0:
                raise ConfigError(f"KD.SCHEDULE.{key} is {schedule[key]}; it must be 0 or more")
        if 0 < schedule.STOP_ITER <= schedule.WARMUP_ITERS:
            raise ConfigError(
                f"KD.SCHEDULE.STOP_ITER is {schedule.STOP_ITER} and KD.SCHEDULE.WARMUP_ITERS is "
                f"{schedule.WARMUP_ITERS}, so distillation would end before its warm-up does; "
                "raise the one or lower the other"
            )
        self._model = model
        self._options = {
            "warmup_iters": schedule.WARMUP_ITERS,
            "decay": schedule.DECAY,
            "stop_iter": schedule.STOP_ITER,
            "max_iter": max_iter,
        }
        self._constant = schedule.DECAY == "none" and not (
            schedule.WARMUP_ITERS or schedule.STOP_ITER
        )

    def before_step(self) -> None:
        factor = schedule_factor(self.trainer.iter, **self._options)
        self._model.distillation_factor = factor
        if not self._constant:
            self.trainer.storage.put_scalar("distillation_factor", factor, smoothing_hint=False)


class LossHistory(HookBase):
    """Keeps the last losses over a resume, since logs and metrics show their running median.

    Without it a resumed run's curve would differ from the uninterrupted one for a while although
    every step is the same.
    """

    WINDOW = 20

    def __init__(self):
        self._restored: dict[str, list] = {}

    def before_train(self) -> None:
        for name, values in self._restored.items():
            for value, iteration in values:
                self.trainer.storage.put_scalar(name, value, cur_iter=iteration)

    def state_dict(self) -> dict:
        return {
            name: [[float(value), int(iteration)] for value, iteration in buffer.values()][
                -self.WINDOW :
            ]
            for name, buffer in self.trainer.storage.histories().items()
            if "loss" in name
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self._restored = state_dict


class TeacherGuard(HookBase):
    """Stops a run whose teacher changed: the numbers would not mean what the config says."""

    def __init__(self, teacher):
        self._teacher = teacher

    def before_train(self) -> None:
        self._fingerprint = self._teacher.fingerprint()

    def after_train(self) -> None:
        if self._teacher.fingerprint() != self._fingerprint:
            raise RuntimeError(
                f"the teacher {self._teacher.name} changed during training; something trained or "
                "overwrote its weights or buffers"
            )
        logger.info("The teacher is unchanged (sha256 %s...)", self._fingerprint[:12])


class KeepBest(BestCheckpointer):
    """Detectron2's best checkpoint (``model_best.pth``) that remembers the best over a resume."""

    def __init__(self, output_dir: str, eval_period: int, checkpointer, metric: str):
        super().__init__(eval_period, checkpointer, metric)
        self._output_dir = output_dir

    def before_train(self) -> None:
        for record in read_metrics(self._output_dir):
            value = record.get(self._val_metric)
            if value is not None and (self.best_metric is None or value > self.best_metric):
                self._update_best(value, record["iteration"])


class ExportStudent(HookBase):
    """Writes ``student_final.pth``, which plain Detectron2 loads, when training is complete."""

    def __init__(self, cfg):
        self._cfg = cfg

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            folder = self._cfg.OUTPUT_DIR
            export_student(os.path.join(folder, "model_final.pth"), folder, cfg=self._cfg)


class WriteResult(HookBase):
    """Writes ``result.json``: final AP, iterations, seconds and sizes of a finished run."""

    def __init__(self, output_dir: str, facts: dict):
        self._output_dir = output_dir
        self._facts = facts
        self._seconds = 0.0

    def before_train(self) -> None:
        self._start = time.perf_counter()

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


class StopOnSignal(HookBase):
    """On SIGTERM or SIGINT: finish the iteration, write a checkpoint, raise :class:`Interrupted`.

    A second SIGINT stops at once, as usual. Forked processes, which inherit the handlers, die of
    SIGTERM as they would without: otherwise a pool's ``terminate()`` waits for them for ever. They
    outlive SIGINT, which a terminal sends to all, since the iteration needs its data workers.
    """

    def __init__(self, checkpointer):
        self._checkpointer = checkpointer
        self._process = os.getpid()
        self._received: int | None = None
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
            "Received %s: finishing this iteration, then writing a checkpoint",
            signal.Signals(number).name,
        )

    def after_step(self) -> None:
        # Every process must leave at the same iteration, whichever of them got the signal.
        received = self._received or 0
        if comm.get_world_size() > 1:
            received = max(comm.all_gather(received))
        last = self.trainer.iter == self.trainer.max_iter - 1
        if received and not last:
            if comm.is_main_process():
                self._checkpointer.save(
                    f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter
                )
            raise Interrupted(received, self.trainer.iter)

    def after_train(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Interrupted(SystemExit):
    """Training stopped on a signal with a checkpoint written; ``--resume`` goes on.

    A ``SystemExit``, so that it is no failure to report: the process ends with
    :data:`INTERRUPTED_EXIT_CODE`.
    """

    def __init__(self, number: int, iteration: int):
        super().__init__(INTERRUPTED_EXIT_CODE)
        self.message = (
            f"stopped by {signal.Signals(number).name} after iteration {iteration}, checkpoint "
            "written; start the same command with --resume to go on"
        )
