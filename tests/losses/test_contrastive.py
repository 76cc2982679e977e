"""DCD, SupCon and CRD against slow references, and the properties they are chosen for."""

import math

import pytest
import torch
from torch.nn import functional as F

from kd_detectron.losses import crd_loss, dcd_loss, supcon_loss

R, WIDTH = 9, 5
TARGETS = torch.tensor([0, 1, 0, 2, 2, 2, 3, 1, 4])  # classes 3 and 4 have one proposal each


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_embeddings(rows=R):
    return tuple(torch.randn(rows, WIDTH, requires_grad=True) for _ in range(2))


def make_scale_and_bias():
    return torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)


def dcd(student, teacher, targets, **options):
    return dcd_loss(student, teacher, *make_scale_and_bias(), **options)


def supcon(student, teacher, targets):
    return supcon_loss(student, targets, temperature=0.1)


def crd(student, teacher, targets):
    return crd_loss(student, teacher, targets, temperature=0.1)


ALL = pytest.mark.parametrize("loss", [dcd, supcon, crd])


def cosines(a, b):
    return (F.normalize(a.detach().double()) @ F.normalize(b.detach().double()).T).tolist()


# ---- DCD ----


@pytest.mark.parametrize("log_scale", [1.0, -2.0, 5.0])
def test_dcd_is_the_two_loop_reference(log_scale):
    student, teacher = make_embeddings()
    scale = min(max(math.exp(log_scale), 0), 10)
    logits = [[c * scale + 0.7 for c in row] for row in cosines(student, teacher)]
    row_sums = [sum(math.exp(x) for x in row) for row in logits]
    column_sums = [sum(math.exp(row[j]) for row in logits) for j in range(R)]
    contrastive, divergence = 0.0, 0.0
    for i in range(R):
        contrastive -= math.log(math.exp(logits[i][i]) / row_sums[i])
        for j in range(R):
            p = math.exp(logits[i][j]) / row_sums[i]
            q = math.exp(logits[j][i]) / column_sums[i]
            divergence += q * math.log(q / p)  # the direction of the release
    loss = dcd_loss(
        student, teacher, torch.tensor(log_scale), torch.tensor(0.7), consistency_weight=0.3
    )
    assert loss.item() == pytest.approx((contrastive + 0.3 * divergence) / R, rel=1e-5)


def test_dcd_consistency_is_zero_for_a_symmetric_similarity():
    student, teacher = make_embeddings()
    for other, is_symmetric in ((student, True), (teacher, False)):
        consistency = dcd(student, other, None, consistency_weight=1.0) - dcd(
            student, other, None, consistency_weight=0.0
        )
        assert (abs(consistency.item()) < 1e-6) == is_symmetric


def test_dcd_bias_cancels_and_the_scale_learns():
    student, teacher = make_embeddings()
    scale, bias = make_scale_and_bias()
    loss = dcd_loss(student, teacher, scale, bias)
    loss.backward()
    assert scale.grad.abs() > 1e-3
    assert bias.grad.abs() < 1e-6
    torch.testing.assert_close(dcd_loss(student, teacher, scale, bias + 3), loss)


# ---- SupCon ----


def test_supcon_is_the_two_loop_reference():
    student, _ = make_embeddings()
    cosine = cosines(student, student)
    losses = []
    for i in range(R):
        others = [a for a in range(R) if a != i]
        positives = [p for p in others if TARGETS[p] == TARGETS[i]]
        total = sum(math.exp(cosine[i][a] / 0.2) for a in others)
        if positives:
            terms = [-math.log(math.exp(cosine[i][p] / 0.2) / total) for p in positives]
            losses.append(sum(terms) / len(terms))
    assert len(losses) == 7
    loss = supcon_loss(student, TARGETS, temperature=0.2)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_supcon_with_two_views_of_all_different_labels_is_info_nce():
    views = torch.randn(2, 4, WIDTH)
    labels = torch.arange(4).repeat(2)
    unit = F.normalize(views.flatten(0, 1))
    similarity = (unit @ unit.T / 0.1).fill_diagonal_(float("-inf"))
    info_nce = F.cross_entropy(similarity, torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]))
    torch.testing.assert_close(supcon_loss(views.flatten(0, 1), labels, temperature=0.1), info_nce)


def test_supcon_without_two_proposals_of_a_class_is_a_zero_with_a_graph():
    student, _ = make_embeddings()
    loss = supcon_loss(student, torch.arange(R), temperature=0.1)
    assert loss == 0
    loss.backward()
    assert (student.grad == 0).all()


# ---- CRD ----


def test_crd_is_the_two_loop_reference():
    student, teacher = make_embeddings()
    cosine = cosines(teacher, student)
    total = 0.0
    for i in range(R):
        positive = math.exp(cosine[i][i] / 0.2)
        negatives = sum(math.exp(cosine[i][j] / 0.2) for j in range(R) if TARGETS[j] != TARGETS[i])
        total -= math.log(positive / (positive + negatives))
    loss = crd_loss(student, teacher, TARGETS, temperature=0.2)
    assert loss.item() == pytest.approx(total / R, rel=1e-5)


def test_crd_pushes_away_proposals_of_other_classes_only():
    # Only anchor 0 has a direction, so that only its row moves the student.
    student, teacher = make_embeddings()
    teacher = torch.cat([teacher[:1], torch.zeros(R - 1, WIDTH)]).detach()
    crd_loss(student, teacher, TARGETS, temperature=0.2).backward()
    moved = student.grad.abs().sum(dim=1) > 0
    expected = TARGETS[0] != TARGETS
    expected[0] = True  # the positive
    assert torch.equal(moved, expected)


def test_crd_with_a_single_class_is_a_zero_with_a_graph():
    student, teacher = make_embeddings()
    loss = crd_loss(student, teacher, torch.zeros(R, dtype=torch.long), temperature=0.1)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert student.grad.abs().max() < 1e-6


# ---- all ----


@ALL
def test_embedding_length_and_order_of_proposals_do_not_matter(loss):
    student, teacher = make_embeddings()
    expected = loss(student, teacher, TARGETS)
    order = torch.randperm(R)
    lengths = torch.rand(R, 1) + 0.1
    moved = loss(student[order] * lengths, teacher[order] / lengths, TARGETS[order])
    torch.testing.assert_close(moved, expected)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_and_zero_rows_give_finite_loss_and_gradient(loss, dtype):
    signs = torch.randn(2, R, WIDTH).sign() * 1e4
    signs[:, 1] = 0
    student, teacher = (side.to(dtype).requires_grad_() for side in signs)
    value = loss(student, teacher, TARGETS)
    value.backward()
    assert value.dtype == torch.float32 and student.grad.dtype == dtype
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()
    assert (student.grad[1] == 0).all()


@ALL
def test_autocast_changes_nothing(loss):
    student, teacher = make_embeddings()
    expected = loss(student, teacher, TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher, TARGETS), expected)


@ALL
@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_contrast_gives_a_zero_with_a_graph(loss, rows):
    student, teacher = make_embeddings(rows)
    value = loss(student, teacher, TARGETS[:rows])
    assert value.item() == pytest.approx(0, abs=1e-6)
    value.backward()
    assert student.grad.shape == (rows, WIDTH) and (student.grad == 0).all()
