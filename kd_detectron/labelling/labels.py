"""Labels unlabelled images with a trained teacher, as a COCO-format file to train on.

:func:`label_images` runs a detector over a list of images and writes its detections above a score
threshold as annotations: boxes, and masks (RLE) where the detector has a mask head, each with its
score. The images are resized and ordered in channels as the teacher was trained to see them.

Until all images are done, each is one line of ``<output>.partial``, from which an interrupted run
continues. Images that cannot be read are reported and left out.
"""

import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from omegaconf import OmegaConf
from torch import nn
from tqdm import tqdm

from kd_detectron.checkpoint import atomic_open
from kd_detectron.config import add_kd_config, get_config, merge_opts
from kd_detectron.data.coco_format import is_usable_box, read_categories, read_coco
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling.teacher_loading import (
    find_teacher_config,
    load_teacher,
    read_lazy_config,
    teacher_config,
)
from kd_detectron.preflight.classes import teacher_categories

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEFAULT_THRESHOLD = 0.5


# ---- the teacher ----


def teacher_cfg_from(
    *, config_file: str = "", teacher: str = "", weights: str = "", opts: Sequence[str] = ()
) -> CfgNode:
    """A config whose ``KD.TEACHER`` names the teacher that labels, on the GPU if there is one.

    ``teacher`` and ``weights`` are ``KD.TEACHER.CONFIG_FILE`` and ``KD.TEACHER.WEIGHTS``, where
    they are not those of ``config_file``, and ``opts`` KEY VALUE overrides.
    """
    if config_file:
        cfg = get_config(config_file, opts)
    else:
        cfg = get_cfg()
        add_kd_config(cfg)
        merge_opts(cfg, list(opts), source="the command line")
    if teacher:
        cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS = teacher, ""
    if weights:
        cfg.KD.TEACHER.WEIGHTS = weights
    if not cfg.KD.TEACHER.CONFIG_FILE:
        raise ConfigError(
            f"no teacher is named (--config-file '{config_file}' has no KD.TEACHER.CONFIG_FILE): "
            "give --teacher CONFIG and --weights FILE, or a --config-file that has KD.TEACHER"
        )
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def load_labeller(cfg: CfgNode) -> tuple[nn.Module, DatasetMapper]:
    """Builds and loads the detector that ``cfg.KD.TEACHER`` names, and what reads its images.

    Raises:
        ConfigError: it is not found, unreadable, or does not fit its config.
    """
    path = find_teacher_config(cfg.KD.TEACHER.CONFIG_FILE)
    if path.endswith(".py"):
        lazy_cfg = read_lazy_config(path, list(cfg.KD.TEACHER.OPTS))
        augmentations = OmegaConf.select(lazy_cfg, "dataloader.test.mapper.augmentations")
        if augmentations is None:
            augmentations = [ResizeShortestEdge(800, 1333)]
        augmentations = instantiate(augmentations)
    else:
        augmentations = build_augmentation(teacher_config(cfg), is_train=False)
    model, input_format = load_teacher(cfg)
    mapper = DatasetMapper(is_train=False, augmentations=augmentations, image_format=input_format)
    return model.eval(), mapper


# ---- what to label, and as what ----


