"""Finding, loading and refusing teachers: what ``KD.TEACHER`` names, as a Detectron2 model.

``KD.TEACHER.CONFIG_FILE`` is a model-zoo name, a path or a config of this project by bare name, as
YAML or as a LazyConfig (``.py``). Of a LazyConfig three things are read: ``model``; the channel
order, ``model.input_format`` or else the ``image_format`` of ``dataloader``'s mapper; and
``train.init_checkpoint``, where the zoo has no checkpoint of that name. ``KD.TEACHER.OPTS`` are
keys of the file: ``["model.roi_heads.num_classes", 3]``.

A checkpoint that does not fit its config in every key is refused.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kd_detectron.checkpoint import DistillationCheckpointer, refuse_misfit
from kd_detectron.config import (
    add_kd_config,
    config_dir,
    list_configs,
    merge_file,
    merge_opts,
)
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.finite import non_finite_key

logger = logging.getLogger(__name__)

RANDOM_WEIGHTS = "none"


def load_teacher(cfg: CfgNode) -> tuple[nn.Module, str]:
    """The whole teacher of ``cfg.KD.TEACHER`` on ``cfg.MODEL.DEVICE``, and its channel order.

    Raises:
        ConfigError: its config or checkpoint is not found, unreadable, or does not fit.
    """
    if cfg.KD.TEACHER.CONFIG_FILE.endswith(".py"):
        path = find_teacher_config(cfg.KD.TEACHER.CONFIG_FILE)
        lazy_cfg = read_lazy_config(path, list(cfg.KD.TEACHER.OPTS))
        own = OmegaConf.select(lazy_cfg, "train.init_checkpoint") or ""
        weights = teacher_weights(cfg, own)
        model, input_format = build_lazy_model(lazy_cfg, path, cfg.MODEL.DEVICE)
        load_teacher_weights(model, weights)
        return model, input_format
    teacher_cfg = teacher_config(cfg)
    return build_teacher_model(teacher_cfg), teacher_cfg.INPUT.FORMAT


def teacher_config(cfg: CfgNode) -> CfgNode:
    """A YAML teacher's whole config: its file, on the student's device, then ``KD.TEACHER.OPTS``.

    Raises:
        ConfigError: there is no such config, it is a LazyConfig, or an override names an unknown
            key.
    """
    name = cfg.KD.TEACHER.CONFIG_FILE
    path = find_teacher_config(name)
    if path.endswith(".py"):
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE '{name}' is a LazyConfig, which can teach and be evaluated, "
            "but this command needs a YAML config; name the YAML of that model"
        )
    teacher_cfg = get_cfg()
    add_kd_config(teacher_cfg)
    # It may have been distilled by a distiller that is not registered here.
    teacher_cfg.KD.set_new_allowed(True)
    merge_file(teacher_cfg, path)
    teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
    merge_opts(teacher_cfg, list(cfg.KD.TEACHER.OPTS), source="KD.TEACHER.OPTS")
    # A teacher that was itself distilled is just a student here.
    teacher_cfg.KD.ENABLED = False
    teacher_cfg.MODEL.WEIGHTS = teacher_weights(cfg, teacher_cfg.MODEL.WEIGHTS)
    return teacher_cfg


def find_teacher_config(name: str) -> str:
    """Returns the file that ``KD.TEACHER.CONFIG_FILE`` names: a path, a zoo or a bare name."""
    if not name:
        raise ConfigError(
            "KD.TEACHER.CONFIG_FILE is empty but KD.DISTILLERS or KD.TEACHER.INHERIT is not; name "
            "a model-zoo config, e.g. COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml, or a path"
        )
    if os.path.isfile(name):
        return name
    if (config_dir() / name).is_file():
        return str(config_dir() / name)
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        near = did_you_mean(name, [*zoo_configs(), *list_configs()])
        raise ConfigError(
            f"KD.TEACHER.CONFIG_FILE '{name}' is no file, no model-zoo name and no config of this "
            f"project{near}"
        ) from None


def zoo_configs() -> list[str]:
    """Names of the model zoo's configs that have a checkpoint to download."""
    folder = Path(model_zoo.__file__).with_name("configs")
    names = model_zoo.model_zoo._ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX
    # Some have a YAML file, some a LazyConfig, some both.
    files = [folder / f"{name}{suffix}" for name in names for suffix in (".yaml", ".py")]
    return sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())


