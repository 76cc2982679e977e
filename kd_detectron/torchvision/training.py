"""Training torchvision's detectors, distilled or not, with Lightning.

Lightning does the loop, checkpoints, resuming, precision and several devices; ``torchmetrics``
COCO AP (by pycocotools); torchvision the data. What is here is the module in between and a callback
that writes the run folder: ``config.yaml``, ``metrics.json`` (JSON lines), ``result.json``,
``model_final.pth`` (the plain student's state dict) and ``checkpoints/last.ckpt`` to resume from.

Losses are logged by the names that Detectron2 gives them, so that curves of both engines agree.
"""

import json
import logging
import math
import os
import time
import warnings
from bisect import bisect_right
from pathlib import Path

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torchmetrics.detection import MeanAveragePrecision

from kd_detectron.atomic_files import atomic_open
from kd_detectron.errors import ConfigError, NonFiniteLossError
from kd_detectron.learning_rate import scale_learning_rate
from kd_detectron.runs import files
from kd_detectron.runs.same_run import compare_with_run

from .data import BatchesByIteration, DetectionData, test_loader, train_loader
from .detector import DistilledDetector
from .models import build_detector
from .options import FINAL_WEIGHTS, TrainingOptions

logger = logging.getLogger(__name__)

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
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
            iou_type=self._tasks, backend="pycocotools", average="macro"
        )

    def train_dataloader(self):
        options, (rank, world_size) = self.options, self._share()
        if options.batch_size % world_size:
            raise ConfigError(
                f"batch_size is {options.batch_size} for {world_size} processes; give a multiple "
                "of them"
            )
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
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_batch_start(self, batch, batch_idx):
        # Sampled anchors and proposals are a function of seed and iteration, also when resumed.
        rank = self._share()[0]
        torch.manual_seed((self.options.seed * 1_000_003 + self.global_step) * 1009 + rank)

    def training_step(self, batch, batch_idx):
        losses = self.model(*batch)
        total = sum(losses.values())
        if not torch.isfinite(total):
            wrong = [name for name, value in losses.items() if not torch.isfinite(value)]
            raise NonFiniteLossError(
                f"{', '.join(wrong)} is not finite at iteration {self.global_step}; lower "
                "learning_rate or the distillers' weights, or set clip_gradients; the last "
                f"checkpoint in {self.options.output} is intact"
            )
        self.losses = {_LOSS_NAMES.get(name, name): value for name, value in losses.items()}
        self.losses = {k: float(v.detach()) for k, v in self.losses.items()}
        self.log("loss", total.detach(), prog_bar=True, logger=False)
        return total

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        found = self.model(images)
        for one in found:
            if "masks" in one:
                one["masks"] = one["masks"].squeeze(1) > 0.5
        self._average_precision.update(found, targets)

    def on_validation_epoch_end(self):
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


