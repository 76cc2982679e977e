"""Torchvision's detectors by name: their options and their checkpoints."""

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from kd_detectron.errors import ConfigError
from kd_detectron.torchvision.models import build_detector

MV3 = "fasterrcnn_mobilenet_v3_large_320_fpn"
SMALL = {"min_size": 64, "max_size": 96}


def freeze_batch_norm(model: nn.Module) -> None:
    """As torchvision builds a detector on a pretrained backbone."""
    for layer in list(model.backbone.modules()):
        for name, child in layer.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(layer, name, FrozenBatchNorm2d(child.num_features))


def test_checkpoint_of_a_detector_on_a_pretrained_backbone_is_loaded_as_it_was(tmp_path):
    trained = build_detector(MV3, 3, options=SMALL)
    freeze_batch_norm(trained)
    for layer in trained.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.running_var.uniform_(0.5, 2.0)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    loaded = build_detector(MV3, 3, weights=str(tmp_path / "weights.pth"), options=SMALL)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in loaded.backbone.modules())
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = trained.eval().backbone(pixels)
        maps = loaded.eval().backbone(pixels)
    assert all(torch.equal(maps[level], expected[level]) for level in expected)


def test_checkpoint_of_a_training_that_diverged_is_refused(tmp_path):
    state = build_detector(MV3, 3, options=SMALL).state_dict()
    name = next(reversed(state))
    state[name] = torch.full_like(state[name], float("nan"))
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=f"weights.pth .* NaN or infinity in '{name}'"):
        build_detector(MV3, 3, weights=str(tmp_path / "weights.pth"), options=SMALL)


def test_checkpoint_with_trained_batch_norm_stays_trainable(tmp_path):
    trained = build_detector(MV3, 3, options=SMALL)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    loaded = build_detector(MV3, 3, weights=str(tmp_path / "weights.pth"), options=SMALL)
    assert not any(isinstance(layer, FrozenBatchNorm2d) for layer in loaded.modules())


def test_named_weights_have_their_own_number_of_classes(monkeypatch):
    given = {}

    def get_model(name, **arguments):
        given.update(arguments, name=name)
        return nn.Identity()

    monkeypatch.setattr("torchvision.models.get_model", get_model)
    build_detector(MV3, None, weights="COCO_V1")
    assert given["num_classes"] is None and given["weights"] == "COCO_V1"
    build_detector(MV3, 3)
    assert given["num_classes"] == 4 and given["weights"] is None


@pytest.mark.parametrize("name", [MV3, "fasterrcnn_resnet18_fpn", "retinanet_resnet18_fpn"])
def test_unknown_options_are_refused(name):
    with pytest.raises(ConfigError, match="no option min_sise; did you mean min_size"):
        build_detector(name, 3, options={"min_sise": 64})


def test_options_of_the_builder_of_the_detector_and_of_its_base_class_are_taken():
    options = {"box_detections_per_img": 7, "box_score_thresh": 0.5, "min_size": 64}
    model = build_detector(MV3, 3, options=options)
    assert model.roi_heads.score_thresh == 0.5 and model.transform.min_size == (64,)
    keypoints = build_detector("keypointrcnn_resnet50_fpn", 1, options={"num_keypoints": 5} | SMALL)
    assert isinstance(keypoints, detection.KeypointRCNN)
