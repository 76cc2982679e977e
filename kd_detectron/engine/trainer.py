"""DistillationTrainer: Detectron2's ``DefaultTrainer`` for distilled (and plain) students.

What differs from Detectron2's: batches and random state are functions of seed and iteration, so
that a resumed run follows the uninterrupted one; the distillation schedule; a guard on the teacher;
averaged weights; the best checkpoint by AP; ``student_final.pth`` and ``result.json`` at the end;
accumulation and bfloat16. The training step itself is ``DistilledRCNN.forward`` and
``train_loop.py``.
"""

import contextlib
import logging
import os
import weakref
from collections.abc import Iterator, Mapping

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from fvcore.common.param_scheduler import ParamScheduler
from torch.nn.parallel import DistributedDataParallel

from kd_detectron.checkpoint import DistillationCheckpointer, export_student
from kd_detectron.data.loader import ResumableLoader, build_train_loader
from kd_detectron.errors import ConfigError
from kd_detectron.learning_rate import scale_learning_rate
from kd_detectron.modeling.autocast import prepare_for_autocast
from kd_detectron.preflight.evaluation import evaluator_type
from kd_detectron.runs.files import forget_metrics_from, is_finished

from .hooks import (
    EvaluateTrained,
    ExportStudent,
    KeepBest,
    KeepNewest,
    LRScheduler,
    StepSeed,
    StopOnSignal,
    TeacherGuard,
    WriteResult,
    without_distillation,
)
from .schedule import DistillationSchedule
from .train_loop import DistillationTrainLoop
from .weight_average import WeightAverage

logger = logging.getLogger(__name__)

# The running number of positive anchors that RetinaNet's and FCOS's losses are divided by: a plain
# attribute of Detectron2's dense detectors, in no state_dict.
_NORMALIZER = "loss_normalizer"


