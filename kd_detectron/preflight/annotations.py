"""Checks an annotation file in COCO format and its images before they are used.

What would fail inside Detectron2, or only at the first evaluation, is a ``ConfigError`` that names
the file, the value and the fix. The checks read the file, a listing of each image folder, and the
headers of image files: of all in a test set, of at most 5000 in a training set.
"""

import logging
import os
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from detectron2.utils.file_io import PathManager
from PIL import Image

from kd_detectron.data.coco_format import absolute, is_usable_box, read_coco
from kd_detectron.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_TRAIN_HEADERS = 5000
_EXIF_ORIENTATION = 0x0112

# A key of an entry, a test of its value, and what the test asks for in words.
Rule = tuple[str, Callable[[object], bool], str]


@dataclass(frozen=True)
class DatasetSummary:
    """What a checked dataset holds; ``str()`` gives one line for the log."""

    name: str
    images: int  # those listed
    annotations: int  # the usable ones of these images
    classes: tuple[str, ...]  # in the order of the model's outputs

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.images} images, {self.annotations} annotations,"
            f" {count_classes(self.classes)}"
        )


def check_coco_files(
    json_file: str,
    image_dir: str,
    *,
    name: str,
    key: str = "",
    for_training: bool = True,
    for_test: bool = True,
    mask_format: str | None = None,
    num_keypoints: int | None = None,
    max_corrupt_images: int = 0,
) -> DatasetSummary:
    """Checks one COCO-format dataset: an annotation file and the folder of its images.

    Args:
        name, key: the dataset's name and the config key that gives it, for messages.
        for_training: whether it must hold annotations.
        for_test: whether the annotations need what the COCO evaluation reads.
        mask_format: ``INPUT.MASK_FORMAT`` of a model that learns masks; None without masks.
        num_keypoints: how many keypoints an object of a keypoint model has; None without keypoints.
        max_corrupt_images: how many images of another size than annotated the training may skip.
    """
    name_in_messages = f"{key} '{name}'" if key else name
    title = f"{name_in_messages}: '{absolute(json_file)}'"
    for what, path in (("annotation file", json_file), ("image folder", image_dir)):
        if not exists(path):
            raise ConfigError(
                f"{name_in_messages}: {what} '{absolute(path)}' does not exist"
                f" ({datasets_root()}); put it there, correct the path, or set DETECTRON2_DATASETS"
                " to the folder that holds your datasets"
            )
    content = read_coco(json_file, f"{name_in_messages}: annotation file")
    images, annotations = content["images"], content["annotations"]
    for part, rules in (("categories", CATEGORY_RULES), ("images", IMAGE_RULES)):
        if not content[part]:
            raise ConfigError(f"{title} lists no {part}, without which it cannot be used")
        _check_entries(title, part, content[part], rules)
    rules = ANNOTATION_RULES + (TEST_RULES if for_test else [])
    if for_test and num_keypoints is not None:
        rules = [*rules, ("num_keypoints", _number, "how many keypoints are labelled")]
    # Detectron2 makes the same exception for COCO 2014.
    _check_entries(title, "annotations", annotations, rules, unique="minival" not in json_file)
    ids = [image["id"] for image in images] + [entry["image_id"] for entry in annotations]
    if len({isinstance(image_id, str) for image_id in ids}) > 1:
        raise ConfigError(
            f"{title} mixes numbers and text as image ids; use one type for all of them, also in"
            " 'image_id' of the annotations"
        )
    files = [os.path.join(image_dir, image["file_name"]) for image in images]
    check_on_disk(name_in_messages, files)
    usable = _usable(title, content)
    objects = [annotation for annotation in usable if not annotation.get("iscrowd", 0)]
    if for_training and not objects:
        raise ConfigError(
            f"{title} has no usable annotation among {len(annotations)}: all of them are crowds,"
            " have no area, lie outside their image, or are of unknown images; nothing can be"
            " learned from it"
        )
    if not annotations:
        logger.warning("%s lists no annotations, so it cannot be used to compute AP", title)
    rules = _model_rules(mask_format, num_keypoints, for_training=for_training)
    _check_entries(title, "annotations", objects, rules, unique=False)
    if mask_format is not None:
        _check_rle_sizes(title, usable, images)
    step = 1 if for_test else -(-len(files) // MAX_TRAIN_HEADERS)
    allowed = 0 if for_test else max_corrupt_images
    _check_image_sizes(title, images[::step], files[::step], for_test=for_test, allowed=allowed)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return DatasetSummary(name, len(images), len(usable), tuple(c["name"] for c in categories))


def exists(path: str) -> bool:
    """Whether a path exists; True for a URL, of which only opening it tells."""
    try:
        return PathManager.exists(path)
    except NotImplementedError:
        return True


def check_on_disk(title: str, file_names: Iterable[str]) -> None:
    """Refuses images that are missing, by one listing of each folder.

    Looking at each file would take minutes on network disks. Folders behind a URL have no listing.
    """
    file_names, present, unlisted = list(file_names), set(), set()
    for folder in {os.path.dirname(file_name) for file_name in file_names}:
        here = folder or os.curdir
        try:
            if PathManager.isdir(here):
                present.update(_plain(os.path.join(folder, x)) for x in PathManager.ls(here))
        except NotImplementedError:
            unlisted.add(folder)
    absent = [name for name in file_names if _plain(name) not in present]
    missing = [absolute(name) for name in absent if os.path.dirname(name) not in unlisted]
    if missing:
        raise ConfigError(
            f"{title}: {len(missing)} of {len(file_names)} images are not on disk"
            f" ({datasets_root()}):"
            f" {some(map(repr, missing))}; put them there, correct the image folder, or remove"
            " them from the annotation file"
        )


def _plain(path: str) -> str:
    """A path without doubled slashes and the like; a URL as it is."""
    return path if "://" in path else os.path.normpath(path)


def _usable(title: str, content: Mapping[str, list]) -> list[dict]:
    """Returns the annotations that are trained on or evaluated; logs how many are not."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    listed = {category["id"] for category in content["categories"]}
    unknown = {annotation["category_id"] for annotation in content["annotations"]} - listed
    if unknown:
        raise ConfigError(
            f"{title} has annotations of the category ids {some(unknown)}, which its 'categories'"
            " do not list; add these categories or remove the annotations"
        )
    usable = [
        x
        for x in content["annotations"]
        if x["image_id"] in sizes and is_usable_box(x["bbox"], *sizes[x["image_id"]])
    ]
    boxes = [(*x["bbox"], *sizes[x["image_id"]]) for x in usable]
    past_the_edge = sum(
        x + w > width + 1 or y + h > height + 1 for x, y, w, h, width, height in boxes
    )
    if past_the_edge > len(usable) / 2 and all(w > x and h > y for x, y, w, h, _, _ in boxes):
        raise ConfigError(
            f"{title}: {past_the_edge} of {len(usable)} boxes reach past their image, and all would"
            " fit as [x0, y0, x1, y1]; write 'bbox' as [x, y, width, height]"
        )
    unused = len(content["annotations"]) - len(usable)
    if unused:
        logger.warning(
            "%s: %d annotations are not used: they belong to no listed image, have no area or lie"
            " outside their image",
            *(title, unused),
        )
    return usable


def _model_rules(
    mask_format: str | None, num_keypoints: int | None, *, for_training: bool
) -> list[Rule]:
    """What a mask or keypoint model needs of each object."""
    rules = []
    if mask_format is not None:
        kinds = list if mask_format == "polygon" and for_training else (list, dict)
        words = (
            "polygons, or RLE with INPUT.MASK_FORMAT 'bitmask', as MODEL.MASK_ON is True and"
            f" INPUT.MASK_FORMAT is '{mask_format}'"
        )
        rules.append(("segmentation", lambda mask: mask and isinstance(mask, kinds), words))
    if num_keypoints is not None:
        count = 3 * num_keypoints
        words = (
            f"{count} numbers, x, y and visibility of each, as MODEL.KEYPOINT_ON is True and"
            f" MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num_keypoints}"
        )
        rules.append(("keypoints", lambda x: isinstance(x, list) and len(x) == count, words))
    return rules


def _check_rle_sizes(title: str, annotations: list, images: list) -> None:
    """Refuses masks in RLE that are not of their image's size."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in images}
    for entry in annotations:
        mask, size = entry.get("segmentation"), sizes[entry["image_id"]]
        if isinstance(mask, dict) and mask["size"] != size:
            raise ConfigError(
                f"{title}: the RLE mask of annotation {entry['id']} has the size {mask['size']} on"
                f" an image of height and width {size}; write the mask in the size of its image"
            )


def _check_image_sizes(
    title: str, images: list, files: Sequence[str], *, for_test: bool, allowed: int
) -> None:
    """Refuses more than ``allowed`` images that are not of the annotated size.

    In a test set unreadable images too, since the evaluation would find them only hours later.
    """
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(image_size, files))
    annotated = [(image["width"], image["height"]) for image in images]
    wrong = [i for i, size in enumerate(sizes) if size != annotated[i] and (size or for_test)]
    if len(wrong) > allowed:
        first = wrong[0]
        swapped = all(sizes[i] == annotated[i][::-1] for i in wrong)
        raise ConfigError(
            f"{title}: {len(wrong)} of {len(files)} images cannot be read or are not of the"
            f" annotated size, the first '{absolute(files[first])}': the annotation file says"
            f" (width, height) {annotated[first]}, the image has"
            f" {sizes[first] or 'no readable header'}; {'swap' if swapped else 'correct'} 'width'"
            " and 'height' in the annotation file, or fetch the images again"
        )


