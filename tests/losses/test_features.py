"""The losses on feature maps against slow references, and FGFI's mask by hand."""

import math

import numpy as np
import pytest
import torch

from kd_detectron.losses import (
    fgfi_loss,
    fgfi_mask,
    fitnet_loss,
    hcl_loss,
    pckd_loss,
    pkd_loss,
)

ODD_SIZES = ((7, 9), (5, 5), (3, 4), (2, 3), (1, 1))


def maps(seed, sizes=ODD_SIZES, channels=3, images=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, channels, *size, generator=generator) for size in sizes]


def mean_square(a, b):
    total = 0.0
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        total += (x - y) ** 2
    return total / a.numel()


def pooled(maps, size):
    """Adaptive average pooling: cell i covers rows floor(i H / size) to ceil((i + 1) H / size)."""
    images, channels, height, width = maps.shape
    result = torch.empty(images, channels, size, size)
    for i in range(size):
        top, bottom = i * height // size, -(-(i + 1) * height // size)
        for j in range(size):
            left, right = j * width // size, -(-(j + 1) * width // size)
            result[:, :, i, j] = maps[:, :, top:bottom, left:right].mean(dim=(2, 3))
    return result


def reference_hcl(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        sizes = [size for size in (4, 2, 1) if size < s.shape[2]]
        parts = [mean_square(s, t)] + [mean_square(pooled(s, n), pooled(t, n)) for n in sizes]
        weights = [1, 1 / 2, 1 / 4, 1 / 8][: len(parts)]
        weighted = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        total += weighted / sum(weights)
    return total


def reference_fgfi(student, teacher, masks):
    total = 0.0
    for s, t, mask in zip(student, teacher, masks, strict=True):
        level, locations = 0.0, 0
        for n in range(mask.shape[0]):
            for y in range(mask.shape[1]):
                for x in range(mask.shape[2]):
                    if mask[n, y, x]:
                        locations += 1
                        level += sum(((s - t)[n, :, y, x] ** 2).tolist())
        total += level / (2 * locations) if locations else 0.0
    return total


def test_hcl_is_the_weighted_error_of_the_pooled_maps():
    student, teacher = maps(0), maps(1)
    expected = reference_hcl(student, teacher)
    assert hcl_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("height, parts", [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4)])
def test_hcl_skips_pool_sizes_that_the_height_does_not_exceed(height, parts):
    # A constant difference is the same at every pool size, so the weights used must sum to 1;
    # a single row of ones has another error at each size, so a wrong choice of sizes shows.
    student, teacher = [torch.ones(1, 1, height, 9)], [torch.zeros(1, 1, height, 9)]
    assert hcl_loss(student, teacher).item() == pytest.approx(1.0)
    student[0][0, 0, 1:] = 0
    sizes = [4, 2, 1][3 - (parts - 1) :]
    errors = [mean_square(student[0], teacher[0])]
    errors += [mean_square(pooled(student[0], n), pooled(teacher[0], n)) for n in sizes]
    weights = [0.5**i for i in range(parts)]
    expected = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
    assert hcl_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_fitnet_is_the_mean_squared_error_summed_over_levels():
    student, teacher = maps(0), maps(1)
    expected = sum(mean_square(s, t) for s, t in zip(student, teacher, strict=True))
    assert fitnet_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_fgfi_is_half_the_mean_squared_distance_of_masked_locations():
    student, teacher = maps(0), maps(1)
    generator = torch.Generator().manual_seed(2)
    masks = [torch.rand(2, *size, generator=generator) < 0.4 for size in ODD_SIZES]
    masks[3][:] = False
    expected = reference_fgfi(student, teacher, masks)
    assert fgfi_loss(student, teacher, masks).item() == pytest.approx(expected, rel=1e-5)


def test_equal_maps_cost_nothing():
    student = maps(0)
    masks = [torch.ones(2, *size, dtype=torch.bool) for size in ODD_SIZES]
    assert hcl_loss(student, student) == 0
    assert fitnet_loss(student, student) == 0
    assert fgfi_loss(student, student, masks) == 0


# Two locations side by side with one anchor each, and two boxes. IoU, anchors by boxes:
#   anchor 0 (0, 0, 10, 10), box 0 (0, 0, 10, 5):  50 / 100 = 0.5     box 1 (8, 0, 18, 10): 20 / 180
#   anchor 1 (10, 0, 20, 10), box 0:               0                  box 1: 80 / 120 = 0.667
ANCHORS = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10]])
BOXES = torch.tensor([[0.0, 0, 10, 5], [8, 0, 18, 10]])


