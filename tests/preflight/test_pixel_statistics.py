"""A mean or standard deviation that cannot be the images' is warned of, with the fix."""

import pytest
from detectron2.modeling import build_model
from tiny import distilled_cfg, tiny_cfg

from kd_detectron.preflight.pixel_statistics import (
    pixel_statistics_warning,
    warn_of_pixel_statistics,
)

RGB_MEAN, BGR_MEAN = [123.675, 116.28, 103.53], [103.53, 116.28, 123.675]
RGB_STD, BGR_STD = [58.395, 57.12, 57.375], [57.375, 57.12, 58.395]


@pytest.mark.parametrize(
    ("student", "teacher", "warned"),
    [
        ([], [], []),
        (["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", RGB_MEAN], [], []),
        (["INPUT.FORMAT", "RGB"], [], ["student"]),  # as in the release of the papers
        (["MODEL.PIXEL_MEAN", RGB_MEAN], [], ["student"]),
        (["MODEL.PIXEL_MEAN", [122.7717, 115.9465, 102.9801]], [], ["student"]),  # Caffe's
        (["MODEL.PIXEL_MEAN", [90.0, 80.0, 70.0]], [], []),  # own data may look like anything
        ([], ["INPUT.FORMAT", "RGB"], ["teacher"]),
        (["INPUT.FORMAT", "RGB"], ["MODEL.PIXEL_MEAN", RGB_MEAN], ["student", "teacher"]),
    ],
)
def test_mean_in_the_other_channel_order_is_warned_of_with_the_fix(
    tmp_path, caplog, student, teacher, warned
):
    model = build_model(distilled_cfg(tmp_path, ["CKD"], [*student, "KD.TEACHER.OPTS", teacher]))
    found = warn_of_pixel_statistics(model)
    assert [
        who for text in found for who in ("student", "teacher") if f"of the {who} are" in text
    ] == (warned)
    for text in found:
        assert text in caplog.text
        assert "INPUT.FORMAT" in text and "PIXEL_MEAN" in text
        assert f"them to {RGB_MEAN}" in text or f"them to {BGR_MEAN}" in text


@pytest.mark.parametrize(
    ("order", "mean", "std", "words"),
    [
        # The standard deviation alone in the other order.
        (
            "RGB",
            RGB_MEAN,
            BGR_STD,
            ["(the standard", str(BGR_STD), f"to {RGB_MEAN} and {RGB_STD}"],
        ),
        (
            "BGR",
            BGR_MEAN,
            RGB_STD,
            ["(the standard", str(RGB_STD), f"to {BGR_MEAN} and {BGR_STD}"],
        ),
        # torchvision's, of images in 0..1; as often rounded.
        ("RGB", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], ["0..1", "255", f"to {RGB_MEAN}"]),
        ("BGR", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], ["0..1", "[127.5, 127.5, 127.5]"]),
        ("BGR", [0.4, 0.4, 0.4], [1.0, 1.0, 1.0], ["0..1"]),
        ("BGR", [0.0, 0.0, 0.0], [0.2, 0.2, 0.2], ["0..1"]),
        ("L", [0.5], [0.5], ["0..1"]),
    ],
)
def test_statistics_that_cannot_be_the_images_are_warned_of_with_the_fix(order, mean, std, words):
    text = pixel_statistics_warning("student", order, mean, std)
    for word in ["student", *words]:
        assert word in text, text


@pytest.mark.parametrize(
    ("order", "mean", "std"),
    [
        ("BGR", BGR_MEAN, [1.0, 1.0, 1.0]),  # Detectron2's default
        ("BGR", BGR_MEAN, BGR_STD),
        ("RGB", RGB_MEAN, RGB_STD),
        ("RGB", RGB_MEAN, [58.0, 57.0, 57.0]),  # rounded
        ("RGB", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),  # the network normalises by itself
        ("RGB", [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]),
        ("RGB", [90.0, 80.0, 70.0], BGR_STD),  # own data may look like anything
        ("L", [120.0], [60.0]),
        ("RGB", [], []),  # a detector without statistics
    ],
)
def test_statistics_that_can_be_the_images_are_not_warned_of(order, mean, std):
    assert pixel_statistics_warning("student", order, mean, std) is None


def test_channel_order_of_a_plain_detector_is_checked_too(tmp_path):
    opts = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "INPUT.FORMAT", "RGB"]
    assert len(warn_of_pixel_statistics(build_model(tiny_cfg(opts)))) == 1
