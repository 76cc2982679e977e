"""MobileNetV2 as a Detectron2 backbone: shapes, freezing, detectors of both kinds."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
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


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at_counts_stages_as_for_resnet(freeze_at):
    cfg = tiny_cfg([*MOBILENET, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", freeze_at])
    # blocks up to stride 2, 4, 8, 16, 32
    frozen_blocks = (0, 2, 4, 7, 14, 18)[freeze_at]
    for index, block in enumerate(build_backbone(cfg).bottom_up.features):
        frozen = not any(parameter.requires_grad for parameter in block.parameters())
        frozen_norm = any(isinstance(module, FrozenBatchNorm2d) for module in block.modules())
        assert frozen == frozen_norm == (index < frozen_blocks)


def test_frozen_stages_do_not_move_in_training():
    backbone = MobileNetV2(width_mult=0.25, norm="BN", freeze_at=2).train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    features = backbone(torch.rand(2, 3, 64, 96))
    sum(feature.square().mean() for feature in features.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == (int(name.split(".")[1]) > 3)
    moved = {name for name, t in backbone.state_dict().items() if not torch.equal(t, before[name])}
    assert moved and not any(int(name.split(".")[1]) <= 3 for name in moved)


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
