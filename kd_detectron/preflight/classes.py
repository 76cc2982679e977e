"""Checks that teacher, student and datasets have the same classes in the same order.

Some outputs are compared class by class: with as many classes in another order training runs
without an error, but the student learns the wrong classes.
"""

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf
from torch import nn

from kd_detectron.data.coco_format import read_categories, resolve_path
from kd_detectron.distillers import CLASS_OUTPUTS, DISTILLER_REGISTRY
from kd_detectron.errors import ConfigError
from kd_detectron.modeling.teacher_loading import (
    find_teacher_config,
    read_lazy_config,
    teacher_config,
)
from kd_detectron.preflight.annotations import DatasetSummary, count_classes

# Stands for the NUM_CLASSES of a model that has no such attribute (some LazyConfigs').
UNKNOWN_CLASSES = -1


def check_dataset_classes(
    cfg: CfgNode, key: str, summary: DatasetSummary, first: DatasetSummary
) -> None:
    """Compares a dataset's classes with the model's number, and with another dataset's classes."""
    if not summary.classes:  # A user's own function that sets no thing_classes.
        return
    architecture = cfg.MODEL.META_ARCHITECTURE
    if "RetinaNet" in architecture:
        class_key, num_classes = "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    else:
        class_key, num_classes = "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    known = num_classes != UNKNOWN_CLASSES and architecture != "ProposalNetwork"
    if known and len(summary.classes) != num_classes:
        raise ConfigError(
            f"{key} '{summary.name}' has {count_classes(summary.classes)} but {class_key} is"
            f" {num_classes}; set {class_key} to {len(summary.classes)}"
        )
    for mine, theirs in zip(summary.classes, first.classes, strict=False):
        if mine != theirs:
            raise ConfigError(
                f"{key} '{summary.name}' and '{first.name}' must list the same classes in the same"
                f" order of category ids, but one has '{mine}' where the other has '{theirs}';"
                " rename or renumber the categories of one annotation file"
            )


def check_class_order(cfg: CfgNode, summaries: Mapping[str, DatasetSummary]) -> None:
    """Refuses a teacher of other class names where distillers or ``INHERIT`` go class by class.

    Where their numbers differ, ``check_fits`` refuses it with a better sentence. ``summaries`` are
    those of :func:`kd_detectron.preflight.data.check_datasets` for ``cfg``.
    """
    if not (cfg.KD.ENABLED and cfg.DATASETS.TRAIN):
        return
    known = [name for name in cfg.KD.DISTILLERS if name in DISTILLER_REGISTRY]
    comparing = [name for name in known if DISTILLER_REGISTRY.get(name).requires & CLASS_OUTPUTS]
    inherited = [part for part in cfg.KD.TEACHER.INHERIT if _has_class_layers(part)]
    if comparing:
        reason = f"{comparing} compare their outputs class by class"
        other_way = "feature distillers alone"
    elif inherited:
        reason = f"KD.TEACHER.INHERIT {inherited} copies the layers of each class"
        other_way = "inherit other parts, such as proposal_generator and roi_heads.box_head"
    else:
        return
    _compare_names(cfg, summaries, "DATASETS.TRAIN", f"but {reason}", other_way)


def check_teacher_to_evaluate(
    cfg: CfgNode, summaries: Mapping[str, DatasetSummary], model: nn.Module
) -> None:
    """Refuses to evaluate ``model``, a teacher, on ``DATASETS.TEST`` of other classes."""
    who = f"the teacher (KD.TEACHER.CONFIG_FILE '{cfg.KD.TEACHER.CONFIG_FILE}')"
    for name in cfg.DATASETS.TEST if summaries else ():
        if summaries[name].classes:
            check_number_of_classes(who, model, summaries[name].classes)
    if summaries and cfg.DATASETS.TEST:
        way = "set DATASETS.TEST to the dataset that the teacher was trained for"
        _compare_names(cfg, summaries, "DATASETS.TEST", "so its AP would mean nothing", way)


def check_number_of_classes(who: str, model: nn.Module, class_names: Sequence[str]) -> None:
    """Refuses a model whose number of classes is not the dataset's."""
    heads = getattr(model, "roi_heads", model)
    count = getattr(heads, "num_classes", len(class_names))
    if count != len(class_names):
        key = "MODEL.ROI_HEADS" if hasattr(model, "roi_heads") else "MODEL.RETINANET"
        raise ConfigError(
            f"{who} detects {count} classes ({key}.NUM_CLASSES) but the dataset has "
            f"{count_classes(class_names)}; name the dataset that it was trained for"
        )


def _has_class_layers(part: str) -> bool:
    layers = ("roi_heads.box_predictor", "roi_heads.mask_head", "head.cls_score")
    return part == "auto" or any(x.startswith(part) or part.startswith(x) for x in layers)


def _compare_names(
    cfg: CfgNode, summaries: Mapping[str, DatasetSummary], key: str, reason: str, other_way: str
) -> None:
    """Compares a dataset's class names with the teacher's, where both are known, without case."""
    own_name = cfg.DATASETS[key.removeprefix("DATASETS.")][0]
    own = summaries[own_name].classes
    teacher_name, categories = teacher_categories(cfg)
    theirs = [category["name"] for category in categories]
    if not own or len(own) != len(theirs):
        return
    for index, (mine, other) in enumerate(zip(own, theirs, strict=True)):
        if mine.strip().lower() != other.strip().lower():
            raise ConfigError(
                f"class {index} is '{mine}' in the student's {key} '{own_name}' and '{other}' in "
                f"the teacher's '{teacher_name}' (KD.TEACHER.CONFIG_FILE "
                f"'{cfg.KD.TEACHER.CONFIG_FILE}'), {reason}; use a teacher of the same classes in "
                f"the same order, or {other_way}. If only the names differ, set KD.TEACHER.OPTS to "
                f'["DATASETS.TRAIN", "(\'{own_name}\',)"]'
            )


def teacher_categories(cfg: CfgNode) -> tuple[str, list[dict]]:
    """Returns name and categories of the dataset that the teacher's config trains on first.

    The categories, COCO's "id" and "name" in the order of the teacher's outputs, are empty where
    they cannot be known here: neither is the dataset registered with class names nor its annotation
    file at hand.
    """
    path = find_teacher_config(cfg.KD.TEACHER.CONFIG_FILE)
    files: dict[str, str] = {}
    if path.endswith(".py"):
        lazy_cfg = read_lazy_config(path, list(cfg.KD.TEACHER.OPTS))
        names = OmegaConf.select(lazy_cfg, "dataloader.train.dataset.names") or ()
        names = [names] if isinstance(names, str) else list(names)
    else:
        teacher_cfg = teacher_config(cfg)
        names = teacher_cfg.DATASETS.TRAIN
        files = {entry[0]: resolve_path(entry[1]) for entry in teacher_cfg.DATASETS.COCO_FORMAT}
    if not names:
        return "", []
    name = names[0]
    metadata = MetadataCatalog.get(name).as_dict() if name in MetadataCatalog else {}
    classes = metadata.get("thing_classes", ())
    if classes and name not in files:
        ids = metadata.get("thing_dataset_id_to_contiguous_id")
        ids = sorted(ids, key=ids.get) if ids else range(1, len(classes) + 1)
        return name, [{"id": i, "name": each} for i, each in zip(ids, classes, strict=True)]
    try:
        return name, read_categories(files.get(name) or metadata.get("json_file", ""), "")
    except ConfigError:  # The teacher's data need not be here, nor be sound.
        return name, []