def find_images(folder: str, *, listed_in: str = "", labelled_in: Sequence[str] = ()) -> list[dict]:
    """The images to label, each with "id", "name" (below the folder) and "file_name" (its path).

    Args:
        folder: it and the folders below it are searched for images.
        listed_in: a COCO-format file; only the images that it lists, with its ids.
        labelled_in: COCO-format files whose images are left out.

    Raises:
        ConfigError: no image is left, or a file cannot be read.
    """
    root = Path(folder)
    if listed_in:
        images = read_coco(listed_in, "--images-from")["images"]
        found = [(image["id"], image["file_name"]) for image in images]
    else:
        paths = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
        found = list(enumerate(names, start=1))
    known, left_out = {name for _, name in found}, set()
    for path in labelled_in:
        labelled = {image["file_name"] for image in read_coco(path, "--skip-labelled")["images"]}
        if not labelled & known:
            raise ConfigError(
                f"--skip-labelled '{path}' lists no image of '{folder}', so that nothing would be "
                "left out: its file names must be relative to that folder"
            )
        left_out |= labelled
    images = [
        {"id": number, "name": name, "file_name": os.path.join(folder, name)}
        for number, name in found
        if name not in left_out
    ]
    if not images:
        raise ConfigError(
            f"--images '{folder}' has no image to label ({', '.join(IMAGE_SUFFIXES)}), or all its "
            f"{len(known)} images are listed by --skip-labelled; name the folder that holds them"
        )
    return images


def categories_of(cfg: CfgNode, model: nn.Module, annotation_file: str = "") -> list[dict]:
    """The teacher's classes in the order of its outputs, as COCO's "id" and "name".

    They come from ``annotation_file``, in COCO format, or else from the dataset that the teacher's
    config trains on.

    Raises:
        ConfigError: there are not as many as the teacher has.
    """
    if annotation_file:
        source, categories = annotation_file, read_categories(annotation_file, "--categories")
    else:
        source, categories = teacher_categories(cfg)
    count = getattr(getattr(model, "roi_heads", model), "num_classes", None)
    if len(categories) != count:
        raise ConfigError(
            f"the teacher detects {count} classes, but {len(categories)} categories are known from "
            f"'{source}'; give --categories with the annotation file that it was trained on"
        )
    return categories


