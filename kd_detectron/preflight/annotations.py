"""Will an annotation file in COCO format, and its images, train and evaluate?

What would fail deep inside Detectron2, or only at the first evaluation, hours later, is a
``ConfigError`` that names the file, the value and the fix.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from detectron2.utils.file_io import PathManager

from kd_detectron.data.coco_format import box_fault
from kd_detectron.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetSummary:
    """What a checked dataset holds; ``str()`` gives one line for the log.

    Args:
        name: the dataset's name in the config.
        images: number of images listed.
        annotations: number of usable annotations of these images.
        classes: class names in the order of the model's outputs.
    """

    name: str
    images: int
    annotations: int
    classes: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        return (
            f"{self.name}: {self.images} images, {self.annotations} annotations,"
            f" {len(self.classes)} classes ({names})"
        )


def check_coco_files(
    json_file: str,
    image_dir: str,
    *,
    name: str,
    for_training: bool = True,
    for_test: bool = True,
    mask_format: str | None = None,
    num_keypoints: int | None = None,
) -> DatasetSummary:
    """Checks one COCO-format dataset: an annotation file and the folder of its images.

    Args:
        json_file, image_dir: the two paths.
        name: how error messages call the dataset, e.g. "DATASETS.TRAIN 'cells'".
        for_training: whether it must hold annotations.
        for_test: whether the annotations need what the COCO evaluation reads.
        mask_format: ``INPUT.MASK_FORMAT`` of a model that learns masks; None without masks.
        num_keypoints: how many keypoints an object of a keypoint model has; None without keypoints.

    Raises:
        ConfigError: the first thing found that would not work.
    """
    content = _read_json(name, json_file)
    if not PathManager.isdir(image_dir):
        raise ConfigError(
            f"{name}: image folder '{absolute(image_dir)}' does not exist ({datasets_root()});"
            " put the images there or correct the path"
        )
    classes = _check_categories(name, json_file, content)
    sizes = _check_images(name, json_file, image_dir, content)
    annotations = _check_annotations(
        name,
        json_file,
        content,
        sizes,
        for_training=for_training,
        for_test=for_test,
        mask_format=mask_format,
        num_keypoints=num_keypoints,
    )
    return DatasetSummary(name, len(sizes), annotations, tuple(classes.values()))


def _read_json(name: str, json_file: str) -> dict:
    if not PathManager.isfile(json_file):
        raise ConfigError(
            f"{name}: annotation file '{absolute(json_file)}' does not exist"
            f" ({datasets_root()}); put it there, or set DETECTRON2_DATASETS to the folder that"
            " holds your datasets"
        )
    try:
        with PathManager.open(json_file, "r") as file:
            content = json.load(file)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{name}: annotation file '{absolute(json_file)}' is not readable as JSON ({error});"
            " it may be cut off: fetch or write it again"
        ) from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key, []), list) for key in keys
    ):
        raise ConfigError(
            f"{name}: annotation file '{absolute(json_file)}' is not in COCO format; it must hold"
            ' {"images": [...], "annotations": [...], "categories": [...]}'
        )
    return content


def _check_categories(name: str, json_file: str, content: Mapping) -> dict[int, str]:
    """Returns class names by category id, in Detectron2's order."""
    title = f"{name}: '{absolute(json_file)}'"
    categories = content.get("categories", [])
    if not categories:
        raise ConfigError(f"{title} lists no categories; its 'categories' name the classes")
    _require(title, "categories", categories, ("id", "name"))
    _refuse_repeated(title, "categories", categories)
    return {category["id"]: category["name"] for category in sorted(categories, key=_id)}


def _check_images(
    name: str, json_file: str, image_dir: str, content: Mapping
) -> dict[int, tuple[int, int]]:
    """Returns (width, height) by image id."""
    title = f"{name}: '{absolute(json_file)}'"
    images = content.get("images", [])
    if not images:
        raise ConfigError(f"{title} lists no images; there is nothing to use it for")
    _require(title, "images", images, ("id", "file_name", "width", "height"))
    _refuse_repeated(title, "images", images)
    for image in images:
        if not all(_is_number(image[side]) and image[side] > 0 for side in ("width", "height")):
            raise ConfigError(
                f"{title}: the width and height of an image must be positive numbers of pixels, not"
                f" as in {short(image)}; correct them"
            )
    check_on_disk(name, [os.path.join(image_dir, image["file_name"]) for image in images])
    return {image["id"]: (image["width"], image["height"]) for image in images}


def check_on_disk(title: str, file_names: Iterable[str]) -> None:
    by_folder: dict[str, list[str]] = {}
    for file_name in file_names:
        folder, base = os.path.split(file_name)
        by_folder.setdefault(folder, []).append(base)
    missing, count = [], 0
    for folder, bases in by_folder.items():
        # One listing of the folder: a look at every file would take minutes on network disks.
        present = set(PathManager.ls(folder)) if PathManager.isdir(folder) else set()
        missing += [os.path.join(folder, base) for base in bases if base not in present]
        count += len(bases)
    if missing:
        which = "all" if len(missing) == count else f"{len(missing)} of"
        first = ", ".join(f"'{absolute(file_name)}'" for file_name in missing[:10])
        raise ConfigError(
            f"{title}: {which} {count} images are not on disk ({datasets_root()}):"
            f" {first}{', ...' if len(missing) > 10 else ''}; put them there, correct the image"
            " folder, or remove them from the annotation file"
        )


