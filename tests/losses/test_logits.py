"""KD and DKD against slow references in plain Python, and their known limits."""

import math

import pytest
import torch

from kd_detectron.losses import dkd_loss, kd_loss

R, CLASSES = 7, 5


@pytest.fixture
def student():
    return torch.randn(R, CLASSES, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def teacher():
    return torch.randn(R, CLASSES, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture
def targets():
    return torch.tensor([0, 1, 2, 3, 4, 4, 0])


def softmax(row, temperature):
    exps = [math.exp(value / temperature) for value in row]
    return [value / sum(exps) for value in exps]


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reference_kd(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        total += divergence(softmax(t, temperature), softmax(s, temperature))
    return total / len(student) * temperature**2


def reference_dkd(student, teacher, targets, alpha, beta, temperature):
    total = 0.0
    for s, t, target in zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        tckd = divergence([p[target], 1 - p[target]], [q[target], 1 - q[target]])
        p_rest = [value / (1 - p[target]) for i, value in enumerate(p) if i != target]
        q_rest = [value / (1 - q[target]) for i, value in enumerate(q) if i != target]
        total += alpha * tckd + beta * divergence(p_rest, q_rest)
    return total / len(student) * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_is_the_mean_divergence_of_softened_distributions(student, teacher, temperature):
    expected = reference_kd(student, teacher, temperature)
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha, beta", [(1.0, 0.25), (1.0, 0.0), (0.0, 8.0), (0.3, 2.0)])
def test_dkd_is_both_divergences_weighted_apart(
    student, teacher, targets, alpha, beta, temperature
):
    expected = reference_dkd(student, teacher, targets, alpha, beta, temperature)
    loss = dkd_loss(student, teacher, targets, alpha, beta, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_dkd_with_two_foreground_classes_keeps_the_non_target_term(student, teacher):
    student, teacher, targets = student[:3, :3], teacher[:3, :3], torch.tensor([0, 1, 2])
    expected = reference_dkd(student, teacher, targets, 1.0, 4.0, 1.0)
    assert dkd_loss(student, teacher, targets, beta=4.0).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_dkd_with_the_teachers_own_confidence_as_beta_is_kd(student, teacher, targets, temperature):
    confidence = (teacher / temperature).softmax(dim=1)[torch.arange(R), targets]
    alpha = 0.7
    loss = dkd_loss(student, teacher, targets, alpha, alpha * (1 - confidence), temperature)
    torch.testing.assert_close(loss, alpha * kd_loss(student, teacher, temperature))


def test_equal_logits_cost_nothing(student, targets):
    student.requires_grad_()
    for loss in (kd_loss(student, student), dkd_loss(student, student, targets)):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.abs().max() < 1e-6


def test_adding_a_constant_to_a_proposals_logits_changes_nothing(student, teacher, targets):
    shift = torch.arange(R)[:, None] * 5.0
    torch.testing.assert_close(
        kd_loss(student + shift, teacher - shift), kd_loss(student, teacher), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        dkd_loss(student + shift, teacher - shift, targets),
        dkd_loss(student, teacher, targets),
        rtol=1e-4,
        atol=1e-5,
    )


def test_non_target_term_ignores_the_target_logits(student, teacher, targets):
    boosted = student.clone()
    boosted[torch.arange(R), targets] += 6
    only_non_target = {"alpha": 0.0, "beta": 1.0}
    torch.testing.assert_close(
        dkd_loss(boosted, teacher, targets, **only_non_target),
        dkd_loss(student, teacher, targets, **only_non_target),
    )


def test_gradient_of_kd_is_the_difference_of_probabilities(student, teacher):
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, 2.0), student)
    expected = 2.0 * ((student / 2).softmax(dim=1) - (teacher / 2).softmax(dim=1)) / R
    torch.testing.assert_close(gradient, expected.detach())


def test_teacher_gets_no_gradient(student, teacher, targets):
    student.requires_grad_()
    teacher.requires_grad_()
    (kd_loss(student, teacher) + dkd_loss(student, teacher, targets)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(dtype):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype)
    teacher = -student
    targets = torch.tensor([0, 0, 2])
    student.requires_grad_()
    for loss in (kd_loss(student, teacher), dkd_loss(student, teacher, targets)):
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(gradient).all()


def test_dkd_sees_differences_beyond_the_resolution_of_a_probability():
    # p[target] rounds to 1 in float32, so log(1 - p) would be -inf; the true value is -40.
    teacher = torch.tensor([[0.0, 0.0, 0.0]])
    student = torch.tensor([[40.0, 0.0, 0.0]])
    loss = dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=0.0)
    expected = math.log(1 / 3) / 3 + 2 / 3 * (math.log(2 / 3) - (math.log(2) - 40))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_16_bit_logits_lose_nothing_but_their_own_rounding(student, teacher, targets):
    student, teacher = student.half(), teacher.half()
    for half, full in (
        (kd_loss(student, teacher), kd_loss(student.float(), teacher.float())),
        (dkd_loss(student, teacher, targets), dkd_loss(student.float(), teacher.float(), targets)),
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_autocast_changes_nothing(student, teacher, targets):
    outside = kd_loss(student, teacher), dkd_loss(student, teacher, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kd_loss(student, teacher), dkd_loss(student, teacher, targets)
    assert inside == outside


def test_no_proposals_give_a_zero_with_a_graph():
    student = torch.zeros(0, CLASSES, requires_grad=True)
    no_targets = torch.zeros(0, dtype=torch.long)
    for loss in (
        kd_loss(student, torch.zeros(0, CLASSES)),
        dkd_loss(student, torch.zeros(0, CLASSES), no_targets),
    ):
        assert loss.item() == 0
        loss.backward()


def test_single_foreground_class_switches_the_non_target_term_off_with_a_warning():
    student = torch.tensor([[1.0, -1.0], [0.5, 2.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 3.0], [2.0, 2.0]])
    with pytest.warns(UserWarning, match="NCKD is switched off"):
        loss = dkd_loss(student, teacher, torch.tensor([0, 1]), beta=100.0)
    # With two classes (target, everything else) is the whole distribution.
    torch.testing.assert_close(loss, kd_loss(student, teacher))
    loss.backward()
    assert torch.isfinite(student.grad).all()
