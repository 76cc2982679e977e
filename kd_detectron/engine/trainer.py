"""DistillationTrainer: Detectron2's ``DefaultTrainer`` for distilled (and plain) students.

What differs from Detectron2's: batches and random state are functions of seed and iteration, so
that a resumed run follows the uninterrupted one; the distillation schedule; a guard on the teacher;
the best checkpoint by AP; ``student_final.pth`` and ``result.json`` at the end; accumulation and
bfloat16. The training step itself is ``DistilledRCNN.forward`` and ``train_loop.py``.
"""

import glob
import logging
import os
import secrets
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
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
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from kd_detectron.checkpoint import DistillationCheckpointer
from kd_detectron.data.loader import build_train_loader
from kd_detectron.errors import ConfigError
from kd_detectron.modeling.fold import channels_last_on_cpu
from kd_detectron.preflight.evaluation import evaluator_type
from kd_detectron.runs.files import METRICS, parse_record

from .hooks import (
    DistillationSchedule,
    ExportStudent,
    KeepBest,
    LossHistory,
    StepSeed,
    StopOnSignal,
    TeacherGuard,
    WriteResult,
)
from .pictures import TrainingPictures
from .train_loop import DistillationTrainLoop

logger = logging.getLogger(__name__)


class DistillationTrainer(DefaultTrainer):
    """Trains the model of a config, with or without distillation, and evaluates it by COCO AP.

    Attributes:
        seed: the run's seed: ``cfg.SEED``, or a random one where that is negative; kept in
            checkpoints.
    """

    def __init__(self, cfg: CfgNode):
        """
        Args:
            cfg: the whole config, as :func:`kd_detectron.get_config` returns it.
        """
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else shared_random_seed()
        model = self.build_model(cfg)
        if cfg.SOLVER.AMP.ENABLED:
            channels_last_on_cpu(model.backbone)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self._trainer = DistillationTrainLoop.from_config(
            cfg, distribute(model), data_loader, optimizer
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DistillationCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self._step_seed = StepSeed(self.seed)
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the last checkpoint of ``OUTPUT_DIR`` (if ``resume``) or ``MODEL.WEIGHTS``.

        A resumed run goes on with weights, optimizer, schedule, iteration, distiller parameters,
        seed and data order of the interrupted one.
        """
        super().resume_or_load(resume=resume)
        self._step_seed.seed = self.seed
        self.data_loader.seek(self.seed, self.start_iter * self.cfg.SOLVER.ACCUMULATE_STEPS)
        forget_metrics_from(self.cfg.OUTPUT_DIR, self.start_iter)

    def build_hooks(self) -> list:
        cfg = self.cfg
        model = unwrap(self.model)
        teacher = getattr(model, "teacher", None)
        ret = super().build_hooks()
        limit_checkpoints(ret, cfg)
        # Detectron2 ends its list with the writer on the main process: evaluations and what is put
        # into the storage must come before it.
        writer = [ret.pop()] if comm.is_main_process() else []
        ret = [self._step_seed, *ret, LossHistory()]
        if getattr(model, "distillers", None):
            ret.append(DistillationSchedule(model, cfg.KD.SCHEDULE, self.max_iter))
        if teacher is not None:
            ret.append(TeacherGuard(teacher))
        if comm.is_main_process() and cfg.TEST.EVAL_PERIOD > 0:
            metric = "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"
            ret.append(KeepBest(cfg.OUTPUT_DIR, cfg.TEST.EVAL_PERIOD, self.checkpointer, metric))
        if comm.is_main_process() and cfg.VIS_PERIOD > 0:
            ret.append(TrainingPictures(cfg, model))
        ret += [ExportStudent(cfg), WriteResult(cfg.OUTPUT_DIR, run_facts(cfg, model, self.seed))]
        return [*ret, *writer, StopOnSignal(self.checkpointer)]

    def state_dict(self) -> dict:
        return super().state_dict() | {"seed": self.seed}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The evaluators that a dataset's ``evaluator_type`` asks for, as in Detectron2's own tool.

        Raises:
            ConfigError: as :func:`evaluator_type`.
        """
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


def limit_checkpoints(built: list[HookBase], cfg: CfgNode) -> None:
    """Has the periodic checkpoints deleted but for ``SOLVER.CHECKPOINT_MAX_TO_KEEP``, if any.

    Raises:
        ConfigError: that number is negative.
    """
    keep = cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP
    if keep < 0:
        raise ConfigError(
            f"SOLVER.CHECKPOINT_MAX_TO_KEEP is {keep}; give how many checkpoints to keep, or 0 for "
            "all of them"
        )
    for hook in built:
        if keep and isinstance(hook, hooks.PeriodicCheckpointer):
            hook.max_to_keep = keep
            # Those of the run that is resumed count as well; other files are not ours to delete.
            if hook.checkpointer.has_checkpoint():
                pattern = os.path.join(glob.escape(cfg.OUTPUT_DIR), f"model_{'[0-9]' * 7}.pth")
                hook.recent_checkpoints = sorted(glob.glob(pattern))


def unwrap(model):
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def distribute(model):
    """Wraps the student for several processes; on the CPU too. The teacher is not part of it."""
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def shared_random_seed() -> int:
    """A random seed, the same in all processes."""
    return comm.all_gather(secrets.randbelow(2**31))[0]


def run_facts(cfg: CfgNode, model, seed: int) -> dict:
    """What ``result.json`` says of a run beside its results."""
    teacher = getattr(model, "teacher", None)
    distillers = getattr(model, "distillers", None)
    own = sum(p.numel() for p in distillers.parameters()) if distillers else 0
    return {
        "distillers": list(distillers) if distillers else [],
        "distillation_weights": dict(model.distillation_weights) if distillers else {},
        "teacher": teacher.name if teacher else "",
        "teacher_parameters": teacher.num_parameters if teacher else 0,
        "student_parameters": sum(p.numel() for p in model.parameters()) - own,
        "distiller_parameters": own,
        "seed": seed,
        "config": os.path.basename(cfg.OUTPUT_DIR),
        "torch": torch.__version__,
    }


def forget_metrics_from(output_dir: str, iteration: int) -> None:
    """Cuts ``metrics.json`` at the first record of an iteration that will be run (again)."""
    path = os.path.join(output_dir, METRICS)
    if not comm.is_main_process() or not os.path.isfile(path):
        return
    kept = 0
    with open(path, "rb") as file:
        for line in file:
            record = parse_record(line)
            if record is None or record.get("iteration", -1) >= iteration:
                break
            kept += len(line)
    # In place, since the writer already holds the file open for appending.
    os.truncate(path, kept)
