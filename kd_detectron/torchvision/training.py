"""Training torchvision's detectors, distilled or not, with Lightning.

Lightning does the loop, resuming, precision and several devices; ``torchmetrics`` COCO AP (by
pycocotools); torchvision the data. What is here is the module in between; the run folder is written
in ``callbacks.py``.

Losses are logged by the names that Detectron2 gives them, so that curves of both engines agree.
"""

import hashlib
import logging
import math
import os
import signal
import warnings
from bisect import bisect_right
from pathlib import Path
from pickle import UnpicklingError

import lightning
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import Callback
from torch import nn
from torchmetrics.detection import MeanAveragePrecision

from kd_detectron.atomic_files import atomic_open, remove_unfinished_files
from kd_detectron.errors import ConfigError, NonFiniteLossError
from kd_detectron.finite import read_losses
from kd_detectron.learning_rate import scale_learning_rate
from kd_detectron.precision import emulated_bfloat16, slow_bfloat16
from kd_detectron.runs import files
from kd_detectron.runs.same_run import compare_with_run, config_of_run

from .callbacks import (
    LAST_CHECKPOINT,
    AtomicCheckpoints,
    RunFolder,
    StopOnSignal,
    evaluation_period,
)
from .classes import TRAIN_CLASSES, check_class_order
from .data import BatchesByIteration, DetectionData, test_loader, train_loader
from .detector import DistilledDetector
from .models import build_detector
from .options import FINAL_WEIGHTS, TrainingOptions

logger = logging.getLogger(__name__)

# Of a parameter group: what the options set, also where a training is resumed.
_FROM_OPTIONS = ("initial_lr", "momentum", "weight_decay")
_CHECKSUM = "TRAIN_SHA256"  # in config.yaml, of the annotation file
# What Lightning raises where it cannot have the devices.
_REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException)
# Torchvision's names of losses, and Detectron2's names of the same ones.
_LOSS_NAMES = {
    "loss_classifier": "loss_cls",
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
    "classification": "loss_cls",
    "bbox_regression": "loss_box_reg",
}
_METRICS = {"AP": "map", "AP50": "map_50", "AP75": "map_75", "APs": "map_small",
            "APm": "map_medium", "APl": "map_large"}  # fmt: skip


