"""The student without its distillation: a checkpoint and a config that stock Detectron2 reads.

A distilled run's checkpoint holds the trainer's state and the distillers' parameters, and its
config holds keys that Detectron2 does not know. :func:`export_student` writes both without these,
after it has built the plain model from the plain config and loaded it without a missing or
unexpected key (``tests/checkpoint/test_plain_export.py``, in a process without this project). With
averaged weights (``SOLVER.EMA``) a checkpoint's model is the average.

Students whose backbone comes from :mod:`kd_detectron.backbones` are not in stock Detectron2; their
config keeps that backbone's own node, and whoever loads it imports that module and calls its
``add_backbone_config`` first.
"""

import logging
import os
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from kd_detectron.atomic_files import atomic_open
from kd_detectron.backbones import BACKBONE_NODES, add_backbone_config
from kd_detectron.checkpoint.checkpointer import DistillationCheckpointer, refuse_misfit
from kd_detectron.config import find_config, load_run_config
from kd_detectron.errors import ConfigError, did_you_mean

_logger = logging.getLogger(__name__)


class ExportedStudent(NamedTuple):
    """The two files that :func:`export_student` wrote."""

    checkpoint: str
    config: str


def export_student(
    src: str, dst: str, *, checkpoint: str = "final", cfg: CfgNode | str | None = None
) -> ExportedStudent:
    """Writes a run's student as a plain Detectron2 checkpoint with its config beside it.

    Args:
        src: a run's output folder or a checkpoint file.
        dst: the file to write, or a folder, for ``student_final.pth`` in it. The config becomes
            ``config.yaml`` beside it, or ``<checkpoint's name>.yaml`` where that would overwrite
            the run's own config.
        checkpoint: which one of a folder, as for :func:`find_checkpoint`.
        cfg: the run's config, its path or its bare name; by default the ``config.yaml`` beside
            ``src``.

    Raises:
        ConfigError: a file is missing or unreadable, or the checkpoint does not fit the config.
        CheckpointWriteError: the result could not be written.
    """
    checkpoint = find_checkpoint(src, checkpoint)
    if not dst.endswith(".pth"):
        dst = os.path.join(dst, "student_final.pth")
    if os.path.realpath(dst) == os.path.realpath(checkpoint):
        raise ConfigError(f"the export of '{checkpoint}' would overwrite it: name another file")
    config = os.path.join(os.path.dirname(dst), "config.yaml")
    if os.path.realpath(config) == os.path.realpath(config_beside(checkpoint)):
        config = dst.removesuffix(".pth") + ".yaml"

    cfg, model = load_plain_student(checkpoint, cfg)
    cfg.MODEL.WEIGHTS = os.path.abspath(dst)
    os.makedirs(os.path.dirname(os.path.abspath(dst)), exist_ok=True)
    with atomic_open(dst, "wb") as file:
        torch.save({"model": model.state_dict()}, file)
    with atomic_open(config, "w") as file:
        file.write(cfg.dump())
    _logger.info("the student of %s is written to %s, its config to %s", checkpoint, dst, config)
    return ExportedStudent(dst, config)


def load_plain_student(
    checkpoint: str, cfg: CfgNode | str | None = None
) -> tuple[CfgNode, torch.nn.Module]:
    """Builds a run's student on the CPU and loads all of it, as :func:`export_student`.

    Returns:
        the plain config, and the plain Detectron2 model in eval mode.
    """
    if cfg is None:
        cfg = config_beside(checkpoint)
        if not os.path.isfile(cfg):
            raise ConfigError(
                f"there is no config.yaml beside '{checkpoint}': give the config that it was "
                "trained with (--config-file)"
            )
    cfg = student_config(cfg)
    on_cpu = cfg.clone()
    on_cpu.MODEL.DEVICE = "cpu"
    on_cpu.MODEL.WEIGHTS = checkpoint
    try:
        model = build_model(on_cpu)
    except KeyError as error:
        raise ConfigError(
            f"the student cannot be built, something that the config names is not registered"
            f" ({error}): import the module that registers it before exporting"
        ) from error
    checkpointer = DistillationCheckpointer(model, weights_key="the student's checkpoint")
    checkpointer.load(checkpoint)
    refuse_misfit(
        checkpointer.incompatible,
        f"'{checkpoint}' does not fit its config",
        "give the config that it was trained with",
    )
    return cfg, model.eval()


def student_config(cfg: CfgNode | str) -> CfgNode:
    """Returns a run's config (or that of this name) without keys unknown to stock Detectron2."""
    if isinstance(cfg, str):
        cfg = load_run_config(find_config(cfg))
    plain = get_cfg()
    node = BACKBONE_NODES.get(cfg.MODEL.BACKBONE.NAME)
    if node is not None:
        add_backbone_config(plain)
        for other in set(BACKBONE_NODES.values()) - {node}:
            del plain.MODEL[other]
        _logger.warning(
            "the student's backbone %s is not in stock Detectron2: to load the export, import"
            " kd_detectron.backbones and call its add_backbone_config(cfg) before merging the"
            " config",
            cfg.MODEL.BACKBONE.NAME,
        )
    plain.merge_from_other_cfg(_known_part(cfg, plain))
    plain.MODEL.META_ARCHITECTURE = plain_meta_architecture(plain.MODEL.META_ARCHITECTURE)
    if node == "TIMM":
        plain.MODEL.TIMM.PRETRAINED = False  # the checkpoint has the weights
    return plain


def plain_meta_architecture(name: str) -> str:
    """The meta-architecture that a distilled one adds distillation to; others are their own."""
    registered = dict(META_ARCH_REGISTRY)
    for cls in getattr(registered.get(name), "__mro__", ()):
        # Known by what it adds: kd_detectron.modeling stands above this package.
        if not hasattr(cls, "distillation_losses") and registered.get(cls.__name__) is cls:
            return cls.__name__
    return name


def _known_part(cfg: CfgNode, known: CfgNode) -> CfgNode:
    """The keys of ``cfg`` that ``known`` has as well, at every depth."""
    part = CfgNode()
    for key, value in cfg.items():
        if key in known:
            is_node = isinstance(value, CfgNode) and isinstance(known[key], CfgNode)
            part[key] = _known_part(value, known[key]) if is_node else value
    return part


def find_checkpoint(src: str, which: str = "final") -> str:
    """Returns the checkpoint file that is meant.

    Args:
        src: a run's output folder, or a checkpoint file, which is then the one.
        which: of a folder "final" (``model_final.pth``), "best" (``model_best.pth``), or a file's
            name in it.

    Raises:
        ConfigError: there is no such file; those that there are, are named.
    """
    path = src
    if os.path.isdir(src):
        names = {"final": "model_final.pth", "best": "model_best.pth"}
        path = os.path.join(src, names.get(which, which))
    if os.path.isfile(path):
        return path
    folder, name = os.path.split(os.path.normpath(path))
    there = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    if path != src:
        there = [file for file in there if file.endswith(".pth")]
    raise ConfigError(
        f"'{path}' does not exist; give a run's output folder or a checkpoint file, or name one of "
        f"the folder's with --checkpoint{did_you_mean(name, there)}"
    )


def config_beside(checkpoint: str) -> str:
    """The path of the config of the run that a checkpoint file belongs to."""
    return os.path.join(os.path.dirname(checkpoint), "config.yaml")