def teacher_weights(cfg: CfgNode, own: str) -> str:
    """Where the teacher's weights come from; "" for random ones.

    Args:
        cfg: the student's whole config.
        own: the weights that the teacher's config itself names.

    Raises:
        ConfigError: no trained weights are named, or two different ones.
    """
    weights = cfg.KD.TEACHER.WEIGHTS
    opts = list(cfg.KD.TEACHER.OPTS)
    for key, value in zip(opts[::2], opts[1::2], strict=False):
        if key in ("MODEL.WEIGHTS", "train.init_checkpoint"):
            if weights and weights != value:
                raise ConfigError(
                    f"KD.TEACHER.WEIGHTS is '{weights}' and {key} in KD.TEACHER.OPTS is '{value}'; "
                    "give one of them"
                )
            weights = value
    if weights == RANDOM_WEIGHTS:
        logger.warning(
            "KD.TEACHER.WEIGHTS is 'none': the teacher has RANDOM weights. This is for tests and "
            "benchmarks; nothing can be learnt from it."
        )
        return ""
    if weights:
        return weights
    try:
        return model_zoo.get_checkpoint_url(cfg.KD.TEACHER.CONFIG_FILE)
    except RuntimeError:
        # A config of one's own: its weights must be the trained model, not ImageNet.
        if not own or "ImageNet" in own or own.startswith("torchvision://"):
            raise ConfigError(
                f"KD.TEACHER.WEIGHTS is empty and KD.TEACHER.CONFIG_FILE "
                f"'{cfg.KD.TEACHER.CONFIG_FILE}' is not a model-zoo config with a checkpoint "
                f"(its own weights are '{own}'); set KD.TEACHER.WEIGHTS to the trained teacher"
            ) from None
        return own


def build_teacher_model(teacher_cfg: CfgNode) -> nn.Module:
    """Builds the whole teacher and loads its checkpoint; never returns a half-loaded one.

    Raises:
        ConfigError: the config names parts that do not exist or do not go together; the checkpoint
            is missing, unreadable, or has missing or unexpected keys.
    """
    try:
        model = build_model(teacher_cfg)
    except (KeyError, AssertionError) as error:
        # A name that is in no registry, or parts that do not go together.
        raise ConfigError(
            "the teacher of KD.TEACHER.CONFIG_FILE cannot be built "
            f"({error.args[0] if error.args else error}); check its MODEL.META_ARCHITECTURE and "
            "MODEL.BACKBONE.NAME, KD.TEACHER.OPTS, and that their code is imported (--import)"
        ) from error
    load_teacher_weights(model, teacher_cfg.MODEL.WEIGHTS)
    return model


def load_teacher_weights(model: nn.Module, weights: str) -> None:
    """Loads the teacher's checkpoint, all of it; nothing where ``weights`` is empty.

    Raises:
        ConfigError: the checkpoint is missing, unreadable, or has missing or unexpected keys.
    """
    if weights:
        checkpointer = DistillationCheckpointer(model, weights_key="KD.TEACHER.WEIGHTS")
        checkpointer.load(weights)
        refuse_misfit(
            checkpointer.incompatible,
            f"KD.TEACHER.WEIGHTS '{weights}' does not fit KD.TEACHER.CONFIG_FILE",
            "give the checkpoint that was trained with that config",
        )
        if key := non_finite_key(model.state_dict()):
            raise ConfigError(
                f"KD.TEACHER.WEIGHTS '{weights}' holds NaN or infinity in '{key}'; give a "
                "checkpoint from before its training failed"
            )


# ---- LazyConfig teachers ----


def read_lazy_config(path: str, opts: list) -> DictConfig:
    """Reads a LazyConfig file and applies KEY VALUE overrides, given in one flat list.

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
        check_lazy_key(cfg, key, source="KD.TEACHER.OPTS")
        OmegaConf.update(cfg, key, value)
    return cfg


def check_lazy_key(cfg: DictConfig, key: str, *, source: str) -> None:
    """Refuses an override of a LazyConfig in a node that it does not have.

    A new leaf is an argument that the file leaves at its default; a new node is a typo.
    """
    node = key.rpartition(".")[0] or key
    if OmegaConf.select(cfg, node) is None:
        raise ConfigError(
            f"{source} sets {key}, but the LazyConfig has no '{node}'"
            f"{did_you_mean(node.partition('.')[0], map(str, cfg))}"
        )


def plain_list(values: Sequence) -> list:
    """A list of a LazyConfig, and those in it, as Python's, which are what YAML configs take."""
    return OmegaConf.to_container(values) if OmegaConf.is_config(values) else list(values)


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


def build_lazy_model(cfg: DictConfig, path: str, device: str) -> tuple[nn.Module, str]:
    """Instantiates ``cfg.model`` on a device; also returns the channel order of its images.

    Raises:
        ConfigError: the model cannot be built, or its channel order is not known.
    """
    try:
        model = instantiate(cfg.model)
    except Exception as error:  # Any Python error of any constructor.
        raise ConfigError(
            f"the 'model' of KD.TEACHER.CONFIG_FILE '{path}' cannot be built "
            f"({type(error).__name__}: {error}); check KD.TEACHER.OPTS and the file"
        ) from error
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
