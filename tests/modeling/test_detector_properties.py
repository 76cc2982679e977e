"""Every distilled detector takes what Detectron2's own takes: any size, no objects, no detections.

Values that are not finite are dropped when detecting and stop a training.
"""

import pytest
import torch
from detectors import DETECTORS, batch_for_all, detector_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

SIZES = {
    "one image": ((64, 96),),
    "several sizes": ((97, 61), (33, 130), (20, 24)),
}
WITH_BOX_HEAD = [name for name in DETECTORS if name not in ("RetinaNet", "Cascade R-CNN")]
WITH_RPN = [name for name in DETECTORS if name != "RetinaNet"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns a function that gives the model of a detector, built once for this file."""
    models = {}

    def model_of(detector):
        if detector not in models:
            torch.manual_seed(2)
            folder = tmp_path_factory.mktemp("detector")
            models[detector] = build_model(detector_cfg(folder, detector))
        return models[detector]

    return model_of


def images_and_features(model, value):
    """An image and the pyramid of it, filled with one value."""
    images = ImageList.from_tensors([torch.rand(3, 64, 96)])
    features = {
        level: torch.full((1, shape.channels, 64 // shape.stride, 96 // shape.stride), value)
        for level, shape in model.backbone.output_shape().items()
    }
    return images, features


@pytest.mark.parametrize("objects", [True, False], ids=["objects", "no objects"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("detector", DETECTORS)
def test_training_has_finite_losses_and_gradients(built, detector, sizes, objects):
    model = built(detector).train()
    model.zero_grad()
    batch = batch_for_all(sizes=sizes, boxes_per_image=[2 * objects] * len(sizes))
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert {f"loss_{name.lower()}" for name in model.distillers} <= losses.keys()
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("detector", DETECTORS)
@torch.no_grad()
def test_detections_lie_in_images_of_any_size(built, detector):
    model = built(detector).eval()
    sizes = [size for group in SIZES.values() for size in group]
    images = [
        {"image": torch.rand(3, h, w) * 255, "height": 2 * h, "width": 2 * w} for h, w in sizes
    ]
    for output, (height, width) in zip(model(images), sizes, strict=True):
        found = output["instances"]
        assert found.image_size == (2 * height, 2 * width) and len(found) > 0
        boxes = found.pred_boxes.tensor
        assert boxes.isfinite().all() and (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height]) * 2).all()
        assert ((found.pred_classes >= 0) & (found.pred_classes < 3)).all()


@pytest.mark.parametrize("detector", WITH_RPN)
@torch.no_grad()
def test_masks_and_keypoints_of_no_detections_are_empty(built, detector):
    model = built(detector).eval()
    nothing = Instances((64, 96))
    nothing.pred_boxes = Boxes(torch.zeros(0, 4))
    nothing.pred_classes = torch.zeros(0, dtype=torch.int64)
    nothing.scores = torch.zeros(0)
    _, features = images_and_features(model, 0.0)
    (found,) = model.roi_heads.forward_with_given_boxes(features, [nothing])
    assert len(found) == 0
    assert found.has("pred_masks") == model.roi_heads.mask_on
    assert found.has("pred_keypoints") == model.roi_heads.keypoint_on


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("detector", WITH_RPN)
@torch.no_grad()
def test_proposals_that_are_not_finite_are_dropped_or_stop_the_training(built, detector, value):
    model = built(detector)
    images, features = images_and_features(model, value)
    proposals, _ = model.proposal_generator.eval()(images, features)
    assert [len(of_image) for of_image in proposals] == [0]
    batch = batch_for_all(sizes=[(64, 96)], boxes_per_image=[1])
    with EventStorage(), pytest.raises(FloatingPointError, match="diverged"):
        model.proposal_generator.train()(images, features, [batch[0]["instances"]])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("detector", WITH_BOX_HEAD)
@torch.no_grad()
def test_detections_that_are_not_finite_are_dropped(built, detector, value):
    model = built(detector).eval()
    images, features = images_and_features(model, value)
    proposals = Instances((64, 96))
    proposals.proposal_boxes = Boxes(torch.tensor([[2.0, 3, 30, 40], [10, 10, 90, 60]]))
    (found,), _ = model.roi_heads(images, features, [proposals])
    assert len(found) == 0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@torch.no_grad()
def test_retinanet_detects_nothing_where_its_head_is_not_finite(tmp_path, value):
    model = build_model(detector_cfg(tmp_path, "RetinaNet")).eval()
    model.head.bbox_pred.bias.fill_(value)
    model.head.cls_score.bias.fill_(float("nan"))
    (output,) = model([{"image": torch.rand(3, 64, 96) * 255}])
    assert len(output["instances"]) == 0
