"""Losses on RPN, box deltas and masks against slow references, and what they are chosen for."""

import math

import pytest
import torch

from kd_detectron.losses import (
    box_kd_loss,
    head_kd_loss,
    mask_kd_loss,
    relative_error,
    rpn_kd_loss,
)

IMAGES, ANCHORS = 2, 9
K, R = 3, 8
TARGETS = torch.tensor([0, 3, 2, 1, 3, 1, 0, 2])  # 3 is background


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def entropy(logit, target):
    return -target * math.log(sigmoid(logit)) - (1 - target) * math.log(1 - sigmoid(logit))


def smooth_l1(difference, beta):
    size = abs(difference)
    return size - beta / 2 if size > beta else size**2 / (2 * beta)


def rpn_inputs():
    objectness = [torch.randn(IMAGES, ANCHORS, requires_grad=True) for _ in range(2)]
    deltas = [torch.randn(IMAGES, ANCHORS, 4, requires_grad=True) for _ in range(2)]
    labels = torch.randint(-1, 2, (IMAGES, ANCHORS))
    return [*objectness, *deltas, labels]


@pytest.mark.parametrize("anchors", ["sampled", "all"])
def test_rpn_loss_is_the_two_loop_reference(anchors):
    student, teacher, student_deltas, teacher_deltas, labels = inputs = rpn_inputs()
    objectness = weights = deltas = sampled = 0.0
    for n in range(IMAGES):
        for a in range(ANCHORS):
            label, probability = labels[n, a].item(), sigmoid(teacher[n, a].item())
            sampled += label >= 0
            weight = probability if anchors == "all" else label >= 0
            weights += weight
            objectness += weight * entropy(student[n, a].item(), probability)
            if label == 1:
                differences = student_deltas[n, a] - teacher_deltas[n, a]
                deltas += sum(smooth_l1(x, 1 / 9) for x in differences.tolist())
    expected = objectness / weights + 0.3 * deltas / sampled
    loss = rpn_kd_loss(*inputs, anchors=anchors, delta_weight=0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("anchors", ["sampled", "all"])
def test_rpn_that_agrees_with_the_teacher_stops_learning(anchors):
    student, _, deltas, _, labels = rpn_inputs()
    rpn_kd_loss(student, student, deltas, deltas, labels, anchors=anchors).backward()
    assert student.grad.abs().max() < 1e-7 and deltas.grad.abs().max() == 0


def test_rpn_deltas_of_anchors_that_are_not_positive_do_not_count():
    *inputs, labels = rpn_inputs()
    rpn_kd_loss(*inputs, labels).backward()
    moved = inputs[2].grad.abs().sum(dim=2) > 0
    assert torch.equal(moved, labels == 1)


def box_inputs(columns=4 * K):
    deltas = [torch.randn(R, columns, requires_grad=True) for _ in range(2)]
    truth = torch.randn(R, 4)
    truth[TARGETS == K] = float("inf")  # background rows mean nothing
    return [*deltas, TARGETS, truth, K]


@pytest.mark.parametrize("columns", [4, 4 * K])
@pytest.mark.parametrize("form", ["teacher", "bounded"])
def test_box_loss_is_the_two_loop_reference(form, columns):
    student, teacher, targets, truth, _ = inputs = box_inputs(columns)
    margin, total, counted = 0.5, 0.0, 0
    for r in range(R):
        if targets[r] == K:
            continue
        first = 0 if columns == 4 else 4 * targets[r].item()
        own, other = (x[r, first : first + 4].tolist() for x in (student, teacher))
        if form == "teacher":
            total += sum(smooth_l1(a - b, 1) for a, b in zip(own, other, strict=True))
        else:
            errors = [
                sum((a - b) ** 2 for a, b in zip(one, truth[r].tolist(), strict=True))
                for one in (own, other)
            ]
            counted += errors[0] + margin > errors[1]
            total += errors[0] if errors[0] + margin > errors[1] else 0.0
    loss = box_kd_loss(*inputs, form=form, margin=margin)
    assert loss.item() == pytest.approx(total / R, rel=1e-5)
    assert form == "teacher" or 0 < counted < (targets < K).sum()


def test_bounded_box_loss_leaves_a_student_alone_that_is_better_than_the_teacher():
    truth = torch.zeros(1, 4)
    better, worse = torch.full((1, 4), 0.1), torch.full((1, 4), 0.2)
    args = (torch.tensor([0]), truth, 1)
    assert box_kd_loss(better, worse, *args, form="bounded") == 0
    assert box_kd_loss(worse, better, *args, form="bounded").item() == pytest.approx(0.16)
    # Not better by the margin: 0.04 + 0.2 is more than the teacher's 0.16.
    assert box_kd_loss(better, worse, *args, form="bounded", margin=0.2).item() > 0


@pytest.mark.parametrize("channels", [1, K])
def test_mask_loss_is_the_loop_reference(channels):
    student, teacher = (torch.randn(4, channels, 5, 5) for _ in range(2))
    classes = torch.tensor([2, 0, 1, 2])
    total = 0.0
    for f in range(4):
        channel = 0 if channels == 1 else classes[f].item()
        own, other = (x[f, channel].flatten().tolist() for x in (student, teacher))
        total += sum(entropy(a, sigmoid(b)) for a, b in zip(own, other, strict=True))
    loss = mask_kd_loss(student, teacher, classes)
    assert loss.item() == pytest.approx(total / (4 * 25), rel=1e-5)


def test_heads_of_classes_and_class_agnostic_heads_can_be_compared():
    assert mask_kd_loss(torch.randn(4, 1, 2, 2), torch.randn(4, K, 2, 2), TARGETS[:4] % K) > 0
    student, _, *rest = box_inputs(4)
    assert box_kd_loss(student, box_inputs()[1], *rest) > 0


def test_relative_error_is_the_loop_reference():
    student, teacher, weights = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 1)
    error = power = 0.0
    for row in range(3):
        for s, t in zip(student[row].tolist(), teacher[row].tolist(), strict=True):
            error += weights[row].item() * (s - t) ** 2 / 12
            power += weights[row].item() * (s**2 + t**2) / 12
    loss = relative_error(student, teacher, weights)
    assert loss.item() == pytest.approx(error / (power + 1e-6), rel=1e-5)