class DistillationTrainer(DefaultTrainer):
    """Trains the model of a config, with or without distillation, and evaluates it by COCO AP.

    Attributes:
        seed: the run's seed: ``cfg.SEED``, or a random one where that is negative; kept in
            checkpoints.
        ddp_options: of DistributedDataParallel.
        log_period: iterations from one line of ``metrics.json`` to the next.
    """

    ddp_options: Mapping = {"broadcast_buffers": False}
    log_period = 20

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: the whole config, as :func:`kd_detectron.get_config` returns it.
        """
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        model = self.build_model(cfg)
        if cfg.SOLVER.AMP.ENABLED:
            prepare_for_autocast(model)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        distributed = create_ddp_model(
            model,
            device_ids=None,  # the model's own, also on the CPU
            **self.ddp_options,
        )
        self._trainer = DistillationTrainLoop.from_config(cfg, distributed, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DistillationCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._step_seed = StepSeed(self.seed)
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """As Detectron2's, which follows ``SOLVER.REFERENCE_WORLD_SIZE``, for this project's keys.

        The iterations of ``KD.SCHEDULE`` are scaled like ``SOLVER.MAX_ITER``, and ``SOLVER.EMA``
        averages over the same number of images.
        """
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is cfg:
            return cfg
        scale = num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE
        scaled.defrost()
        for key in ("WARMUP_ITERS", "STOP_ITER"):
            before = cfg.KD.SCHEDULE[key]
            scaled.KD.SCHEDULE[key] = max(round(before / scale), 1) if before > 0 else before
        scaled.SOLVER.EMA.DECAY = cfg.SOLVER.EMA.DECAY**scale
        scaled.freeze()
        return scaled

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the last checkpoint of ``OUTPUT_DIR`` (if ``resume``) or ``MODEL.WEIGHTS``.

        A resumed run continues with weights, optimizer, schedule, iteration, distiller parameters,
        seed and data order of the interrupted one; a changed ``SOLVER.BASE_LR``, weight decay or
        momentum is that of the config.

        Raises:
            ConfigError: what is to be resumed is beyond ``SOLVER.MAX_ITER``, no checkpoint fits, or
                the processes read checkpoints of different iterations; ``MODEL.WEIGHTS`` would
                replace what was inherited from the teacher.
        """
        groups = [dict(group) for group in self.optimizer.param_groups]
        super().resume_or_load(resume=resume)
        if not (resume and self.checkpointer.has_checkpoint()):
            self._check_inherited()
        # No process renames a file of the run before all have read it.
        starts = sorted(set(comm.all_gather(self.start_iter)))
        if len(starts) > 1:
            raise ConfigError(
                f"--resume: the processes found checkpoints of different iterations ({starts}) in "
                f"OUTPUT_DIR '{self.cfg.OUTPUT_DIR}'; give a folder that all machines share"
            )
        if self.start_iter > self.max_iter:
            raise ConfigError(
                f"SOLVER.MAX_ITER is {self.max_iter} but the run in OUTPUT_DIR "
                f"'{self.cfg.OUTPUT_DIR}' has done {self.start_iter} iterations; raise it to go on "
                "with this run, or give another OUTPUT_DIR"
            )
        self._set_optimizer_options(groups)
        self._step_seed.seed = self.seed
        if isinstance(self.data_loader, ResumableLoader):
            self.data_loader.seek(self.seed, self.start_iter * self.cfg.SOLVER.ACCUMULATE_STEPS)
        elif self.start_iter:
            logger.warning(
                "dataloader.train is no call of build_detection_train_loader that can be continued:"
                " the resumed run draws its batches anew"
            )
        if not self.finished and comm.is_main_process():
            forget_metrics_from(self.cfg.OUTPUT_DIR, self.start_iter)

    def _check_inherited(self) -> None:
        """Refuses ``MODEL.WEIGHTS`` that have replaced inherited parts."""
        inherited = getattr(unwrap(self.model), "inherited", ())
        unmatched = self.checkpointer.incompatible
        if not inherited or unmatched is None:
            return
        kept = {*unmatched.missing_keys, *(name for name, _, _ in unmatched.incorrect_shapes)}
        replaced = sorted(set(inherited) - kept)
        if replaced:
            raise ConfigError(
                f"MODEL.WEIGHTS is '{self.cfg.MODEL.WEIGHTS}', which has {len(replaced)} of the"
                f" {len(inherited)} tensors that KD.TEACHER.INHERIT"
                f" {list(self.cfg.KD.TEACHER.INHERIT)} copies from the teacher, e.g."
                f" {replaced[0]}, and would replace them; set KD.TEACHER.INHERIT to [], or"
                " MODEL.WEIGHTS to the weights of a backbone alone"
            )

    def _set_optimizer_options(self, groups: list[dict]) -> None:
        """Gives the optimizer the options of the config, where a checkpoint had others.

        Args:
            groups: its parameter groups before the checkpoint was loaded.
        """
        for group, own in zip(self.optimizer.param_groups, groups, strict=True):
            for key in ("initial_lr", "weight_decay", "momentum"):
                if key in own:
                    group[key] = own[key]
        # Other schedulers, of a user's own, go on with the rates that they had.
        if self.start_iter and isinstance(self.scheduler, ParamScheduler):
            # Of a LazyConfig; Detectron2's hook makes an LRMultiplier of it.
            for group, own in zip(self.optimizer.param_groups, groups, strict=True):
                group["initial_lr"] = group["lr"] = own["lr"]
        elif self.start_iter and isinstance(self.scheduler, LRMultiplier):
            self.scheduler.base_lrs = [group["initial_lr"] for group in groups]
            rates = self.scheduler.get_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    @property
    def finished(self) -> bool:
        """Whether the run that was resumed has nothing left to do: it is trained and evaluated."""
        return self.start_iter == self.max_iter and is_finished(self.cfg.OUTPUT_DIR)

    def build_hooks(self) -> list:
        """Detectron2's hooks and this project's, in the order in which they run after a step.

        Average the weights; write checkpoints; evaluate; compare and write what follows from the
        evaluation; write metrics; stop on a signal.
        """
        cfg = self.cfg
        model = unwrap(self.model)
        teacher = getattr(model, "teacher", None)
        stop = StopOnSignal(self.checkpointer)
        ret = super().build_hooks()
        period, keep = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP
        if period < 1:
            raise ConfigError(
                f"SOLVER.CHECKPOINT_PERIOD is {period}; give the iterations from one checkpoint to "
                "the next, 1 or more"
            )
        if keep < 0:
            raise ConfigError(
                f"SOLVER.CHECKPOINT_MAX_TO_KEEP is {keep}; give how many checkpoints to keep, or 0 "
                "for all of them"
            )
        # Detectron2 ends its list with the evaluation and, on the main process, the writer:
        # whatever is put into the storage must come before that.
        writer = []
        if comm.is_main_process():
            ret.pop()
            writer = [hooks.PeriodicWriter(self.build_writers(), period=self.log_period)]
        ret.pop()
        for place, hook in enumerate(ret):
            if isinstance(hook, hooks.LRScheduler):
                ret[place] = LRScheduler(inherited_parameters(model))
            elif isinstance(hook, hooks.PreciseBN) and getattr(model, "distillers", None):
                hook.update_stats = without_distillation(model)(hook.update_stats)
        ret.insert(0, self._step_seed)
        if cfg.SOLVER.EMA.ENABLED:
            if cfg.TEST.PRECISE_BN.ENABLED:
                raise ConfigError(
                    "SOLVER.EMA.ENABLED and TEST.PRECISE_BN.ENABLED are both True, but PreciseBN "
                    "estimates the statistics of weights that are not averaged; set one to False"
                )
            average = WeightAverage(model, cfg.SOLVER.EMA.DECAY)
            self.checkpointer.saved_weights = average.applied
            ret.insert(1, average)

        @contextlib.contextmanager
        def evaluating() -> Iterator[None]:
            with self.checkpointer.saved_weights(), stop.at_once():
                take_buffers_of_main_process(model)
                yield

        def evaluate() -> dict:
            with evaluating():
                self._last_eval_results = self.test(cfg, self.model)
            return self._last_eval_results

        def evaluate_with_augmentation() -> dict:
            with evaluating():
                results = self.test_with_augmentation(cfg, self.model)
            self._last_eval_results = {**self._last_eval_results, **results}
            return results

        if keep and comm.is_main_process():
            ret.append(KeepNewest(cfg.OUTPUT_DIR, period, keep))
        ret += [EvaluateTrained(cfg.TEST.EVAL_PERIOD, evaluate)]
        if cfg.TEST.AUG.ENABLED:
            ret.append(EvaluateTrained(0, evaluate_with_augmentation))
        if getattr(model, "distillers", None):
            ret.append(DistillationSchedule(model, cfg.KD.SCHEDULE, self.max_iter))
        if teacher is not None:
            guard = TeacherGuard(teacher)
            self.checkpointer.before_save = guard.check
            ret.append(guard)
        if comm.is_main_process() and cfg.TEST.EVAL_PERIOD > 0:
            ret.append(KeepBest(self.checkpointer, cfg.TEST.EVAL_PERIOD, main_metric(cfg)))
        # The result last of the files: a run that has one is finished.
        ret += [ExportStudent(), WriteResult(cfg.OUTPUT_DIR, run_facts(model, self.seed))]
        return [*ret, *writer, stop]

    def before_train(self) -> None:
        super().before_train()
        # Detectron2 counts one iteration too many where there is none left to run, as after a stop
        # in the final evaluation.
        if self.start_iter >= self.max_iter:
            self.iter = self.max_iter - 1

    def export(self) -> None:
        """Writes ``student_final.pth``, which plain Detectron2 loads, from ``model_final.pth``."""
        folder = self.cfg.OUTPUT_DIR
        export_student(os.path.join(folder, "model_final.pth"), folder, cfg=self.cfg)

    def state_dict(self) -> dict:
        # After the last step Detectron2 counts one further, and a resume would skip an iteration.
        state = {"seed": self.seed, "iteration": min(self.iter, self.max_iter - 1)}
        model = unwrap(self.model)
        if isinstance(model, DenseDetector) and hasattr(model, _NORMALIZER):
            state[_NORMALIZER] = getattr(model, _NORMALIZER)
        return super().state_dict() | state

    def load_state_dict(self, state_dict: dict) -> None:
        averaged = WeightAverage.__qualname__ in state_dict.get("hooks", {})
        if averaged and not self.cfg.SOLVER.EMA.ENABLED:
            raise ConfigError(
                "SOLVER.EMA.ENABLED is False but the run in OUTPUT_DIR averages its weights; set "
                "it to True to go on with it, or start anew with MODEL.WEIGHTS set to its "
                "checkpoint"
            )
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        if _NORMALIZER in state_dict:
            setattr(unwrap(self.model), _NORMALIZER, state_dict[_NORMALIZER])

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Detectron2's, with ``KD.TEACHER.INHERIT_LR_FACTOR`` on the inherited parts."""
        optimizer = super().build_optimizer(cfg, model)
        factor = cfg.KD.TEACHER.INHERIT_LR_FACTOR
        scale_learning_rate(optimizer, inherited_parameters(model), factor)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The evaluators of a dataset's ``evaluator_type``, as in Detectron2's own tool."""
        kind = evaluator_type(dataset_name)
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        evaluators = []
        if kind in ("sem_seg", "coco_panoptic_seg"):
            evaluators.append(SemSegEvaluator(dataset_name, output_dir=folder))
        if kind in ("coco", "coco_panoptic_seg"):
            sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
            evaluators.append(COCOEvaluator(dataset_name, output_dir=folder, kpt_oks_sigmas=sigmas))
        if kind == "coco_panoptic_seg":
            evaluators.append(COCOPanopticEvaluator(dataset_name, folder))
        if kind == "lvis":
            evaluators.append(LVISEvaluator(dataset_name, output_dir=folder))
        if kind == "pascal_voc":
            evaluators.append(PascalVOCDetectionEvaluator(dataset_name))
        return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)

    @classmethod
    def test_with_augmentation(cls, cfg: CfgNode, model) -> dict:
        """Evaluates with Detectron2's test-time augmentation; keys end in ``_TTA``."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, unwrap(model)), evaluators)
        return {f"{key}_TTA": value for key, value in results.items()}


