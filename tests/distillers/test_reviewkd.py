"""ReviewKD's fusion against a straightforward one, and its behaviour at the edges."""

from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kd_detectron.distillers import ModelSpec, ReviewKD
from kd_detectron.errors import ConfigError
from kd_detectron.losses import hcl_loss

IN, OUT, MID = (3, 5, 4), (6, 7, 2), 8
SIZES = ((9, 13), (5, 7), (2, 3))


def make_maps(channels, sizes=SIZES, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, c, *size, generator=generator)
        for c, size in zip(channels, sizes, strict=True)
    ]


def pointwise(maps, weight):
    return torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], maps)


def neighbourhood(maps, weight):
    """3x3 convolution with zeros around the map, one shifted copy per weight."""
    height, width = maps.shape[2:]
    padded = torch.zeros(*maps.shape[:2], height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = maps
    total = 0.0
    for dy in range(3):
        for dx in range(3):
            window = padded[:, :, dy : dy + height, dx : dx + width]
            total = total + torch.einsum("oi,nihw->nohw", weight[:, :, dy, dx], window)
    return total


def normalised(maps, gain, shift):
    mean = maps.mean(dim=(0, 2, 3), keepdim=True)
    variance = (maps - mean).square().mean(dim=(0, 2, 3), keepdim=True)
    scaled = (maps - mean) / (variance + 1e-5).sqrt()
    return scaled * gain[:, None, None] + shift[:, None, None]


def nearest(maps, height, width):
    rows = [y * maps.shape[2] // height for y in range(height)]
    columns = [x * maps.shape[3] // width for x in range(width)]
    return maps[:, :, rows][:, :, :, columns]


def reference_fuse(model, features):
    """The fusion, step by step, on the model's weights by name, in training mode."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    outputs, running = [None] * len(features), None
    for level in reversed(range(len(features))):

        def get(name, level=level):
            return weights[f"fusions.{level}.{name}"]

        here = pointwise(features[level], get("reduce.0.weight"))
        here = normalised(here, get("reduce.1.weight"), get("reduce.1.bias"))
        if running is not None:
            coarser = nearest(running, *here.shape[2:])
            both = torch.cat([here, coarser], dim=1)
            maps = pointwise(both, get("attention.0.weight"))
            maps = (maps + get("attention.0.bias")[:, None, None]).sigmoid()
            here = here * maps[:, 0].unsqueeze(1) + coarser * maps[:, 1].unsqueeze(1)
        running = here
        output = neighbourhood(here, get("output.0.weight"))
        outputs[level] = normalised(output, get("output.1.weight"), get("output.1.bias"))
    return outputs


def make_model(seed=0):
    torch.manual_seed(seed)
    model = ReviewKD(IN, OUT, mid_channels=MID)
    for module in model.modules():  # so that gains and shifts of the normalisation matter
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)
    return model


def make_context(model_in=IN, model_out=OUT, sizes=SIZES, images=2):
    levels = [f"p{level + 2}" for level in range(len(sizes))]
    student = make_maps(model_in, sizes, images)
    teacher = make_maps(model_out, sizes, images, seed=1)
    return SimpleNamespace(
        student=SimpleNamespace(features=dict(zip(levels, student, strict=True))),
        # Another order than the student's: names decide.
        teacher=SimpleNamespace(features=dict(list(zip(levels, teacher, strict=True))[::-1])),
    )


def test_fusion_of_odd_sizes_follows_the_paper():
    model, features = make_model(), make_maps(IN)
    fused = model.fuse(features)
    expected = reference_fuse(model, features)
    assert [tuple(f.shape) for f in fused] == [
        (2, c, *size) for c, size in zip(OUT, SIZES, strict=True)
    ]
    for level in range(len(features)):
        torch.testing.assert_close(fused[level], expected[level], rtol=1e-4, atol=1e-4)


def test_fusion_of_one_level_has_no_attention():
    model = ReviewKD([3], [6], mid_channels=8)
    features = [torch.randn(2, 3, 5, 7)]
    (fused,), (expected,) = model.fuse(features), reference_fuse(model, features)
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    assert not any("attention" in name for name in model.state_dict())


def test_coarse_levels_inform_the_finer_ones_only():
    model = make_model().eval()
    features = make_maps(IN)
    before = model.fuse(features)
    features[1] = features[1] + 1
    changed = [not torch.equal(a, b) for a, b in zip(before, model.fuse(features), strict=True)]
    assert changed == [True, True, False]


def test_loss_is_hcl_of_the_fused_levels_and_the_teachers_of_the_same_name():
    model, context = make_model(), make_context()
    losses = model(context)
    assert set(losses) == {"loss_reviewkd"}
    teacher = [context.teacher.features[level] for level in ("p2", "p3", "p4")]
    expected = hcl_loss(model.fuse(list(context.student.features.values())), teacher)
    torch.testing.assert_close(losses["loss_reviewkd"], expected)


def test_every_parameter_gets_a_gradient():
    model = make_model()
    model(make_context())["loss_reviewkd"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_every_layer_runs_once_a_step():
    model, runs = make_model(), {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1})
            )
    model(make_context())
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    # The attention's convolution is applied in two halves, without its module.
    halves = {name for name in leaves if name.endswith("attention.0")}
    assert runs == dict.fromkeys(leaves - halves, 1)


def test_one_image_whose_coarsest_map_is_one_location_trains():
    model = ReviewKD([3, 3], [4, 4], mid_channels=8)
    context = make_context((3, 3), (4, 4), ((2, 2), (1, 1)), images=1)
    loss = model(context)["loss_reviewkd"]
    assert torch.isfinite(loss)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_order_of_images_does_not_matter():
    model, features = make_model(), make_maps(IN)
    fused = model.fuse(features)
    flipped = model.fuse([feature.flip(0) for feature in features])
    for a, b in zip(fused, flipped, strict=True):
        torch.testing.assert_close(a, b.flip(0), rtol=1e-4, atol=1e-5)


def test_autocast_and_16_bit_features_stay_in_float32():
    model = make_model()
    features = [feature.bfloat16() for feature in make_maps(IN)]
    expected = model.fuse([feature.float() for feature in features])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = model.fuse(features)
    for a, b in zip(fused, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_convolutions_start_as_in_the_release():
    torch.manual_seed(0)
    for name, module in ReviewKD([64] * 2, [64] * 2, mid_channels=64).named_modules():
        if isinstance(module, torch.nn.Conv2d):
            # kaiming_uniform: uniform within sqrt(6 / ((1 + a^2) * fan_in)); a = 1, but PyTorch's
            # default, sqrt(5), in the attention.
            a = 5**0.5 if "attention" in name else 1
            fan_in = module.weight[0].numel()
            bound = (6 / ((1 + a**2) * fan_in)) ** 0.5
            assert module.weight.abs().max() <= bound
            assert module.weight.abs().max() > 0.9 * bound


def test_defaults_are_the_five_levels_of_an_fpn():
    model = ReviewKD()
    assert len(model.fusions) == 5
    fused = model.fuse([torch.randn(1, 256, 2**size, 2**size) for size in (4, 3, 2, 1, 0)])
    assert [tuple(f.shape[1:]) for f in fused] == [(256, 2**s, 2**s) for s in (4, 3, 2, 1, 0)]


def test_channels_come_from_the_two_models():
    student = ModelSpec(channels={"p3": 3, "p4": 5})
    teacher = ModelSpec(channels={"p4": 7, "p3": 6, "p2": 6})
    model = ReviewKD.from_specs(student, teacher, mid_channels=8)
    fused = model.fuse([torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)])
    assert [f.shape[1] for f in fused] == [6, 7]


def test_levels_that_the_teacher_lacks_are_refused():
    with pytest.raises(ConfigError, match="ReviewKD.*KD.TEACHER.CONFIG_FILE"):
        ReviewKD.from_specs(
            ModelSpec(channels={"p2": 3, "p6": 3}), ModelSpec(channels={"p2": 3, "p7": 3})
        )


@pytest.mark.parametrize("mid_channels", [0, -8, 2.5])
def test_impossible_width_is_refused_by_its_config_key(mid_channels):
    with pytest.raises(ConfigError, match="KD.REVIEWKD.MID_CHANNELS"):
        ReviewKD([3], [3], mid_channels=mid_channels)


@pytest.mark.parametrize("images", [1, 2])
def test_recomputed_maps_change_neither_loss_nor_gradients_nor_statistics(images):
    sizes = ((9, 13), (5, 7), (1, 1))
    kept, recomputed = make_model(), make_model()
    kept.use_act_checkpoint = False
    results = []
    for model in (kept, recomputed):
        context = make_context(sizes=sizes, images=images)
        leaves = [f.requires_grad_() for f in context.student.features.values()]
        for _ in range(2):
            loss = model(context)["loss_reviewkd"]
            loss.backward()
        gradients = [tensor.grad for tensor in (*leaves, *model.parameters())]
        results.append([loss, *gradients, *model.buffers()])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_recomputed_maps_are_not_kept_between_forward_and_backward():
    def kept(use_act_checkpoint):
        """The layers whose output is still in memory when backward could begin."""
        model, context = make_model(), make_context()
        model.use_act_checkpoint = use_act_checkpoint
        for feature in context.student.features.values():
            feature.requires_grad_()
        outputs = {}

        def remember(name, output):
            outputs[name] = StorageWeakRef(output.untyped_storage())

        for name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_hook(lambda *given, name=name: remember(name, given[-1]))
        loss = model(context)["loss_reviewkd"]
        alive = {name for name, output in outputs.items() if not output.expired()}
        assert loss.requires_grad
        return alive

    assert {"fusions.0.reduce.0", "fusions.0.reduce.1", "fusions.0.output.0"} <= kept(False)
    # The reduced maps are left (and the running features, which no layer gives but the coarsest),
    # and the finest level's output, whose backward comes first.
    finest = {"fusions.0.output.0", "fusions.0.output.1"}
    assert kept(True) == finest | {f"fusions.{level}.reduce.1" for level in range(3)}