@pytest.mark.parametrize("unit", [1e-2, 1.0, 1e4])
def test_relative_error_goes_from_0_to_2_whatever_the_unit(unit):
    teacher = unit * torch.randn(2000)
    assert relative_error(teacher, teacher) == 0
    assert relative_error(-teacher, teacher).item() == pytest.approx(2, rel=0.02)
    unrelated = relative_error(unit * torch.randn(2000), teacher)
    assert unrelated.item() == pytest.approx(1, abs=0.1)


def test_relative_error_of_what_is_far_below_the_smallest_power_is_near_0():
    teacher = 1e-6 * torch.randn(100)
    assert relative_error(-teacher, teacher) < 1e-4


def head_inputs():
    *outputs, _ = rpn_inputs()
    return [*outputs, *(torch.randn(R, 6, requires_grad=True) for _ in range(2))]


def test_head_loss_is_the_sum_of_three_relative_errors():
    inputs = head_inputs()
    student, teacher = (x.sigmoid() for x in inputs[:2])
    expected = (
        relative_error(student, teacher)
        + relative_error(*inputs[2:4], teacher[..., None].expand(-1, -1, 4))
        + relative_error(*inputs[4:])
    )
    assert head_kd_loss(*inputs).item() == pytest.approx(expected.item(), rel=1e-6)


def test_heads_that_agree_with_the_teacher_stop_learning():
    student = head_inputs()[::2]
    loss = head_kd_loss(*(x for own in student for x in (own, own.detach().clone())))
    loss.backward()
    assert loss == 0 and all(x.grad.abs().sum() == 0 for x in student)


def test_deltas_of_anchors_that_the_teacher_rejects_do_not_count():
    objectness, deltas, features = head_inputs()[::2]
    rejected = objectness.detach().clone()
    rejected[0, 0] = -100.0
    moved = deltas.detach().clone()
    moved[0, 0] += 10.0
    same = [objectness, rejected, deltas, deltas.detach(), features, features.detach()]
    other = [objectness, rejected, moved, deltas.detach(), features, features.detach()]
    assert torch.equal(head_kd_loss(*same), head_kd_loss(*other))


