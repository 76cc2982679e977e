"""The student alone, as a checkpoint and a config that stock Detectron2 reads.

A distilled run's checkpoint holds the trainer's state and the distillers' parameters, and its
config holds keys that Detectron2 does not know. :func:`export_student` writes what is left when
those are taken away, and only after it has built the plain model from the plain config and loaded
it without a missing and without an unexpected key. Test: ``test_exported_student_loads_in_plain_
detectron2`` in ``tests/test_export.py`` does so in a process that never imports this project.

Students whose backbone comes from :mod:`kd_detectron.backbones` are not in stock Detectron2; their
config keeps that backbone's own node, and whoever loads it imports that module and calls its
``add_backbone_config`` first.
"""

import logging
import os
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from kd_detectron.backbones import BACKBONE_NODES, add_backbone_config
from kd_detectron.checkpoint.checkpointer import DistillationCheckpointer, refuse_misfit
from kd_detectron.checkpoint.files import atomic_open
from kd_detectron.errors import ConfigError
from kd_detectron.runs.files import LAST_CHECKPOINT, last_checkpoint

_logger = logging.getLogger(__name__)

PLAIN_META_ARCHITECTURES = {
    "DistilledPanopticFPN": "PanopticFPN",
    "DistilledRCNN": "GeneralizedRCNN",
    "DistilledRetinaNet": "RetinaNet",
}


class ExportedStudent(NamedTuple):
    """The two files that :func:`export_student` wrote."""

    checkpoint: str
    config: str


def export_student(src: str, dst: str, *, cfg: CfgNode | str | None = None) -> ExportedStudent:
    """Writes a run's student as a plain Detectron2 checkpoint with its config beside it.

    Args:
        src: a run's output folder (its last checkpoint is taken) or a checkpoint file.
        dst: the file to write, or a folder, for ``student_final.pth`` in it. The config becomes
            ``config.yaml`` beside it, or ``<checkpoint's name>.yaml`` where that would overwrite
            the run's own config.
        cfg: the run's config or the path of it; by default the ``config.yaml`` beside ``src``.

    Raises:
        ConfigError: a file is missing or unreadable, or the checkpoint does not fit the config.
        CheckpointWriteError: the result could not be written.
    """
    checkpoint, run_config = find_run(src)
    if not dst.endswith(".pth"):
        dst = os.path.join(dst, "student_final.pth")
    if os.path.realpath(dst) == os.path.realpath(checkpoint):
        raise ConfigError(f"the export of '{checkpoint}' would overwrite it: name another file")
    config = os.path.join(os.path.dirname(dst), "config.yaml")
    if os.path.realpath(config) == os.path.realpath(run_config):
        config = dst.removesuffix(".pth") + ".yaml"

    cfg, model = load_student(checkpoint, run_config if cfg is None else cfg)
    cfg.MODEL.WEIGHTS = os.path.abspath(dst)
    os.makedirs(os.path.dirname(os.path.abspath(dst)), exist_ok=True)
    with atomic_open(dst, "wb") as file:
        torch.save({"model": model.state_dict()}, file)
    with atomic_open(config, "w") as file:
        file.write(cfg.dump())
    _logger.info("the student of %s is written to %s, its config to %s", checkpoint, dst, config)
    return ExportedStudent(dst, config)


def load_student(checkpoint: str, cfg: CfgNode | str) -> tuple[CfgNode, torch.nn.Module]:
    """Builds a run's student as a plain Detectron2 model on the CPU and loads all of it.

    Args:
        checkpoint: a checkpoint file of the run.
        cfg: the run's config, or the path of it.

    Returns:
        the plain config, and the model in eval mode.

    Raises:
        ConfigError: a file is missing or unreadable, or the checkpoint does not fit the config.
    """
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
    """Returns a run's config without the keys that stock Detectron2 does not know.

    Args:
        cfg: the run's config, or the path of it.
    """
    if isinstance(cfg, str):
        if not os.path.isfile(cfg):
            raise ConfigError(f"the run's config '{cfg}' does not exist: name it with cfg=")
        cfg = CfgNode(CfgNode.load_yaml_with_base(cfg))
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
    name = plain.MODEL.META_ARCHITECTURE
    plain.MODEL.META_ARCHITECTURE = PLAIN_META_ARCHITECTURES.get(name, name)
    if node == "TIMM":
        plain.MODEL.TIMM.PRETRAINED = False  # the checkpoint has the weights
    return plain


def _known_part(cfg: CfgNode, known: CfgNode) -> CfgNode:
    """The keys of ``cfg`` that ``known`` has as well, at every depth."""
    part = CfgNode()
    for key, value in cfg.items():
        if key in known:
            is_node = isinstance(value, CfgNode) and isinstance(known[key], CfgNode)
            part[key] = _known_part(value, known[key]) if is_node else value
    return part


def find_run(src: str) -> tuple[str, str]:
    """Returns the checkpoint that ``src`` means and the path of its config."""
    if not os.path.isdir(src):
        return src, os.path.join(os.path.dirname(src), "config.yaml")
    checkpoint = last_checkpoint(src)
    if checkpoint is None:
        raise ConfigError(
            f"'{src}' is no output folder of a run: it has no '{LAST_CHECKPOINT}'; name the"
            " checkpoint file itself"
        )
    return str(checkpoint), os.path.join(src, "config.yaml")