def parse_thresholds(values: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The score threshold of each class in ``names``: "NAME=0.7" for one, "0.7" for the others.

    Raises:
        ConfigError: a class is unknown, or a value is not in [0, 1].
    """
    given = {"": DEFAULT_THRESHOLD}
    for value in values:
        name, _, number = value.rpartition("=")
        if name and name not in names:
            raise ConfigError(
                f"--score-threshold names the class '{name}', which the teacher lacks"
                f"{did_you_mean(name, names)}"
            )
        try:
            given[name] = float(number)
        except ValueError:
            given[name] = -1.0
        if not 0 <= given[name] <= 1:
            raise ConfigError(
                f"--score-threshold has '{value}'; give a number from 0 to 1, or CLASS=NUMBER"
            )
    return {name: given.get(name, given[""]) for name in names}


# ---- labelling ----


def label_images(
    model: nn.Module,
    mapper: DatasetMapper,
    images: Sequence[dict],
    output: str,
    *,
    categories: Sequence[dict],
    thresholds: dict[str, float],
    source: str,
    batch_size: int = 4,
    workers: int = 2,
) -> dict:
    """Labels images and writes them as a COCO-format file.

    Args:
        model, mapper, images, categories, thresholds: as the functions above return them.
        output: the file to write; ``<output>.partial`` beside it until it is complete.
        source: names the teacher, for the file's "info" and to recognise an interrupted run.
        batch_size: images that the teacher sees at once.
        workers: processes that read images; 0 reads in this one.

    Returns:
        The file's content.

    Raises:
        ConfigError: the output exists, or the partial file is of other settings.
    """
    if os.path.exists(output):
        raise ConfigError(f"--output '{output}' exists already: name another file or remove it")
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    # The model's own threshold may be higher; a lower one only costs time.
    for module in model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = min(thresholds.values())
    unfinished = f"{output}.partial"
    settings = {
        "teacher": source,
        "score_threshold": thresholds,
        "categories": list(categories),
        "resize": str(mapper.augmentations),
    }
    done = _read_partial(unfinished, settings)
    rest = [image for image in images if image["name"] not in done]
    loader = build_detection_test_loader(
        rest, mapper=partial(_read, mapper), batch_size=batch_size, num_workers=workers
    )
    with open(unfinished, "a", encoding="utf-8") as file:
        if file.tell() == 0:
            _write_line(file, settings)
        for batch in tqdm(loader, unit="batch", disable=None) if rest else ():
            for record in _label_batch(model, batch, categories, thresholds):
                done[record["name"]] = record
                _write_line(file, record)
    # An interrupted run's ids are those of the folder as it was then.
    records = [done[image["name"]] | {"id": image["id"]} for image in images]
    content = _coco_content(records, settings)
    with atomic_open(output, "w") as file:
        json.dump(content, file)
    os.remove(unfinished)
    return content


def _read(mapper: DatasetMapper, image: dict) -> dict:
    """Reads and resizes an image; for one that cannot be read, gives the reason as "skipped"."""
    try:
        return mapper(image)
    except Exception as error:  # Any error of any decoder.
        return image | {"skipped": f"{type(error).__name__}: {error}"}


def _label_batch(
    model: nn.Module, batch: list[dict], categories: Sequence[dict], thresholds: dict[str, float]
) -> list[dict]:
    """Records of a batch: the image's entry and its annotations, without ids."""
    readable = [record for record in batch if "skipped" not in record]
    with torch.no_grad():
        outputs = model(readable) if readable else []
    lowest = torch.tensor([thresholds[category["name"]] for category in categories])
    for record, output in zip(readable, outputs, strict=True):
        found = output["instances"].to("cpu")
        found = found[found.scores >= lowest[found.pred_classes]]
        annotations = [
            _annotation(detection, categories)
            for detection in instances_to_coco_json(found, record["id"])
            if is_usable_box(detection["bbox"], record["width"], record["height"])
        ]
        # Masks without a pixel cannot be trained on.
        record["annotations"] = [each for each in annotations if each["area"] > 0]
        del record["image"]
    for record in batch:
        if "skipped" in record:
            name, reason = record["name"], record["skipped"]
            logger.warning("skipped '%s': it cannot be read (%s)", name, reason)
    return batch


def _annotation(detection: dict, categories: Sequence[dict]) -> dict:
    mask = detection.get("segmentation")
    width, height = detection["bbox"][2:]
    detection.pop("keypoints", None)
    return detection | {
        "category_id": categories[detection["category_id"]]["id"],
        "bbox": [round(value, 2) for value in detection["bbox"]],
        "area": float(mask_util.area(mask)) if mask else round(width * height, 2),
        "iscrowd": 0,
        "score": round(detection["score"], 4),
    }


def _write_line(file, content: dict) -> None:
    file.write(json.dumps(content) + "\n")
    file.flush()


def _read_partial(path: str, settings: dict) -> dict[str, dict]:
    """Records of an interrupted run by image, without those that could not be read.

    Cuts off a line that was not finished.
    """
    if not os.path.exists(path):
        return {}
    content = Path(path).read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    os.truncate(path, len(content))
    lines = [json.loads(line) for line in content.splitlines()]
    if lines and lines[0] != json.loads(json.dumps(settings)):  # as JSON gives them back
        raise ConfigError(
            f"'{path}' was begun by another teacher, or with other thresholds or categories: "
            "remove it, or name another --output"
        )
    if lines:
        logger.info("%s: going on after %d images", path, len(lines) - 1)
    return {record["name"]: record for record in lines[1:] if "skipped" not in record}


def _coco_content(records: list[dict], settings: dict) -> dict:
    labelled = [record for record in records if "skipped" not in record]
    annotations = [
        each | {"image_id": record["id"]} for record in labelled for each in record["annotations"]
    ]
    info = {"description": "labelled by a detector, not by people", **settings}
    return {
        "categories": info.pop("categories"),
        "info": info,
        "images": [
            {"file_name": record["name"]} | {key: record[key] for key in ("id", "height", "width")}
            for record in labelled
        ],
        "annotations": [{"id": i} | each for i, each in enumerate(annotations, start=1)],
    }
