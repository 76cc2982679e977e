"""MobileNetV2 as a Detectron2 backbone: shapes, freezing, detectors of both kinds."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from tiny import tiny_batch, tiny_cfg

from kd_detectron import add_kd_config
from kd_detectron.backbones import MobileNetV2, add_backbone_config
from kd_detectron.errors import ConfigError

MOBILENET = [
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
    *("MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"),
    *("MODEL.MOBILENETV2.WIDTH_MULT", 0.25),
]


@pytest.mark.parametrize("width", [0.25, 1.0, 1.4])
def test_outputs_are_what_output_shape_says(width):
    backbone = MobileNetV2(width_mult=width)
    with torch.no_grad():
        features = backbone(torch.zeros(2, 3, 64, 96))
    assert list(features) == ["res2", "res3", "res4", "res5"]
    for (name, shape), stride in zip(backbone.output_shape().items(), (4, 8, 16, 32), strict=True):
        assert features[name].shape == (2, shape.channels, 64 // stride, 96 // stride)
        assert shape.stride == stride


def test_channels_are_the_papers():
    channels = [shape.channels for shape in MobileNetV2().output_shape().values()]
    assert channels == [24, 32, 96, 320]


def test_layers_after_the_last_stage_asked_for_are_not_built():
    whole, part = MobileNetV2(), MobileNetV2(out_features=["res2", "res3"])
    assert len(part.features) == 7 < len(whole.features) == 18
    assert list(part(torch.zeros(1, 3, 32, 32))) == ["res2", "res3"]


def test_detector_trains_and_detects():
    torch.manual_seed(0)
    model = build_model(tiny_cfg(MOBILENET)).train()
    with EventStorage():
        losses = model(tiny_batch())
    sum(losses.values()).backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    with torch.no_grad():
        assert len(model.eval()(tiny_batch())) == 2


def test_retinanet_builder_gives_p3_to_p7():
    cfg = tiny_cfg(
        [
            *MOBILENET,
            *("MODEL.BACKBONE.NAME", "build_retinanet_mobilenetv2_fpn_backbone"),
            *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
        ]
    )
    backbone = build_backbone(cfg)
    features = backbone(torch.zeros(1, 3, 128, 128))
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    assert all(feature.shape[1] == 32 for feature in features.values())


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.RESNETS.NORM", "GN"),
        ("MODEL.BACKBONE.FREEZE_AT", 2),
        ("MODEL.FPN.IN_FEATURES", ["res2", "res6"]),
    ],
)
def test_values_that_cannot_work_are_refused_by_key(key, value):
    with pytest.raises(ConfigError, match=key):
        build_backbone(tiny_cfg([*MOBILENET, key, value]))


def test_backbone_nodes_are_those_of_the_kd_config():
    with_kd, with_backbones = get_cfg(), get_cfg()
    add_kd_config(with_kd)
    add_backbone_config(with_backbones)
    assert with_kd.MODEL == with_backbones.MODEL
