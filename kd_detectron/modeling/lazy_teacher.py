"""Teachers written as Detectron2 LazyConfigs: ``.py`` files of the model zoo, or one's own.

``KD.TEACHER.CONFIG_FILE`` may name such a file, e.g. the zoo's
``new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py``. Three things of it are read: ``model``; the
channel order, ``model.input_format`` or else the ``image_format`` of ``dataloader``'s mapper; and
``train.init_checkpoint``, where the zoo has no checkpoint of that name. ``KD.TEACHER.OPTS`` are
keys of the file: ``["model.roi_heads.num_classes", 3]``.
"""

import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kd_detectron.errors import ConfigError


def read_lazy_config(path: str, opts: list) -> DictConfig:
    """Reads a LazyConfig file and applies overrides.

    Args:
        path: the ``.py`` file.
        opts: KEY VALUE overrides in one flat list.

    Raises:
        ConfigError: the file cannot be run, has no ``model``, or an override fits nothing in it.
    """
    cfg = run_lazy_file(path, key="KD.TEACHER.CONFIG_FILE")
    if "model" not in cfg:
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE '{path}' defines no 'model'; a LazyConfig of a detector does"
        )
    if len(opts) % 2:
        raise ConfigError(f"KD.TEACHER.OPTS is {opts}: overrides come in pairs of KEY VALUE")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        # A new leaf is an argument that the file leaves at its default; a new node is a typo.
        node = key.rpartition(".")[0]
        if not node or OmegaConf.select(cfg, node) is None:
            raise ConfigError(
                f"KD.TEACHER.OPTS sets {key}, but KD.TEACHER.CONFIG_FILE '{path}' is a LazyConfig "
                f"and has no '{node or key}'; give keys such as model.roi_heads.num_classes"
            )
        OmegaConf.update(cfg, key, value)
    return cfg


def run_lazy_file(path: str, *, key: str) -> DictConfig:
    """What a LazyConfig file defines; ``key`` named the file.

    Raises:
        ConfigError: the file cannot be run.
    """
    try:
        return LazyConfig.load(path)
    except Exception as error:  # Any Python error: the file is a program.
        raise ConfigError(
            f"{key} '{path}' cannot be read ({type(error).__name__}: {error})"
        ) from error


def lazy_weights(cfg: DictConfig) -> str:
    """``train.init_checkpoint`` of a LazyConfig; "" where there is none."""
    return OmegaConf.select(cfg, "train.init_checkpoint") or ""


def build_lazy_model(cfg: DictConfig, path: str, device: str) -> tuple[nn.Module, str]:
    """Instantiates ``cfg.model`` on a device; also returns the channel order of its images.

    Raises:
        ConfigError: the model cannot be built, is no detector, or its channel order is not known.
    """
    try:
        model = instantiate(cfg.model)
    except Exception as error:  # Any Python error of any constructor.
        raise ConfigError(
            f"the 'model' of KD.TEACHER.CONFIG_FILE '{path}' cannot be built "
            f"({type(error).__name__}: {error}); check KD.TEACHER.OPTS and the file"
        ) from error
    if not hasattr(model, "backbone") or not hasattr(model, "preprocess_image"):
        raise ConfigError(
            f"the 'model' of KD.TEACHER.CONFIG_FILE '{path}' is a {type(model).__name__}; a "
            "teacher is a Detectron2 detector with a backbone"
        )
    input_format = (
        getattr(model, "input_format", None)
        or OmegaConf.select(cfg, "dataloader.train.mapper.image_format")
        or OmegaConf.select(cfg, "dataloader.test.mapper.image_format")
    )
    if input_format not in ("BGR", "RGB"):
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE '{path}' does not say in which channel order its model takes "
            f"images (model.input_format is {input_format}); set KD.TEACHER.OPTS to "
            '["model.input_format", "BGR"] or "RGB"'
        )
    return model.to(torch.device(device)), input_format
