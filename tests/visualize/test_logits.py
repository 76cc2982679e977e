import numpy as np
import pytest
import torch

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.logits import (
    box_logits,
    class_correlation,
    draw_correlations,
)
from kd_detectron.visualize.models import dataset_records, load_run_student


@pytest.fixture
def models(write_trained_run):
    return [
        load_run_student(write_trained_run("teacher", depth=101, seed=5), label="teacher R101"),
        load_run_student(write_trained_run("a", ap=[30.0])),
        load_run_student(write_trained_run("b", distillers=["CKD"], ap=[34.0], seed=3)),
    ]


def test_every_model_classifies_the_annotated_boxes(models):
    records, _ = dataset_records(models[0].cfg)
    logits = box_logits(models[1], records)
    assert logits.shape == (6, 4)
    with pytest.raises(ConfigError, match="no box to classify"):
        box_logits(models[1], [records[0] | {"annotations": []}])


def test_correlation_is_that_of_every_two_columns():
    logits = torch.tensor([[1.0, -2.0, 5.0], [2.0, -4.0, 5.0], [4.0, -8.0, 5.0]])
    matrix = class_correlation(logits)
    np.testing.assert_allclose(matrix[:2, :2], [[1, -1], [-1, 1]], atol=1e-12)
    assert np.isnan(matrix[2]).all() and np.isnan(matrix[:, 2]).all()


def test_each_student_stands_above_its_distance_to_the_teacher(models, tmp_path, check_picture):
    records, names = dataset_records(models[0].cfg)
    teacher, *students = models
    figure = draw_correlations(teacher, students, records, names, tmp_path / "c.png")
    matrices = [class_correlation(box_logits(model, records)) for model in models]
    distance = np.abs(matrices[2] - matrices[0]).mean()
    assert figure.axes[5].get_title() == f"distance to the teacher: {distance:.3f}"
    assert len(figure.axes) == 6 + 2
    assert [axes.get_title().split("\n")[0] for axes in figure.axes[:3]] == [
        "teacher R101",
        "baseline R50",
        "CKD R50",
    ]
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["cat", "dog", "hen", "background"]
    check_picture(tmp_path / "c.png")
