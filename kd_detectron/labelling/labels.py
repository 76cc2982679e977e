"""Labels unlabelled images with a trained teacher, as a COCO-format file to train on.

:func:`label_images` runs a detector over a list of images and writes its detections above a score
threshold as annotations: boxes, and masks (RLE) where the detector has a mask head, each with its
score. The images are resized and ordered in channels as the teacher was trained to see them.

Until all images are done, each is one line of ``<output>.partial``, from which an interrupted run
goes on. Images that cannot be read are reported and left out.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import AugInput, AugmentationList, ResizeShortestEdge
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from omegaconf import OmegaConf
from torch import nn
from tqdm import tqdm

from kd_detectron.checkpoint import atomic_open
from kd_detectron.config import add_kd_config, get_config, merge_opts
from kd_detectron.data import register_coco_format
from kd_detectron.data.coco_format import box_fault
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling.teacher_loading import (
    find_teacher_config,
    load_teacher,
    read_lazy_config,
    teacher_config,
)

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


# ---- the teacher ----


@dataclass(frozen=True)
class Labeller:
    """A teacher and how images are prepared for it.

    Attributes:
        model: the detector, in eval mode.
        input_format: "BGR" or "RGB", the channel order of its images.
        resize: what is done to an image before the model sees it.
        datasets: names of the datasets that its config trains and tests on.
    """

    model: nn.Module
    input_format: str
    resize: AugmentationList
    datasets: tuple[str, ...]


def teacher_cfg_from(
    *,
    config_file: str = "",
    teacher: str = "",
    weights: str = "",
    opts: Sequence[str] = (),
) -> CfgNode:
    """A config whose ``KD.TEACHER`` names the teacher that labels, on the GPU if there is one.

    Args:
        config_file: a config with ``KD.TEACHER``, or "".
        teacher, weights: ``KD.TEACHER.CONFIG_FILE`` and ``KD.TEACHER.WEIGHTS``, where they are
            not those of ``config_file``.
        opts: KEY VALUE overrides of ``config_file``.
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


def load_labeller(cfg: CfgNode) -> Labeller:
    """Builds and loads the detector that ``cfg.KD.TEACHER`` names.

    Raises:
        ConfigError: it is not found, unreadable, does not fit its config, or detects no objects.
    """
    path = find_teacher_config(cfg.KD.TEACHER.CONFIG_FILE)
    if path.endswith(".py"):
        lazy_cfg = read_lazy_config(path, list(cfg.KD.TEACHER.OPTS))
        resize = OmegaConf.select(lazy_cfg, "dataloader.test.mapper.augmentations")
        resize = [ResizeShortestEdge(800, 1333)] if resize is None else instantiate(resize)
        names = [
            OmegaConf.select(lazy_cfg, f"dataloader.{part}.dataset.names")
            for part in ("train", "test")
        ]
    else:
        own = teacher_config(cfg)
        register_coco_format(own)
        resize = [ResizeShortestEdge(own.INPUT.MIN_SIZE_TEST, own.INPUT.MAX_SIZE_TEST)]
        names = [own.DATASETS.TRAIN, own.DATASETS.TEST]
    datasets = [[each] if isinstance(each, str) else each or () for each in names]
    model, input_format = load_teacher(cfg)
    if class_count(model) is None:
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE '{cfg.KD.TEACHER.CONFIG_FILE}' is a {type(model).__name__}, "
            "which detects no objects of known classes; name an R-CNN or a RetinaNet"
        )
    return Labeller(
        model.eval(), input_format, AugmentationList(resize), tuple(chain.from_iterable(datasets))
    )


def class_count(model: nn.Module) -> int | None:
    """Number of foreground classes of a detector; None where it does not say."""
    return getattr(getattr(model, "roi_heads", model), "num_classes", None)


# ---- what to label, and as what ----


