"""CKD against a slow reference, its paper's theory, and its row blocks against the whole matrix."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kd_detectron.errors import ConfigError
from kd_detectron.losses import ckd_loss
from kd_detectron.losses.ckd import TRIPLES

R, CLASSES = 11, 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_logits(rows=R, classes=CLASSES):
    return torch.randn(rows, classes, requires_grad=True), torch.randn(rows, classes)


def loss_and_gradient(student, teacher, *args, **kwargs):
    loss = ckd_loss(student, teacher, *args, **kwargs)
    (gradient,) = torch.autograd.grad(loss, student)
    return loss.detach(), gradient


def cosine(a, b):
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


def slow_row_losses(student, teacher, temperature, triple):
    """Equation 13 with two loops, in Python's double precision."""
    rows = {"s": student.detach(), "t": teacher}
    anchors, positives, negatives = (rows[name] for name in triple)
    losses = []
    for i in range(len(student)):
        positive = math.exp(cosine(anchors[i], positives[i]) / temperature)
        total = positive
        for j in range(len(student)):
            if j != i:
                total += math.exp(cosine(anchors[i], negatives[j]) / temperature)
        losses.append(-math.log(positive / total))
    return losses


def slow_loss(*args):
    losses = slow_row_losses(*args)
    return sum(losses) / len(losses)


# ---- the formula ----


@pytest.mark.parametrize("triple", TRIPLES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("chunk_size", [0, 4])
def test_loss_is_the_two_loop_reference(triple, temperature, chunk_size):
    student, teacher = make_logits()
    loss = ckd_loss(student, teacher, temperature, triple, chunk_size=chunk_size)
    assert loss.item() == pytest.approx(slow_loss(student, teacher, temperature, triple), rel=1e-5)


@pytest.mark.parametrize("triple", TRIPLES)
def test_gradient_is_the_slope_of_the_loss(triple):
    student, teacher = make_logits(rows=5)
    _, gradient = loss_and_gradient(student, teacher, 0.5, triple)
    step = 1e-5
    for i in range(len(student)):
        for k in range(CLASSES):
            moved = [student.detach().double().clone() for _ in range(2)]
            moved[0][i, k] += step
            moved[1][i, k] -= step
            up, down = (slow_loss(m, teacher, 0.5, triple) for m in moved)
            assert gradient[i, k].item() == pytest.approx((up - down) / (2 * step), abs=1e-5)


def test_arguments_may_be_given_by_position():
    student, teacher = make_logits()
    by_name = ckd_loss(
        student_logits=student,
        teacher_logits=teacher,
        temperature=0.5,
        triple="stt",
        group_size=0,
        chunk_size=3,
    )
    assert torch.equal(ckd_loss(student, teacher, 0.5, "stt", 0, 3), by_name)


def test_teacher_negatives_with_teacher_anchor_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"KD.CKD.TRIPLE is 'tst'.*teacher is fixed"):
        ckd_loss(*make_logits(), triple="tst")


def test_unknown_triple_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"KD.CKD.TRIPLE is 'xyz'.*sts, stt, tss"):
        ckd_loss(*make_logits(), triple="xyz")


# ---- theory ----


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_theorem_1_gradients_are_proportional_to_one_minus_the_positives_probability(chunk_size):
    # On the sphere: the gradient with respect to a unit row is the theorem's, less its part along
    # that row. Row i of the loss pulls s_i towards t_i by g_i and pushes every s_j from t_i, all
    # together by g_i too.
    student, teacher = (F.normalize(rows.detach()) for rows in make_logits())
    temperature = 0.3
    student.requires_grad_()
    _, gradient = loss_and_gradient(student, teacher, temperature, chunk_size=chunk_size)
    probability = (teacher @ student.detach().T / temperature).softmax(dim=1)
    g = 1 - probability.diagonal()
    for k in range(R):
        pulled = -g[k] * teacher[k]
        pushed = sum(probability[i, k] * teacher[i] for i in range(R) if i != k)
        whole = (pulled + pushed) / temperature / R
        tangent = whole - (whole @ student[k]) * student[k]
        torch.testing.assert_close(gradient[k], tangent.detach())
    for i in range(R):
        negatives = torch.arange(R) != i
        torch.testing.assert_close(probability[i, negatives].sum(), g[i])


