"""Checks that the datasets of a config exist, are well-formed and fit the model.

:func:`check_data` is what training, ``--check`` and LazyConfig training call; it also compares the
classes of student, datasets and teacher.
"""

import logging

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.preflight.annotations import (
    DatasetSummary,
    check_coco_files,
    check_on_disk,
    datasets_root,
    exists,
)
from kd_detectron.preflight.classes import check_class_order, check_dataset_classes

logger = logging.getLogger(__name__)


def check_data(cfg: CfgNode, *, train: bool = True) -> dict[str, DatasetSummary]:
    """Checks the datasets of a config and the teacher's classes, in the main process alone.

    Args:
        cfg: a whole config.
        train: whether ``DATASETS.TRAIN`` will be used; False for evaluation only.

    Returns:
        A summary of each dataset, by name; they are logged. Empty in other processes.
    """
    summaries = {}
    if comm.is_main_process():
        summaries = check_datasets(cfg, train=train)
        for summary in summaries.values():
            logger.info("%s", summary)
        if train:
            check_class_order(cfg, summaries)
    comm.synchronize()
    return summaries


def check_datasets(cfg: CfgNode, *, train: bool = True) -> dict[str, DatasetSummary]:
    """Registers ``DATASETS.COCO_FORMAT`` and checks the datasets, as :func:`check_data` does.

    Returns:
        A summary of each dataset, by name, training sets first.
    """
    register_coco_format(cfg)
    if train and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty; name the dataset to train on")
    named = [("DATASETS.TRAIN", name) for name in cfg.DATASETS.TRAIN if train]
    named += [("DATASETS.TEST", name) for name in cfg.DATASETS.TEST]
    for key, name in named:
        if name not in DatasetCatalog:
            raise ConfigError(
                f"{key} names '{name}', which is no registered dataset"
                f"{did_you_mean(name, DatasetCatalog.keys())} (your own data is registered by"
                " DATASETS.COCO_FORMAT)"
            )
    for part in ("TRAIN", "TEST") if train else ("TEST",):
        _check_proposal_files(cfg, part)
    summaries = {}
    for key, name in named:
        if name not in summaries:
            summaries[name] = _check_dataset(cfg, key, name)
            check_dataset_classes(cfg, key, summaries[name], next(iter(summaries.values())))
    return summaries


def _check_proposal_files(cfg: CfgNode, part: str) -> None:
    count, files = len(cfg.DATASETS[part]), cfg.DATASETS[f"PROPOSAL_FILES_{part}"]
    missing = [file for file in files if not exists(file)]
    if cfg.MODEL.LOAD_PROPOSALS and count and (missing or len(files) != count):
        absent = f", of which {missing} do not exist" if missing else ""
        raise ConfigError(
            f"MODEL.LOAD_PROPOSALS is True and DATASETS.{part} names {count} datasets, but"
            f" DATASETS.PROPOSAL_FILES_{part} names {len(files)} files{absent}; give one for each"
            " dataset, by its path from the working directory"
        )


def _check_dataset(cfg: CfgNode, key: str, name: str) -> DatasetSummary:
    metadata = MetadataCatalog.get(name)
    files = (metadata.get("json_file"), metadata.get("image_root"))
    if metadata.get("evaluator_type") != "coco" or not all(files):
        return _check_dicts(cfg, key, name)
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else None
    # Without sigmas pycocotools takes those of COCO's 17 keypoints of a person.
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17
    if name in cfg.DATASETS.TEST and keypoints not in (None, sigmas):
        raise ConfigError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {keypoints} but TEST.KEYPOINT_OKS_SIGMAS are"
            f" for {sigmas} keypoints; give one for each keypoint"
        )
    return check_coco_files(
        *files,
        name=name,
        key=key,
        for_training=key == "DATASETS.TRAIN",
        for_test=name in cfg.DATASETS.TEST,
        mask_format=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        num_keypoints=keypoints,
        max_corrupt_images=cfg.DATALOADER.MAX_CORRUPT_IMAGES,
    )


def _check_dicts(cfg: CfgNode, key: str, name: str) -> DatasetSummary:
    """Checks what a user's own function, or one of Detectron2 for another format, returns."""
    try:
        dataset_dicts = DatasetCatalog.get(name)
    except OSError as error:
        raise ConfigError(f"{key} '{name}': {error} ({datasets_root()})") from error
    check_on_disk(f"{key} '{name}'", [record["file_name"] for record in dataset_dicts])
    count = sum(len(record.get("annotations", ())) for record in dataset_dicts)
    metadata = MetadataCatalog.get(name)
    classes = tuple(metadata.get("thing_classes", ()))
    if name in cfg.DATASETS.TEST and metadata.get("evaluator_type") == "coco" and not classes:
        raise ConfigError(
            f"{key} '{name}' has the evaluator type 'coco' but no class names, which the evaluation"
            f" reads; set MetadataCatalog.get('{name}').thing_classes in a file given to --import"
        )
    return DatasetSummary(name, len(dataset_dicts), count, classes)