def read_coco(path: str, option: str) -> dict:
    """Reads a COCO-format file; ``option`` is the command's option that names it, for errors."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        named = all(isinstance(image["file_name"], str) for image in content["images"])
        named &= all("id" in entry and "name" in entry for entry in content["categories"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{option} '{path}' is not a COCO-format annotation file: {error!r}"
        ) from error
    if not named:
        raise ConfigError(f"{option} '{path}' has images or categories without a name")
    return content


def find_images(folder: str, *, listed_in: str = "", labelled_in: Sequence[str] = ()) -> list[dict]:
    """The images to label, each with "id", "file_name" (below the folder) and "path".

    Args:
        folder: it and the folders below it are searched for images.
        listed_in: a COCO-format file; only the images that it lists, with its ids.
        labelled_in: COCO-format files whose images are left out.

    Raises:
        ConfigError: no image is left, or a file cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"--images '{folder}' is not a folder")
    if listed_in:
        images = read_coco(listed_in, "--images-from")["images"]
        found = [(image["id"], image["file_name"]) for image in images]
    else:
        paths = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
        found = list(enumerate(names, start=1))
    if not found:
        raise ConfigError(
            f"--images '{folder}' has no image ({', '.join(IMAGE_SUFFIXES)}); name the folder that "
            "holds them"
        )
    known = {name for _, name in found}
    for path in labelled_in:
        labelled = {image["file_name"] for image in read_coco(path, "--skip-labelled")["images"]}
        if not labelled & known:
            raise ConfigError(
                f"--skip-labelled '{path}' lists no image of '{folder}', so that nothing would be "
                "left out: its file names must be relative to that folder"
            )
        found = [(number, name) for number, name in found if name not in labelled]
    if not found:
        raise ConfigError(
            f"all {len(known)} images of --images '{folder}' are listed by --skip-labelled: there "
            "is nothing to label"
        )
    return [
        {"id": number, "file_name": name, "path": os.path.join(folder, name)}
        for number, name in found
    ]


def categories_of(labeller: Labeller, annotation_file: str = "") -> list[dict]:
    """The teacher's classes in the order of its outputs, as COCO's "id" and "name".

    Args:
        annotation_file: take them from this COCO-format file; by default from the datasets of the
            teacher's config.

    Raises:
        ConfigError: there are none, or not as many as the teacher has.
    """
    if annotation_file:
        source = f"--categories '{annotation_file}'"
        categories = _sorted_categories(read_coco(annotation_file, "--categories"))
    else:
        source, categories = _known_categories(labeller.datasets)
    count = class_count(labeller.model)
    if len(categories) != count:
        raise ConfigError(
            f"{source} has {len(categories)} categories but the teacher has {count} classes; give "
            "--categories with the annotation file that the teacher was trained on"
        )
    return categories


def _known_categories(datasets: Iterable[str]) -> tuple[str, list[dict]]:
    for name in datasets:
        metadata = MetadataCatalog.get(name)
        if "thing_classes" in metadata.as_dict():
            ids = metadata.as_dict().get("thing_dataset_id_to_contiguous_id")
            ids = sorted(ids, key=ids.get) if ids else range(1, len(metadata.thing_classes) + 1)
            pairs = zip(ids, metadata.thing_classes, strict=True)
            return f"dataset '{name}'", [{"id": number, "name": each} for number, each in pairs]
        if os.path.isfile(metadata.as_dict().get("json_file", "")):
            content = read_coco(metadata.json_file, f"dataset '{name}'")
            return f"dataset '{name}'", _sorted_categories(content)
    raise ConfigError(
        f"the names of the teacher's classes are not known (its config's datasets are "
        f"{list(datasets)}); give --categories with the annotation file that it was trained on"
    )


def _sorted_categories(content: dict) -> list[dict]:
    """By id, the order in which Detectron2 numbers classes."""
    categories = sorted(content["categories"], key=lambda entry: entry["id"])
    return [{"id": entry["id"], "name": entry["name"]} for entry in categories]


