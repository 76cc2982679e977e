"""Loads trained detectors for the pictures: a run's student, a run's teacher, or any config.

Nothing here trains: distillation is switched off in the config, so that a student is built without
its teacher. A record is one image as Detectron2's datasets describe it: a dict with ``file_name``,
``height``, ``width`` and, for ground truth, ``annotations``. Each model reads and resizes a record
by Detectron2's own test-time mapper, in its own channel order.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from kd_detectron.checkpoint import DistillationCheckpointer, refuse_misfit
from kd_detectron.config import get_config, load_run_config
from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling.taps import box_head_of
from kd_detectron.modeling.teacher_loading import build_teacher_model, load_teacher, teacher_config
from kd_detectron.preflight.classes import check_number_of_classes
from kd_detectron.runs.files import FINAL_CHECKPOINTS, LAST_CHECKPOINT, last_checkpoint
from kd_detectron.runs.groups import named_groups
from kd_detectron.runs.run import TASKS, Run, backbone_name, load_run

_TEACHER = "teacher "


@dataclass(frozen=True)
class LoadedModel:
    """A detector in eval mode, and what a picture says of it.

    Attributes:
        label: what it is called in pictures.
        model: the Detectron2 detector.
        cfg: its whole config.
        ap: text such as "37.7 box AP"; empty if unknown.
        is_teacher: whether the students are compared with it.
    """

    label: str
    model: nn.Module
    cfg: CfgNode
    ap: str = ""
    is_teacher: bool = False

    def inputs(self, record: dict) -> dict:
        """Reads a record as the model expects it: ``image`` (3, H, W), ``height``, ``width``."""
        record = {key: record[key] for key in ("file_name", "height", "width") if key in record}
        return DatasetMapper(self.cfg, is_train=False)(record)

    def batch(self, record: dict) -> ImageList:
        """Reads a record as a batch of one, normalised and padded, on the model's device."""
        return self.model.preprocess_image([self.inputs(record)])

    def features(self, record: dict) -> dict[str, torch.Tensor]:
        """Returns the feature maps of one record: level name -> (C, H, W), without the padding."""
        batch = self.batch(record)
        with torch.no_grad():
            maps = self.model.backbone(batch.tensor)
        height, width = batch.image_sizes[0]
        padded_height, padded_width = batch.tensor.shape[-2:]
        return {
            level: one[
                0,
                :,
                : math.ceil(one.shape[-2] * height / padded_height),
                : math.ceil(one.shape[-1] * width / padded_width),
            ].cpu()
            for level, one in maps.items()
        }

    def logits(self, record: dict, boxes: np.ndarray) -> torch.Tensor:
        """Returns the box head's logits (R, K+1) for given boxes (R, 4), XYXY in image pixels."""
        batch = self.batch(record)
        with torch.no_grad():
            return BoxClassifier(self, boxes, record, batch)(batch.tensor).cpu()

    def detect(self, record: dict) -> Instances:
        """Returns the detections on one record, in pixels of the image file, on the CPU."""
        with torch.no_grad():
            return self.model([self.inputs(record)])[0]["instances"].to("cpu")


@dataclass(frozen=True)
class CachedOutputs(LoadedModel):
    """A model's outputs on some records, kept when the model itself is gone: ``model`` is None.

    Attributes:
        found: detections and features by the record's file name.
    """

    found: dict[str, tuple[Instances, dict[str, torch.Tensor]]] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: LoadedModel, records: Sequence[dict]) -> "CachedOutputs":
        """Runs a model on the records."""
        found = {r["file_name"]: (loaded.detect(r), loaded.features(r)) for r in records}
        return cls(loaded.label, None, loaded.cfg, loaded.ap, loaded.is_teacher, found)

    def detect(self, record: dict) -> Instances:
        return self.found[record["file_name"]][0]

    def features(self, record: dict) -> dict[str, torch.Tensor]:
        return self.found[record["file_name"]][1]


