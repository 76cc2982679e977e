import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.models import choose_records, dataset_records, load_run_student
from kd_detectron.visualize.predictions import (
    MOST_DETECTIONS,
    class_colour,
    detections,
    draw_objects,
    draw_predictions,
    ground_truth,
)


@pytest.fixture
def models(write_trained_run):
    return [
        load_run_student(write_trained_run("a", ap=[30.0])),
        load_run_student(write_trained_run("b", distillers=["CKD"], ap=[34.0], seed=3)),
    ]


def test_one_panel_per_image_and_model_beside_the_ground_truth(models, tmp_path, check_picture):
    records, names = dataset_records(models[0].cfg)
    figure = draw_predictions(
        models, choose_records(records, 2), names, tmp_path / "p.png", score_threshold=0.0
    )
    assert len(figure.axes) == 2 * 3
    titles = [axes.get_title() for axes in figure.axes[:3]]
    assert titles == ["ground truth", "baseline R50\n30.0 box AP", "CKD R50\n34.0 box AP"]
    panels = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    assert all(panel.std() > 0 for panel in panels)
    assert not np.array_equal(panels[1], panels[2])
    check_picture(tmp_path / "p.png")


def test_untrained_model_draws_no_wall_of_boxes():
    instances = Instances((48, 64))
    instances.pred_boxes = Boxes(torch.zeros(100, 4))
    instances.scores = torch.linspace(0.1, 1.0, 100)
    instances.pred_classes = torch.zeros(100, dtype=torch.int64)
    shown = detections(instances, 0.0)
    assert len(shown.boxes) == len(shown.scores) == MOST_DETECTIONS
    assert shown.scores[0] == 1.0


def test_masks_are_drawn(write_trained_run):
    model = load_run_student(write_trained_run("mask", mask=True))
    records, names = dataset_records(model.cfg)
    assert ground_truth(records[0]).masks is not None
    assert detections(model.detect(records[0]), 0.0).masks[0].shape == (48, 64)
    assert len(draw_predictions([model], records[:1], names, score_threshold=0.0).axes) == 2


def test_ground_truth_has_masks_only_beside_a_model_that_has(models, write_trained_run):
    records, names = dataset_records(models[0].cfg)
    with_masks = load_run_student(write_trained_run("mask", mask=True))

    def inside_of_the_object(shown):
        axes = draw_predictions(shown, records[:1], names).axes[0]
        pixels = np.asarray(axes.images[0].get_array())
        # A white rectangle at 6, 8 of 24 x 20 in an image of 48 x 64.
        row, column = (np.array([18, 18]) * pixels.shape[1] / 64).astype(int)
        return pixels[row, column].tolist()

    assert inside_of_the_object(models) == [230, 230, 230]
    assert inside_of_the_object([with_masks]) != [230, 230, 230]


def test_score_threshold_holds_for_every_model(models):
    records, _ = dataset_records(models[0].cfg)
    found = models[0].detect(records[0])
    threshold = float(found.scores.median())
    kept = detections(found, threshold)
    assert 0 < len(kept.scores) < len(found) and min(kept.scores) >= threshold
    assert detections(found, 1.01).boxes.shape == (0, 4)


def test_image_without_objects_is_drawn_plain():
    image = np.full((20, 30, 3), 128, dtype=np.uint8)
    drawn = draw_objects(image, ground_truth({}))
    assert np.unique(drawn).tolist() == [128]


def test_every_class_has_a_colour_of_its_own():
    assert len({class_colour(index) for index in range(80)}) == 80


def test_model_of_other_classes_is_refused(models):
    records, _ = dataset_records(models[0].cfg)
    with pytest.raises(ConfigError, match="detects 3 classes"):
        draw_predictions(models, records[:1], ["one"])
    with pytest.raises(ConfigError, match="no image to draw"):
        draw_predictions(models, [], ["one"])
