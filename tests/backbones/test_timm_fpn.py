"""timm networks as Detectron2 backbones."""

import logging
import sys

import pytest
import timm
import torch
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from tiny import tiny_batch, tiny_cfg

from kd_detectron.backbones import TimmBackbone
from kd_detectron.errors import ConfigError


def timm_cfg(name: str = "mobilenetv3_small_050", opts: list | None = None):
    return tiny_cfg(
        [
            *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            *("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone"),
            *("MODEL.TIMM.NAME", name),
            *("MODEL.TIMM.PRETRAINED", False),
            *(opts or []),
        ]
    )


@pytest.mark.parametrize(
    "name, channels",
    [
        ("mobilenetv3_small_050", [8, 16, 24, 288]),
        ("efficientnet_b0", [24, 40, 112, 320]),
        ("convnext_atto", [40, 80, 160, 320]),
        ("regnetx_002", [24, 56, 152, 368]),
    ],
)
def test_pyramid_reads_the_last_map_at_each_stride(name, channels):
    backbone = build_backbone(timm_cfg(name))
    shapes = backbone.bottom_up.output_shape()
    assert [shape.channels for shape in shapes.values()] == channels
    assert [shape.stride for shape in shapes.values()] == [4, 8, 16, 32]
    features = backbone(torch.zeros(1, 3, 64, 96))
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]
    assert features["p2"].shape == (1, 32, 16, 24)


def test_features_are_timms_own():
    torch.manual_seed(0)
    backbone = TimmBackbone("mobilenetv3_small_050", norm="BN").eval()
    network = timm.create_model("mobilenetv3_small_050", features_only=True).eval()
    network.load_state_dict(backbone.net.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        found, expected = list(backbone(images).values()), network(images)[1:]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18"])
def test_frozen_batchnorm_keeps_the_activation_after_it(name):
    """timm's MobileNets have the activation inside the norm layer; freezing must not lose it."""
    torch.manual_seed(0)
    trained = TimmBackbone(name, norm="BN").eval()
    frozen = TimmBackbone(name, norm="FrozenBN")
    frozen.load_state_dict(trained.state_dict(), strict=False)
    frozen.train()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(frozen(images).values(), trained(images).values(), strict=True):
            torch.testing.assert_close(a, b)
    norms = [m for m in frozen.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == []


def test_building_does_not_move_batchnorm_statistics():
    backbone = TimmBackbone("mobilenetv3_small_050", norm="BN")
    assert backbone.training
    for name, buffer in backbone.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 0


def test_detector_trains_and_every_parameter_is_used():
    torch.manual_seed(0)
    model = build_model(timm_cfg()).train()
    with EventStorage():
        losses = model(tiny_batch())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_retinanet_builder_gives_p3_to_p7():
    opts = ["MODEL.BACKBONE.NAME", "build_retinanet_timm_fpn_backbone"]
    opts += ["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    features = build_backbone(timm_cfg(opts=opts))(torch.zeros(1, 3, 128, 128))
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.parametrize(
    "name, opts, expected",
    [
        ("mobilenetv3_smal_050", [], "MODEL.TIMM.NAME.*did you mean mobilenetv3_small_050"),
        ("vit_tiny_patch16_224", [], "MODEL.TIMM.NAME.*images of any size"),
        ("swin_tiny_patch4_window7_224", [], "MODEL.TIMM.NAME.*images of any size"),
        ("resnet18", ["MODEL.RESNETS.NORM", "GN"], "MODEL.RESNETS.NORM is 'GN'"),
        ("resnet18", ["MODEL.BACKBONE.FREEZE_AT", 2], "MODEL.BACKBONE.FREEZE_AT is 2.*to 0"),
    ],
)
def test_networks_that_cannot_work_are_refused_by_key(name, opts, expected):
    with pytest.raises(ConfigError, match=expected):
        build_backbone(timm_cfg(name, opts))


def test_missing_timm_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install timm"):
        build_backbone(timm_cfg())


@pytest.fixture
def asked_for_weights(monkeypatch):
    """Records for which networks timm's weights were asked for, and refuses them."""
    asked = []
    original = timm.create_model

    def create_model(name, *, pretrained=False, **options):
        if pretrained:
            asked.append(name)
            raise OSError("no route to host")
        return original(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    return asked


def test_failed_download_names_the_key_and_the_fix(asked_for_weights):
    with pytest.raises(ConfigError, match="MODEL.TIMM.PRETRAINED.*no route to host.*False"):
        build_backbone(timm_cfg(opts=["MODEL.TIMM.PRETRAINED", True]))
    assert asked_for_weights == ["mobilenetv3_small_050"]


def test_checkpoint_in_the_config_needs_no_weights_of_timm(asked_for_weights):
    opts = ["MODEL.TIMM.PRETRAINED", True, "MODEL.WEIGHTS", "run/model_final.pth"]
    build_backbone(timm_cfg(opts=opts))
    assert asked_for_weights == []


@pytest.mark.parametrize("right", [True, False])
def test_normalisation_other_than_timms_is_warned_of(caplog, right):
    opts = ["MODEL.TIMM.PRETRAINED", True, "MODEL.WEIGHTS", "run/model_final.pth"]
    opts += ["MODEL.PIXEL_STD", [57.375, 57.12, 58.395] if right else [1.0, 1.0, 1.0]]
    with caplog.at_level(logging.WARNING, "kd_detectron"):
        build_backbone(timm_cfg(opts=opts))
    assert ("MODEL.PIXEL_STD" in caplog.text) != right