class BoxClassifier(nn.Module):
    """A detector as a classifier of given boxes: images -> logits (R, K+1), with graph.

    Attributes:
        levels: an identity layer on every feature level that the boxes are pooled from; hooks on
            them see the level's map and its gradient.
    """

    def __init__(self, loaded: LoadedModel, boxes: np.ndarray, record: dict, batch: ImageList):
        """
        Args:
            loaded: the detector.
            boxes: (R, 4), XYXY in pixels of the image file.
            record: the image, with its height and width.
            batch: the image as the model gets it.

        Raises:
            ConfigError: the detector has no box head, or one for each of several stages.
        """
        super().__init__()
        if box_head_of(loaded.model) is None:
            raise ConfigError(
                f"{loaded.label} ({loaded.cfg.MODEL.META_ARCHITECTURE}) has not exactly one box "
                "head, so given boxes cannot be classified; use a Faster or Mask R-CNN"
            )
        self.detector = loaded.model
        heads = loaded.model.roi_heads
        height, width = batch.image_sizes[0]
        scale = [width / record["width"], height / record["height"]] * 2
        boxes = torch.as_tensor(boxes, dtype=torch.float32) * torch.tensor(scale)
        self.boxes = Boxes(boxes.to(batch.tensor.device))
        self.levels = nn.ModuleDict({level: nn.Identity() for level in heads.box_in_features})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        heads = self.detector.roi_heads
        features = self.detector.backbone(images)
        features = [tap(features[level]) for level, tap in self.levels.items()]
        return heads.box_predictor(heads.box_head(heads.box_pooler(features, [self.boxes])))[0]

    def level_of_box(self) -> str:
        """Returns the name of the level that the first box is pooled from."""
        pooler = self.detector.roi_heads.box_pooler
        if len(self.levels) == 1:
            return next(iter(self.levels))
        index = assign_boxes_to_levels(
            [self.boxes[:1]],
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
        return list(self.levels)[int(index[0])]


def load_run_student(
    run_folder: str | Path, *, label: str = "", weights: str = "", dataset: str = ""
) -> LoadedModel:
    """Loads the student of a run folder.

    Args:
        run_folder: a Detectron2 ``OUTPUT_DIR``.
        label: what to call it; by default its method and student, "CKD R18".
        weights: the checkpoint; by default the run's final one, or the last one written.
        dataset: whose AP stands beside it; by default the first of ``DATASETS.TEST``.

    Raises:
        ConfigError: it is no run folder, holds no checkpoint, or the checkpoint does not fit.
    """
    run = load_run(run_folder)
    cfg = load_run_config(run_folder)
    weights = weights or _checkpoint_of(run.path)
    label = label or f"{run.method} {run.student}"
    if dataset and dataset != run.test_dataset:
        tested = dataset in cfg.DATASETS.TEST
        run = load_run(run_folder, dataset) if tested else replace(run, results={})
    return LoadedModel(label, _build(cfg, weights), cfg, _ap_text(run))


def load_run_teacher(run_folder: str | Path, *, label: str = "") -> LoadedModel:
    """Loads the teacher that a run's config names in ``KD.TEACHER``."""
    cfg = load_run_config(run_folder)
    cfg.MODEL.DEVICE = _device(cfg)
    return load_configured_teacher(cfg, label=label)


def load_detector(config: str, weights: str, *, label: str = "") -> LoadedModel:
    """Loads a detector by its config: a model-zoo name, a path, or a config of this project.

    The config may be YAML or a LazyConfig (.py), as for ``KD.TEACHER.CONFIG_FILE``.

    Args:
        config: the config's name or path.
        weights: its checkpoint; empty for the model zoo's.
        label: what to call it; by default its backbone.
    """
    cfg = get_config("baseline_rcnn_r18.yaml")
    cfg.MODEL.DEVICE = _device(cfg)
    cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS = config, weights
    loaded = load_configured_teacher(cfg, label=label)
    return loaded if label else replace(loaded, label=loaded.label.removeprefix(_TEACHER))


def load_configured_teacher(cfg: CfgNode, *, label: str = "") -> LoadedModel:
    """Loads the whole teacher that ``cfg.KD.TEACHER`` names, on ``cfg.MODEL.DEVICE``.

    Args:
        cfg: a whole config.
        label: what to call it; by default "teacher" and its backbone, or its LazyConfig file.
    """
    file = cfg.KD.TEACHER.CONFIG_FILE
    if file.endswith(".py"):
        model, input_format = load_teacher(cfg)
        # All that is read of it is how images are to be read; the test sizes are the student's.
        teacher_cfg = cfg.clone()
        teacher_cfg.defrost()
        teacher_cfg.INPUT.FORMAT = input_format
        teacher_cfg.MODEL.META_ARCHITECTURE = type(model).__name__
        name, weights = Path(file).stem, cfg.KD.TEACHER.WEIGHTS
    else:
        teacher_cfg = teacher_config(cfg)
        model = build_teacher_model(teacher_cfg)
        name, weights = backbone_name(teacher_cfg), teacher_cfg.MODEL.WEIGHTS
    label = label or f"{_TEACHER}{name}"
    return LoadedModel(label, model.eval(), teacher_cfg, _ap_of_checkpoint(weights))


def load_models(
    run_folders: Sequence[str | Path],
    *,
    labels: Sequence[str] = (),
    teacher: str | Path | None = None,
    teacher_weights: str = "",
    with_teacher: bool = True,
    dataset: str = "",
) -> list[LoadedModel]:
    """Loads the models of one picture: the teacher first, then the students of the runs.

    Args:
        run_folders: Detectron2 ``OUTPUT_DIR``s; that of the teacher among them is drawn once.
        labels: what to call the runs, one each; by default the names of their rows in a table.
        teacher: the teacher's run folder, or its config as in ``load_detector``; by default the
            one that the first distilled run names, none where no run is distilled.
        teacher_weights: the checkpoint that belongs to ``teacher``.
        with_teacher: False leaves the teacher out.
        dataset: whose AP stands beside them; by default the first of ``DATASETS.TEST``.

    Raises:
        ConfigError: as the single loaders, ``labels`` are not as many as the runs, or there is no
            run but the teacher's.
    """
    if labels and len(labels) != len(run_folders):
        raise ConfigError(f"{len(run_folders)} runs have {len(labels)} labels; give one label each")
    runs = [load_run(folder) for folder in run_folders]
    if not labels:
        names = {
            run.path: name if len(group) == 1 else f"{name}, seed {run.seed}"
            for name, group in named_groups(runs).items()
            for run in group
        }
        labels = [names[run.path] for run in runs]
    models, shown = [], None
    if with_teacher and teacher is not None:
        shown = Path(teacher)
        if Path(teacher).is_dir():
            label = f"{_TEACHER}{load_run(teacher).student}"
            models.append(
                load_run_student(teacher, label=label, weights=teacher_weights, dataset=dataset)
            )
        else:
            models.append(load_detector(str(teacher), teacher_weights, label="teacher"))
    elif with_teacher:
        for run in [run for run in runs if run.teacher][:1]:
            models.append(load_run_teacher(run.path))
            shown = run.teacher_folder
    models = [replace(model, is_teacher=True) for model in models]
    pairs = zip(runs, labels, strict=True)
    students = [
        load_run_student(run.path, label=label, dataset=dataset)
        for run, label in pairs
        if shown is None or run.path.resolve() != shown.resolve()
    ]
    if not students:
        raise ConfigError("the only run is the teacher's: name at least one student's run folder")
    for model in models:
        match_test_size(model, students[-1].cfg)
    return models + students


def match_test_size(model: LoadedModel, other: CfgNode) -> None:
    """Makes a model read images at the test size of another's config, so that the two compare.

    A model that pads images to a square (ViTDet) reads larger ones at the size of its square.
    """
    square = model.model.backbone.padding_constraints.get("square_size", 0)
    largest = other.INPUT.MAX_SIZE_TEST
    model.cfg.INPUT.MIN_SIZE_TEST = other.INPUT.MIN_SIZE_TEST
    model.cfg.INPUT.MAX_SIZE_TEST = min(largest, square) if square else largest


def dataset_records(cfg: CfgNode, name: str = "") -> tuple[list[dict], list[str]]:
    """Returns a dataset's records and its class names.

    Args:
        cfg: a config; its ``DATASETS.COCO_FORMAT`` is registered.
        name: a registered dataset; by default the first of ``DATASETS.TEST``.

    Raises:
        ConfigError: there is no such dataset, or its files are missing.
    """
    register_coco_format(cfg)
    name = name or (cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "")
    if name not in DatasetCatalog:
        near = did_you_mean(name, DatasetCatalog.list())
        raise ConfigError(f"DATASETS.TEST names '{name}', which is not a registered dataset{near}")
    try:
        records = DatasetCatalog.get(name)
    except FileNotFoundError as error:
        raise ConfigError(
            f"the files of dataset '{name}' are missing: {error}; set DETECTRON2_DATASETS"
        ) from error
    return records, list(MetadataCatalog.get(name).thing_classes)


def choose_records(records: Sequence[dict], count: int, *, seed: int = 0) -> list[dict]:
    """Chooses ``count`` records that have annotations, the same ones for the same seed."""
    annotated = [record for record in records if record.get("annotations")]
    chosen = random.Random(seed).sample(range(len(annotated)), min(count, len(annotated)))
    return [annotated[index] for index in sorted(chosen)]


def find_records(records: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Finds records by file name, with or without its folder, or by image id."""
    by_name = {str(record.get("image_id")): record for record in records}
    by_name |= {Path(record["file_name"]).name: record for record in records}
    for name in names:
        if Path(name).name not in by_name:
            raise ConfigError(
                f"no image of the dataset is called '{name}'{did_you_mean(name, by_name)}"
            )
    return [by_name[Path(name).name] for name in names]


def check_classes(model: LoadedModel, class_names: Sequence[str]) -> None:
    """Refuses a model whose number of classes is not the dataset's."""
    check_number_of_classes(model.label, model.model, class_names)


def read_rgb(record: dict):
    """Reads a record's image file: (H, W, 3) uint8, RGB."""
    return read_image(record["file_name"], format="RGB")


def _build(cfg: CfgNode, weights: str) -> nn.Module:
    cfg.KD.ENABLED = False
    cfg.MODEL.DEVICE = _device(cfg)
    # The checkpoint has all weights.
    cfg.MODEL.TIMM.PRETRAINED = False
    model = build_model(cfg).eval()
    checkpointer = DistillationCheckpointer(model)
    checkpointer.load(weights)
    refuse_misfit(
        checkpointer.incompatible,
        f"the checkpoint {weights} does not fit the run's config.yaml",
        "name another checkpoint, or the run's own config.yaml",
    )
    return model


def _ap_text(run: Run) -> str:
    return ", ".join(
        f"{run.results[task]['AP']:.1f} {name} AP"
        for task, name in TASKS.items()
        if "AP" in run.results.get(task, {})
    )


def _ap_of_checkpoint(weights: str) -> str:
    """The AP of the run that wrote a checkpoint, if it lies in a run folder."""
    folder = Path(weights).parent
    return _ap_text(load_run(folder)) if (folder / "config.yaml").is_file() else ""


def _device(cfg: CfgNode) -> str:
    return cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu"


def _checkpoint_of(folder: Path) -> str:
    for name in FINAL_CHECKPOINTS:
        if (folder / name).is_file():
            return str(folder / name)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(
            f"the run folder {folder} holds no checkpoint: no {' or '.join(FINAL_CHECKPOINTS)} "
            f"and no {LAST_CHECKPOINT}"
        )
    return str(checkpoint)
