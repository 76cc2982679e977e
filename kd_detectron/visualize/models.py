"""Loads trained detectors for the pictures: a run's student and its teacher.

Nothing here trains: distillation is switched off in the config, so that a student is built without
its teacher. A record is one image as Detectron2's datasets describe it: a dict with ``file_name``,
``height``, ``width`` and, for ground truth, ``annotations``. Each model reads and resizes a record
by Detectron2's own test-time mapper, in its own channel order.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from kd_detectron.checkpoint import DistillationCheckpointer, refuse_misfit
from kd_detectron.config import load_run_config
from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling.taps import box_head_of
from kd_detectron.modeling.teacher_loading import build_teacher_model, load_teacher, teacher_config
from kd_detectron.preflight.classes import check_number_of_classes
from kd_detectron.runs.files import CONFIG, FINAL_CHECKPOINTS, LAST_CHECKPOINT, last_checkpoint
from kd_detectron.runs.groups import TEACHER, named_groups
from kd_detectron.runs.run import TASKS, Run, backbone_name, load_run


@dataclass(frozen=True)
class LoadedModel:
    """A detector in eval mode, and what a picture says of it.

    ``ap`` is a text such as "37.7 box AP", empty if unknown.
    """

    label: str
    model: nn.Module
    cfg: CfgNode
    ap: str = ""
    is_teacher: bool = False

    @property
    def title(self) -> str:
        """The label, and the AP below it."""
        return f"{self.label}\n{self.ap}".strip()

    def inputs(self, record: dict) -> dict:
        """Reads a record as the model expects it: ``image`` (3, H, W), ``height``, ``width``."""
        record = {key: record[key] for key in ("file_name", "height", "width") if key in record}
        return DatasetMapper(self.cfg, is_train=False)(record)

    def batch(self, record: dict) -> ImageList:
        """Reads a record as a batch of one, normalised and padded, on the model's device."""
        return self.model.preprocess_image([self.inputs(record)])

    @torch.no_grad()
    def features(self, record: dict) -> dict[str, torch.Tensor]:
        """Returns the feature maps of one record: level name -> (C, H, W), without the padding."""
        batch = self.batch(record)
        size, padded = np.array(batch.image_sizes[0]), np.array(batch.tensor.shape[-2:])
        found = {}
        for level, maps in self.model.backbone(batch.tensor).items():
            height, width = np.ceil(maps.shape[-2:] * size / padded).astype(int)
            found[level] = maps[0, :, :height, :width].cpu()
        return found

    def classify(
        self, record: dict, boxes: np.ndarray
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], ImageList]:
        """Classifies given boxes (R, 4), XYXY in pixels of the image file.

        Returns:
            The box head's logits (R, K+1) with the graph from the feature maps; these maps
            (1, C, H, W) by level name, as leaves; and the batch.

        Raises:
            ConfigError: the detector has no box head, or one for each of several stages.
        """
        if box_head_of(self.model) is None:
            raise ConfigError(
                f"{self.label} ({self.cfg.MODEL.META_ARCHITECTURE}) has not exactly one box "
                "head, so given boxes cannot be classified; use a Faster or Mask R-CNN"
            )
        batch, heads = self.batch(record), self.model.roi_heads
        height, width = batch.image_sizes[0]
        scale = [width / record["width"], height / record["height"]] * 2
        boxes = Boxes(torch.as_tensor(boxes * np.array(scale))).to(batch.tensor.device)
        with torch.no_grad():
            maps = self.model.backbone(batch.tensor)
        maps = {level: maps[level].requires_grad_() for level in heads.box_in_features}
        pooled = heads.box_pooler(list(maps.values()), [boxes])
        return heads.box_predictor(heads.box_head(pooled))[0], maps, batch

    @torch.no_grad()
    def detect(self, record: dict) -> Instances:
        """Returns the detections on one record, in pixels of the image file, on the CPU."""
        return self.model([self.inputs(record)])[0]["instances"].to("cpu")


def load_run_student(run_folder: str | Path, *, label: str = "", dataset: str = "") -> LoadedModel:
    """Loads the student of a run folder: its final checkpoint, or the last one written.

    Its label is by default its method and student, "CKD R18".

    Raises:
        ConfigError: it is no run folder, holds no checkpoint, or the checkpoint does not fit.
    """
    run = load_run(run_folder)
    cfg = load_run_config(run_folder)
    weights = _checkpoint_of(run.path)
    label = label or f"{run.method} {run.student}"
    if dataset and dataset != run.test_dataset:
        tested = dataset in cfg.DATASETS.TEST
        run = load_run(run_folder, dataset) if tested else replace(run, results={})
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
        "put back the config.yaml that the run was trained with",
    )
    return LoadedModel(label, model, cfg, _ap_text(run))


