"""Checks of the output folder: no run is overwritten, and ``--resume`` continues the same run.

With another model, distillation or training data, a resumed run would be a mixture of two runs
wherever the shapes happen to fit.
"""

import logging
import os
import tempfile
from pathlib import Path

import yaml
from detectron2.config import CfgNode, LazyConfig
from omegaconf import DictConfig

from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import CONFIG, LAST_CHECKPOINT, RESULT, flatten
from kd_detectron.runs.same_run import compare_with_run, config_of_run

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
    # A run that was killed before its first checkpoint can have a best one.
    named = [path for path in checkpoints if path.name != "model_best.pth"]
    if resume and not resumable and named:
        raise ConfigError(
            f"--resume: OUTPUT_DIR '{folder}' holds checkpoints but no last_checkpoint; write the "
            f"name of the one to go on with, such as {named[-1].name}, into "
            f"'{folder / LAST_CHECKPOINT}'"
        )
    if resume and not resumable:
        logger.warning(
            "--resume: OUTPUT_DIR '%s' holds no checkpoint: training starts at iteration 0", folder
        )


def check_same_run(cfg: CfgNode) -> list[str]:
    """Compares the config with that of the run in ``OUTPUT_DIR`` which ``--resume`` continues.

    Model, distillation and training data may not change, except for the device, ``MODEL.WEIGHTS``
    (not read by a resumed run), ``KD.SCHEDULE`` and the weights of distillers; image folders may
    have moved. Keys that only one of the two has come from another version and are left out.

    Returns:
        The keys that changed and may, each as one phrase; they are logged.
    """
    annotations = (f"DATASETS.COCO_FORMAT.{name}.annotations" for name in cfg.DATASETS.TRAIN)
    data = ("DATASETS.TRAIN", "DATASETS.PROPOSAL_FILES_TRAIN", "INPUT.FORMAT", *annotations)
    return compare_with_run(
        cfg.OUTPUT_DIR,
        flatten(yaml.safe_load(cfg.dump())),
        identity=("MODEL.", "KD.", *data),
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
        return compare_with_run(
            cfg.train.output_dir,
            config_of_run(folder),
            identity=("model.", "dataloader.train.dataset"),
            may_change=("model.vis_period", "model.distillation_weights", *teacher),
            count_absent=True,
        )
