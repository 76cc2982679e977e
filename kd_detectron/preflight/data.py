"""Are the datasets that a config names there, sound, and what the model needs?

Cost: the reading of the JSON and one listing of each image folder, not one look per image.
"""

import logging
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

    Raises:
        ConfigError: the first thing found that would not work.
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
    """Checks the datasets of a config; call it once, before anything is built.

    Registers ``DATASETS.COCO_FORMAT`` first. Warnings (boxes that are dropped, annotations of
    unknown images) go to the log.

    Args:
        cfg: a whole config.
        train: whether ``DATASETS.TRAIN`` will be used; False for evaluation only.

    Returns:
        A summary of each dataset, by name, training sets first.

    Raises:
        ConfigError: the first thing found that would not work.
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
    summaries = {}
    for key, names in named.items():
        for name in names:
            if name not in summaries:
                summaries[name] = _check_dataset(cfg, key, name)
                check_dataset_classes(cfg, key, summaries[name], next(iter(summaries.values())))
                if cfg.MODEL.KEYPOINT_ON:
                    _check_keypoint_metadata(cfg, key, name)
    return summaries


def _check_dataset(cfg: CfgNode, key: str, name: str) -> DatasetSummary:
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco":
        return _check_dicts(f"{key} '{name}'", name)
    summary = check_coco_files(
        metadata.json_file,
        metadata.image_root,
        name=f"{key} '{name}'",
        for_training=key == "DATASETS.TRAIN",
        for_test=name in cfg.DATASETS.TEST,
        mask_format=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else None,
        num_keypoints=(
            cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else None
        ),
    )
    builtin = metadata.get("thing_classes")
    if builtin is not None and tuple(builtin) != summary.classes:
        raise ConfigError(
            f"{key} '{name}': '{absolute(metadata.json_file)}' has the"
            f" {count_classes(summary.classes)}, but that name stands for the"
            f" {count_classes(builtin)}; register your own data under a name of its own in"
            " DATASETS.COCO_FORMAT"
        )
    return replace(summary, name=name)


def _check_keypoint_metadata(cfg: CfgNode, key: str, name: str) -> None:
    """Refuses a dataset of which Detectron2 does not know what flips and evaluation need."""
    metadata = MetadataCatalog.get(name)
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    title = f"{key} '{name}': MODEL.KEYPOINT_ON is True"
    if key == "DATASETS.TRAIN":
        names = metadata.get("keypoint_names")
        if names is None or metadata.get("keypoint_flip_map") is None:
            raise ConfigError(
                f"{title} but the dataset has no keypoint names and no pairs to exchange when an"
                f" image is flipped; set MetadataCatalog.get('{name}').keypoint_names and"
                " .keypoint_flip_map in a file given to --import, or MODEL.KEYPOINT_ON to False"
            )
        if len(names) != count:
            raise ConfigError(
                f"{title} and MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count} but the dataset"
                f" names {len(names)} keypoints; set NUM_KEYPOINTS to {len(names)}"
            )
    # Without sigmas pycocotools takes those of COCO's 17 keypoints of a person.
    sigmas = len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17
    if name in cfg.DATASETS.TEST and sigmas != count:
        raise ConfigError(
            f"{title} and MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {count} but"
            f" TEST.KEYPOINT_OKS_SIGMAS are for {sigmas} keypoints; give one for each keypoint"
        )


def _check_dicts(title: str, name: str) -> DatasetSummary:
    # Registered by a user's own function: only its result can be checked.
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
    classes = tuple(MetadataCatalog.get(name).get("thing_classes", ()))
    return DatasetSummary(name, len(dataset_dicts), count, classes)
