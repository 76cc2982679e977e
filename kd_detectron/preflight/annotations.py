"""Checks an annotation file in COCO format and its images before they are used.

What would fail inside Detectron2, or only at the first evaluation, is a ``ConfigError`` that names
the file, the value and the fix. The checks read the file, a listing of each image folder, and the
headers of image files: of all in a test set, of at most 5000 in a training set.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from detectron2.utils.file_io import PathManager
from PIL import Image

from kd_detectron.data.coco_format import box_fault
from kd_detectron.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_TRAIN_HEADERS = 5000
_EXIF_ORIENTATION = 0x0112

# A key of an entry, a test of its value, and what the test asks for in words.
Rule = tuple[str, Callable[[object], bool], str]


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
        return (
            f"{self.name}: {self.images} images, {self.annotations} annotations,"
            f" {len(self.classes)} classes ({some(self.classes)})"
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
    max_corrupt_images: int = 0,
) -> DatasetSummary:
    """Checks one COCO-format dataset: an annotation file and the folder of its images.

    Args:
        json_file, image_dir: the two paths.
        name: how error messages call the dataset, e.g. "DATASETS.TRAIN 'cells'".
        for_training: whether it must hold annotations.
        for_test: whether the annotations need what the COCO evaluation reads.
        mask_format: ``INPUT.MASK_FORMAT`` of a model that learns masks; None without masks.
        num_keypoints: how many keypoints an object of a keypoint model has; None without keypoints.
        max_corrupt_images: how many images of another size than annotated the training may skip.
    """
    content = _read_json(name, json_file)
    title = f"{name}: '{absolute(json_file)}'"
    if not PathManager.isdir(image_dir):
        raise ConfigError(
            f"{name}: image folder '{absolute(image_dir)}' does not exist ({datasets_root()});"
            " put the images there or correct the path"
        )
    images, annotations = content["images"], content["annotations"]
    for part, use in (("categories", "the classes"), ("images", "what there is to use")):
        if not content[part]:
            raise ConfigError(f"{title} lists no {part}; its '{part}' name {use}")
    rules = ANNOTATION_RULES + (TEST_RULES if for_test else [])
    if for_test and num_keypoints is not None:
        rules = [*rules, ("num_keypoints", _is_whole, "how many keypoints are labelled")]
    _check_entries(title, "categories", content["categories"], CATEGORY_RULES, unique=True)
    _check_entries(title, "images", images, IMAGE_RULES, unique=True)
    # Detectron2 makes the same exception for COCO 2014.
    _check_entries(title, "annotations", annotations, rules, unique="minival" not in json_file)
    ids = [image["id"] for image in images] + [a["image_id"] for a in annotations]
    if len({isinstance(image_id, str) for image_id in ids}) > 1:
        raise ConfigError(
            f"{title} has image ids that are numbers and others that are text; write all alike,"
            " those of 'image_id' in the annotations too"
        )
    files = [os.path.join(image_dir, image["file_name"]) for image in images]
    check_on_disk(name, files)
    usable = _usable(title, content)
    objects = [annotation for annotation in usable if not annotation.get("iscrowd", 0)]
    if for_training and not objects:
        raise ConfigError(
            f"{title} has no usable annotation among {len(annotations)}: the others are crowds,"
            " boxes without area or outside their image, or of unknown images; nothing can be"
            " learned from it"
        )
    if not annotations:
        logger.warning("%s lists no annotations, so it cannot be used to compute AP", title)
    if mask_format is not None:
        _check_masks(title, objects, images, mask_format if for_training else "bitmask")
    if num_keypoints is not None:
        _check_keypoints(title, objects, num_keypoints)
    if for_test:
        _check_image_sizes(title, images, files)
    elif for_training:
        step = -(-len(files) // MAX_TRAIN_HEADERS)
        _check_image_sizes(title, images[::step], files[::step], allowed=max_corrupt_images)
    categories = sorted(content["categories"], key=_id)
    return DatasetSummary(name, len(images), len(usable), tuple(c["name"] for c in categories))


def check_on_disk(title: str, file_names: Iterable[str]) -> None:
    """Refuses images that are missing, by one listing of each folder.

    Looking at each file would take minutes on network disks.
    """
    file_names, present = list(file_names), set()
    for folder in {os.path.dirname(file_name) for file_name in file_names}:
        if PathManager.isdir(folder):
            present.update(os.path.join(folder, base) for base in PathManager.ls(folder))
    missing = [file_name for file_name in file_names if file_name not in present]
    if missing:
        which = "all" if len(missing) == len(file_names) else f"{len(missing)} of"
        raise ConfigError(
            f"{title}: {which} {len(file_names)} images are not on disk ({datasets_root()}):"
            f" {some([repr(absolute(file_name)) for file_name in missing])}; put them there,"
            " correct the image folder, or remove them from the annotation file"
        )


def _read_json(name: str, json_file: str) -> dict[str, list]:
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
    parts = ("images", "annotations", "categories")
    content = {part: content.get(part, []) for part in parts} if isinstance(content, dict) else {}
    if not content or not all(isinstance(part, list) for part in content.values()):
        raise ConfigError(
            f"{name}: annotation file '{absolute(json_file)}' is not in COCO format; it must hold"
            ' {"images": [...], "annotations": [...], "categories": [...]}'
        )
    return content


def _usable(title: str, content: Mapping[str, list]) -> list[dict]:
    """Returns the annotations that are trained on or evaluated; logs how many are not."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    faults: Counter[str | None] = Counter()
    unknown: Counter[int] = Counter()
    usable, past_the_edge, perhaps_corners = [], 0, True
    for annotation in content["annotations"]:
        if annotation["category_id"] not in categories:
            unknown[annotation["category_id"]] += 1
        size = sizes.get(annotation["image_id"])
        x, y, w, h = annotation["bbox"]
        fault = "of no image" if size is None else box_fault((x, y, w, h), *size)
        faults[fault] += 1
        if fault is None:
            usable.append(annotation)
            past_the_edge += x + w > size[0] + 1 or y + h > size[1] + 1
            perhaps_corners = perhaps_corners and w > x and h > y
    if unknown:
        raise ConfigError(
            f"{title} has annotations of the category ids {some(unknown)}, which its 'categories'"
            " do not list; add these categories or remove the annotations"
        )
    if perhaps_corners and past_the_edge > len(usable) / 2:
        raise ConfigError(
            f"{title}: {past_the_edge} of {len(usable)} boxes reach past their image, and all would"
            " fit as [x0, y0, x1, y1]; write 'bbox' as [x, y, width, height]"
        )
    if faults["of no image"]:
        logger.warning(
            "%s: %d annotations belong to no listed image and are not used",
            *(title, faults["of no image"]),
        )
    if faults["empty"] or faults["outside"]:
        logger.warning(
            "%s: %d boxes have no area and %d lie outside their image; they are not trained on",
            *(title, faults["empty"], faults["outside"]),
        )
    return usable


