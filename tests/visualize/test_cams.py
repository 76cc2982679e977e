import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from torch.nn.functional import interpolate

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.cams import activation_map, draw_cams, largest_object
from kd_detectron.visualize.models import dataset_records, load_run_student


@pytest.fixture
def model(write_trained_run):
    return load_run_student(write_trained_run("a", ap=[30.0]))


def test_given_box_is_classified_as_the_detector_does(model):
    record = dataset_records(model.cfg)[0][0]
    batch = model.batch(record)
    found = model.model.inference([model.inputs(record)], do_postprocess=False)[0]
    features = model.model.backbone(batch.tensor)
    proposals, _ = model.model.proposal_generator(batch, features, None)
    heads = model.model.roi_heads
    pooled = heads.box_pooler(
        [features[level] for level in heads.box_in_features], [proposals[0].proposal_boxes]
    )
    expected = heads.box_predictor(heads.box_head(pooled))[0]
    height, width = batch.image_sizes[0]
    scale = np.array([record["width"] / width, record["height"] / height] * 2, dtype=np.float32)
    boxes = proposals[0].proposal_boxes.tensor.detach().numpy() * scale
    assert len(found) > 0
    torch.testing.assert_close(model.classify(record, boxes)[0], expected)


def test_map_is_grad_cam_by_hand(model):
    record = dataset_records(model.cfg)[0][0]
    box, category = largest_object(record)
    found = activation_map(model, record, box, category)

    batch = model.batch(record)
    features = model.model.backbone(batch.tensor)
    level = features[found.level]
    scale = torch.tensor([batch.image_sizes[0][1] / 64, batch.image_sizes[0][0] / 48]).repeat(2)
    boxes = Boxes(torch.as_tensor(box[None]) * scale)
    heads = model.model.roi_heads
    pooled = heads.box_pooler([features[x] for x in heads.box_in_features], [boxes])
    logits = heads.box_predictor(heads.box_head(pooled))[0]
    (gradient,) = torch.autograd.grad(logits[0, category], level)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * level).sum(dim=1).relu()[0].detach()
    # Enlarged from the level's grid to the padded batch, cut to the image, reduced to the file.
    expected = interpolate(expected[None, None], batch.tensor.shape[-2:], mode="bilinear")
    height, width = batch.image_sizes[0]
    expected = interpolate(expected[..., :height, :width], (48, 64), mode="bilinear")[0, 0].numpy()
    assert found.values.shape == expected.shape
    assert np.corrcoef(found.values.ravel(), expected.ravel())[0, 1] > 0.999
    assert 0 <= found.values.min() < 0.1 and 0.9 < found.values.max() <= 1
    assert found.probability == pytest.approx(logits[0].softmax(0)[category].item(), abs=1e-5)


def test_frozen_model_is_explained_too(model):
    record = dataset_records(model.cfg)[0][0]
    box, category = largest_object(record)
    expected = activation_map(model, record, box, category).values
    model.model.requires_grad_(False)
    np.testing.assert_allclose(
        activation_map(model, record, box, category).values, expected, atol=1e-5
    )


def test_one_panel_per_object_and_model(write_trained_run, model, tmp_path, check_picture):
    other = load_run_student(write_trained_run("b", distillers=["CKD"], ap=[34.0], seed=3))
    records, names = dataset_records(model.cfg)
    figure = draw_cams([model, other], records[:2], names, tmp_path / "cam.png")
    *panels, bar = figure.axes
    assert len(panels) == 2 * 3 and "activation" in bar.get_ylabel()
    assert [axes.get_title() for axes in panels[:3]] == [
        "object",
        "baseline R50\n30.0 box AP",
        "CKD R50\n34.0 box AP",
    ]
    for axes in (*panels[1:3], *panels[4:6]):
        assert np.asarray(axes.images[1].get_array()).std() > 0
        assert axes.get_xlabel().startswith("p(")
    check_picture(tmp_path / "cam.png")


def test_image_without_objects_gets_one_sentence(model):
    records, names = dataset_records(model.cfg)
    empty = records[0] | {"annotations": []}
    with pytest.raises(ConfigError, match="no object to explain"):
        draw_cams([model], [empty], names)
