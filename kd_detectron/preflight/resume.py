"""May this training write into its output folder, and is it the run that ``--resume`` means?

A resumed run whose model, distillation or training data differ would go on as a mixture of two runs
wherever the shapes happen to fit.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import yaml
from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig

from kd_detectron.errors import ConfigError

logger = logging.getLogger(__name__)

# Keys whose change makes another run of it; of these, what a resumed run may change.
IDENTITY = ("MODEL.", "KD.", "DATASETS.TRAIN")
MAY_CHANGE = ("MODEL.DEVICE", "MODEL.WEIGHTS", "KD.SCHEDULE.", "KD.TEACHER.AMP")
LAZY_IDENTITY = ("model.", "dataloader.train.dataset")
LAZY_MAY_CHANGE = (
    *("model.vis_period", "model.distillation_weights", "model.teacher.amp"),
    "model.teacher.device",
)


def check_output_dir(cfg: CfgNode, *, resume: bool, training: bool) -> None:
    """Refuses to train into a folder that holds another run."""
    tag = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if training and not resume and os.path.isfile(tag):
        raise ConfigError(
            f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' already holds a run; give --resume to continue it, or "
            "another OUTPUT_DIR"
        )


def check_same_run(cfg: CfgNode) -> list[str]:
    """Compares the config with that of the run in ``OUTPUT_DIR`` which ``--resume`` goes on with.

    What may change over a resume: everything but model, distillation and training data; and of
    these the device, ``MODEL.WEIGHTS`` (not read by a resumed run), ``KD.SCHEDULE`` and the weights
    of distillers. Keys that only one of the two has come from another version and are left out.

    Returns:
        The keys that changed and may, each as one phrase; they are logged.

    Raises:
        ConfigError: a key differs that makes it another run.
    """
    before = _config_of_run(cfg.OUTPUT_DIR)
    now = dict(_leaves(yaml.safe_load(cfg.dump())))
    changed = {key for key in before.keys() & now.keys() if before[key] != now[key]}
    return _compare_configs(cfg.OUTPUT_DIR, before, now, changed, _makes_another_run)


def check_same_lazy_run(cfg: DictConfig) -> list[str]:
    """As :func:`check_same_run`, for a run from a LazyConfig in ``train.output_dir``.

    What may not change is ``model`` and ``dataloader.train.dataset``; of these may the weights of
    distillers, and where and in which precision the teacher runs. Here a key that only one of the
    two has is a change: a LazyConfig has no keys but its own.
    """
    before = _config_of_run(cfg.train.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        LazyConfig.save(cfg, os.path.join(folder, "config.yaml"))
        now = _config_of_run(folder)
    keys = before.keys() | now.keys() if before else set()
    changed = {key for key in keys if before.get(key, ABSENT) != now.get(key, ABSENT)}
    return _compare_configs(cfg.train.output_dir, before, now, changed, _makes_another_lazy_run)


def _config_of_run(output_dir: str) -> dict[str, object]:
    """The values in ``config.yaml`` by their keys; nothing where it is missing or cut short."""
    path = os.path.join(output_dir, "config.yaml")
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        config = dict(_leaves(yaml.load(text, _PlainLoader)))
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


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def _compare_configs(
    output_dir: str,
    before: Mapping[str, object],
    now: Mapping[str, object],
    changed: Iterable[str],
    makes_another_run: Callable[[str], bool],
) -> list[str]:
    """Refuses changes that make another run; logs and returns the others."""
    path = os.path.join(output_dir, "config.yaml")
    if before and not before.keys() & now.keys():
        raise ConfigError(
            f"--resume: OUTPUT_DIR '{output_dir}' holds a run of the other kind of config, YAML or "
            "LazyConfig; resume it with the command and the config that it was started with"
        )
    refused, allowed = [], []
    for key in sorted(changed):
        was, value = before.get(key, ABSENT), now.get(key, ABSENT)
        phrase = f"{key} was {was!r} and is {value!r}"
        (refused if makes_another_run(key) else allowed).append(phrase)
    if refused:
        raise ConfigError(
            f"--resume: OUTPUT_DIR '{output_dir}' holds another run: {'; '.join(refused)}. Set "
            "them back to go on with it, or give another OUTPUT_DIR (and MODEL.WEIGHTS its "
            f"checkpoint, to start from its weights); if the change is meant, remove {path}"
        )
    if allowed:
        logger.warning("--resume goes on with changed keys: %s", "; ".join(allowed))
    return allowed


def _makes_another_run(key: str) -> bool:
    if key.startswith(MAY_CHANGE) or (key.startswith("KD.") and key.endswith(".WEIGHT")):
        return False
    return key.startswith(IDENTITY)


def _makes_another_lazy_run(key: str) -> bool:
    return key.startswith(LAZY_IDENTITY) and not key.startswith(LAZY_MAY_CHANGE)


def _leaves(node: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
