"""Can the evaluation that ``DATASETS.TEST`` and ``TEST.AUG`` ask for be run after the training?"""

import importlib.util

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN

from kd_detectron.errors import ConfigError

EVALUATOR_TYPES = ("coco", "coco_panoptic_seg", "lvis", "pascal_voc", "sem_seg")
# What Detectron2's evaluators import when they run, and what to give to pip for it.
_EVALUATION_PACKAGES = {
    "coco_panoptic_seg": ("panopticapi", "git+https://github.com/cocodataset/panopticapi.git"),
    "lvis": ("lvis", "lvis"),
}


def check_evaluation(cfg: CfgNode) -> None:
    """Refuses, before training, an evaluation that would fail after it.

    ``DATASETS.COCO_FORMAT`` must be registered.
    """
    for name in cfg.DATASETS.TEST:
        if name in DatasetCatalog:
            evaluator_type(name)
    if not cfg.TEST.AUG.ENABLED:
        return
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    boxes = issubclass(architecture, GeneralizedRCNN) and not issubclass(architecture, PanopticFPN)
    if not boxes or cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "TEST.AUG.ENABLED is True, but Detectron2's test-time augmentation is for the boxes and"
            f" masks of R-CNN models: MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE},"
            f" MODEL.KEYPOINT_ON is {cfg.MODEL.KEYPOINT_ON} and MODEL.LOAD_PROPOSALS is"
            f" {cfg.MODEL.LOAD_PROPOSALS}; set TEST.AUG.ENABLED False"
        )


def evaluator_type(dataset_name: str) -> str:
    """The dataset's ``evaluator_type``, one of :data:`EVALUATOR_TYPES` that can be used here."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATOR_TYPES:
        raise ConfigError(
            f"DATASETS.TEST names '{dataset_name}', whose evaluator type is '{kind}'; known are "
            f"{', '.join(EVALUATOR_TYPES)}; for another one write a training script with a "
            "subclass of DistillationTrainer (docs/how_it_works.md)"
        )
    package, source = _EVALUATION_PACKAGES.get(kind, (None, None))
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"DATASETS.TEST names '{dataset_name}' of evaluator type '{kind}', which Detectron2 "
            f"evaluates with the package {package}, which is not installed: pip install {source}"
        )
    return kind
