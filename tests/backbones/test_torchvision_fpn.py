"""torchvision networks as Detectron2 backbones, and torchvision's weights in them."""

import copy

import pytest
import torch
import torchvision
from detectron2.modeling import build_backbone, build_model
from detectron2.utils.events import EventStorage
from tiny import tiny_batch, tiny_cfg

from kd_detectron.backbones import TorchvisionBackbone
from kd_detectron.checkpoint import DistillationCheckpointer, torchvision_url
from kd_detectron.errors import ConfigError

NETWORKS = {
    "mobilenet_v3_small": [16, 24, 48, 576],
    "regnet_y_400mf": [48, 104, 208, 440],
    "shufflenet_v2_x0_5": [24, 48, 96, 1024],
}


def torchvision_cfg(name: str = "mobilenet_v3_small", opts: list | None = None):
    return tiny_cfg(
        [
            *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
            *("MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone"),
            *("MODEL.TORCHVISION.NAME", name),
            *(opts or []),
        ]
    )


def network_with_statistics(name: str) -> torch.nn.Module:
    """A torchvision network with random weights and BatchNorm statistics that matter."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_pyramid_reads_the_last_block_at_each_stride(name):
    backbone = build_backbone(torchvision_cfg(name))
    shapes = backbone.bottom_up.output_shape()
    assert [shape.channels for shape in shapes.values()] == NETWORKS[name]
    assert [shape.stride for shape in shapes.values()] == [4, 8, 16, 32]
    features = backbone(torch.zeros(1, 3, 64, 96))
    assert list(features) == ["p2", "p3", "p4", "p5", "p6"]
    assert features["p2"].shape == (1, 32, 16, 24)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_weights_of_torchvision_give_its_activations(tmp_path, norm):
    network = network_with_statistics("mobilenet_v3_small")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = build_model(torchvision_cfg(opts=["MODEL.RESNETS.NORM", norm])).eval()
    DistillationCheckpointer(model).load(str(tmp_path / "weights.pth"))
    outputs = {}
    for stage, index in (("res2", 1), ("res3", 3), ("res4", 8), ("res5", 12)):
        network.features[index].register_forward_hook(
            lambda module, args, output, stage=stage: outputs.update({stage: output})
        )
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        network(images)
        found = model.backbone.bottom_up(images)
    for stage, output in outputs.items():
        torch.testing.assert_close(found[stage], output)


def test_names_of_torchvision_are_urls():
    assert "efficientnet_b0" in torchvision_url("efficientnet_b0")
    assert "regnet_y_400mf" in torchvision_url("regnet_y_400mf/IMAGENET1K_V2")


@pytest.mark.parametrize(
    "name, other", [("resnet18", "resnet34"), ("mobilenet_v3_small", "mobilenet_v3_large")]
)
def test_weights_of_another_network_are_refused(tmp_path, name, other):
    """All tensors of a ResNet-18 are in a ResNet-34 too, under the same names."""
    torch.save(torchvision.models.get_model(other).state_dict(), tmp_path / "weights.pth")
    model = TorchvisionBackbone(name)
    with pytest.raises(ConfigError, match="does not fit the model's backbone.*MODEL.TORCHVISION"):
        DistillationCheckpointer(model).load(str(tmp_path / "weights.pth"))


def test_weights_of_a_densenet_are_named_as_in_torchvisions_files(tmp_path):
    model = TorchvisionBackbone("densenet121", out_features=["res2"])
    state = torchvision.models.densenet121().state_dict()
    assert "features.denseblock1.denselayer1.norm1.weight" in state
    for part in ("norm", "conv"):
        state = {name.replace(f".{part}1.", f".{part}.1."): t for name, t in state.items()}
        state = {name.replace(f".{part}2.", f".{part}.2."): t for name, t in state.items()}
    torch.save(state, tmp_path / "weights.pth")
    DistillationCheckpointer(model).load(str(tmp_path / "weights.pth"))
    name = "features.denseblock1.denselayer1.{}weight"
    assert torch.equal(model.net.state_dict()[name.format("norm1.")], state[name.format("norm.1.")])


def test_checkpoint_of_the_detector_itself_loads(tmp_path):
    trained, model = (build_model(torchvision_cfg()) for _ in range(2))
    DistillationCheckpointer(trained, str(tmp_path)).save("model_final")
    checkpointer = DistillationCheckpointer(model)
    checkpointer.load(str(tmp_path / "model_final.pth"))
    assert not any(checkpointer.incompatible)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())


def test_building_does_not_move_batchnorm_statistics():
    backbone = TorchvisionBackbone("mobilenet_v3_small", norm="BN")
    assert backbone.training and backbone.net.training
    for name, buffer in backbone.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 0


def test_frozen_batchnorm_has_no_parameters_and_stays():
    backbone = TorchvisionBackbone("mobilenet_v3_small", norm="FrozenBN").train()
    before = copy.deepcopy(backbone.state_dict())
    backbone(torch.rand(2, 3, 64, 96))
    assert all(torch.equal(before[name], t) for name, t in backbone.state_dict().items())
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms == []


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "googlenet"])
def test_detector_trains_and_every_parameter_is_used(name):
    """GoogLeNet's auxiliary classifiers are cut off, as what follows the last map."""
    torch.manual_seed(0)
    model = build_model(torchvision_cfg(name)).train()
    with EventStorage():
        losses = model(tiny_batch())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_retinanet_builder_gives_p3_to_p7():
    opts = ["MODEL.BACKBONE.NAME", "build_retinanet_torchvision_fpn_backbone"]
    opts += ["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    features = build_backbone(torchvision_cfg(opts=opts))(torch.zeros(1, 3, 128, 128))
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]


@pytest.mark.parametrize(
    "name, opts, expected",
    [
        ("mobilenet_v3_smal", [], "MODEL.TORCHVISION.NAME.*did you mean mobilenet_v3_small"),
        ("", [], "MODEL.TORCHVISION.NAME '' is no classification network"),
        ("squeezenet1_1", [], r"strides \[\].*MODEL.FPN.IN_FEATURES"),
        ("vit_b_32", [], "MODEL.TORCHVISION.NAME.*images of any size"),
        ("resnet18", ["MODEL.RESNETS.NORM", "GN"], "MODEL.RESNETS.NORM is 'GN'"),
        ("resnet18", ["MODEL.BACKBONE.FREEZE_AT", 2], "MODEL.BACKBONE.FREEZE_AT is 2.*to 0"),
    ],
)
def test_networks_that_cannot_work_are_refused_by_key(name, opts, expected):
    with pytest.raises(ConfigError, match=expected):
        build_backbone(torchvision_cfg(name, opts))