def image_size(path: str) -> tuple[int, int] | None:
    """Width and height in which Detectron2 reads an image, by its header; None if unreadable."""
    try:
        with Image.open(PathManager.get_local_path(path)) as image:
            turned = "exif" in image.info and image.getexif().get(_EXIF_ORIENTATION, 1) > 4
            return image.size[::-1] if turned else image.size
    except (OSError, ValueError, SyntaxError):
        return None


def _check_entries(
    title: str, part: str, entries: list, rules: Iterable[Rule], *, unique: bool = True
) -> None:
    """Refuses entries of an annotation file that break a rule, or several of the same id."""
    for key, fits, expected in rules:
        wrong = [x for x in entries if not (isinstance(x, dict) and fits(x.get(key)))]
        if wrong:
            first = wrong[0] if isinstance(wrong[0], dict) else {}
            value = first.get(key)
            found = f"no '{key}'" if value is None else f"the {key} {reprlib.repr(value)}"
            raise ConfigError(
                f"{title}: {len(wrong)} of {len(entries)} {part} have no valid '{key}', the first"
                f" (id {first.get('id')}) has {found}; it must be {expected}"
            )
    repeated = [key for key, count in Counter(x["id"] for x in entries).items() if count > 1]
    if repeated and unique:
        raise ConfigError(
            f"{title}: several {part} have the same id ({some(repeated)}); ids must be unique, so"
            f" renumber the {part}"
        )