@pytest.mark.parametrize("channels", [1, K])
def test_relative_mask_loss_is_the_relative_error_of_probabilities_less_a_half(channels):
    student, teacher = (torch.randn(4, channels, 5, 5) for _ in range(2))
    classes = torch.tensor([2, 0, 1, 2])
    own, other = (
        torch.stack([x[f, 0 if channels == 1 else classes[f]] for f in range(4)]).sigmoid() - 0.5
        for x in (student, teacher)
    )
    loss = mask_kd_loss(student, teacher, classes, form="relative")
    assert loss.item() == pytest.approx(relative_error(own, other).item(), rel=1e-6)


# A squared error of probabilities does not move logits far from 0; those come first.
SATURATING = ("mask, relative", "head")


def all_losses(dtype=torch.float32, scale=1.0, rows=R, proposals=4):
    """Each loss with the student's and the teacher's tensors that it was made of."""
    torch.manual_seed(1)

    def leaf(*shape):
        return (scale * torch.randn(shape)).to(dtype).requires_grad_()

    rpn = [leaf(IMAGES, rows), leaf(IMAGES, rows), leaf(IMAGES, rows, 4), leaf(IMAGES, rows, 4)]
    boxes = [leaf(rows, 4 * K), leaf(rows, 4 * K)]
    masks = [leaf(proposals, K, 3, 3), leaf(proposals, K, 3, 3)]
    features = [leaf(rows, 6), leaf(rows, 6)]
    labels, classes = torch.randint(-1, 2, (IMAGES, rows)), torch.randint(K, (proposals,))
    truth, targets = torch.randn(rows, 4), TARGETS[:rows]
    sampled = rpn_kd_loss(*rpn, labels)
    weighted = rpn_kd_loss(*rpn, labels, anchors="all")
    own, teachers = [rpn[0], rpn[2]], [rpn[1], rpn[3]]
    return {
        "rpn": (sampled, own, teachers),
        "rpn, all": (weighted, own, teachers),
        "box": (box_kd_loss(*boxes, targets, truth, K), boxes[:1], boxes[1:]),
        "bounded": (
            box_kd_loss(*boxes, targets, truth, K, form="bounded"),
            boxes[:1],
            boxes[1:],
        ),
        "mask": (mask_kd_loss(*masks, classes), masks[:1], masks[1:]),
        "mask, relative": (mask_kd_loss(*masks, classes, form="relative"), masks[:1], masks[1:]),
        "head": (
            head_kd_loss(*rpn, *features),
            [*own, features[0]],
            [*teachers, features[1]],
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_losses_are_finite_float32_and_teach_the_student_alone(dtype, scale):
    for name, (loss, student, teacher) in all_losses(dtype, scale).items():
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite(), name
        assert all(x.grad.isfinite().all() for x in student), name
        learning = student[1:] if scale > 1 and name in SATURATING else student
        assert all(x.grad.abs().sum() > 0 for x in learning), name
        assert all(x.grad is None for x in teacher), name


def test_nothing_to_compare_gives_a_zero_with_a_graph():
    for name, (loss, student, _) in all_losses(rows=0, proposals=0).items():
        loss.backward()
        assert loss == 0 and student[0].grad is not None, name


def test_no_positive_anchor_and_no_foreground_proposal_give_a_zero_with_a_graph():
    student, teacher, *_, truth, _ = box_inputs()
    loss = box_kd_loss(student, teacher, torch.full((R,), K), truth, K)
    loss.backward()
    assert loss == 0 and student.grad.abs().sum() == 0
    *inputs, labels = rpn_inputs()
    loss = rpn_kd_loss(*inputs, torch.full_like(labels, -1))
    loss.backward()
    assert loss == 0 and inputs[0].grad.abs().sum() == 0


def test_autocast_changes_nothing():
    outside = {name: loss for name, (loss, *_) in all_losses().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = {name: loss for name, (loss, *_) in all_losses().items()}
    assert all(torch.equal(inside[name], outside[name]) for name in outside)
