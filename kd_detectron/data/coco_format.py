"""A user's own COCO-format data, named in the config and read without code.

``DATASETS.COCO_FORMAT: [["name", "annotations.json", "image_dir"], ...]`` gives Detectron2 datasets
that ``DATASETS.TRAIN`` and ``DATASETS.TEST`` can name. Paths are relative to the environment
variable ``DETECTRON2_DATASETS`` (default ``datasets``), as for Detectron2's builtin datasets;
absolute paths stay as they are.

The one difference from ``register_coco_instances``: boxes that no detector can learn (no area, or
wholly outside their image) are dropped where the annotations are loaded, because one of them can
turn a loss into NaN. ``tests/data/test_coco_format.py`` pins it. Builtin datasets are left alone.
"""

import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from kd_detectron.errors import ConfigError

logger = logging.getLogger(__name__)


def resolve_path(path: str) -> str:
    """Returns ``path`` below ``DETECTRON2_DATASETS``; an absolute path, or a URL, as it is."""
    path = os.path.expanduser(path)
    if "://" in path:
        return path
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    return os.path.join(root, path)


def box_fault(box: Sequence[float], width: int, height: int) -> str | None:
    """Says what is wrong with a box, if anything.

    Args:
        box: x, y, width, height in pixels, as in a COCO file.
        width, height: size of its image in pixels.

    Returns:
        "empty" for a width or height that is not a positive number, "outside" for a box without a
        pixel inside the image, None for a usable box. Boxes partly outside are usable: Detectron2
        clips them.
    """
    x, y, w, h = box
    if not (0 < w < math.inf and 0 < h < math.inf):
        return "empty"
    # Written so that a NaN coordinate counts as outside.
    if not (x < width and y < height and x + w > 0 and y + h > 0):
        return "outside"
    return None


def register_coco_format(cfg: CfgNode) -> None:
    """Registers the datasets of ``DATASETS.COCO_FORMAT`` with Detectron2 (evaluator "coco").

    No file is opened. Registering a name again with the same files does nothing.

    Raises:
        ConfigError: an entry is not three strings, or its name is taken by other files.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        if not (
            isinstance(entry, (list, tuple))
            and len(entry) == 3
            and all(isinstance(part, str) and part for part in entry)
        ):
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
    dataset_dicts, faults = load(), Counter()
    for record in dataset_dicts:
        kept = []
        for annotation in record["annotations"]:
            fault = box_fault(annotation["bbox"], record["width"], record["height"])
            faults[fault] += 1
            if fault is None:
                kept.append(annotation)
        record["annotations"] = kept
    if faults["empty"] or faults["outside"]:
        logger.warning(
            "Dataset '%s': dropped %d boxes without area and %d boxes outside their image",
            *(name, faults["empty"], faults["outside"]),
        )
    return dataset_dicts
