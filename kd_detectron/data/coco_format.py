"""A user's own COCO-format data, named in the config and read without code.

``DATASETS.COCO_FORMAT: [["name", "annotations.json", "image_dir"], ...]`` gives Detectron2 datasets
that ``DATASETS.TRAIN`` and ``DATASETS.TEST`` can name. Paths are relative to the environment
variable ``DETECTRON2_DATASETS`` (default ``datasets``), as for Detectron2's builtin datasets.

The one difference from ``register_coco_instances``: boxes that no detector can learn (no area, or
wholly outside their image) are dropped where the annotations are loaded, because one of them can
turn a loss into NaN. Builtin datasets are left alone.
"""

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from kd_detectron.errors import ConfigError

logger = logging.getLogger(__name__)


def resolve_path(path: str) -> str:
    """Returns ``path`` below ``DETECTRON2_DATASETS``; an absolute path or a URL as it is."""
    if "://" in path:
        return path
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    return os.path.join(os.path.expanduser(root), os.path.expanduser(path))


def absolute(path: str | os.PathLike) -> str:
    """The absolute path; a URL as it is."""
    return str(path) if "://" in str(path) else os.path.abspath(path)


def read_coco(path: str | os.PathLike, title: str) -> dict:
    """Reads a COCO-format file; its "images", "annotations", "categories" are lists, if empty.

    Raises:
        ConfigError: it cannot be read, is no JSON, or not in COCO format; begins with ``title``.
    """
    title = f"{title} '{absolute(path)}'"
    try:
        with PathManager.open(path, "rb") as file:
            content = json.load(file)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{title} is not readable as JSON ({error}); it may be cut off: fetch or write it again"
        ) from error
    parts = {"images": [], "annotations": [], "categories": []}
    content = parts | content if isinstance(content, dict) else {}
    if not content or not all(isinstance(content[part], list) for part in parts):
        raise ConfigError(
            f"{title} is not in COCO format; it must hold"
            ' {"images": [...], "annotations": [...], "categories": [...]}'
        )
    return content


def read_categories(path: str | os.PathLike, title: str) -> list[dict]:
    """The "id" and "name" of a COCO-format file's categories, in Detectron2's order of classes.

    Raises:
        ConfigError: as :func:`read_coco`, or categories lack id or name, or mix types of ids.
    """
    categories = read_coco(path, title)["categories"]
    try:
        categories = [{"id": entry["id"], "name": entry["name"]} for entry in categories]
        return sorted(categories, key=lambda entry: entry["id"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{title} '{path}' has categories without sound id or name") from error


def name_keypoints(names: Sequence[str]) -> None:
    """Gives datasets the names of their keypoints, which flipped images need, from their files.

    Two keypoints whose names differ in "left" and "right" change places in a flipped image.
    Datasets that have names already, such as Detectron2's COCO, stay as they are.

    Raises:
        ConfigError: no category of a dataset's file lists "keypoints".
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        path = metadata.get("json_file")
        if metadata.get("keypoint_names") or not path:
            continue
        categories = read_coco(path, f"the annotation file of '{name}'")["categories"]
        points = next((entry["keypoints"] for entry in categories if entry.get("keypoints")), None)
        if points is None:
            raise ConfigError(
                f"MODEL.KEYPOINT_ON is True, but no category in '{absolute(path)}' lists the names "
                f'of its keypoints; add "keypoints": ["left_eye", ...] to it, or set '
                f"MetadataCatalog.get('{name}').keypoint_names and keypoint_flip_map in a file "
                "given to --import"
            )
        pairs = [(point, point.replace("left", "right")) for point in points if "left" in point]
        metadata.keypoint_names = list(points)
        metadata.keypoint_flip_map = [pair for pair in pairs if pair[1] in points]


def is_usable_box(box: Sequence[float], width: int, height: int) -> bool:
    """Whether a box has an area and a pixel inside its image; Detectron2 clips what is outside.

    Args:
        box: x, y, width, height in pixels, as in a COCO file.
        width, height: size of its image in pixels.
    """
    x, y, w, h = box
    # Each comparison is False for NaN.
    return 0 < w < math.inf and 0 < h < math.inf and -w < x < width and -h < y < height


def register_coco_format(cfg: CfgNode) -> None:
    """Registers the datasets of ``DATASETS.COCO_FORMAT`` with Detectron2; opens no file.

    Raises:
        ConfigError: an entry is not three strings, or its name is taken by other files.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        parts = entry if isinstance(entry, (list, tuple)) else ()
        if len(parts) != 3 or not all(isinstance(part, str) and part for part in parts):
            raise ConfigError(
                f"DATASETS.COCO_FORMAT has the entry {entry!r}; each entry must be a list of three"
                ' strings, ["name", "annotations.json", "image_dir"]'
            )
        name, json_file, image_dir = entry
        _register(name, resolve_path(json_file), resolve_path(image_dir))


def _register(name: str, json_file: str, image_dir: str) -> None:
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        known = (metadata.get("json_file"), metadata.get("image_root"))
        if known == (json_file, image_dir):
            return
        raise ConfigError(
            f"DATASETS.COCO_FORMAT names '{name}' for '{json_file}' and '{image_dir}', but that"
            f" name already stands for '{known[0]}' and '{known[1]}'; choose another name"
        )
    register_coco_instances(name, {}, json_file, image_dir)
    load = DatasetCatalog.pop(name)
    DatasetCatalog.register(name, functools.partial(_load_without_bad_boxes, name, load))


def _load_without_bad_boxes(name: str, load: Callable[[], list[dict]]) -> list[dict]:
    dataset_dicts, dropped = load(), 0
    for record in dataset_dicts:
        size = record["width"], record["height"]
        usable = [x for x in record["annotations"] if is_usable_box(x["bbox"], *size)]
        dropped += len(record["annotations"]) - len(usable)
        record["annotations"] = usable
    if dropped:
        logger.warning(
            "Dataset '%s': dropped %d boxes without area or outside their image", name, dropped
        )
    return dataset_dicts