def unwrap(model):
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def inherited_parameters(model) -> list[torch.nn.Parameter]:
    """Parameters of a model that started from its teacher's."""
    names = getattr(model, "inherited", ())
    return [p for name, p in model.named_parameters() if name in names]


def main_metric(cfg: CfgNode) -> str:
    """What the best checkpoint is chosen by: AP of masks, or else of boxes, on the first dataset.

    As it stands in ``metrics.json``, where the dataset's name goes before if there are several.
    """
    metric = "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"
    return f"{cfg.DATASETS.TEST[0]}/{metric}" if len(cfg.DATASETS.TEST) > 1 else metric


def student_parameters(model) -> int:
    """Number of the student's parameters, without the distillers' own."""
    return sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("distillers.")
    )


def describe(model) -> str:
    """Teacher, distillers and student with their sizes and weights, one line each."""
    lines = [f"student  {student_parameters(model) / 1e6:.1f} M parameters"]
    if teacher := getattr(model, "teacher", None):
        distilled = model.distillation_weights.items()
        lines = [
            f"teacher  {teacher.name}: {teacher.num_parameters / 1e6:.1f} M parameters",
            *(f"distil   {name}, weight {weight:g}" for name, weight in distilled),
            *lines,
        ]
    return "\n".join(lines)


def run_facts(model, seed: int) -> dict:
    """What ``result.json`` says of a run beside its results."""
    teacher = getattr(model, "teacher", None)
    return {
        "distillers": list(getattr(model, "distillers", ())),
        "distillation_weights": dict(getattr(model, "distillation_weights", {})),
        "teacher": teacher.name if teacher else "",
        "teacher_parameters": teacher.num_parameters if teacher else 0,
        "student_parameters": student_parameters(model),
        "seed": seed,
        "torch": torch.__version__,
    }


def take_buffers_of_main_process(model: torch.nn.Module) -> None:
    """Has all processes evaluate what is saved: the main process's BatchNorm statistics.

    Each process has estimated them on its own images. To be called by all processes.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