def _check_masks(title: str, objects: list, images: list, mask_format: str) -> None:
    title = f"{title}: MODEL.MASK_ON is True"
    _check_entries(title, "annotations", objects, [("segmentation", bool, "polygons or RLE")])
    sizes = {image["id"]: [image["height"], image["width"]] for image in images}
    for annotation in objects:
        mask, size = annotation["segmentation"], sizes[annotation["image_id"]]
        if isinstance(mask, dict) and mask_format == "polygon":
            raise ConfigError(
                f"{title} and annotation {annotation['id']} has its mask in RLE but"
                " INPUT.MASK_FORMAT is 'polygon'; set INPUT.MASK_FORMAT to 'bitmask'"
            )
        if isinstance(mask, dict) and ("counts" not in mask or mask.get("size") != size):
            raise ConfigError(
                f"{title} and the RLE mask of annotation {annotation['id']} has no counts, or its"
                f" size is {mask.get('size')} on an image of height and width {size}; correct it"
            )


def _check_keypoints(title: str, objects: list, num_keypoints: int) -> None:
    def fits(value) -> bool:
        return isinstance(value, list) and len(value) == 3 * num_keypoints

    expected = (
        f"{3 * num_keypoints} numbers, x, y and visibility of each, as"
        f" MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num_keypoints}"
    )
    title = f"{title}: MODEL.KEYPOINT_ON is True"
    _check_entries(title, "annotations", objects, [("keypoints", fits, expected)])