@pytest.mark.parametrize(("rows", "chunk_size"), [(2, 0), (8, 0), (8, 3)])
def test_gradient_strength_at_high_temperature_is_the_share_of_the_negatives(rows, chunk_size):
    # g -> n / (n + 1) with n negatives: seen from outside, the slope of the mean loss along
    # cos(t_i, s_i), with every other cosine held at zero by orthogonal axes.
    student, teacher = torch.eye(rows, rows + 1), torch.eye(rows, rows + 1)
    student[:, rows] = 1.0  # s_i = t_i + an axis that no teacher row has
    student.requires_grad_()
    temperature = 1e3
    _, gradient = loss_and_gradient(student, teacher, temperature, chunk_size=chunk_size)
    # d cos(t_i, s_i) / d s_i along the extra axis is -1 / (2 sqrt 2).
    g = gradient[:, rows] * temperature * rows * 2 * math.sqrt(2)
    torch.testing.assert_close(g, torch.full((rows,), (rows - 1) / rows), rtol=1e-2, atol=0)


@pytest.mark.parametrize("chunk_size", [0, 3])
def test_gradient_vanishes_at_low_temperature_where_the_positive_is_largest(chunk_size):
    teacher = torch.eye(8)
    student = (teacher + 0.2 * torch.rand(8, 8)).requires_grad_()
    loss, gradient = loss_and_gradient(student, teacher, 1e-3, chunk_size=chunk_size)
    assert loss == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("triple", TRIPLES)
def test_scale_of_any_row_does_not_matter(triple):
    student, teacher = make_logits()
    scales = 10 ** torch.linspace(-3, 3, R)[:, None]
    expected = ckd_loss(student, teacher, 0.5, triple)
    torch.testing.assert_close(ckd_loss(student * scales, teacher, 0.5, triple), expected)
    torch.testing.assert_close(ckd_loss(student, teacher * scales, 0.5, triple), expected)


