"""Checks that the datasets of a config exist, are well-formed and fit the model.

:func:`check_data` is what training, ``--check`` and LazyConfig training call; it also compares the
classes of student, datasets and teacher.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.preflight.annotations import (
    DatasetSummary,
    absolute,
    check_coco_files,
    check_on_disk,
    count_classes,
    datasets_root,
    short,
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
    named = {
        "DATASETS.TRAIN": cfg.DATASETS.TRAIN if train else (),
        "DATASETS.TEST": cfg.DATASETS.TEST,
    }
    for key, names in named.items():
        for name in names:
            if name not in DatasetCatalog:
                raise ConfigError(
                    f"{key} names '{name}', which is no registered dataset"
                    f"{did_you_mean(name, DatasetCatalog.keys())} (your own data is registered by"
                    " DATASETS.COCO_FORMAT)"
                )
    if cfg.MODEL.LOAD_PROPOSALS:
        _check_proposal_files(cfg, named)
    summaries = {}
    for key, names in named.items():
        for name in names:
            if name not in summaries:
                summaries[name] = _check_dataset(cfg, key, name)
                check_dataset_classes(cfg, key, summaries[name], next(iter(summaries.values())))
                if cfg.MODEL.KEYPOINT_ON:
                    _check_keypoint_metadata(cfg, key, name)
    return summaries


def _check_proposal_files(cfg: CfgNode, named: Mapping[str, Sequence[str]]) -> None:
    for key, names in named.items():
        files_key = "DATASETS.PROPOSAL_FILES_" + key.removeprefix("DATASETS.")
        files = cfg.DATASETS[files_key.removeprefix("DATASETS.")] if names else ()
        if len(files) != len(names):
            raise ConfigError(
                f"MODEL.LOAD_PROPOSALS is True and {key} names {len(names)} datasets, but"
                f" {files_key} {len(files)} files; give one proposal file for each dataset"
            )
        for file in files:
            if "://" not in file and not os.path.isfile(file):
                raise ConfigError(
                    f"MODEL.LOAD_PROPOSALS is True but '{absolute(file)}' of {files_key} does not"
                    " exist; correct the path (it is relative to the working directory)"
                )


def _check_dataset(cfg: CfgNode, key: str, name: str) -> DatasetSummary:
    metadata = MetadataCatalog.get(name)
    title = f"{key} '{name}'"
    files = (metadata.get("json_file"), metadata.get("image_root"))
    if metadata.get("evaluator_type") != "coco" or not all(files):
        return _check_dicts(cfg, title, name)
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    summary = check_coco_files(
        *files,
        name=title,
        for_training=key == "DATASETS.TRAIN",
        for_test=name in cfg.DATASETS.TEST,
        mask_format=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        num_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else None,
        max_corrupt_images=cfg.DATALOADER.MAX_CORRUPT_IMAGES,
    )
    builtin = metadata.get("thing_classes")
    if builtin is not None and tuple(builtin) != summary.classes:
        raise ConfigError(
            f"{title}: '{absolute(files[0])}' has the {count_classes(summary.classes)}, but that"
            f" name stands for the {count_classes(builtin)}; register your own data under a name of"
            " its own in DATASETS.COCO_FORMAT"
        )
    return replace(summary, name=name)


def _check_keypoint_metadata(cfg: CfgNode, key: str, name: str) -> None:
    """Refuses a dataset of which Detectron2 does not know what flips and evaluation need."""
    metadata = MetadataCatalog.get(name)
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    title = f"{key} '{name}': MODEL.KEYPOINT_ON is True"
    names = metadata.get("keypoint_names")
    if key == "DATASETS.TRAIN" and None in (names, metadata.get("keypoint_flip_map")):
        raise ConfigError(
            f"{title} but the dataset has no keypoint names and no pairs to exchange when an image"
            f" is flipped; set MetadataCatalog.get('{name}').keypoint_names and .keypoint_flip_map"
            " in a file given to --import, or MODEL.KEYPOINT_ON to False"
        )
    # Without sigmas pycocotools takes those of COCO's 17 keypoints of a person.
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17
    for known, what in (
        (names if key == "DATASETS.TRAIN" else None, "the dataset's keypoint_names has"),
        (range(sigmas) if name in cfg.DATASETS.TEST else None, "TEST.KEYPOINT_OKS_SIGMAS are for"),
    ):
        if known is not None and len(known) != count:
            raise ConfigError(
                f"{title} and MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count} but {what}"
                f" {len(known)} keypoints; give one for each keypoint"
            )


def _check_dicts(cfg: CfgNode, title: str, name: str) -> DatasetSummary:
    """Checks what a user's own function returns."""
    try:
        dataset_dicts = DatasetCatalog.get(name)
    except OSError as error:
        raise ConfigError(f"{title}: {error} ({datasets_root()})") from error
    if not isinstance(dataset_dicts, list) or not dataset_dicts:
        raise ConfigError(
            f"{title}: its registered function returned {short(dataset_dicts)}; it must return a"
            " list of dataset dicts, not empty"
        )
    check_on_disk(title, [record["file_name"] for record in dataset_dicts])
    count = sum(len(record.get("annotations", ())) for record in dataset_dicts)
    metadata = MetadataCatalog.get(name)
    classes = tuple(metadata.get("thing_classes", ()))
    if name in cfg.DATASETS.TEST and metadata.get("evaluator_type") == "coco" and not classes:
        raise ConfigError(
            f"{title} has the evaluator type 'coco' but no class names, which the evaluation reads;"
            f" set MetadataCatalog.get('{name}').thing_classes in a file given to --import"
        )
    return DatasetSummary(name, len(dataset_dicts), count, classes)
