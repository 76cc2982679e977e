"""From config to teacher and distillers, with every incompatibility refused before the first step.

:func:`build_distillation` is what the meta-architectures call. The student is built first and the
random state is restored afterwards, so that a distilled student starts from the same weights as a
plain one under the same seed.
"""

import logging
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode

from kd_detectron.distillers import (
    DISTILLER_REGISTRY,
    Distiller,
    build_distiller,
    check_weight,
    find_distiller,
)
from kd_detectron.errors import ConfigError, did_you_mean

from .compatibility import check_fits
from .frozen_teacher import FrozenTeacher, model_spec
from .inherit import inherit_parts
from .teacher_loading import load_teacher

logger = logging.getLogger(__name__)


def build_distillation(cfg: CfgNode, student: Mapping) -> dict:
    """Builds the teacher and the distillers of a config, checked against the student.

    Parts that ``KD.TEACHER.INHERIT`` names are copied into the student, also where no distiller is
    named; the teacher is then freed.

    Args:
        cfg: the whole config.
        student: the student's parts by constructor name ("backbone", "roi_heads", ...).

    Returns:
        The arguments ``teacher``, ``distillers``, ``distillation_weights`` and ``inherited`` of the
        meta-architecture; no teacher and no distillers where ``KD.ENABLED`` is False or
        ``KD.DISTILLERS`` is empty.

    Raises:
        ConfigError: something named in ``KD`` is unknown or does not fit.
    """
    names = list(cfg.KD.DISTILLERS) if cfg.KD.ENABLED else []
    parts = list(cfg.KD.TEACHER.INHERIT) if cfg.KD.ENABLED else []
    built = {"teacher": None, "distillers": {}, "distillation_weights": {}, "inherited": ()}
    if not names and not parts:
        if cfg.KD.ENABLED and cfg.KD.TEACHER.CONFIG_FILE:
            logger.warning(
                "KD.TEACHER.CONFIG_FILE is '%s' but KD.DISTILLERS is empty: nothing is distilled",
                cfg.KD.TEACHER.CONFIG_FILE,
            )
        return built
    if not parts and cfg.KD.TEACHER.INHERIT_LR_FACTOR != 1:
        logger.warning(
            "KD.TEACHER.INHERIT_LR_FACTOR is %g but KD.TEACHER.INHERIT is empty: no part learns at"
            " another rate",
            cfg.KD.TEACHER.INHERIT_LR_FACTOR,
        )
    if len(set(names)) != len(names):
        raise ConfigError(f"KD.DISTILLERS is {names}: name each distiller once")
    student_model = SimpleNamespace(**student)
    student_spec = model_spec(student_model)
    weights, options = {}, {}
    for name in names:
        weights[name], options[name] = weight_and_options(cfg, name)
    # All devices by default, with a warning where there are several; one is used here.
    device = torch.device(cfg.MODEL.DEVICE)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Fail on a wrong name or option before minutes of teacher download.
        for name in names:
            build_distiller(name, options[name], student_spec, student_spec)
        model, input_format = load_teacher(cfg)
        built["inherited"] = inherit_parts(parts, student, model)
        if not names:
            return built
        teacher = FrozenTeacher.from_model(model, input_format, cfg)
        for name in names:
            requires = DISTILLER_REGISTRY.get(name).requires
            check_fits(name, requires, student_model, student_spec, teacher)
        distillers = {
            name: build_distiller(name, options[name], student_spec, teacher.spec) for name in names
        }
    return built | {
        "teacher": teacher,
        "distillers": distillers,
        "distillation_weights": weights,
    }


def weight_and_options(cfg: CfgNode, name: str) -> tuple[float, dict]:
    """What the node ``KD.<NAME>`` of a distiller says: its weight and its constructor's options.

    A distiller that was registered after the config was made has no node, and its defaults.

    Raises:
        ConfigError: no such distiller is registered, or its weight cannot be used.
    """
    cls = find_distiller(name)
    options = dict(cfg.KD.get(name.upper(), {}))
    weight = options.pop("WEIGHT", cls.default_weight)
    return check_weight(f"KD.{name.upper()}.WEIGHT", weight), options


def check_weights(
    weights: Mapping[str, float], distillers: Mapping[str, Distiller]
) -> dict[str, float]:
    """Weights by distiller as a meta-architecture is given them; its default where absent.

    Args:
        weights: the argument ``distillation_weights``.
        distillers: the distillers by name.

    Raises:
        ConfigError: a name is that of no distiller of the model, or a weight cannot be used.
    """
    for name, weight in weights.items():
        if name not in distillers:
            raise ConfigError(
                f"distillation_weights names '{name}', which is no distiller of the model"
                f"{did_you_mean(name, distillers)}"
            )
        check_weight(f"distillation_weights['{name}']", weight)
    return {name: float(weights.get(name, x.default_weight)) for name, x in distillers.items()}