def _check_annotations(
    name: str,
    json_file: str,
    content: Mapping,
    sizes: Mapping[int, tuple[int, int]],
    *,
    for_training: bool,
    for_test: bool,
    mask_format: str | None,
    num_keypoints: int | None,
) -> int:
    """Returns the number of usable annotations."""
    title = f"{name}: '{absolute(json_file)}'"
    annotations = content.get("annotations", [])
    if not annotations and not for_training:
        logger.warning("%s lists no annotations, so it cannot be used to compute AP", title)
        return 0
    needed = ["id", "image_id", "category_id", "bbox"]
    if for_test:  # Read by the COCO evaluation, that is only after the training.
        needed += ["area", "iscrowd"]
        needed += ["num_keypoints"] if num_keypoints is not None else []
    _require(title, "annotations", annotations, needed)
    if "minival" not in json_file:  # Detectron2 makes the same exception for COCO 2014.
        _refuse_repeated(title, "annotations", annotations)

    categories = {category["id"] for category in content["categories"]}
    unknown = Counter(
        annotation["category_id"]
        for annotation in annotations
        if annotation["category_id"] not in categories
    )
    if unknown:
        raise ConfigError(
            f"{title} has annotations of the category ids {_some(unknown)}, which its 'categories'"
            " do not list; add these categories or remove the annotations"
        )

    faults: Counter[str] = Counter()
    usable = objects = 0
    for annotation in annotations:
        size = sizes.get(annotation["image_id"])
        if size is None:
            faults["image"] += 1
            continue
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise ConfigError(
                f"{title}: annotation {annotation['id']} has the bbox {short(box)}; it must be"
                " [x, y, width, height] in pixels"
            )
        if annotation.get("ignore", 0):
            raise ConfigError(
                f"{title}: annotation {annotation['id']} has 'ignore' set, which Detectron2 does"
                " not support; set 'iscrowd' instead or remove the annotation"
            )
        fault = box_fault(box, *size)
        if fault is not None:
            faults[fault] += 1
            continue
        usable += 1
        if annotation.get("iscrowd", 0):
            continue
        objects += 1
        if mask_format is not None:
            _check_mask(title, annotation, size, mask_format if for_training else None)
        if num_keypoints is not None:
            _check_keypoints(title, annotation, num_keypoints)
    if faults["image"]:
        logger.warning(
            "%s: %d annotations belong to no listed image and are not used", title, faults["image"]
        )
    if faults["empty"] or faults["outside"]:
        logger.warning(
            "%s: %d boxes have no area and %d lie outside their image; they are not trained on",
            title,
            faults["empty"],
            faults["outside"],
        )
    if for_training and not objects:
        raise ConfigError(
            f"{title} has no usable annotation among {len(annotations)} ({faults['image']} of"
            f" unknown images, {faults['empty']} boxes without area, {faults['outside']} outside"
            " their image, the rest crowds); nothing can be learned from it"
        )
    return usable


def _check_mask(
    title: str, annotation: Mapping, size: tuple[int, int], mask_format: str | None
) -> None:
    mask = annotation.get("segmentation")
    if not mask:
        raise ConfigError(
            f"{title}: MODEL.MASK_ON is True but annotation {annotation['id']} has no"
            " 'segmentation'; set MODEL.MASK_ON to False or add masks to all annotations"
        )
    if isinstance(mask, dict):
        if mask_format == "polygon":
            raise ConfigError(
                f"{title}: annotation {annotation['id']} has its mask in RLE but INPUT.MASK_FORMAT"
                " is 'polygon'; set INPUT.MASK_FORMAT to 'bitmask'"
            )
        if tuple(mask["size"]) != size[::-1]:
            raise ConfigError(
                f"{title}: annotation {annotation['id']} has a mask of height and width"
                f" {list(mask['size'])} on an image of {list(size[::-1])}; correct one of them"
            )


def _check_keypoints(title: str, annotation: Mapping, num_keypoints: int) -> None:
    keypoints = annotation.get("keypoints")
    if not keypoints:
        raise ConfigError(
            f"{title}: MODEL.KEYPOINT_ON is True but annotation {annotation['id']} has no"
            " 'keypoints'; set MODEL.KEYPOINT_ON to False or add keypoints to all annotations"
        )
    if not (
        isinstance(keypoints, list)
        and len(keypoints) == 3 * num_keypoints
        and all(map(_is_number, keypoints))
    ):
        raise ConfigError(
            f"{title}: annotation {annotation['id']} has the keypoints {short(keypoints)}, but"
            f" MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num_keypoints}, so that it must have"
            f" {3 * num_keypoints} numbers, x, y and visibility of each; correct one of them"
        )


def _require(title: str, part: str, entries: list, keys: Iterable[str]) -> None:
    for key in keys:
        without = [e for e in entries if not isinstance(e, dict) or key not in e]
        if without:
            raise ConfigError(
                f"{title}: {len(without)} of {len(entries)} {part} have no '{key}', the first is"
                f" {short(without[0])}; add '{key}' to all of them"
            )


def _refuse_repeated(title: str, part: str, entries: list) -> None:
    repeated = [value for value, count in Counter(map(_id, entries)).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"{title}: several {part} have the same id ({_some(repeated)}); ids must be unique, so"
            f" renumber the {part}"
        )


def _id(entry: Mapping):
    return entry["id"]


def _is_number(value) -> bool:
    return isinstance(value, (int, float))


def _some(values: Iterable, limit: int = 10) -> str:
    values = list(values)
    return ", ".join(map(str, values[:limit])) + (", ..." if len(values) > limit else "")


def short(value, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def count_classes(classes: Iterable[str]) -> str:
    classes = list(classes)
    plural = "class" if len(classes) == 1 else "classes"
    return f"{len(classes)} {plural} ({_some(classes, 5)})"


def absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def datasets_root() -> str:
    value = os.environ.get("DETECTRON2_DATASETS")
    if value is None:
        return "DETECTRON2_DATASETS is not set, so 'datasets' in the working directory is used"
    return f"DETECTRON2_DATASETS is '{value}'"
