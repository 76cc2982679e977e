"""What distillers refuse when they are built: option values and feature levels that cannot work.

Each check raises one ConfigError that names the config key, so that nothing fails inside the first
training step.
"""

import math
from collections.abc import Sequence

from kd_detectron.errors import ConfigError

from .base import ModelSpec


def check_number(
    key: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
) -> float:
    """Returns ``value`` if it is a finite number within the bounds given.

    Raises:
        ConfigError: it is not; ``key`` is the config key that the message names.
    """
    wanted = ["a finite number"]
    wanted += [f"above {above:g}"] if above is not None else []
    wanted += [f"at least {at_least:g}"] if at_least is not None else []
    wanted += [f"below {below:g}"] if below is not None else []
    fits = (
        isinstance(value, (int, float))
        and math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
    )
    if not fits:
        raise ConfigError(f"{key} is {value!r}; give {', '.join(wanted)}")
    return value


def check_whole_number(key: str, value: int, *, at_least: int) -> int:
    """Returns ``value`` if it is a whole number of at least ``at_least``; else a ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"{key} is {value!r}; give a whole number of at least {at_least}")
    return value


def level_channels(
    name: str, student: ModelSpec, teacher: ModelSpec
) -> tuple[list[int], list[int]]:
    """Channels of the student's levels and of the teacher's levels of the same names.

    Args:
        name: the distiller, for the message.
        student, teacher: what is known of the two models.

    Returns:
        Two lists, one entry for each level of the student, fine to coarse.

    Raises:
        ConfigError: the student has no feature levels, or one that the teacher lacks.
    """
    missing = [level for level in student.channels if level not in teacher.channels]
    if missing or not student.channels:
        raise ConfigError(
            f"KD.DISTILLERS names {name}, which compares feature levels of the same name: the"
            f" student has {list(student.channels)}, the teacher of KD.TEACHER.CONFIG_FILE has"
            f" {list(teacher.channels)}; choose a teacher with the student's levels"
        )
    return list(student.channels.values()), [teacher.channels[level] for level in student.channels]


def count_levels(key: str, strides: Sequence[int], max_stride: int) -> int:
    """How many levels, fine to coarse, have at most this stride.

    Raises:
        ConfigError: none has, or ``max_stride`` is not a whole number of at least 1; ``key`` is the
            config key to name.
    """
    check_whole_number(key, max_stride, at_least=1)
    count = sum(stride <= max_stride for stride in strides)
    if not count:
        raise ConfigError(
            f"{key} is {max_stride}, but the strides of the feature levels are {list(strides)}; "
            "raise it to one of them"
        )
    return count


def check_same_channels(name: str, own: list[int], others: list[int], instead: str) -> None:
    """Refuses levels of different widths, for a distiller without adapters.

    Args:
        name: the distiller, for the message.
        own, others: channels of the student's and of the teacher's levels.
        instead: another remedy, for the message.

    Raises:
        ConfigError: they differ.
    """
    if own != others:
        raise ConfigError(
            f"KD.DISTILLERS names {name}, which compares the maps as they are, but the student's "
            f"levels (MODEL.FPN.OUT_CHANNELS) have {own} channels and the teacher's {others}; "
            f"give both the same width, or {instead}"
        )