class DetectionModule(lightning.LightningModule):
    """A (distilled) detector as Lightning trains it.

    Args:
        model: a :class:`DistilledDetector`.
        options: of the training.
        train, val: the data.
        start: the iteration to go on from.
    """

    def __init__(
        self,
        model: DistilledDetector,
        options: TrainingOptions,
        train: DetectionData,
        val: DetectionData,
        start: int = 0,
    ):
        super().__init__()
        self.model = model
        self.options = options
        self.losses: dict[str, float] = {}
        self.results: dict[str, dict[str, float]] = {}
        self._data = train, val
        self._start = start
        self._tasks = ("bbox", "segm") if options.student.startswith("maskrcnn") else ("bbox",)
        self._average_precision = MeanAveragePrecision(
            iou_type=self._tasks,
            backend="pycocotools",
            average="macro",
            sync_on_compute=False,  # see _gather_states
        )

    def train_dataloader(self):
        options, (rank, world_size) = self.options, self._share()
        batches = BatchesByIteration(
            len(self._data[0]),
            options.batch_size,
            options.iterations,
            seed=options.seed,
            start=self._start,
            rank=rank,
            world_size=world_size,
        )
        return train_loader(self._data[0], batches, options.workers)

    def val_dataloader(self):
        rank, world_size = self._share()
        shard = range(rank, len(self._data[1]), world_size)
        batch_size = max(1, self.options.batch_size // world_size)
        return test_loader(self._data[1], batch_size, self.options.workers, shard)

    def _share(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size

    def configure_optimizers(self):
        options = self.options
        optimizer = torch.optim.SGD(
            [p for p in self.parameters() if p.requires_grad],
            lr=options.learning_rate,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        own = self.model.student.named_parameters()
        inherited = [p for name, p in own if name in self.model.inherited]
        scale_learning_rate(optimizer, inherited, options.inherit_lr_factor)

        def factor(step: int) -> float:
            warm = min(1.0, 0.001 + 0.999 * step / options.warmup) if options.warmup else 1.0
            return warm * 0.1 ** bisect_right(sorted(options.steps), step)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        groups = optimizer.param_groups
        self._of_groups = [{key: group[key] for key in _FROM_OPTIONS} for group in groups]
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_start(self):
        # The checkpoint of a resumed training has brought back what the options were before.
        schedule, groups = self.lr_schedulers(), self.trainer.optimizers[0].param_groups
        schedule.base_lrs = [values["initial_lr"] for values in self._of_groups]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, values, factor in zip(groups, self._of_groups, factors, strict=True):
            group.update(values, lr=values["initial_lr"] * factor)

    def on_train_batch_start(self, batch, batch_idx):
        # Sampled anchors and proposals are a function of seed and iteration, also when resumed.
        rank = self._share()[0]
        torch.manual_seed((self.options.seed * 1_000_003 + self.global_step) * 1009 + rank)

    def training_step(self, batch, batch_idx):
        losses = self.model(*batch)
        total = sum(losses.values())
        values, wrong = read_losses(losses)
        if wrong:
            raise NonFiniteLossError(
                f"{', '.join(wrong)} is not finite at iteration {self.global_step}; lower "
                "learning_rate or the distillers' weights, or set clip_gradients; the last "
                f"checkpoint in {self.options.output} is intact"
            )
        self.losses = {_LOSS_NAMES.get(name, name): value for name, value in values.items()}
        self.log("loss", sum(values.values()), prog_bar=True, logger=False)
        return total

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        with torch.autocast(self.device.type, enabled=False):
            found = self.model(images)
        for one in found:
            if "masks" in one:
                one["masks"] = one["masks"].squeeze(1) > 0.5
        self._average_precision.update(found, targets)

    def on_validation_epoch_end(self):
        if self.trainer.world_size > 1:
            _gather_states(self._average_precision)
        values = self._average_precision.compute()
        self._average_precision.reset()
        self.results = {}
        for task in self._tasks:
            prefix = f"{task}_" if len(self._tasks) > 1 else ""
            scores = {key: float(values[prefix + name]) for key, name in _METRICS.items()}
            # -1 stands for "no object of this size in the data".
            self.results[task] = {
                key: 100 * value if value >= 0 else math.nan for key, value in scores.items()
            }


def _gather_states(metric: MeanAveragePrecision) -> None:
    """Gives each process what all of them found, in the order of their ranks.

    Torchmetrics' own gathering needs as many images in each process.
    """
    for name, value in metric.metric_state.items():
        own = [x.cpu() if isinstance(x, torch.Tensor) else x for x in value]  # masks are RLE
        gathered = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, own)
        setattr(metric, name, [x for part in gathered for x in part])


def train(options: TrainingOptions, *, resume: bool = True) -> dict[str, dict[str, float]]:
    """Trains and evaluates; continues from the folder's last checkpoint where there is one.

    A finished run is left as it is, or extended if the options have more iterations.

    Args:
        options: of the training.
        resume: False: refuse a folder that holds a run; True: go on with it.

    Returns:
        AP by task and metric, in points, as in ``result.json``.

    Raises:
        ConfigError: something named in the options does not exist or does not fit.
        NonFiniteLossError: a loss became NaN or infinite.
        KeyboardInterrupt: stopped by a signal; another call goes on from the last checkpoint.
    """
    folder = Path(options.output)
    held = (files.METRICS, files.RESULT, LAST_CHECKPOINT)
    if not resume and any((folder / name).is_file() for name in held):
        raise ConfigError(f"{folder} holds a run; give --resume to go on, or another --output")
    # Lightning's remarks on hardware and its other products.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data, val = _load_data(options)
    config = options.config(len(data.class_names))
    checksum = hashlib.sha256(Path(options.train[0]).read_bytes()).hexdigest()
    config["DATASETS"] |= {_CHECKSUM: checksum, TRAIN_CLASSES: data.class_names}
    _check_same_run(folder, config)
    result = files.read_result(folder)
    if files.is_finished(folder) and (result.get("iterations") or 0) >= options.iterations:
        return _with_nan(result["results"])
    checkpoint = folder / LAST_CHECKPOINT
    start = _iteration_of(checkpoint) if checkpoint.is_file() else 0
    if result and not start:
        raise ConfigError(
            f"{folder} holds a finished run of {result.get('iterations')} iterations and no "
            f"{LAST_CHECKPOINT} to go on from; give another --output"
        )
    if start > options.iterations:
        raise ConfigError(
            f"--iterations is {options.iterations} but the run in {folder} has done {start}; raise "
            "it to go on with this run, or give another --output"
        )
    run_folder, stop = RunFolder(options, start), StopOnSignal(checkpoint)
    trainer = build_trainer(options, [run_folder, stop])
    if len(val) < trainer.world_size:
        # Lightning leaves out the evaluation of a process without images; the others wait for it.
        raise ConfigError(
            f"{options.val[0]} has {len(val)} images for {trainer.world_size} processes to "
            "evaluate on; give at most as many devices, or more images"
        )
    lightning.seed_everything(options.seed, verbose=False)
    model = build_model(options, len(data.class_names))
    if options.teacher_run:
        check_class_order(model, data.class_names, options.teacher_run)
    if trainer.is_global_zero:
        _prepare_folder(folder, config, start)
    module = DetectionModule(model, options, data, val, start)
    with stop, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*mid-epoch.*|.*resumable.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        try:
            if run_folder.evaluation_is_missing:
                trainer.validate(module, ckpt_path=checkpoint, verbose=False)
            trainer.fit(module, ckpt_path=checkpoint if start else None)
            if run_folder.evaluated != trainer.global_step:
                trainer.validate(module, verbose=False)
        except SystemExit as error:  # What Lightning makes of a KeyboardInterrupt.
            raise KeyboardInterrupt from error
        except Exception:
            # The processes that this one started would wait for it: on GPUs for half an hour.
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signal.SIGKILL)
            raise
    run_folder.write_result(trainer, module)
    return module.results


def _prepare_folder(folder: Path, config: dict, start: int) -> None:
    """Writes ``config.yaml``; removes what does not belong to a run that goes on from ``start``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output is {folder}, which cannot be made: {error}") from error
    for place in (folder, folder / LAST_CHECKPOINT.parent):
        remove_unfinished_files(place)
    with atomic_open(folder / files.CONFIG, "w") as file:
        yaml.safe_dump(config, file, sort_keys=False)
    for name in (files.RESULT, FINAL_WEIGHTS):  # of a run that is extended
        (folder / name).unlink(missing_ok=True)
    files.forget_metrics_from(folder, start)


def build_trainer(options: TrainingOptions, callbacks: list[Callback]) -> lightning.Trainer:
    """Lightning's trainer for these options.

    Raises:
        ConfigError: there are no such devices, or the batch cannot be shared out to them.
    """
    devices = options.devices
    try:
        trainer = lightning.Trainer(
            accelerator=options.accelerator,
            devices=int(devices) if devices.removeprefix("-").isdigit() else devices,
            num_nodes=options.nodes,
            precision=options.precision,
            max_steps=options.iterations,
            gradient_clip_val=options.clip_gradients or None,
            val_check_interval=evaluation_period(options),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=os.isatty(2),
            default_root_dir=options.output,
            callbacks=callbacks,
            plugins=[AtomicCheckpoints()],
        )
    except _REFUSALS as error:
        raise ConfigError(
            f"accelerator '{options.accelerator}' with devices '{devices}' cannot be had from "
            f"Lightning: {' '.join(str(error).split())}"
        ) from error
    if isinstance(trainer.accelerator, CPUAccelerator):
        cores = os.cpu_count() or 1
        if trainer.num_devices > cores:
            raise ConfigError(
                f"devices is {devices}, one process each, on a CPU of {cores} cores; give at most "
                "these"
            )
    if warning := _slow_precision(options.precision, trainer):
        logger.warning(warning)
    if options.batch_size % trainer.world_size:
        raise ConfigError(
            f"batch_size is {options.batch_size} for {trainer.world_size} processes; give a "
            "multiple of them"
        )
    return trainer


def _slow_precision(precision: str, trainer: lightning.Trainer) -> str | None:
    """Says that bfloat16 is slow on the devices, where it is asked for."""
    setting = f"precision is '{precision}'"
    if precision.startswith("bf16") and isinstance(trainer.accelerator, CPUAccelerator):
        return slow_bfloat16(setting, "precision 32-true")
    if precision.startswith("bf16") and isinstance(trainer.accelerator, CUDAAccelerator):
        return emulated_bfloat16(setting, "precision 16-mixed")
    return None


def _load_data(options: TrainingOptions) -> tuple[DetectionData, DetectionData]:
    if options.student.startswith("keypointrcnn"):
        raise ConfigError(
            f"student is {options.student}, but this command has no keypoint data (flipped images "
            "need the left and right keypoints exchanged); train it with DistilledDetector in a "
            "training loop of your own, or choose a Faster or Mask R-CNN"
        )
    masks = options.student.startswith("maskrcnn")
    train = DetectionData(*options.train, training=True, masks=masks)
    val = DetectionData(*options.val, training=False, masks=masks)
    if val.class_names != train.class_names:
        raise ConfigError(
            f"the classes of train are {train.class_names} and those of val {val.class_names}; "
            "give both files the same categories"
        )
    return train, val


def _check_same_run(folder: Path, config: dict) -> None:
    """Refuses another model, teacher, distillation or data: the run would be a mixture of two."""
    now = files.flatten(yaml.safe_load(yaml.safe_dump(config)))  # lists in place of tuples
    before = config_of_run(str(folder))
    for key in (f"DATASETS.{_CHECKSUM}", f"DATASETS.{TRAIN_CLASSES}"):
        if key not in before:  # written by an earlier version
            del now[key]
    compare_with_run(
        str(folder),
        now,
        identity=("ENGINE", "MODEL.", "KD.", "DATASETS.TRAIN"),
        may_change=("MODEL.WEIGHTS",),
        count_absent=True,
    )


def _with_nan(results: dict) -> dict[str, dict[str, float]]:
    """What ``result.json`` has as null, "no object of this size in the data", is NaN again."""
    return {
        task: {key: math.nan if value is None else value for key, value in scores.items()}
        for task, scores in results.items()
    }


def build_model(options: TrainingOptions, num_classes: int) -> DistilledDetector:
    """The student with its teacher and distillers, as the options name them."""
    _check_teacher_options(options)
    student = build_detector(
        options.student,
        num_classes,
        weights=options.weights,
        backbone_weights=options.backbone_weights,
        options=options.student_options,
    )
    teacher = None
    if options.distillers or options.inherit:
        with torch.random.fork_rng(devices=[]):
            teacher = build_teacher(options, num_classes)
    return DistilledDetector(student, teacher, options.distillers, inherit=options.inherit)


def _check_teacher_options(options: TrainingOptions) -> None:
    """Refuses a teacher that is named twice; warns of options that change nothing."""
    for key in ("teacher", "teacher_options"):
        if options.teacher_run and getattr(options, key):
            raise ConfigError(
                f"{key} is {getattr(options, key)!r} and teacher_run '{options.teacher_run}', "
                "which names the teacher and its options; leave one of the two out"
            )
    named = [x for x in ("teacher", "teacher_run", "teacher_weights") if getattr(options, x)]
    if named and not (options.distillers or options.inherit):
        logger.warning(
            "%s is '%s' but distillers and inherit are empty: nothing is distilled",
            *(named[0], getattr(options, named[0])),
        )
    if options.inherit_lr_factor != 1 and not options.inherit:
        logger.warning(
            "inherit_lr_factor is %g but inherit is empty: no part learns at another rate",
            options.inherit_lr_factor,
        )


def build_teacher(options: TrainingOptions, num_classes: int) -> nn.Module:
    """The trained teacher that the options name, by its run folder or by name and weights."""
    name, weights, own = options.teacher, options.teacher_weights, options.teacher_options
    if options.teacher_run:
        name, own, num_classes = detector_of_run(options.teacher_run)
        weights = weights or str(Path(options.teacher_run) / FINAL_WEIGHTS)
    if not name or not weights:
        raise ConfigError(
            f"teacher is '{name}' and teacher_weights '{weights}', but distillers or inherit need "
            "a trained teacher; give both, or teacher_run, the folder of the teacher's training"
        )
    if options.teacher_run and not Path(weights).is_file():
        raise ConfigError(f"the teacher's weights {weights} do not exist; train the teacher first")
    if not Path(weights).is_file():
        num_classes = None  # weights of torchvision's, such as "COCO_V1", have classes of their own
    return build_detector(name, num_classes, weights=weights, options=own)


def detector_of_run(folder: str | Path) -> tuple[str, dict, int]:
    """Name, options and number of classes of the detector that a run folder holds.

    Raises:
        ConfigError: it is no run folder of this command.
    """
    model = files.read_config(folder)["MODEL"]
    if "DETECTOR" not in model.get("TORCHVISION", {}):
        raise ConfigError(f"{folder} is not a run of torchvision's detectors; name one that is")
    node = model["TORCHVISION"]
    return node["DETECTOR"], node["OPTIONS"], model["ROI_HEADS"]["NUM_CLASSES"]


def _iteration_of(checkpoint: Path) -> int:
    try:
        return int(AtomicCheckpoints().load_checkpoint(checkpoint)["global_step"])
    except (RuntimeError, EOFError, KeyError, TypeError, UnpicklingError) as error:
        # The first sentence: PyTorch's go on with guesses at the cause.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ConfigError(
            f"{checkpoint} cannot be read ({reason}): it is damaged, or holds other objects than a "
            "training writes; remove it to start anew"
        ) from error
