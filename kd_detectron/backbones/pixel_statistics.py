"""The mean and standard deviation of the images that pretrained weights have seen.

Images that are normalised otherwise train without an error, to some points of AP less: a warning.
"""

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)

IMAGENET_MEAN = {"RGB": (123.675, 116.28, 103.53), "BGR": (103.53, 116.28, 123.675)}
IMAGENET_STD = {"RGB": (58.395, 57.12, 57.375), "BGR": (57.375, 57.12, 58.395)}
# How far statistics may be from those of pretrained weights.
PRETRAINED_TOLERANCE = 1.0


def near(values: Sequence[float], expected: Sequence[float], tolerance: float) -> bool:
    """Whether two statistics have as many channels and differ by at most ``tolerance`` in each."""
    return len(values) == len(expected) and all(
        abs(a - b) <= tolerance for a, b in zip(values, expected, strict=True)
    )


def rounded(values: Sequence[float]) -> list[float]:
    """Statistics as messages show them."""
    return [round(value, 3) for value in values]


def warn_of_pretrained_statistics(
    source: str,
    trained_mean: Sequence[float],
    trained_std: Sequence[float],
    *,
    input_format: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Logs if images are not normalised as those that pretrained weights have seen.

    Args:
        source: where the weights come from, as the warning names it.
        trained_mean, trained_std: statistics of the weights' images in 0..255, in RGB order; empty
            where they are not known.
        input_format: "BGR" or "RGB", the order of the student's images.
        mean, std: the student's ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD``.
    """
    order = slice(None, None, -1 if input_format == "BGR" else 1)
    for key, trained, own in (("MEAN", trained_mean, mean), ("STD", trained_std, std)):
        expected = list(trained)[order]
        if expected and not near(expected, own, PRETRAINED_TOLERANCE):
            logger.warning(
                "%s was trained with MODEL.PIXEL_%s %s (for INPUT.FORMAT %s), but it is %s",
                *(source, key, rounded(expected), input_format, rounded(own)),
            )