class RunFolder(Callback):
    """Writes ``metrics.json`` while training and ``result.json`` at the end.

    Args:
        options: of the training.
        start: the iteration to go on from; what an interrupted run logged after it is dropped.
    """

    def __init__(self, options: TrainingOptions, start: int):
        self._options = options
        self._folder = Path(options.output)
        self.evaluated = -1
        self._sums: dict[str, float] = {}
        self._count = 0
        # Wall time of the training up to iteration ``start``, as its metrics say.
        seconds = (x.get("elapsed", 0.0) for x in files.read_metrics(self._folder))
        self._seconds = max(seconds, default=0.0)

    def on_train_start(self, trainer, module):
        self._begun = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        for name, value in module.losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        iteration = trainer.global_step - 1
        if trainer.global_step % self._options.log_period and not self._is_last(trainer):
            return
        means = {name: value / self._count for name, value in self._sums.items()}
        total = sum(means.values())
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self._write(trainer, iteration, {"total_loss": total, **means, "lr": rate})
        self._sums, self._count = {}, 0

    def on_validation_end(self, trainer, module):
        metrics = {
            f"{task}/{key}": value
            for task, scores in module.results.items()
            for key, value in scores.items()
        }
        self.evaluated = trainer.global_step
        # As Detectron2 does: the last evaluation is logged one iteration after the last step.
        iteration = trainer.global_step - (not self._is_last(trainer))
        self._write(trainer, iteration, metrics)

    def write_result(self, trainer, module) -> None:
        """Writes the plain student's weights and ``result.json``."""
        if not trainer.is_global_zero:
            return
        student, teacher = module.model.student, module.model.teacher
        torch.save(student.state_dict(), self._folder / FINAL_WEIGHTS)
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

    def _is_last(self, trainer) -> bool:
        return trainer.global_step >= self._options.iterations

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._begun

    def _write(self, trainer, iteration: int, values: dict) -> None:
        if trainer.is_global_zero:
            line = {"iteration": iteration, "elapsed": self._elapsed(), **values}
            with open(self._folder / files.METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def train(options: TrainingOptions, *, resume: bool = True) -> dict[str, dict[str, float]]:
    """Trains and evaluates; continues from the folder's last checkpoint where there is one.

    Args:
        options: of the training.
        resume: False: refuse a folder that holds a run; True: go on with it.

    Returns:
        AP by task and metric, in points, as in ``result.json``.

    Raises:
        ConfigError: something named in the options does not exist or does not fit.
        NonFiniteLossError: a loss became NaN or infinite.
    """
    folder = Path(options.output)
    if resume and files.is_finished(folder):
        return files.read_result(folder)["results"]
    if not resume and (folder / files.METRICS).is_file():
        raise ConfigError(f"{folder} holds a run; give --resume to go on, or another --output")
    # Lightning's remarks on hardware and its other products.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    masks = options.student.startswith("maskrcnn")
    data = DetectionData(*options.train, training=True, masks=masks)
    val = DetectionData(*options.val, training=False, masks=masks)
    if val.class_names != data.class_names:
        raise ConfigError(
            f"the classes of train are {data.class_names} and those of val {val.class_names}; "
            "give both files the same categories"
        )
    lightning.seed_everything(options.seed, verbose=False)
    model = build_model(options, len(data.class_names))
    folder.mkdir(parents=True, exist_ok=True)
    config = options.config(len(data.class_names))
    # With another teacher, or other data, the run would be a mixture of two.
    compare_with_run(
        str(folder),
        files.flatten(config),
        identity=("ENGINE", "MODEL.", "KD.", "DATASETS.TRAIN"),
        may_change=("MODEL.WEIGHTS",),
    )
    with atomic_open(folder / files.CONFIG, "w") as file:
        yaml.safe_dump(config, file, sort_keys=False)
    checkpoint = folder / LAST_CHECKPOINT
    start = _iteration_of(checkpoint) if checkpoint.is_file() else 0
    files.forget_metrics_from(folder, start)
    run_folder = RunFolder(options, start)
    trainer = lightning.Trainer(
        accelerator=options.accelerator,
        devices=options.devices if options.devices == "auto" else int(options.devices),
        precision=options.precision,
        max_steps=options.iterations,
        gradient_clip_val=options.clip_gradients or None,
        val_check_interval=min(options.eval_period or options.iterations, options.iterations),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=os.isatty(2),
        default_root_dir=folder,
        callbacks=[
            run_folder,
            ModelCheckpoint(
                folder / "checkpoints",
                every_n_train_steps=options.checkpoint_period,
                save_last=True,
                save_top_k=1,
                enable_version_counter=False,
            ),
        ],
    )
    module = DetectionModule(model, options, data, val, start)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", ".*mid-epoch.*|.*resumable.*")
        warnings.filterwarnings("ignore", ".*LeafSpec.*")
        trainer.fit(module, ckpt_path=checkpoint if start else None)
    if trainer.interrupted or trainer.global_step < options.iterations:
        raise KeyboardInterrupt
    if run_folder.evaluated != trainer.global_step:
        trainer.validate(module, verbose=False)
    run_folder.write_result(trainer, module)
    return module.results


def build_model(options: TrainingOptions, num_classes: int) -> DistilledDetector:
    """The student with its teacher and distillers, as the options name them."""
    student = build_detector(
        options.student,
        num_classes,
        weights=options.weights,
        backbone_weights=options.backbone_weights,
        options=options.student_options,
    )
    teacher = None
    if options.distillers or options.inherit:
        with torch.random.fork_rng():
            teacher = build_teacher(options, num_classes)
    return DistilledDetector(student, teacher, options.distillers, inherit=options.inherit)


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
        return int(torch.load(checkpoint, map_location="cpu", weights_only=False)["global_step"])
    except (RuntimeError, EOFError, KeyError) as error:
        raise ConfigError(
            f"{checkpoint} cannot be read ({str(error).splitlines()[0]}); remove it to start anew"
        ) from error


def _count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
