import numpy as np
import pytest
import torch

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.features import (
    compare_features,
    draw_feature_differences,
    feature_difference,
    linear_cka,
)
from kd_detectron.visualize.models import dataset_records, load_run_student

LEVELS = ["p2", "p3", "p4", "p5", "p6"]


@pytest.fixture
def teacher(write_trained_run):
    return load_run_student(write_trained_run("teacher", depth=101, seed=5), label="teacher R101")


@pytest.fixture
def student(write_trained_run):
    return load_run_student(write_trained_run("student", ap=[30.0]))


def test_difference_is_one_minus_cosine_at_every_location():
    teacher = torch.tensor([[[1.0, 0.0, 2.0]], [[0.0, 1.0, 0.0]]])
    student = torch.tensor([[[3.0, 1.0, -1.0]], [[0.0, 0.0, 0.0]]])
    expected = torch.tensor([[0.0, 1.0, 2.0]])
    torch.testing.assert_close(feature_difference(student, teacher), expected)


def test_cka_ignores_rotation_scale_and_offset_of_the_channels():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    assert linear_cka(features @ rotation * 3 + 1, features) == pytest.approx(1.0)
    unrelated = torch.randn(5000, 6, generator=generator)
    assert linear_cka(unrelated, torch.randn(5000, 6, generator=generator)) < 0.05
    assert np.isnan(linear_cka(torch.ones(50, 6), features))


def test_cka_is_that_of_the_two_loop_definition():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, generator=generator).double()
    y = torch.randn(7, 4, generator=generator).double()
    centre = torch.eye(7).double() - 1 / 7

    def hsic(a, b):
        return torch.trace(a @ a.T @ centre @ b @ b.T @ centre)

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert linear_cka(x, y) == pytest.approx(float(expected))


def test_model_does_not_differ_from_itself(student):
    records, _ = dataset_records(student.cfg)
    found = compare_features(student, student, records[:2])
    assert list(found.difference) == LEVELS
    assert all(value == pytest.approx(0.0, abs=1e-5) for value in found.difference.values())
    assert all(value == pytest.approx(1.0) for value in found.cka.values())


def test_padding_is_not_compared(student):
    records, _ = dataset_records(student.cfg)
    # 48 x 64 is read as 64 x 85 and padded to 64 x 96: p2 (stride 4) covers 22 of 24 columns.
    assert student.batch(records[0]).tensor.shape[-2:] == (64, 96)
    assert student.features(records[0])["p2"].shape == (16, 16, 22)


def test_maps_and_bars_of_every_level(student, teacher, write_trained_run, tmp_path, check_picture):
    distilled = load_run_student(write_trained_run("b", distillers=["ReviewKD"], seed=3))
    records, _ = dataset_records(student.cfg)
    figure = draw_feature_differences(
        teacher, [student, distilled], records[:3], tmp_path / "features.png"
    )
    maps, (bar, *charts) = figure.axes[:12], figure.axes[12:]
    assert [axes.get_title() for axes in maps[1:6]] == LEVELS
    assert "cosine" in bar.get_ylabel()
    assert [axes.get_ylabel() for axes in charts] == ["1 - cosine", "linear CKA"]
    found = compare_features(distilled, teacher, records[:3])
    heights = [bar.get_height() for bar in charts[0].containers[1]]
    assert heights == [found.difference[level] for level in LEVELS]
    assert all(np.asarray(maps[i].images[0].get_array()).std() > 0 for i in (1, 2, 7, 8))
    check_picture(tmp_path / "features.png")


def test_models_that_do_not_compare_get_one_sentence(student, write_trained_run):
    records, _ = dataset_records(student.cfg)
    wide = load_run_student(write_trained_run("wide", opts=["MODEL.FPN.OUT_CHANNELS", 32]))
    with pytest.raises(ConfigError, match=r"level p2 is \(16, 16, 22\).*\(32, 16, 22\)"):
        compare_features(student, wide, records[:1])
    with pytest.raises(ConfigError, match="no image"):
        compare_features(student, student, [])