def _check_image_sizes(
    title: str, images: list, files: Sequence[str], *, allowed: int | None = None
) -> None:
    """Refuses more than ``allowed`` images that are not of the annotated size.

    None is for a test set: there, an unreadable image is an error too, since the evaluation would
    find it only hours later.
    """
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(image_size, files))
    unreadable = [file for file, size in zip(files, sizes, strict=True) if size is None]
    if unreadable and allowed is None:
        raise ConfigError(
            f"{title}: {len(unreadable)} of {len(files)} images cannot be read, the first"
            f" '{absolute(unreadable[0])}'; fetch them again, or remove them from the annotation"
            " file"
        )
    annotated = [(image["width"], image["height"]) for image in images]
    wrong = [i for i, size in enumerate(sizes) if size not in (None, annotated[i])]
    if len(wrong) > (allowed or 0):
        first = wrong[0]
        swapped = all(sizes[i] == annotated[i][::-1] for i in wrong)
        raise ConfigError(
            f"{title}: {len(wrong)} of {len(files)} images are not of the annotated size, the first"
            f" '{absolute(files[first])}': annotated are width and height {list(annotated[first])},"
            f" the file has {list(sizes[first])}; {'exchange' if swapped else 'correct'} 'width'"
            " and 'height' in the annotation file"
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
    title: str, part: str, entries: list, rules: Iterable[Rule], *, unique: bool = False
) -> None:
    """Refuses entries of an annotation file that break a rule, or several of the same id."""
    for key, fits, expected in rules:
        wrong = [x for x in entries if not (isinstance(x, dict) and fits(x.get(key)))]
        if wrong:
            first = wrong[0] if isinstance(wrong[0], dict) else {}
            which = f"id {first['id']}" if "id" in first else short(wrong[0])
            value = first.get(key)
            found = f"no '{key}'" if value is None else f"the {key} {short(value)}"
            raise ConfigError(
                f"{title}: {len(wrong)} of {len(entries)} {part} have no valid '{key}', the first"
                f" ({which}) has {found}; it must be {expected}"
            )
    repeated = [value for value, count in Counter(map(_id, entries)).items() if count > 1]
    if repeated and unique:
        raise ConfigError(
            f"{title}: several {part} have the same id ({some(repeated)}); ids must be unique, so"
            f" renumber the {part}"
        )


def _id(entry: Mapping):
    return entry["id"]


def _is_number(value) -> bool:
    return isinstance(value, (int, float))


def _is_positive(value) -> bool:
    return _is_number(value) and value > 0


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_whole(value) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _is_box(value) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_mask(value) -> bool:
    """Whether Detectron2 can read it: nothing, polygons or RLE; of a polygon, the first number."""
    if not value:
        return True
    if isinstance(value, dict):
        counts = value.get("counts")
        return isinstance(counts, str) or (isinstance(counts, list) and "size" in value)
    return isinstance(value, list) and all(
        isinstance(polygon, list) and all(map(_is_number, polygon[:1])) for polygon in value
    )


IMAGE_ID = (lambda value: _is_whole(value) or isinstance(value, str), "a whole number or text")
CATEGORY_RULES = [("id", _is_whole, "a whole number"), ("name", _is_text, "text")]
IMAGE_RULES = [
    ("id", *IMAGE_ID),
    ("file_name", _is_text, "text"),
    ("width", _is_positive, "a positive number of pixels"),
    ("height", _is_positive, "a positive number of pixels"),
]
ANNOTATION_RULES = [
    ("id", _is_whole, "a whole number"),
    ("image_id", *IMAGE_ID),
    ("category_id", _is_whole, "a whole number"),
    ("bbox", _is_box, "[x, y, width, height] in pixels"),
    (
        "segmentation",
        _is_mask,
        "polygons [[x1, y1, x2, y2, ...], ...] or RLE with 'size' and 'counts'",
    ),
    ("ignore", lambda value: not value, "0 (set 'iscrowd' instead)"),
]
# What the COCO evaluation reads, that is only after the training.
TEST_RULES = [
    ("id", bool, "a number from 1, as COCO's evaluation takes id 0 for an object not found"),
    ("area", _is_number, "a number of pixels"),
    ("iscrowd", lambda value: value in (0, 1), "0 or 1"),
]


def some(values: Iterable, limit: int = 10) -> str:
    """The first values, comma-separated."""
    values = list(values)
    return ", ".join(map(str, values[:limit])) + (", ..." if len(values) > limit else "")


def short(value, limit: int = 120) -> str:
    """The start of a value's ``repr``."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def count_classes(classes: Iterable[str]) -> str:
    """Such as "2 classes (cat, dog)"."""
    classes = list(classes)
    plural = "class" if len(classes) == 1 else "classes"
    return f"{len(classes)} {plural} ({some(classes, 5)})"


def absolute(path: str) -> str:
    """An absolute path; a URL as it is."""
    return path if "://" in path else os.path.abspath(path)


def datasets_root() -> str:
    """What ``DETECTRON2_DATASETS`` says, for messages about missing files."""
    value = os.environ.get("DETECTRON2_DATASETS")
    if value is None:
        return "DETECTRON2_DATASETS is not set, so 'datasets' in the working directory is used"
    return f"DETECTRON2_DATASETS is '{value}'"