def _is_mask(value) -> bool:
    """Whether Detectron2 can read it, which it does for models without masks too."""
    if isinstance(value, dict):
        return isinstance(value.get("size"), list) and isinstance(value.get("counts"), (str, list))
    return not value or (isinstance(value, list) and all(isinstance(x, list) for x in value))


def _number(value) -> bool:
    return isinstance(value, (int, float))


def _text(value) -> bool:
    return isinstance(value, str) and value.strip() != ""


IMAGE_ID = (lambda value: isinstance(value, (int, float, str)), "a whole number or text")
PIXELS = (lambda value: _number(value) and value > 0, "a positive number of pixels")
CATEGORY_RULES = [("id", _number, "a whole number"), ("name", _text, "text, not empty")]
IMAGE_RULES = [
    ("id", *IMAGE_ID),
    ("file_name", _text, "text, not empty"),
    ("width", *PIXELS),
    ("height", *PIXELS),
]
ANNOTATION_RULES = [
    ("id", _number, "a whole number"),
    ("image_id", *IMAGE_ID),
    ("category_id", _number, "a whole number"),
    (
        "bbox",
        lambda value: isinstance(value, list) and len(value) == 4 and all(map(_number, value)),
        "[x, y, width, height] in pixels",
    ),
    ("segmentation", _is_mask, "polygons [[x1, y1, ...], ...] or RLE with 'size' and 'counts'"),
]
# What the COCO evaluation reads, that is only after the training.
TEST_RULES = [
    ("id", bool, "a number from 1, as COCO's evaluation takes id 0 for an object not found"),
    ("area", _number, "a number of pixels"),
    ("iscrowd", lambda value: value in (0, 1), "0 or 1"),
]


def some(values: Iterable, limit: int = 10) -> str:
    """The first values, comma-separated."""
    values = list(values)
    return ", ".join(map(str, values[:limit])) + (", ..." if len(values) > limit else "")


def count_classes(classes: Sequence[str]) -> str:
    """Such as "2 classes (cat, dog)"."""
    return f"{len(classes)} classes ({some(classes)})"


def datasets_root() -> str:
    """What ``DETECTRON2_DATASETS`` says, for messages about missing files."""
    value = os.environ.get("DETECTRON2_DATASETS")
    return f"DETECTRON2_DATASETS is {'not set' if value is None else repr(value)}"
