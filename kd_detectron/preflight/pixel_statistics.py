"""Warns where images are normalised by a mean and standard deviation that cannot be theirs.

Images in one channel order with the statistics of the other, as in the release of the papers, or
with those of images in 0..1, train without an error, to some points of AP less. All of it is a
warning: own data may have any. Those of pretrained weights: ``backbones/pixel_statistics.py``.
"""

import logging
from collections.abc import Mapping, Sequence

from kd_detectron.backbones.pixel_statistics import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    near,
    rounded,
)

logger = logging.getLogger(__name__)

# Variants in use (Caffe's, rounded ones) are within 2 of these; the two orders are 20 apart.
MEAN_TOLERANCE = 4.0
# The two orders are 1 apart.
STD_TOLERANCE = 0.25


def pixel_statistics_warning(
    who: str,
    input_format: str,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    format_key: str,
    mean_key: str,
    std_key: str,
) -> str | None:
    """Returns a sentence if images are normalised by statistics that cannot be theirs.

    That is, by those of images in 0..1, or by ImageNet's in the other channel order. Own data may
    have any others.

    Args:
        who: whose images these are, "student" or "teacher".
        input_format: "BGR" or "RGB".
        mean, std: what images in 0..255 are normalised by.
        format_key, mean_key, std_key: the config keys of the three.
    """
    faults = []
    shown = f"{mean_key} {rounded(mean)} and {std_key} {rounded(std)} of the {who}"
    # A mean of 0 with a standard deviation of 1 leaves the images as they are.
    if (any(mean) and max(map(abs, mean)) <= 1) or (len(std) and max(std) < 1):
        faults.append("those of images in 0..1, but images are in 0..255 here")
        mean, std = ([255 * value for value in values] for values in (mean, std))
    other = {"RGB": "BGR", "BGR": "RGB"}.get(input_format)
    mean_order = _imagenets_order(mean, IMAGENET_MEAN, MEAN_TOLERANCE)
    std_order = _imagenets_order(std, IMAGENET_STD, STD_TOLERANCE)
    in_other_order = [
        key
        for key, order in ((mean_key, mean_order), (std_key, std_order))
        if mean_order and order == other
    ]
    if in_other_order:
        keys = " and ".join(in_other_order)
        faults.append(f"ImageNet's in {other} order ({keys}), but {format_key} is {input_format}")
    if not faults:
        return None
    right_mean = IMAGENET_MEAN[input_format] if mean_order in IMAGENET_MEAN else mean
    right_std = IMAGENET_STD[input_format] if std_order in IMAGENET_STD else std
    fix = f"set them to {rounded(right_mean)} and {rounded(right_std)}"
    if in_other_order:
        fix += f", or, if the weights were trained on {other} images, {format_key} to {other}"
    return f"{shown} are {', and '.join(faults)}: {fix}"


def _imagenets_order(
    values: Sequence[float], imagenets: Mapping[str, Sequence[float]], tolerance: float
) -> str | None:
    """The channel order in which these are ImageNet's statistics, if they are."""
    orders = [order for order, expected in imagenets.items() if near(values, expected, tolerance)]
    return orders[0] if orders else None


def warn_of_pixel_statistics(model) -> list[str]:
    """Logs where student or teacher normalise by statistics that cannot be their images'.

    Args:
        model: a detector, distilled or plain, not wrapped in DistributedDataParallel.

    Returns:
        The warnings.
    """
    found = [
        pixel_statistics_warning(
            "student",
            getattr(model, "input_format", None),
            *_statistics_of(model),
            format_key="INPUT.FORMAT",
            mean_key="MODEL.PIXEL_MEAN",
            std_key="MODEL.PIXEL_STD",
        )
    ]
    teacher = getattr(model, "teacher", None)
    if teacher is not None:
        found.append(
            pixel_statistics_warning(
                "teacher",
                teacher.input_format,
                *_statistics_of(teacher.model),
                format_key="INPUT.FORMAT of KD.TEACHER.CONFIG_FILE",
                mean_key="its MODEL.PIXEL_MEAN (by KD.TEACHER.OPTS)",
                std_key="its MODEL.PIXEL_STD",
            )
        )
    warnings = [warning for warning in found if warning]
    for warning in warnings:
        logger.warning("%s", warning)
    return warnings


def _statistics_of(model) -> tuple[list[float], list[float]]:
    values = (getattr(model, name, None) for name in ("pixel_mean", "pixel_std"))
    mean, std = ([] if value is None else value.flatten().tolist() for value in values)
    return mean, std
