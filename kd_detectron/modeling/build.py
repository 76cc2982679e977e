"""From config to teacher and distillers, with every incompatibility refused before the first step.

:func:`build_distillers` is what the meta-architectures call. The student is built first and the
random state is restored afterwards, so that a distilled student starts from the same weights as a
plain one under the same seed.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from torch import nn

from kd_detectron.distillers import DISTILLER_REGISTRY, ModelSpec, build_distiller, find_distiller
from kd_detectron.errors import ConfigError

from .frozen_teacher import FrozenTeacher, model_spec
from .taps import anchor_levels_of
from .teacher_loading import load_teacher

logger = logging.getLogger(__name__)


def build_distillers(cfg: CfgNode, student: Mapping) -> dict:
    """Builds the teacher and the distillers of a config, checked against the student.

    Args:
        cfg: the whole config.
        student: the student's parts by constructor name ("backbone", "roi_heads", ...).

    Returns:
        The arguments ``teacher``, ``distillers`` and ``distillation_weights`` of the
        meta-architecture; no teacher and no distillers where ``KD.ENABLED`` is False.

    Raises:
        ConfigError: something named in ``KD`` is unknown or does not fit.
    """
    names = list(cfg.KD.DISTILLERS) if cfg.KD.ENABLED else []
    if not names:
        if cfg.KD.ENABLED and cfg.KD.TEACHER.INHERIT:
            raise ConfigError(
                f"KD.TEACHER.INHERIT is {list(cfg.KD.TEACHER.INHERIT)} but KD.DISTILLERS is empty, "
                "so no teacher is built; name a distiller (KD.SCHEDULE.STOP_ITER 1 ends it at once)"
            )
        return {"teacher": None, "distillers": {}, "distillation_weights": {}}
    if len(set(names)) != len(names):
        raise ConfigError(f"KD.DISTILLERS is {names}: name each distiller once")
    student_model = SimpleNamespace(**student)
    student_spec = model_spec(student_model)
    weights, options = {}, {}
    for name in names:
        weights[name], options[name] = weight_and_options(cfg, name)
    with torch.random.fork_rng():
        # Fail on a wrong name or option before minutes of teacher download.
        for name in names:
            build_distiller(name, options[name], student_spec, student_spec)
        model, input_format = load_teacher(cfg)
        inherit(cfg.KD.TEACHER.INHERIT, student, model)
        teacher = FrozenTeacher.from_model(model, input_format, cfg)
        for name in names:
            requires = DISTILLER_REGISTRY.get(name).requires
            check_fits(name, requires, student_model, student_spec, teacher)
        distillers = {
            name: build_distiller(name, options[name], student_spec, teacher.spec) for name in names
        }
    return {"teacher": teacher, "distillers": distillers, "distillation_weights": weights}


def inherit(parts: Sequence[str], student: Mapping, teacher: nn.Module) -> None:
    """Starts parts of the student from the teacher's weights: the inheriting strategy.

    As in Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection" (arXiv
    2110.12724), where neck and heads are inherited. A student that starts from scratch need not
    learn again what a box head is.

    Args:
        parts: the starts of the names, ``KD.TEACHER.INHERIT``.
        student: the student's parts by constructor name.
        teacher: the whole detector, as :func:`load_teacher` returns it.

    Raises:
        ConfigError: the teacher has no such part, or the student's is another.
    """
    modules = {name: part for name, part in student.items() if isinstance(part, nn.Module)}
    own = {f"{n}.{key}": t for n, part in modules.items() for key, t in part.state_dict().items()}
    for part in parts:
        inherited = {key: t for key, t in teacher.state_dict().items() if key.startswith(part)}
        wrong = [k for k, t in inherited.items() if k not in own or own[k].shape != t.shape]
        if not inherited or wrong:
            example = f", e.g. {wrong[0]}" if wrong else ""
            raise ConfigError(
                f"KD.TEACHER.INHERIT has '{part}', of which the teacher has {len(inherited)} "
                f"tensors; the student lacks {len(wrong)} of them or has them in another shape"
                f"{example}; name only parts that are built alike (MODEL.FPN, .RPN, .ROI_*)"
            )
        for key, tensor in inherited.items():
            own[key].copy_(tensor)
        logger.info("Inherited from the teacher: %s (%d tensors)", part, len(inherited))


def weight_and_options(cfg: CfgNode, name: str) -> tuple[float, dict]:
    """What the node ``KD.<NAME>`` of a distiller says: its weight and its constructor's options.

    A distiller that was registered after the config was made has no node, and its defaults.

    Raises:
        ConfigError: no such distiller is registered, or its weight cannot be used.
    """
    cls = find_distiller(name)
    options = dict(cfg.KD.get(name.upper(), {}))
    weight = options.pop("WEIGHT", cls.default_weight)
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise ConfigError(
            f"KD.{name.upper()}.WEIGHT is {weight}; it must be a finite number, not negative"
        )
    return float(weight), options


def check_fits(
    name: str,
    requires: frozenset[str],
    student_model,
    student: ModelSpec,
    teacher: FrozenTeacher,
) -> None:
    """Refuses a distiller that reads parts which student or teacher lack or do not share.

    Raises:
        ConfigError: naming the key, both values and the fix.
    """
    if requires & {"logits", "box_features"}:
        for who, spec in (("student", student), ("teacher", teacher.spec)):
            if spec.box_channels is None:
                raise ConfigError(
                    f"KD.DISTILLERS has '{name}', which reads box-head outputs, but the {who} has "
                    "not exactly one box head (RetinaNet, Cascade and C4 models); use feature "
                    "distillers such as ReviewKD, or a Faster or Mask R-CNN with FPN"
                )
    if "logits" in requires and student.num_classes != teacher.spec.num_classes:
        raise ConfigError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {student.num_classes} for the student and "
            f"{teacher.spec.num_classes} for the teacher, but '{name}' compares their logits; "
            "train the teacher on the student's classes, or use feature distillers alone"
        )
    if "features" in requires:
        _check_levels(name, student, teacher.spec)
        paddings = [padding_of(m.backbone) for m in (student_model, teacher.model)]
        if paddings[0] != paddings[1]:
            raise ConfigError(
                f"'{name}' compares feature maps, but images are padded {paddings[0]} for the "
                f"student (MODEL.BACKBONE.NAME) and {paddings[1]} for the teacher "
                "(KD.TEACHER.CONFIG_FILE), so the maps' sizes differ; choose backbones that pad "
                "alike, or distillers of logits or box features alone"
            )
    if "anchors" in requires and anchor_levels_of(student_model) is None:
        raise ConfigError(
            f"KD.DISTILLERS has '{name}', which reads anchors, but the student has no anchor "
            "generator; remove it or use an RPN (MODEL.PROPOSAL_GENERATOR.NAME)"
        )


def padding_of(backbone) -> str:
    """How Detectron2 pads images for a backbone, as text: "to multiples of 32" pixels."""
    constraints = backbone.padding_constraints
    multiple = constraints.get("size_divisibility", backbone.size_divisibility)
    if square := constraints.get("square_size", 0):
        side = math.ceil(square / multiple) * multiple if multiple else square
        return f"to squares of {side}"
    return f"to multiples of {multiple}"


def _check_levels(name: str, student: ModelSpec, teacher: ModelSpec) -> None:
    if list(student.strides.items()) != list(teacher.strides.items()):
        raise ConfigError(
            f"'{name}' compares feature levels, but the student's (MODEL.FPN) are "
            f"{_levels(student)} and the teacher's (KD.TEACHER.CONFIG_FILE) are "
            f"{_levels(teacher)}; choose a teacher with the same levels and strides"
        )


def _levels(spec: ModelSpec) -> str:
    return ", ".join(f"{level} (stride {stride})" for level, stride in spec.strides.items())