@pytest.mark.parametrize(
    "boxes, psi, expected",
    [
        (BOXES, 0.5, [[True, True]]),  # each location is near one box
        (BOXES, 0.9, [[True, True]]),  # 0.5 > 0.45: each box has its own best anchor
        (BOXES[:1], 0.5, [[True, False]]),  # 0.5 > 0.25, 0 is not
        (BOXES[1:], 0.5, [[False, True]]),  # 0.111 is not above 0.333
        (BOXES[1:], 0.1, [[True, True]]),  # 0.111 > 0.067
        (BOXES[:1], 0.0, [[True, False]]),  # above, not at least: no overlap is not near
        (BOXES[:1] + 100, 0.5, [[False, False]]),  # the best IoU is 0: nothing is near
        (BOXES[:0], 0.5, [[False, False]]),  # an image without boxes
    ],
)
def test_fgfi_mask_by_hand(boxes, psi, expected):
    mask = fgfi_mask(ANCHORS, boxes, 1, 2, psi)
    assert mask.dtype == torch.bool
    assert mask.tolist() == expected


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (areas - shared)


def test_fgfi_mask_is_location_major_with_several_anchors():
    height, width, per_location = 3, 5, 2
    anchors = []
    for y in range(height):
        for x in range(width):
            for half in (4, 9):
                anchors.append([8 * x - half, 8 * y - half, 8 * x + half, 8 * y + half])
    boxes = [[10.0, 1, 25, 12], [30, 14, 40, 20]]
    expected = torch.zeros(height, width, dtype=torch.bool)
    for box in boxes:
        best = max(iou(anchor, box) for anchor in anchors)
        for index, anchor in enumerate(anchors):
            if iou(anchor, box) > 0.5 * best:
                location = index // per_location
                expected[location // width, location % width] = True
    assert 0 < expected.sum() < expected.numel()
    mask = fgfi_mask(torch.tensor(anchors).float(), torch.tensor(boxes), height, width)
    assert torch.equal(mask, expected)


def test_fgfi_mask_refuses_anchors_of_another_map():
    with pytest.raises(ValueError, match="3 anchors .* 1x2 map"):
        fgfi_mask(torch.zeros(3, 4), BOXES, 1, 2)


def test_no_masked_location_gives_a_zero_with_a_graph():
    student = [torch.randn(1, 2, 3, 3, requires_grad=True)]
    loss = fgfi_loss(student, [torch.randn(1, 2, 3, 3)], [torch.zeros(1, 3, 3, dtype=torch.bool)])
    assert loss == 0
    loss.backward()
    assert torch.equal(student[0].grad, torch.zeros(1, 2, 3, 3))


def all_losses(student, teacher):
    masks = [torch.ones(s.shape[0], *s.shape[2:], dtype=torch.bool) for s in student]
    return {
        "hcl": hcl_loss(student, teacher),
        "fitnet": fitnet_loss(student, teacher),
        "fgfi": fgfi_loss(student, teacher, masks),
        "pkd": pkd_loss(student, teacher),
        "pckd": pckd_loss(student, teacher),
    }


def test_teacher_gets_no_gradient():
    student = [feature.requires_grad_() for feature in maps(0)]
    teacher = [feature.requires_grad_() for feature in maps(1)]
    sum(all_losses(student, teacher).values()).backward()
    assert all(feature.grad is None for feature in teacher)
    assert all(feature.grad.abs().sum() > 0 for feature in student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_maps_of_large_values_give_finite_float32_losses(dtype):
    student = [(1e4 * feature.sign()).to(dtype) for feature in maps(0)]
    teacher = [(1e4 * feature.sign()).to(dtype) for feature in maps(1)]
    exact = all_losses([s.float() for s in student], [t.float() for t in teacher])
    for name, loss in all_losses(student, teacher).items():
        assert loss.dtype == torch.float32, name
        assert torch.isfinite(loss), name
        assert torch.equal(loss, exact[name]), name


def test_maps_of_different_shapes_are_refused_rather_than_broadcast():
    for loss in (hcl_loss, fitnet_loss, pkd_loss, pckd_loss):
        with pytest.raises(ValueError, match="same levels and shapes"):
            loss([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 4, 1)])
        with pytest.raises(ValueError, match="same levels and shapes"):
            loss([torch.zeros(1, 2, 4, 4)] * 2, [torch.zeros(1, 2, 4, 4)])


# ---- PKD ----


def reference_pkd(student, teacher):
    """Half the mean squared difference of channels normalised over images and locations."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        level = 0.0
        for channel in range(s.shape[1]):
            normalised = []
            for maps_ in (s, t):
                values = maps_[:, channel].flatten().tolist()
                mean = sum(values) / len(values)
                deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
                normalised.append([(v - mean) / (deviation + 1e-6) for v in values])
            squares = [(a - b) ** 2 for a, b in zip(*normalised, strict=True)]
            level += sum(squares) / len(squares) / 2
        total += level / s.shape[1]
    return total


def test_pkd_is_half_the_error_of_normalised_channels():
    # The coarsest level has two values per channel: whatever they are, the maps agree or not.
    student, teacher = maps(0), maps(1)
    expected = reference_pkd(student, teacher)
    assert pkd_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_pkd_is_one_minus_the_correlation():
    student, teacher = maps(0)[:1], maps(1)[:1]
    rows = [x[0].transpose(0, 1).flatten(1) for x in (student, teacher)]
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows, strict=True)]
    expected = 1 - torch.stack(correlations).mean()
    torch.testing.assert_close(pkd_loss(student, teacher), expected)


def test_pkd_does_not_see_scale_and_offset_of_a_channel():
    student, teacher = maps(0)[:3], maps(1)[:3]
    scale = torch.tensor([0.01, 3.0, 700.0])[:, None, None]
    moved = [x * scale + 10 * scale for x in student]
    torch.testing.assert_close(
        pkd_loss(moved, teacher), pkd_loss(student, teacher), rtol=1e-4, atol=0
    )
    assert pkd_loss(moved, student).abs() < 1e-5
    assert pkd_loss([-x for x in student], student).item() == pytest.approx(2 * 3, rel=1e-5)


@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
def test_pkd_of_a_constant_channel_is_finite_and_gives_it_no_gradient(constant):
    student, teacher = maps(0)[:1], maps(1)[:1]
    for name, (side,) in (("student", student), ("teacher", teacher)):
        if constant in (name, "both"):
            side[:, 1] = 5.0
    student[0].requires_grad_()
    loss = pkd_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(reference_pkd(student, teacher), rel=1e-4)
    gradient = student[0].grad.abs().sum(dim=(0, 2, 3))
    assert gradient[1] < 1e-6 and gradient[0] > 0 and student[0].grad.isfinite().all()


def test_pkd_of_one_location_in_one_image_is_a_zero_with_a_graph():
    student = [torch.randn(1, 3, 1, 1, requires_grad=True)]
    loss = pkd_loss(student, [torch.randn(1, 3, 1, 1)])
    loss.backward()
    assert loss == 0 and torch.equal(student[0].grad, torch.zeros(1, 3, 1, 1))


# ---- PCKD ----


def reference_pckd(student, teacher, floor=0.01):
    """The docstring's formula, component by component, with NumPy's eigenvectors."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        s, t = (x.double().transpose(0, 1).flatten(1).numpy() for x in (s, t))
        mean = t.mean(axis=1, keepdims=True)
        variances, components = np.linalg.eigh(np.cov(t, bias=True))
        smallest = floor * variances.mean()
        level = weights = 0.0
        for variance, component in zip(variances, components.T, strict=True):
            own, other = component @ (s - mean), component @ (t - mean)
            error = ((own - other) ** 2).mean()
            weight = variance / (variance + smallest)
            level += weight * error / ((own**2).mean() + (other**2).mean() + smallest)
            weights += weight
        total += level / weights
    return total


def correlated_maps(seed, count=2):
    """Maps whose first principal component has nearly all the variance, as those of an FPN."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([10.0, 1.0, 0.3, 0.1])
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(9)))[0]
    found = []
    for _ in range(count):
        independent = torch.randn(2, 5, 6, 4, generator=generator) * scale
        found.append((independent @ mix + 3).permute(0, 3, 1, 2).contiguous())
    return found


@pytest.mark.parametrize("floor", [0.001, 0.01, 1.0])
def test_pckd_is_the_relative_error_of_each_principal_component(floor):
    student, teacher = correlated_maps(0), correlated_maps(1)
    expected = reference_pckd(student, teacher, floor)
    assert pckd_loss(student, teacher, floor=floor).item() == pytest.approx(expected, rel=1e-4)


def test_pckd_of_equal_maps_is_zero_and_of_unrelated_ones_one_for_each_level():
    (student,), (teacher,) = correlated_maps(0, 1), correlated_maps(1, 1)
    assert pckd_loss([teacher], [teacher]).abs() < 1e-6
    assert pckd_loss([student], [teacher]).item() == pytest.approx(1, abs=0.2)
    about_mean = 2 * teacher.mean(dim=(0, 2, 3), keepdim=True) - teacher
    assert pckd_loss([about_mean], [teacher], floor=1e-6).item() == pytest.approx(2, abs=0.01)


def test_pckd_sees_a_small_component_as_well_as_a_large_one():
    (teacher,) = correlated_maps(1, 1)
    flat = teacher.transpose(0, 1).flatten(1)
    mean = flat.mean(dim=1, keepdim=True)
    components = torch.linalg.eigh(torch.cov(flat))[1]
    losses = {}
    for name, index in (("large", 3), ("small", 2)):
        direction = components[:, index, None]
        lacking = flat - direction @ (direction.T @ (flat - mean))
        lacking = lacking.unflatten(1, (2, 5, 6)).transpose(0, 1)
        losses[name] = [pckd_loss([lacking], [teacher]), pkd_loss([lacking], [teacher])]
    pckd, pkd = zip(losses["large"], losses["small"], strict=True)
    assert pckd[1] > 0.5 * pckd[0]
    assert pkd[1] < 0.1 * pkd[0]


def test_pckd_does_not_change_when_the_channels_of_both_maps_are_rotated():
    student, teacher = correlated_maps(0), correlated_maps(1)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)))[0]
    rotated = [
        [torch.einsum("dc,nchw->ndhw", rotation, x) for x in side] for side in (student, teacher)
    ]
    expected = pckd_loss(student, teacher)
    torch.testing.assert_close(pckd_loss(*rotated), expected, rtol=1e-4, atol=0)


def test_pckd_sees_scale_and_offset_unlike_pkd():
    teacher = correlated_maps(1)
    for moved in ([2 * x for x in teacher], [x + 3 for x in teacher]):
        assert pkd_loss(moved, teacher).abs() < 1e-5
        assert pckd_loss(moved, teacher) > 0.1


def test_pckd_is_computed_in_float32_under_autocast():
    student, teacher = correlated_maps(0), correlated_maps(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pckd_loss(student, teacher)
    assert torch.equal(loss, pckd_loss(student, teacher))


@pytest.mark.parametrize("value", [0.0, 0.1, 5.0, 1000.1, [0.1, -7.3, 33.3, 1e4]])
@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
def test_pckd_of_constant_maps_is_finite_and_nothing_where_the_teachers_is(constant, value):
    sides = {"student": correlated_maps(0)[:1], "teacher": correlated_maps(1)[:1]}
    for name, side in sides.items():
        if constant in (name, "both"):
            side[0][:] = torch.as_tensor(value).reshape(-1, 1, 1)
    student = [x.requires_grad_() for x in sides["student"]]
    loss = pckd_loss(student, sides["teacher"])
    loss.backward()
    assert loss.isfinite() and student[0].grad.isfinite().all()
    assert (loss == 0) == (constant != "student")


def test_pckd_of_fewer_locations_than_channels_compares_what_they_span():
    (student,), (teacher,) = (maps(seed, [(3, 3)], channels=32, images=1) for seed in (0, 1))
    loss = pckd_loss([student.requires_grad_()], [teacher])
    loss.backward()
    assert 0 < loss < 2 and student.grad.isfinite().all()
    assert loss.item() == pytest.approx(reference_pckd([student.detach()], [teacher]), rel=1e-3)


def test_pckd_stays_within_its_bounds_where_products_are_rounded_as_by_tf32(monkeypatch):
    def rounded(rows):
        rows = (rows.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
        return rows @ rows.T / rows.shape[1]

    scale = torch.logspace(0, -3, 64)[:, None, None]
    mix = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    (unmixed,), (other,) = (maps(seed, [(20, 20)], channels=64) for seed in (0, 1))
    teacher = torch.einsum("dc,nchw->ndhw", mix, unmixed * scale)
    for student in (teacher + 30, other, teacher * 1.01):
        exact = pckd_loss([student], [teacher])
        with monkeypatch.context() as patch:
            patch.setattr("kd_detectron.losses.features._second_moments", rounded)
            loss = pckd_loss([student], [teacher])
        assert 0 <= loss <= 2 and loss.item() == pytest.approx(exact.item(), abs=0.02)


def test_pckd_of_one_location_in_one_image_is_a_zero_with_a_graph():
    student = [torch.randn(1, 3, 1, 1, requires_grad=True)]
    loss = pckd_loss(student, [torch.randn(1, 3, 1, 1)])
    loss.backward()
    assert loss == 0 and torch.equal(student[0].grad, torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_pckd_of_maps_that_are_not_finite_is_not_finite(broken):
    sides = {"student": correlated_maps(0), "teacher": correlated_maps(1)}
    sides[broken][1][0, 0, 0, 0] = math.inf
    assert not pckd_loss(sides["student"], sides["teacher"]).isfinite()
