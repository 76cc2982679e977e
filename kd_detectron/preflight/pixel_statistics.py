"""Warns where images are normalised by a mean and standard deviation that cannot be theirs.

Images in one channel order with the statistics of the other, as in the release of the papers, or
with those of images in 0..1, train without an error, to some points of AP less. All of it is a
warning: own data may have any. Those of pretrained weights: ``backbones/pixel_statistics.py``.
"""

import logging
from collections.abc import Sequence

from kd_detectron.backbones.pixel_statistics import IMAGENET_MEAN, IMAGENET_STD, near, rounded

logger = logging.getLogger(__name__)

# Variants in use (Caffe's, rounded ones) are within 2 of these; the two orders are 20 apart.
MEAN_TOLERANCE = 4.0
# The two orders are 1 apart.
STD_TOLERANCE = 0.25


def pixel_statistics_warning(
    who: str, input_format: str, mean: Sequence[float], std: Sequence[float]
) -> str | None:
    """Returns a sentence if images are normalised by statistics that cannot be theirs.

    That is, by those of images in 0..1, or by ImageNet's in the other channel order.

    Args:
        who: whose images these are, "student" or "teacher".
        input_format: "BGR" or "RGB".
        mean, std: what images in 0..255 are normalised by.
    """
    other = {"RGB": "BGR", "BGR": "RGB"}.get(input_format, "")
    wrong_mean = other and near(mean, IMAGENET_MEAN[other], MEAN_TOLERANCE)
    is_imagenet = wrong_mean or near(mean, IMAGENET_MEAN.get(input_format, ()), MEAN_TOLERANCE)
    wrong_std = other and is_imagenet and near(std, IMAGENET_STD[other], STD_TOLERANCE)
    # A mean of 0 with a standard deviation of 1 leaves the images as they are.
    if (any(mean) and max(map(abs, mean)) <= 1) or (len(std) and max(std) < 1):
        fault = "those of images in 0..1, but images are in 0..255 here"
        right = [[255 * value for value in values] for values in (mean, std)]
        otherwise = ""
    elif wrong_mean or wrong_std:
        which = "the mean" if wrong_mean else "the standard deviation"
        which = "both" if wrong_mean and wrong_std else which
        fault = f"ImageNet's in {other} order ({which}), but INPUT.FORMAT is {input_format}"
        right = [
            IMAGENET_MEAN[input_format] if wrong_mean else mean,
            IMAGENET_STD[input_format] if wrong_std else std,
        ]
        otherwise = f", or, if the weights were trained on {other} images, INPUT.FORMAT to {other}"
    else:
        return None
    where = " (in KD.TEACHER.CONFIG_FILE or KD.TEACHER.OPTS)" if who == "teacher" else ""
    return (
        f"MODEL.PIXEL_MEAN {rounded(mean)} and MODEL.PIXEL_STD {rounded(std)} of the {who} are"
        f" {fault}: set them to {rounded(right[0])} and {rounded(right[1])}{otherwise}{where}"
    )


def warn_of_pixel_statistics(model) -> list[str]:
    """Logs and returns where student or teacher normalise by statistics of other images.

    Args:
        model: a detector, distilled or plain, not wrapped in DistributedDataParallel.
    """
    detectors = {"student": (model, getattr(model, "input_format", None))}
    teacher = getattr(model, "teacher", None)
    if teacher is not None:
        detectors["teacher"] = (teacher.model, teacher.input_format)
    warnings = []
    for who, (detector, input_format) in detectors.items():
        values = (getattr(detector, name, None) for name in ("pixel_mean", "pixel_std"))
        mean, std = ([] if value is None else value.flatten().tolist() for value in values)
        warning = pixel_statistics_warning(who, input_format, mean, std)
        if warning:
            warnings.append(warning)
            logger.warning("%s", warning)
    return warnings
