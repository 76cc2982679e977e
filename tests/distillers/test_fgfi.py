"""The FGFI distiller: imitation near objects only, at every level, image by image."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from kd_detectron.distillers import FGFI, ModelSpec
from kd_detectron.errors import ConfigError
from kd_detectron.losses import fgfi_mask

SPEC = ModelSpec(channels={"p2": 3, "p3": 3})
SIZES = {"p2": (4, 6), "p3": (2, 3)}
STRIDES = {"p2": 4, "p3": 8}


def make_anchors(level):
    """Two square anchors per location, of one and of two strides."""
    height, width = SIZES[level]
    stride = STRIDES[level]
    boxes = []
    for y in range(height):
        for x in range(width):
            for half in (stride / 2, stride):
                boxes.append(
                    [x * stride - half, y * stride - half, x * stride + half, y * stride + half]
                )
    return torch.tensor(boxes)


def make_context(gt_boxes):
    generator = torch.Generator().manual_seed(0)

    def features():
        return {k: torch.randn(len(gt_boxes), 3, *v, generator=generator) for k, v in SIZES.items()}

    student = {level: feature.requires_grad_() for level, feature in features().items()}
    return SimpleNamespace(
        student=SimpleNamespace(features=student),
        teacher=SimpleNamespace(features=features()),
        anchors={level: make_anchors(level) for level in SIZES},
        gt_boxes=gt_boxes,
    )


TWO_IMAGES = [torch.tensor([[1.0, 1, 9, 6], [14, 4, 21, 15]]), torch.zeros(0, 4)]


def test_loss_is_the_squared_error_of_adapted_maps_near_objects():
    context, distiller = make_context(TWO_IMAGES), FGFI.from_specs(SPEC, SPEC, psi=0.7)
    losses = distiller(context)
    assert set(losses) == {"loss_fgfi"}
    expected = 0.0
    for adapter, (level, (height, width)) in zip(distiller.adapters, SIZES.items(), strict=True):
        adapted = F.conv2d(context.student.features[level], adapter.weight, adapter.bias, padding=1)
        squared = (adapted - context.teacher.features[level]).square().sum(dim=1)
        masks = [fgfi_mask(context.anchors[level], b, height, width, 0.7) for b in TWO_IMAGES]
        near = [squared[n][mask] for n, mask in enumerate(masks)]
        expected = expected + torch.cat(near).mean() / 2
    torch.testing.assert_close(losses["loss_fgfi"], expected)


def test_student_moves_only_around_objects():
    context, distiller = make_context(TWO_IMAGES), FGFI.from_specs(SPEC, SPEC)
    distiller(context)["loss_fgfi"].backward()
    for level in SIZES:
        gradient = context.student.features[level].grad
        assert gradient[0].abs().sum() > 0
        assert gradient[1].abs().sum() == 0  # the image without a box


def test_images_without_any_box_give_a_zero_with_a_graph():
    context = make_context([torch.zeros(0, 4), torch.zeros(0, 4)])
    distiller = FGFI.from_specs(SPEC, SPEC)
    loss = distiller(context)["loss_fgfi"]
    assert loss == 0
    loss.backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_order_of_images_does_not_matter():
    boxes = [TWO_IMAGES[0], torch.tensor([[3.0, 3, 12, 12]])]
    context, distiller = make_context(boxes), FGFI.from_specs(SPEC, SPEC)
    forward = distiller(context)["loss_fgfi"]
    context.gt_boxes = boxes[::-1]
    for side in (context.student, context.teacher):
        side.features = {level: feature.flip(0) for level, feature in side.features.items()}
    torch.testing.assert_close(distiller(context)["loss_fgfi"], forward)


def test_autocast_changes_nothing():
    context, distiller = make_context(TWO_IMAGES), FGFI.from_specs(SPEC, SPEC)
    outside = distiller(context)["loss_fgfi"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distiller(context)["loss_fgfi"]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("psi", [-0.1, 1.0, float("nan")])
def test_impossible_psi_is_refused_by_its_config_key(psi):
    with pytest.raises(ConfigError, match="KD.FGFI.PSI"):
        FGFI.from_specs(SPEC, SPEC, psi=psi)


def test_levels_that_the_teacher_lacks_are_refused():
    with pytest.raises(ConfigError, match="FGFI.*KD.TEACHER.CONFIG_FILE"):
        FGFI.from_specs(SPEC, ModelSpec(channels={"p2": 3}))
