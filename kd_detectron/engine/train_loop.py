"""One optimizer step: Detectron2's ``SimpleTrainer`` with accumulation and mixed precision.

``SOLVER.ACCUMULATE_STEPS`` batches of ``SOLVER.IMS_PER_BATCH`` images are run one after the other
and their gradients averaged before one optimizer step, which equals the larger batch for a model
without BatchNorm: two models on one GPU often leave room for few images. ``SOLVER.AMP`` runs the
forward pass in float16 (with loss scaling) or bfloat16.

Every loss is checked before the weights change: a non-finite one stops the run with the loss, the
iteration and the images named, and the last checkpoint intact.
"""

import contextlib
import logging
import time
from collections import defaultdict

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from kd_detectron.errors import ConfigError, NonFiniteLossError
from kd_detectron.finite import read_losses
from kd_detectron.precision import PRECISIONS, slow_precision

logger = logging.getLogger(__name__)


class DistillationTrainLoop(SimpleTrainer):
    """Runs one iteration: ``accumulate_steps`` forward and backward passes, one optimizer step.

    Args:
        model, data_loader, optimizer: as for Detectron2's ``SimpleTrainer``.
        accumulate_steps: batches per optimizer step.
        amp_dtype: run the forward pass under autocast in this type; None for float32.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        accumulate_steps: int = 1,
        amp_dtype: torch.dtype | None = None,
    ):
        super().__init__(model, data_loader, optimizer)
        self.accumulate_steps = accumulate_steps
        self.amp_dtype = amp_dtype
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=amp_dtype is torch.float16 and self.device_type == "cuda"
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, model, data_loader, optimizer) -> "DistillationTrainLoop":
        """Reads ``SOLVER.ACCUMULATE_STEPS`` and ``SOLVER.AMP``."""
        if cfg.SOLVER.ACCUMULATE_STEPS < 1:
            raise ConfigError(
                f"SOLVER.ACCUMULATE_STEPS is {cfg.SOLVER.ACCUMULATE_STEPS}; it must be 1 or more"
            )
        precision = cfg.SOLVER.AMP.PRECISION
        if precision not in PRECISIONS:
            raise ConfigError(f"SOLVER.AMP.PRECISION is '{precision}'; it must be fp16 or bf16")
        if cfg.SOLVER.AMP.ENABLED and precision == "fp16" and cfg.MODEL.DEVICE == "cpu":
            raise ConfigError(
                "SOLVER.AMP.PRECISION is 'fp16' but MODEL.DEVICE is 'cpu', which has no loss "
                "scaling; set SOLVER.AMP.PRECISION bf16 or SOLVER.AMP.ENABLED False"
            )
        if warning := slow_precision(cfg):
            logger.warning(warning)
        return cls(
            model,
            data_loader,
            optimizer,
            accumulate_steps=cfg.SOLVER.ACCUMULATE_STEPS,
            amp_dtype=PRECISIONS[precision] if cfg.SOLVER.AMP.ENABLED else None,
        )

    def run_step(self) -> None:
        assert self.model.training, "the model was changed to eval mode during training"
        self.optimizer.zero_grad()
        totals: dict[str, float] = defaultdict(float)
        data_time = 0.0
        for index in range(self.accumulate_steps):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            last = index == self.accumulate_steps - 1
            with contextlib.nullcontext() if last else self._without_gradient_exchange():
                losses = self._forward(batch)
                loss = sum(losses.values()) / self.accumulate_steps
                self.grad_scaler.scale(loss).backward()
            for name, value in self._finite_values(losses, batch).items():
                totals[name] += value / self.accumulate_steps
        self.after_backward()
        self._write_metrics({name: torch.tensor(x) for name, x in totals.items()}, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _forward(self, batch) -> dict[str, torch.Tensor]:
        with torch.autocast(
            self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None
        ):
            try:
                return self.model(batch)
            except FloatingPointError as error:  # Detectron2's RPN, before there is any loss.
                raise self._not_finite(str(error), batch) from error

    def _without_gradient_exchange(self):
        # Gradients are reduced over the processes once, with the last batch.
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _finite_values(
        self, losses: dict[str, torch.Tensor], batch: list[dict]
    ) -> dict[str, float]:
        """The losses as numbers; refuses NaN and infinity."""
        values, wrong = read_losses(losses)
        if wrong:
            raise self._not_finite(", ".join(f"{name}={values[name]}" for name in wrong), batch)
        return values

    def _not_finite(self, what: str, batch: list[dict]) -> NonFiniteLossError:
        files = ", ".join(str(x.get("file_name", "unnamed image")) for x in batch)
        return NonFiniteLossError(
            f"Loss not finite at iteration {self.iter} (process {comm.get_rank()}): {what}; "
            f"the images were {files}. The weights of this iteration were not changed and the "
            "last checkpoint is intact; lower SOLVER.BASE_LR or the distillation weight, or "
            "raise KD.SCHEDULE.WARMUP_ITERS, and --resume"
        )

    def state_dict(self) -> dict:
        return super().state_dict() | {"grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # Empty in a checkpoint of a run without fp16: the scaler then starts anew.
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
