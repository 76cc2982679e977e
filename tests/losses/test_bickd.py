"""BicKD, as this project reads its abstract: KD plus a class-wise and a sample-wise contrast."""

import math

import pytest
import torch
from torch.nn import functional as F

from kd_detectron.errors import ConfigError
from kd_detectron.losses import bickd_loss, kd_loss
from kd_detectron.losses.bickd import FORMS

R, CLASSES = 8, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_logits(rows=R, classes=CLASSES):
    return torch.randn(rows, classes, requires_grad=True), torch.randn(rows, classes)


def slow_term(student, teacher, temperature, form):
    """One bilateral term from (n, D) vectors, with two loops in double precision."""
    student, teacher = F.normalize(student.double()), F.normalize(teacher.double())
    n = len(student)
    cosine = (teacher @ student.T).tolist()
    if form == "contrastive":
        total = 0.0
        for i in range(n):
            scores = [math.exp(cosine[i][j] / temperature) for j in range(n)]
            total -= math.log(scores[i] / sum(scores))
        return total / n
    diagonal = sum((cosine[i][i] - 1) ** 2 for i in range(n))
    rest = sum(cosine[i][j] ** 2 for i in range(n) for j in range(n) if i != j)
    return diagonal / n + rest / (n * (n - 1))


@pytest.mark.parametrize("form", FORMS)
def test_loss_is_kd_plus_the_two_terms_over_columns_and_rows(form):
    student, teacher = make_logits()
    temperature, contrast_temperature, weight = 2.0, 0.3, 0.7
    p_s, p_t = (softmax.softmax(1) for softmax in (student.detach() / 2, teacher / 2))
    expected = kd_loss(student, teacher, temperature).item() + weight * (
        slow_term(p_s.T, p_t.T, contrast_temperature, form)
        + slow_term(p_s, p_t, contrast_temperature, form)
    )
    loss = bickd_loss(student, teacher, temperature, contrast_temperature, weight, form)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_weight_zero_is_kd():
    student, teacher = make_logits()
    assert torch.equal(
        bickd_loss(student, teacher, 2.0, contrast_weight=0.0), kd_loss(student, teacher, 2.0)
    )


@pytest.mark.parametrize("form", FORMS)
def test_bilateral_terms_are_least_where_classes_are_orthogonal_and_equal(form):
    # One proposal per class, both models sure of it: columns are the same orthogonal axes.
    sure = 50 * torch.eye(CLASSES)
    least = bickd_loss(sure, sure, form=form).item()
    floor = 2 * math.log1p((CLASSES - 1) * math.exp(-1 / 0.1)) if form == "contrastive" else 0.0
    assert least == pytest.approx(floor, abs=1e-6)
    unequal = bickd_loss(sure.roll(1, dims=0), sure, form=form) - kd_loss(
        sure.roll(1, dims=0), sure
    )
    vague = torch.eye(CLASSES)  # columns equal in both models, but not orthogonal
    not_orthogonal = bickd_loss(vague, vague, form=form)
    assert unequal > least + 0.1 and not_orthogonal > least + 0.1


@pytest.mark.parametrize("form", FORMS)
def test_classes_that_the_teacher_does_not_show_are_left_out(form):
    # Only the sample-wise term and KD see the last class, for which the teacher is sure it is not.
    student, teacher = make_logits()
    teacher[:, -1] = -40.0
    p_s, p_t = student.detach().softmax(1), teacher.softmax(1)
    expected = (
        kd_loss(student, teacher).item()
        + slow_term(p_s[:, :-1].T, p_t[:, :-1].T, 0.1, form)
        + slow_term(p_s, p_t, 0.1, form)
    )
    assert bickd_loss(student, teacher, form=form).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [3, 40])
def test_orthogonal_form_is_the_same_with_fewer_and_more_proposals_than_classes(rows):
    student, teacher = make_logits(rows)
    p_s, p_t = student.detach().softmax(1), teacher.softmax(1)
    expected = (
        kd_loss(student, teacher).item()
        + slow_term(p_s.T, p_t.T, 0.1, "orthogonal")
        + slow_term(p_s, p_t, 0.1, "orthogonal")
    )
    loss = bickd_loss(student, teacher, form="orthogonal")
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_unknown_form_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"KD.BICKD.FORM is 'xyz'.*contrastive, orthogonal"):
        bickd_loss(*make_logits(), form="xyz")


@pytest.mark.parametrize("form", FORMS)
def test_order_of_proposals_does_not_matter(form):
    student, teacher = make_logits()
    order = torch.randperm(R)
    torch.testing.assert_close(
        bickd_loss(student[order], teacher[order], form=form),
        bickd_loss(student, teacher, form=form),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_give_finite_loss_and_gradient(form, dtype):
    student = (torch.randn(R, CLASSES).sign() * 1e4).to(dtype).requires_grad_()
    teacher = (torch.randn(R, CLASSES).sign() * 1e4).to(dtype).requires_grad_()
    loss = bickd_loss(student, teacher, form=form)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    assert teacher.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_nothing(form):
    student, teacher = make_logits()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bickd_loss(student, teacher, form=form)
    assert torch.equal(inside, bickd_loss(student, teacher, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_no_proposals_give_a_zero_with_a_graph(form):
    student, teacher = make_logits(rows=0)
    loss = bickd_loss(student, teacher, form=form)
    assert loss == 0
    loss.backward()
    assert student.grad.shape == (0, CLASSES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, CLASSES])
def test_one_proposal_and_one_class_work(form, classes):
    student, teacher = make_logits(rows=1, classes=classes)
    loss = bickd_loss(student, teacher, form=form)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
