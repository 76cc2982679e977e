"""What happens around the steps of a training: its run folder, and stopping it on a signal.

The run folder holds ``config.yaml``, ``metrics.json`` (JSON lines), ``result.json``,
``model_final.pth`` (the plain student's state dict) and ``checkpoints/last.ckpt`` to resume from.
"""

import json
import logging
import signal
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from kd_detectron.atomic_files import atomic_open
from kd_detectron.errors import NonFiniteLossError
from kd_detectron.finite import non_finite_key
from kd_detectron.runs import files

from .options import FINAL_WEIGHTS, TrainingOptions

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"


class RunFolder(Callback):
    """Writes ``metrics.json`` and checkpoints while training, and ``result.json`` at the end.

    A checkpoint is written before each evaluation too, so that one that fails costs no training.

    Args:
        options: of the training.
        start: the iteration to go on from; what an interrupted run logged after it is dropped.

    Attributes:
        evaluated: the iteration after which the student was evaluated last; -1: none.
        evaluation_is_missing: whether the run was stopped in the evaluation after ``start``.
    """

    def __init__(self, options: TrainingOptions, start: int):
        self._options = options
        self._folder = Path(options.output)
        self._start = start
        self.evaluated = -1
        self._sums: dict[str, float] = {}
        self._count = 0
        kept = [x for x in files.read_metrics(self._folder) if x["iteration"] < start]
        # Wall time of the training up to iteration ``start``, as its metrics say.
        self._seconds = max((x.get("elapsed", 0.0) for x in kept), default=0.0)
        self._begun = time.monotonic()
        evaluated = any(x["iteration"] == start - 1 and "bbox/AP" in x for x in kept)
        due = 0 < start < options.iterations and start % evaluation_period(options) == 0
        self.evaluation_is_missing = due and not evaluated

    def state_dict(self) -> dict:
        return {"sums": self._sums, "count": self._count}

    def load_state_dict(self, state_dict: dict) -> None:
        self._sums, self._count = dict(state_dict["sums"]), state_dict["count"]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name, value in module.losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        step, options = trainer.global_step, self._options
        if _is_due(step, options.log_period) or self._is_last(trainer):
            self._write_losses(trainer)
        evaluates = _is_due(step, evaluation_period(options))
        if _is_due(step, options.checkpoint_period) or evaluates or self._is_last(trainer):
            trainer.save_checkpoint(self._folder / LAST_CHECKPOINT)

    def _write_losses(self, trainer) -> None:
        means = {name: value / self._count for name, value in self._sums.items()}
        total = sum(means.values())
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._write(trainer, trainer.global_step - 1, {"total_loss": total, **means, "lr": rate})
        self._sums, self._count = {}, 0

    def on_validation_end(self, trainer, module):
        metrics = {
            f"{task}/{key}": value
            for task, scores in module.results.items()
            for key, value in scores.items()
        }
        self.evaluated = self._step(trainer)
        # As Detectron2 does: the last evaluation is logged one iteration after the last step.
        self._write(trainer, self.evaluated - (not self._is_last(trainer)), metrics)

    def write_result(self, trainer, module) -> None:
        """Writes the plain student's weights and ``result.json``.

        Raises:
            NonFiniteLossError: a weight or buffer is NaN or infinite; nothing is written.
        """
        if not trainer.is_global_zero:
            return
        student, teacher = module.model.student, module.model.teacher
        if key := non_finite_key(student.state_dict()):
            raise NonFiniteLossError(
                f"'{key}' is not finite, so {self._folder / FINAL_WEIGHTS} was not written; lower "
                "learning_rate, or set clip_gradients, and train anew with another --output"
            )
        with atomic_open(self._folder / FINAL_WEIGHTS) as file:
            torch.save(student.state_dict(), file)
        result = {
            "results": module.results,
            "iterations": trainer.global_step,
            "seconds": self._elapsed(),
            "student_parameters": _count_parameters(student),
            "teacher_parameters": _count_parameters(teacher.model) if teacher else None,
            "seed": self._options.seed,
            "config_name": self._folder.name,
            "finished": True,
        }
        files.write_result(self._folder, result)

    def _step(self, trainer) -> int:
        # Lightning's own is 0 in an evaluation before the training goes on.
        return max(trainer.global_step, self._start)

    def _is_last(self, trainer) -> bool:
        return self._step(trainer) >= self._options.iterations

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._begun

    def _write(self, trainer, iteration: int, values: dict) -> None:
        if trainer.is_global_zero:
            line = {"iteration": iteration, "elapsed": self._elapsed(), **values}
            with open(self._folder / files.METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it; reads one as tensors only.

    Lightning's own copies it from /tmp, which is not atomic where that is another file system.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Writes a checkpoint.

        Raises:
            NonFiniteLossError: a weight or buffer is NaN or infinite; nothing is written.
        """
        if key := non_finite_key(checkpoint["state_dict"]):
            exists = Path(path).is_file()
            before = "the one before it is intact" if exists else "there is no checkpoint before it"
            fix = "and --resume" if exists else "and start anew"
            raise NonFiniteLossError(
                f"'{key}' is not finite after iteration {checkpoint['global_step'] - 1}, so no "
                f"checkpoint of it was written to {path}; {before}: lower learning_rate or the "
                f"distillers' weights, or set clip_gradients, {fix}"
            )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path, map_location=None, weights_only=None) -> dict:
        """Reads a checkpoint to the CPU, and never runs code that is in it."""
        return torch.load(path, map_location="cpu", weights_only=True)


class StopOnSignal(Callback):
    """On SIGINT or SIGTERM: finish the iteration, write a checkpoint, raise ``KeyboardInterrupt``.

    A single process leaves an evaluation at once; several must leave together, so they finish it.
    A second SIGINT stops at once. As a context manager it gives the signals back at the end.

    Args:
        checkpoint: the file to write.
    """

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        self._received = False
        self._previous = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            both = (signal.SIGINT, signal.SIGTERM)
            self._previous = {number: signal.getsignal(number) for number in both}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer, module):
        # Not before: Lightning puts a handler of its own at SIGTERM when it starts.
        for number in self._previous:
            signal.signal(number, self._note)

    on_validation_start = on_train_start

    def _note(self, number, frame) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True
        logger.warning("Received %s: stopping", signal.Signals(number).name)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        # Every process must leave at the same iteration, whichever of them got the signal.
        if trainer.strategy.reduce_boolean_decision(self._received, all=False):
            trainer.save_checkpoint(self._checkpoint)
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer, *_):
        if self._received and trainer.world_size == 1:
            raise KeyboardInterrupt


def evaluation_period(options: TrainingOptions) -> int:
    """Iterations between two evaluations."""
    return min(options.eval_period or options.iterations, options.iterations)


def _is_due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0


def _count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
