"""The distiller: what a knowledge distillation method is to the rest of this project.

A distiller is an ``nn.Module`` that is called once per training step with a
:class:`~kd_detectron.context.DistillationContext` (what the student and the frozen teacher
computed in this step) and returns named losses, unweighted. The meta-architecture multiplies them
by ``KD.<NAME>.WEIGHT`` and by the schedule, and adds them to the detector's own losses.

Shapes used throughout: N images, R sampled proposals over the whole batch, K foreground classes,
so that logits are (R, K+1) with the last column background; C channels, D box-feature channels.

This file, like every distiller and loss, is plain PyTorch: it runs without Detectron2.
"""

import inspect
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from fvcore.common.registry import Registry
from torch import nn

from kd_detectron.errors import ConfigError, did_you_mean

# The outputs of a detector that differ from class to class.
CLASS_OUTPUTS = frozenset({"logits", "box_deltas", "mask_logits"})

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Distillers by name, the name that ``KD.DISTILLERS`` lists. A registered object must be a subclass of
:class:`Distiller`; its options are the keyword-only parameters of its ``__init__``, read from its
config node ``KD.<NAME IN CAPITALS>``.
"""


@dataclass(frozen=True)
class ModelSpec:
    """What a distiller may need to know of a model to build its own layers.

    Args:
        channels: channels C of each feature level, by level name, fine to coarse ("p2".."p6").
        strides: stride in input pixels of each feature level, by level name, in the same order.
        num_classes: number K of foreground classes; None for a detector without ROI heads.
        box_channels: width D of the box head's output; None without one box head.
    """

    channels: Mapping[str, int] = field(default_factory=dict)
    strides: Mapping[str, int] = field(default_factory=dict)
    num_classes: int | None = None
    box_channels: int | None = None


class Distiller(nn.Module):
    """Base class of every method: subclass, register, return named losses from ``forward``.

    The keyword-only parameters of a subclass's constructor are its options: each is a key of its
    config node, with the same default and, in docs/config.md, the text under "Args:". Positional
    parameters are filled by :meth:`from_specs`.

    Class attributes:
        default_weight: default of ``KD.<NAME>.WEIGHT``, the factor on its losses.
        requires: the parts of the context that ``forward`` reads, a subset of ``{"features",
            "objectness", "box_features", "logits", "box_deltas", "mask_logits", "anchors"}``;
            "objectness" covers the anchors' deltas and labels. Checked against student and teacher
            when the model is built, so that a method that cannot work is refused before the first
            step. What no distiller requires is not computed.
    """

    default_weight: ClassVar[float] = 1.0
    requires: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_specs(cls, student: ModelSpec, teacher: ModelSpec, **options) -> "Distiller":
        """Builds the distiller for these two models; override to size adapter layers.

        Args:
            student, teacher: what is known of the two models.
            options: the distiller's config node, keys in lower case, without ``weight``.
        """
        return cls(**options)

    def forward(self, context) -> dict[str, torch.Tensor]:
        """Returns ``{"loss_<name>": scalar}`` for one step, unweighted, with a graph."""
        raise NotImplementedError


def find_distiller(name: str) -> type[Distiller]:
    """Returns the distiller that is registered under a name of ``KD.DISTILLERS``.

    Raises:
        ConfigError: there is none.
    """
    if name not in DISTILLER_REGISTRY:
        known = [key for key, _ in DISTILLER_REGISTRY]
        raise ConfigError(
            f"KD.DISTILLERS names '{name}', which is not registered{did_you_mean(name, known)}"
            " (import your own file first: tools/train_net.py --import FILE.py)"
        )
    return DISTILLER_REGISTRY.get(name)


def check_classes(
    name: str, requires: Collection[str], student: ModelSpec, teacher: ModelSpec, *, key: str
) -> None:
    """Refuses a distiller that compares outputs of each class, where the class counts differ."""
    if CLASS_OUTPUTS.intersection(requires) and student.num_classes != teacher.num_classes:
        raise ConfigError(
            f"{key} is {student.num_classes} for the student and {teacher.num_classes} for the "
            f"teacher, but '{name}' compares their outputs class by class; train the teacher on "
            "the student's classes, or use feature distillers alone"
        )


def check_weight(key: str, weight: float) -> float:
    """Returns a distiller's weight if it can be used; else a ConfigError that names ``key``."""
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise ConfigError(f"{key} is {weight}; it must be a finite number, not negative")
    return float(weight)


def option_defaults(cls: type[Distiller]) -> dict[str, Any]:
    """Options of a distiller with their defaults: its constructor's keyword-only parameters."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def build_distiller(
    name: str, options: Mapping, student: ModelSpec, teacher: ModelSpec
) -> Distiller:
    """Builds one distiller by its registered name.

    Args:
        name: a name of ``KD.DISTILLERS``.
        options: its config node as a mapping, without ``WEIGHT``; keys in any case.
        student, teacher: what is known of the two models.

    Raises:
        ConfigError: the name or an option is unknown, or a value is refused by the distiller.
    """
    cls = find_distiller(name)
    known = {option.upper(): option for option in option_defaults(cls)}
    for key in options:
        if key.upper() not in known:
            raise ConfigError(
                f"KD.{name.upper()} has no option {key.upper()}"
                f"{did_you_mean(key.upper(), [*known, 'WEIGHT'])}"
            )
    options = {known[key.upper()]: value for key, value in options.items()}
    return cls.from_specs(student, teacher, **options)