@pytest.mark.parametrize("triple", TRIPLES)
@pytest.mark.parametrize("chunk_size", [0, 4])
def test_order_of_proposals_and_of_classes_does_not_matter(triple, chunk_size):
    student, teacher = make_logits()
    expected, gradient = loss_and_gradient(student, teacher, 0.5, triple, chunk_size=chunk_size)
    rows, columns = torch.randperm(R), torch.randperm(CLASSES)
    loss, moved = loss_and_gradient(
        student[rows][:, columns].detach().requires_grad_(),
        teacher[rows][:, columns],
        0.5,
        triple,
        chunk_size=chunk_size,
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(moved, gradient[rows][:, columns])


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_loss_lies_between_its_bounds_and_reaches_them(temperature):
    rows = 4

    def bound(gap):
        return math.log1p((rows - 1) * math.exp(gap / temperature))

    loss = ckd_loss(*make_logits(rows), temperature).item()
    assert bound(-2) < loss < bound(2)
    # cos(t_i, s_i) = -1 and cos(t_i, s_j) = 1 for two rows that face each other's teacher.
    teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    best = ckd_loss(teacher.clone(), teacher, temperature).item()
    worst = ckd_loss(-teacher, teacher, temperature).item()
    assert best == pytest.approx(math.log1p(math.exp(-2 / temperature)), abs=1e-6)
    assert worst == pytest.approx(math.log1p(math.exp(2 / temperature)), rel=1e-4)


def test_loss_stays_near_the_logarithm_of_the_number_of_proposals_at_temperature_one():
    rows = 512
    student, teacher = make_logits(rows, 81)
    for name, value in (("random", student), ("perfect", teacher)):
        assert abs(ckd_loss(value, teacher).item() - math.log(rows)) < 1.1, name


def test_perfect_student_scores_better_than_a_random_one():
    student, teacher = make_logits()
    assert ckd_loss(teacher, teacher) < ckd_loss(student, teacher)


# ---- groups ----


@pytest.mark.parametrize("triple", TRIPLES)
@pytest.mark.parametrize("group_size", [1, 3, 4, 10])
@pytest.mark.parametrize("chunk_size", [0, 2])
def test_groups_are_an_average_over_rows_of_separate_contrasts(triple, group_size, chunk_size):
    student, teacher = make_logits()
    torch.manual_seed(7)
    loss = ckd_loss(student, teacher, 0.5, triple, group_size, chunk_size)
    torch.manual_seed(7)
    order = torch.randperm(R)
    losses = []
    for start in range(0, R, group_size):
        group = order[start : start + group_size]
        losses += slow_row_losses(student[group], teacher[group], 0.5, triple)
    assert len(losses) == R
    assert loss.item() == pytest.approx(sum(losses) / R, rel=1e-5, abs=1e-7)


def test_groups_are_drawn_anew_and_repeat_with_the_seed():
    student, teacher = make_logits()
    torch.manual_seed(7)
    first, second = (ckd_loss(student, teacher, 0.1, group_size=3) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(ckd_loss(student, teacher, 0.1, group_size=3), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("group_size", [0, R, R + 5])
def test_group_of_all_proposals_draws_nothing(group_size):
    student, teacher = make_logits()
    state = torch.get_rng_state()
    assert torch.equal(
        ckd_loss(student, teacher, group_size=group_size), ckd_loss(student, teacher)
    )
    assert torch.equal(torch.get_rng_state(), state)


# ---- blocks ----


class Watch(TorchDispatchMode):
    """Records the largest tensor that any operation, forward or backward, gives."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("triple", TRIPLES)
@pytest.mark.parametrize("chunk_size", [1, 4, 10, 11, 100])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_blocks_give_the_loss_and_gradient_of_the_whole_matrix(triple, chunk_size, temperature):
    student, teacher = make_logits()
    whole, gradient = loss_and_gradient(student, teacher, temperature, triple)
    loss, blocked = loss_and_gradient(student, teacher, temperature, triple, chunk_size=chunk_size)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        blocked, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item()
    )


@pytest.mark.parametrize("triple", TRIPLES)
def test_automatic_blocks_give_what_the_whole_matrix_gives(triple):
    rows = 1100
    student, teacher = make_logits(rows)
    whole, gradient = loss_and_gradient(student, teacher, 1.0, triple, chunk_size=rows)
    loss, blocked = loss_and_gradient(student, teacher, 1.0, triple)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        blocked, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item()
    )


@pytest.mark.parametrize("triple", TRIPLES)
def test_neither_pass_holds_the_whole_matrix(triple):
    rows, chunk_size = 200, 16
    student, teacher = make_logits(rows)
    with Watch() as watch:
        ckd_loss(student, teacher, triple=triple, chunk_size=chunk_size).backward()
    assert watch.largest <= chunk_size * rows
    with Watch() as watch:
        ckd_loss(student, teacher, triple=triple).backward()
    assert watch.largest == rows * rows  # the watch sees a whole matrix where there is one


def test_large_batches_are_computed_in_blocks_unasked():
    rows = 1500
    student, teacher = make_logits(rows)
    with Watch() as watch:
        ckd_loss(student, teacher).backward()
    assert watch.largest <= 512 * rows


# ---- numbers ----


@pytest.mark.parametrize("triple", TRIPLES)
@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_and_zero_rows_give_finite_loss_and_gradient(triple, chunk_size, dtype):
    student = torch.tensor([[1e4, -1e4, 1e4], [0, 0, 0], [1e-2, 0, 0], [-1e4, -1e4, -1e4]])
    student = student.to(dtype).requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4, 1e4], [1, 2, 3], [0, 0, 0], [1e4, 1e4, 0]]).to(dtype)
    loss, gradient = loss_and_gradient(student, teacher, 0.1, triple, chunk_size=chunk_size)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert (gradient[1] == 0).all()  # a zero row has no direction to turn


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_autocast_changes_nothing(chunk_size):
    student, teacher = make_logits()
    expected = loss_and_gradient(student, teacher, 0.1, chunk_size=chunk_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_and_gradient(student, teacher, 0.1, chunk_size=chunk_size)
    assert torch.equal(inside[0], expected[0])
    if chunk_size:  # the backward pass is this project's own, and leaves autocast too
        assert torch.equal(inside[1], expected[1])


@pytest.mark.parametrize("triple", TRIPLES)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"group_size": 3}])
def test_no_proposals_give_a_zero_with_a_graph(triple, options):
    student, teacher = make_logits(rows=0)
    loss = ckd_loss(student, teacher, triple=triple, **options)
    assert loss == 0
    loss.backward()
    assert student.grad.shape == (0, CLASSES)


@pytest.mark.parametrize("triple", TRIPLES)
def test_one_proposal_has_nothing_to_contrast(triple):
    loss, gradient = loss_and_gradient(*make_logits(rows=1), triple=triple)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert (gradient == 0).all()


@pytest.mark.parametrize("triple", TRIPLES)
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_teacher_gets_no_gradient(triple, chunk_size):
    student, teacher = make_logits()
    teacher.requires_grad_()
    ckd_loss(student, teacher, triple=triple, chunk_size=chunk_size).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
