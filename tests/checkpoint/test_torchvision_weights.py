"""torchvision's networks under Detectron2's names: same activations, or a clear refusal."""

import logging
import urllib.error
from functools import cache

import iopath.common.file_io
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler
from tiny import tiny_cfg

from kd_detectron.backbones import MobileNetV2
from kd_detectron.checkpoint import (
    DistillationCheckpointer,
    torchvision_layout,
    torchvision_url,
)
from kd_detectron.errors import ConfigError

RGB = [
    *("INPUT.FORMAT", "RGB"),
    *("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]),
    *("MODEL.PIXEL_STD", [58.395, 57.12, 57.375]),
]


@cache
def torchvision_network(name: str) -> torch.nn.Module:
    """A network with torchvision's random weights and with BatchNorm statistics that matter."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return network


def weights_file(folder, name: str) -> str:
    path = str(folder / f"{name}-00000000.pth")
    torch.save(torchvision_network(name).state_dict(), path)
    return path


def detector(depth: int = 18, norm: str = "FrozenBN", opts: list | None = None):
    opts = [
        *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        *("MODEL.RESNETS.DEPTH", depth),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth < 50 else 256),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", 64),
        *("MODEL.RESNETS.STRIDE_IN_1X1", False),
        *("MODEL.RESNETS.NORM", norm),
        *RGB,
        *(opts or []),
    ]
    return build_model(tiny_cfg(opts)).eval()


def stage_outputs(network: torch.nn.Module, stages: dict[str, torch.nn.Module], images):
    """Runs a torchvision network and returns the outputs of some of its modules."""
    outputs = {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output.clone()})
        )
        for name, module in stages.items()
    ]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return outputs


def assert_same_activations(backbone, network, stages) -> None:
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = stage_outputs(network, stages, images)
    with torch.no_grad():
        found = backbone(images)
    assert set(found) == set(expected) and len(found) == 4
    for name in expected:
        scale = expected[name].abs().max()
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, norm",
    [
        ("resnet18", "FrozenBN"),
        ("resnet18", "BN"),
        ("resnet34", "FrozenBN"),
        ("resnet50", "FrozenBN"),
        ("resnet50", "BN"),
    ],
)
def test_converted_resnet_gives_torchvision_activations(tmp_path, name, norm):
    model = detector(int(name.removeprefix("resnet")), norm)
    checkpointer = DistillationCheckpointer(model)
    checkpointer.load(weights_file(tmp_path, name))
    missing = checkpointer.incompatible.missing_keys
    assert missing and not any(key.startswith("backbone.bottom_up.") for key in missing)
    assert not checkpointer.incompatible.unexpected_keys
    network = torchvision_network(name)
    stages = {f"res{index + 1}": getattr(network, f"layer{index}") for index in range(1, 5)}
    assert_same_activations(model.backbone.bottom_up, network, stages)
    if norm == "BN":
        assert model.backbone.bottom_up.stem.conv1.norm.num_batches_tracked == 7


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_converted_mobilenetv2_gives_torchvision_activations(tmp_path, norm):
    opts = [
        *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
        *("MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"),
        *("MODEL.RESNETS.NORM", norm),
        *RGB,
    ]
    model = build_model(tiny_cfg(opts)).eval()
    checkpointer = DistillationCheckpointer(model)
    checkpointer.load(weights_file(tmp_path, "mobilenet_v2"))
    missing = checkpointer.incompatible.missing_keys
    assert missing and not any(key.startswith("backbone.bottom_up.") for key in missing)
    assert not checkpointer.incompatible.unexpected_keys
    network = torchvision_network("mobilenet_v2")
    stages = {
        f"res{index}": network.features[block] for index, block in enumerate((3, 6, 13, 17), 2)
    }
    assert_same_activations(model.backbone.bottom_up, network, stages)


def test_backbone_alone_and_detector_without_fpn_take_the_same_file(tmp_path):
    path = weights_file(tmp_path, "mobilenet_v2")
    backbone = MobileNetV2()
    DistillationCheckpointer(backbone).load(path)
    state = torchvision_network("mobilenet_v2").state_dict()
    assert torch.equal(backbone.features[5].conv[0][0].weight, state["features.5.conv.0.0.weight"])

    c4 = detector(
        opts=[
            *("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
            *("MODEL.RESNETS.OUT_FEATURES", ["res4"]),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[32]]),
            *("MODEL.RPN.IN_FEATURES", ["res4"]),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
        ]
    )
    DistillationCheckpointer(c4).load(weights_file(tmp_path, "resnet18"))
    state = torchvision_network("resnet18").state_dict()
    found = c4.backbone.res4[0].shortcut
    assert torch.equal(found.weight, state["layer3.0.downsample.0.weight"])
    assert torch.equal(found.norm.running_var, state["layer3.0.downsample.1.running_var"])


def test_old_files_without_num_batches_tracked_load_in_batchnorm(tmp_path):
    state = torchvision_network("resnet18").state_dict()
    state = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet18.pth")
    model = detector(norm="BN")
    DistillationCheckpointer(model).load(str(tmp_path / "resnet18.pth"))
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, state["conv1.weight"])


@pytest.mark.parametrize("file, depth", [("resnet34", 18), ("resnet18", 34), ("resnet50", 18)])
def test_resnet_of_another_depth_is_refused(tmp_path, file, depth):
    """A ResNet-34's first blocks have the names and shapes of a ResNet-18's: only the rest tell."""
    model = detector(depth)
    with pytest.raises(ConfigError, match=r"does not fit.*'res\d\..*MODEL.RESNETS \(DEPTH"):
        DistillationCheckpointer(model).load(weights_file(tmp_path, file))


def test_stride_in_1x1_is_refused(tmp_path):
    model = detector(50, opts=["MODEL.RESNETS.STRIDE_IN_1X1", True])
    with pytest.raises(ConfigError, match="STRIDE_IN_1X1 is True: set it to False"):
        DistillationCheckpointer(model).load(weights_file(tmp_path, "resnet50"))


@pytest.mark.parametrize(
    "opts, fix",
    [
        (["MODEL.RESNETS.NORM", "GN"], "NORM"),
        (["MODEL.RESNETS.STEM_OUT_CHANNELS", 32], "STEM_OUT_CHANNELS"),
        (["MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"], "MODEL.BACKBONE.NAME"),
    ],
)
def test_resnet_weights_for_another_network_are_refused(tmp_path, opts, fix):
    with pytest.raises(ConfigError, match=f"MODEL.WEIGHTS.*{fix}"):
        DistillationCheckpointer(detector(opts=opts)).load(weights_file(tmp_path, "resnet18"))


def test_mobilenetv2_of_another_width_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="MODEL.MOBILENETV2.WIDTH_MULT"):
        DistillationCheckpointer(MobileNetV2(width_mult=0.5)).load(
            weights_file(tmp_path, "mobilenet_v2")
        )


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_wrong_pixel_statistics_for_the_channel_order_are_warned_of(tmp_path, caplog, order):
    path = weights_file(tmp_path, "resnet18")
    model = detector(opts=["INPUT.FORMAT", order])
    with caplog.at_level(logging.WARNING, "kd_detectron"):
        DistillationCheckpointer(model).load(path)
    assert ("MODEL.PIXEL_MEAN" in caplog.text) == (order == "BGR")


def test_every_network_has_a_url_and_v1_is_the_default():
    for name in ("resnet18", "resnet50", "resnet152", "mobilenet_v2"):
        assert torchvision_url(name).startswith("https://")
        assert torchvision_url(name) == torchvision_url(f"{name}/IMAGENET1K_V1")
    assert torchvision_url("resnet50/IMAGENET1K_V2") != torchvision_url("resnet50")


def test_layouts_of_other_networks_are_not_taken_for_these():
    for name, layout in (
        ("resnet18", "resnet"),
        ("mobilenet_v2", "mobilenet_v2"),
        ("mobilenet_v3_small", None),
        ("efficientnet_b0", None),
        ("shufflenet_v2_x0_5", None),
    ):
        assert torchvision_layout(torchvision_network(name).state_dict()) == layout
    assert torchvision_layout(detector().state_dict()) is None


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet19", "did you mean resnet1"),
        ("mobilenetv2", "did you mean mobilenet_v2"),
        ("resnet50/V3", "IMAGENET1K_V1, IMAGENET1K_V2"),
    ],
)
def test_unknown_name_lists_the_near_ones(name, expected):
    with pytest.raises(ConfigError) as error:
        DistillationCheckpointer(MobileNetV2()).load(f"torchvision://{name}")
    assert str(error.value).startswith("MODEL.WEIGHTS: ") and expected in str(error.value)


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Replaces the download of PathManager's HTTP handler; returns the URLs asked for."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    urls = []

    def download(url, folder, *, filename, **options):
        urls.append(url)
        if "resnet18" not in url:
            raise urllib.error.URLError("no route to host")
        path = f"{folder}/{filename}"
        torch.save(torchvision_network("resnet18").state_dict(), path)
        return path

    monkeypatch.setattr(iopath.common.file_io, "download", download)
    # A handler remembers what it has downloaded: a new one before and after.
    PathManager.register_handler(HTTPURLHandler(), allow_override=True)
    yield urls
    PathManager.register_handler(HTTPURLHandler(), allow_override=True)


def test_name_is_downloaded_once_and_loaded(downloads):
    for _ in range(2):
        model = detector()
        DistillationCheckpointer(model).load("torchvision://resnet18")
        state = torchvision_network("resnet18").state_dict()
        assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, state["conv1.weight"])
    assert downloads == [torchvision_url("resnet18")]


@pytest.mark.parametrize(
    "weights", ["torchvision://resnet34", "https://example.invalid/model.pkl", "detectron2://x.pkl"]
)
def test_failed_download_names_the_key_the_url_and_the_fix(downloads, weights):
    with pytest.raises(ConfigError) as error:
        DistillationCheckpointer(detector(34)).load(weights)
    message = str(error.value)
    url = torchvision_url("resnet34") if weights.startswith("torchvision") else weights
    assert f"MODEL.WEIGHTS '{weights}'" in message and url in message
    assert "no route to host" in message and "by hand" in message and "from scratch" in message


def test_truncated_download_names_the_cached_file(downloads, tmp_path):
    path = PathManager.get_local_path("torchvision://resnet18")
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ConfigError, match="resnet18-.*truncated"):
        DistillationCheckpointer(detector()).load("torchvision://resnet18")