def parse_thresholds(values: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The score threshold of each class.

    Args:
        values: "0.5" for all classes, "NAME=0.7" for one class, or both.
        names: the classes.

    Raises:
        ConfigError: a class is unknown or left without a threshold, or a value is not in [0, 1].
    """
    for_all: float | None = None
    own: dict[str, float] = {}
    for value in values:
        name, has_name, number = value.rpartition("=")
        try:
            threshold = float(number)
        except ValueError:
            threshold = -1.0
        if not 0 <= threshold <= 1:
            raise ConfigError(
                f"--score-threshold has '{value}'; give a number from 0 to 1, or CLASS=NUMBER"
            )
        if not has_name:
            for_all = threshold
        elif name in names:
            own[name] = threshold
        else:
            raise ConfigError(
                f"--score-threshold names the class '{name}', which the teacher lacks"
                f"{did_you_mean(name, names)}"
            )
    missing = [name for name in names if name not in own]
    if for_all is None and missing:
        raise ConfigError(
            f"--score-threshold gives no threshold for {', '.join(missing)}; add one number for "
            "all other classes"
        )
    return {name: own.get(name, for_all) for name in names}


# ---- labelling ----


def label_images(
    labeller: Labeller,
    images: Sequence[dict],
    output: str,
    *,
    categories: Sequence[dict],
    thresholds: dict[str, float],
    source: str = "",
    batch_size: int = 4,
    workers: int = 2,
    progress: bool = True,
) -> dict:
    """Labels images and writes them as a COCO-format file.

    Args:
        labeller: the teacher.
        images: as :func:`find_images` returns them.
        output: the file to write; ``<output>.partial`` beside it until it is complete.
        categories: as :func:`categories_of` returns them.
        thresholds: lowest score of a label, by class name.
        source: names the teacher, for the file's "info" and to recognise an interrupted run.
        batch_size: images that the teacher sees at once.
        workers: processes that read images; 0 reads in this one.
        progress: show a progress bar.

    Returns:
        Counts: "images" labelled, "empty" of them, "annotations", "skipped" unreadable images, and
        the annotations of each class by its name under "classes".

    Raises:
        ConfigError: the output exists, the partial file is of other settings, no image can be
            read, or the batch size is not positive.
    """
    if os.path.exists(output):
        raise ConfigError(f"--output '{output}' exists already: name another file or remove it")
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; give 1 or more")
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    # The model's own threshold may be higher; a lower one only costs time.
    for module in labeller.model.modules():
        if hasattr(module, "test_score_thresh"):
            module.test_score_thresh = min(thresholds.values())
    partial = f"{output}.partial"
    settings = {
        "teacher": source,
        "score_threshold": thresholds,
        "categories": list(categories),
        "resize": str(labeller.resize),
    }
    done = _read_partial(partial, settings)
    rest = [image for image in images if image["file_name"] not in done]
    if done:
        logger.info("%s: going on after %d images", partial, len(done))
    with open(partial, "a", encoding="utf-8") as file:
        if not done and file.tell() == 0:
            _write_line(file, settings)
        loader = build_detection_test_loader(
            rest,
            mapper=_Reader(labeller.input_format, labeller.resize),
            batch_size=batch_size,
            num_workers=workers,
        )
        bar = tqdm(total=len(images), initial=len(done), unit="image", disable=not progress)
        with bar:
            for batch in loader if rest else ():
                for record in _label_batch(labeller.model, batch, categories, thresholds):
                    done[record["file_name"]] = record
                    _write_line(file, record)
                    if "skipped" in record:
                        name, reason = record["file_name"], record["skipped"]
                        bar.write(f"skipped '{name}': it cannot be read ({reason})")
                bar.update(len(batch))
    records = [done[image["file_name"]] for image in images]
    counts = _write_coco(records, output, settings)
    os.remove(partial)
    return counts


class _Reader:
    """Reads and resizes an image; for one that cannot be read it returns the reason."""

    def __init__(self, input_format: str, resize: AugmentationList):
        self._input_format = input_format
        self._resize = resize

    def __call__(self, image: dict) -> dict:
        record = {"id": image["id"], "file_name": image["file_name"]}
        try:
            pixels = read_image(image["path"], format=self._input_format)
        except Exception as error:  # Any error of any decoder.
            return record | {"skipped": f"{type(error).__name__}: {error}"}
        record |= {"height": pixels.shape[0], "width": pixels.shape[1]}
        resized = AugInput(pixels)
        self._resize(resized)
        return record | {
            "image": torch.as_tensor(resized.image.astype("float32").transpose(2, 0, 1))
        }


def _label_batch(
    model: nn.Module, batch: list[dict], categories: Sequence[dict], thresholds: dict[str, float]
) -> list[dict]:
    """Records of a batch: the image's entry and its annotations, without ids."""
    readable = [record for record in batch if "image" in record]
    with torch.no_grad():
        outputs = model(readable) if readable else []
    lowest = torch.tensor([thresholds[category["name"]] for category in categories])
    for record, output in zip(readable, outputs, strict=True):
        found = output["instances"].to("cpu")
        found = found[found.scores >= lowest[found.pred_classes]]
        record["annotations"] = [
            _annotation(detection, categories)
            for detection in instances_to_coco_json(found, record["id"])
            if box_fault(detection["bbox"], record["width"], record["height"]) is None
        ]
        del record["image"]
    for record in readable:
        # Masks without a pixel cannot be trained on.
        record["annotations"] = [each for each in record["annotations"] if each["area"] > 0]
    return batch


def _annotation(detection: dict, categories: Sequence[dict]) -> dict:
    mask = detection.get("segmentation")
    width, height = detection["bbox"][2:]
    annotation = {
        "image_id": detection["image_id"],
        "category_id": categories[detection["category_id"]]["id"],
        "bbox": [round(value, 2) for value in detection["bbox"]],
        "area": float(mask_util.area(mask)) if mask else round(width * height, 2),
        "iscrowd": 0,
        "score": round(detection["score"], 4),
    }
    return annotation | ({"segmentation": mask} if mask else {})


def _write_line(file, content: dict) -> None:
    file.write(json.dumps(content) + "\n")
    file.flush()


def _read_partial(path: str, settings: dict) -> dict[str, dict]:
    """Records of an interrupted run by file name; cuts off a line that was not finished."""
    if not os.path.exists(path):
        return {}
    content = Path(path).read_bytes()
    content = content[: content.rfind(b"\n") + 1]
    os.truncate(path, len(content))
    lines = [json.loads(line) for line in content.splitlines()]
    if not lines:
        return {}
    # As JSON gives them back.
    if lines[0] != json.loads(json.dumps(settings)):
        raise ConfigError(
            f"'{path}' was begun by another teacher, or with other thresholds or categories: "
            "remove it, or name another --output"
        )
    return {record["file_name"]: record for record in lines[1:]}


def _write_coco(records: list[dict], output: str, settings: dict) -> dict:
    labelled = [record for record in records if "skipped" not in record]
    if not labelled:
        raise ConfigError(
            f"none of the {len(records)} images can be read, the first is "
            f"'{records[0]['file_name']}' ({records[0]['skipped']}); check --images"
        )
    fields = ("id", "file_name", "height", "width")
    annotations = [each for record in labelled for each in record["annotations"]]
    content = {
        "info": {
            "description": "labelled by a detector, not by people",
            "teacher": settings["teacher"],
            "score_threshold": settings["score_threshold"],
        },
        "images": [{field: record[field] for field in fields} for record in labelled],
        "annotations": [{"id": i} | each for i, each in enumerate(annotations, start=1)],
        "categories": settings["categories"],
    }
    with atomic_open(output, "w") as file:
        json.dump(content, file)
    return {
        "images": len(labelled),
        "empty": sum(not record["annotations"] for record in labelled),
        "annotations": len(annotations),
        "skipped": len(records) - len(labelled),
        "classes": {
            category["name"]: sum(each["category_id"] == category["id"] for each in annotations)
            for category in settings["categories"]
        },
    }
