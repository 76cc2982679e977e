"""Whether a config is that of the run in a folder, which a resumed training continues."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from kd_detectron.errors import ConfigError

from .files import CONFIG, flatten

logger = logging.getLogger(__name__)

_COCO_FORMAT = "DATASETS.COCO_FORMAT"


def compare_with_run(
    output_dir: str,
    now: Mapping[str, object],
    *,
    identity: tuple[str, ...],
    may_change: tuple[str, ...],
    count_absent: bool = False,
) -> list[str]:
    """Refuses changes of keys that start as ``identity``; logs and returns the others.

    ``may_change`` are exceptions, as are the weights of distillers. With ``count_absent`` a key
    that only one of the two configs has is a change.
    """
    before = _datasets_by_name(config_of_run(output_dir))
    now = _datasets_by_name(now)
    if not before:
        return []
    if not before.keys() & now.keys():
        raise ConfigError(
            f"--resume: OUTPUT_DIR '{output_dir}' holds a run of the other kind of config, YAML or "
            "LazyConfig; resume it with the command and the config that it was started with"
        )
    refused, allowed = [], []
    for key in sorted(before.keys() | now.keys() if count_absent else before.keys() & now.keys()):
        was, value = (repr(x[key]) if key in x else "absent" for x in (before, now))
        if was != value:
            is_weight = key.startswith("KD.") and key.endswith(".WEIGHT")
            may = is_weight or key.startswith(may_change) or not key.startswith(identity)
            (allowed if may else refused).append(f"{key} was {was} and is {value}")
    if refused:
        raise ConfigError(
            f"--resume: OUTPUT_DIR '{output_dir}' holds another run: {'; '.join(refused)}. Set "
            "them back to go on with it, or give another OUTPUT_DIR (and MODEL.WEIGHTS its "
            "checkpoint, to start from its weights); if the change is meant, remove "
            + os.path.join(output_dir, CONFIG)
        )
    if allowed:
        logger.warning("--resume continues with changed keys: %s", "; ".join(allowed))
    return allowed


def _datasets_by_name(config: Mapping[str, object]) -> dict[str, object]:
    """The config with two keys per entry of ``DATASETS.COCO_FORMAT`` in place of the one list.

    So that data sets may be added, and the two files of one are two things that may change.
    """
    config = dict(config)
    for name, annotations, images in config.pop(_COCO_FORMAT, ()):
        config[f"{_COCO_FORMAT}.{name}.annotations"] = annotations
        config[f"{_COCO_FORMAT}.{name}.images"] = images
    return config


def config_of_run(output_dir: str) -> dict[str, object]:
    """The values in ``config.yaml`` by their keys; nothing where it is missing or cut short."""
    path = Path(output_dir, CONFIG)
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        config = flatten(yaml.load(text, _PlainLoader))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
        text = ""
    if not text.endswith("\n"):  # Detectron2 was killed while it wrote the file.
        logger.warning("%s cannot be read; nothing to compare this config with", path)
        return {}
    return config


class _PlainLoader(yaml.SafeLoader):
    """Reads the Python objects in a saved LazyConfig as the text that they are written as."""


def _as_text(loader: yaml.Loader, tag: str, node: yaml.Node) -> list:
    return [tag, yaml.serialize(node)]


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _as_text)