def load_configured_teacher(cfg: CfgNode) -> LoadedModel:
    """Loads the whole teacher that ``cfg.KD.TEACHER`` names, on ``cfg.MODEL.DEVICE``."""
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
    # Its AP is known if its checkpoint lies in a run folder.
    folder = Path(weights).parent
    ap = _ap_text(load_run(folder)) if (folder / CONFIG).is_file() else ""
    return LoadedModel(f"{TEACHER} {name}", model.eval(), teacher_cfg, ap, is_teacher=True)


def load_models(
    run_folders: Sequence[str | Path],
    *,
    labels: Sequence[str] = (),
    teacher: str | Path | None = None,
    dataset: str = "",
) -> list[LoadedModel]:
    """Loads the models of one picture: the teacher first, then the students of the runs.

    Args:
        run_folders: ``OUTPUT_DIR``s; that of the teacher among them is drawn once.
        labels: what to call the runs, one each; by default the names of their rows in a table.
        teacher: the teacher's run folder; by default the teacher that the first distilled run
            names, none where no run is distilled.
        dataset: whose AP stands beside them; by default the first of ``DATASETS.TEST``.

    Raises:
        ConfigError: as the single loaders, or there is no run but the teacher's.
    """
    runs = [load_run(folder) for folder in run_folders]
    if not labels:
        names = {
            run.path: name if len(group) == 1 else f"{name}, seed {run.seed}"
            for name, group in named_groups(runs).items()
            for run in group
        }
        labels = [names[run.path] for run in runs]
    models, shown = [], Path(teacher) if teacher else None
    distilled = [run for run in runs if run.teacher]
    if shown:
        label = f"{TEACHER} {load_run(shown).student}"
        student = load_run_student(shown, label=label, dataset=dataset)
        models.append(replace(student, is_teacher=True))
    elif distilled:
        cfg = load_run_config(distilled[0].path)
        cfg.MODEL.DEVICE = _device(cfg)
        models.append(load_configured_teacher(cfg))
        shown = distilled[0].teacher_folder
    students = [
        load_run_student(run.path, label=label, dataset=dataset)
        for run, label in zip(runs, labels, strict=True)
        if shown is None or run.path.resolve() != shown.resolve()
    ]
    if not students:
        raise ConfigError("the only run is the teacher's: name at least one student's run folder")
    for model in models:
        match_test_size(model, students[-1].cfg)
    return models + students


def match_test_size(model: LoadedModel, other: CfgNode) -> None:
    """Makes a model read images at the test size of another's config, so that the two compare."""
    # A model that pads images to a square (ViTDet) reads larger ones at the size of its square.
    square = model.model.backbone.padding_constraints.get("square_size", 0)
    largest = other.INPUT.MAX_SIZE_TEST
    model.cfg.INPUT.MIN_SIZE_TEST = other.INPUT.MIN_SIZE_TEST
    model.cfg.INPUT.MAX_SIZE_TEST = min(largest, square) if square else largest


def dataset_records(cfg: CfgNode, name: str = "") -> tuple[list[dict], list[str]]:
    """Returns the records and class names of a dataset, by default the first of ``DATASETS.TEST``.

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
    """Finds records by file name, with all, some or none of its folders, or by image id.

    Raises:
        ConfigError: a name is of no image, or of several.
    """
    return [_find_record(records, name) for name in names]


def _find_record(records: Sequence[dict], name: str) -> dict:
    by_id = {str(record.get("image_id")): record for record in records}
    shared = [_shared_parts(Path(record["file_name"]), Path(name)) for record in records]
    longest = max(shared, default=0)
    found = [r for r, count in zip(records, shared, strict=True) if count == longest > 0]
    if len(found) > 1:
        one, other = (record["file_name"] for record in found[:2])
        raise ConfigError(
            f"'{name}' may be {one} or {other}; give more of its path, or its image id"
        )
    if not found and name not in by_id:
        known = [*by_id, *(Path(record["file_name"]).name for record in records)]
        near = did_you_mean(Path(name).name, known)
        raise ConfigError(f"no image of the dataset is called '{name}'{near}")
    return found[0] if found else by_id[name]


def _shared_parts(one: Path, other: Path) -> int:
    """How many parts the shorter path has, if the longer one ends in it; else 0."""
    count = min(len(one.parts), len(other.parts))
    return count if one.parts[-count:] == other.parts[-count:] else 0


def check_classes(model: LoadedModel, class_names: Sequence[str]) -> None:
    """Refuses a model whose number of classes is not the dataset's."""
    check_number_of_classes(model.label, model.model, class_names)


def read_rgb(record: dict):
    """Reads a record's image file: (H, W, 3) uint8, RGB."""
    return read_image(record["file_name"], format="RGB")


def _ap_text(run: Run) -> str:
    return ", ".join(
        f"{run.results[task]['AP']:.1f} {name} AP"
        for task, name in TASKS.items()
        if "AP" in run.results.get(task, {})
    )


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
