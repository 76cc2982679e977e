"""Checks of the output folder: no run is overwritten, and ``--resume`` continues the same run.

With another model, distillation or training data, a resumed run would be a mixture of two runs
wherever the shapes happen to fit.
"""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml
from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig

from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import CONFIG, LAST_CHECKPOINT, RESULT, flatten

logger = logging.getLogger(__name__)


def check_output_dir(cfg: CfgNode, *, resume: bool, training: bool) -> None:
    """Refuses to train over another run; warns where ``resume`` finds nothing to go on with.

    Raises:
        ConfigError: ``OUTPUT_DIR`` holds a run and ``resume`` is False, or its checkpoints cannot
            be continued because no ``last_checkpoint`` names one.
    """
    if not training:
        return
    folder = Path(cfg.OUTPUT_DIR)
    checkpoints = sorted(folder.glob("model_*.pth"), key=lambda path: path.stat().st_mtime)
    resumable = (folder / LAST_CHECKPOINT).is_file()
    if not resume and (resumable or checkpoints or (folder / RESULT).is_file()):
        raise ConfigError(
            f"OUTPUT_DIR '{folder}' already holds a run; give --resume to continue it, or another "
            "OUTPUT_DIR"
        )
    if resume and not resumable and checkpoints:
        raise ConfigError(
            f"--resume: OUTPUT_DIR '{folder}' holds checkpoints but no last_checkpoint; write the "
            f"name of the one to go on with, such as {checkpoints[-1].name}, into "
            f"'{folder / LAST_CHECKPOINT}'"
        )
    if resume and not resumable:
        logger.warning(
            "--resume: OUTPUT_DIR '%s' holds no checkpoint: training starts at iteration 0", folder
        )


def check_same_run(cfg: CfgNode) -> list[str]:
    """Compares the config with that of the run in ``OUTPUT_DIR`` which ``--resume`` goes on with.

    Model, distillation and training data may not change, except for the device, ``MODEL.WEIGHTS``
    (not read by a resumed run), ``KD.SCHEDULE`` and the weights of distillers. Keys that only one
    of the two has come from another version and are left out.

    Returns:
        The keys that changed and may, each as one phrase; they are logged.
    """
    return _compare_configs(
        cfg.OUTPUT_DIR,
        flatten(yaml.safe_load(cfg.dump())),
        identity=("MODEL.", "KD.", "DATASETS.TRAIN"),
        may_change=("MODEL.DEVICE", "MODEL.WEIGHTS", "KD.SCHEDULE.", "KD.TEACHER.AMP"),
    )


def check_same_lazy_run(cfg: DictConfig) -> list[str]:
    """As :func:`check_same_run`, for a run from a LazyConfig in ``train.output_dir``.

    What may not change is ``model`` and ``dataloader.train.dataset``; of these may the weights of
    distillers, and where and in which precision the teacher runs. Here a key that only one of the
    two has is a change: a LazyConfig has no keys but its own.
    """
    teacher = ("model.teacher.amp", "model.teacher.device")
    with tempfile.TemporaryDirectory() as folder:
        LazyConfig.save(cfg, os.path.join(folder, CONFIG))
        return _compare_configs(
            cfg.train.output_dir,
            _config_of_run(folder),
            identity=("model.", "dataloader.train.dataset"),
            may_change=("model.vis_period", "model.distillation_weights", *teacher),
            count_absent=True,
        )


def _compare_configs(
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
    before = _config_of_run(output_dir)
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
        logger.warning("--resume goes on with changed keys: %s", "; ".join(allowed))
    return allowed


def _config_of_run(output_dir: str) -> dict[str, object]:
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
