"""What every distiller of this project keeps to, whatever its method.

One test a rule, over all registered distillers: a new one is held to them by being registered.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch

from kd_detectron.distillers import DISTILLER_REGISTRY

NAMES = sorted(
    name for name, cls in DISTILLER_REGISTRY if cls.__module__.startswith("kd_detectron.")
)
# What a distiller that requires a part may read.
PARTS = {
    "features": ["features"],
    "logits": ["logits"],
    "box_features": ["box_features"],
    "objectness": ["objectness", "anchor_deltas"],
    "box_deltas": ["box_deltas"],
    "mask_logits": ["mask_logits"],
}
OF_THE_CONTEXT = {
    "anchors": ["anchors"],
    "objectness": ["anchor_labels"],
    "box_deltas": ["box_targets"],
    "mask_logits": ["mask_classes"],
}

every_distiller = pytest.mark.parametrize("name", NAMES)


def only_loss(losses):
    (loss,) = losses.values()
    return loss


def tensors(side):
    parts = vars(side).values()
    return [t for part in parts for t in (part.values() if isinstance(part, dict) else [part])]


def tensors_read(distiller, side):
    """Those tensors of one model that the distiller declares to read."""
    return tensors(SimpleNamespace(**declared(distiller, side, PARTS)))


def declared(distiller, side, parts):
    names = [name for part in distiller.requires for name in parts.get(part, [])]
    return {name: getattr(side, name) for name in names}


def check_gradients(distiller, context, loss):
    """The backward pass gives finite gradients to the student and to every own parameter."""
    loss.backward()
    trained = [*tensors_read(distiller, context.student), *distiller.parameters()]
    assert trained
    for tensor in trained:
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


def test_all_methods_of_the_project_are_registered():
    assert NAMES == [
        "BicKD", "BoxKD", "CKD", "CRD", "DCD", "DKD", "FGFI", "FitNet", "HeadKD", "KD", "MaskKD",
        "PCKD", "PKD", "RPNKD", "ReviewKD", "SupCon",
    ]  # fmt: skip


@every_distiller
def test_loss_is_one_float32_scalar_named_after_the_distiller(name, make_distiller, make_context):
    losses = make_distiller(name)(make_context())
    assert list(losses) == [f"loss_{name.lower()}"]
    loss = only_loss(losses)
    assert loss.shape == () and loss.dtype == torch.float32
    assert torch.isfinite(loss) and loss > 0


@every_distiller
def test_student_and_own_parameters_learn_and_the_teacher_does_not(
    name, make_distiller, make_context
):
    distiller, context = make_distiller(name), make_context()
    check_gradients(distiller, context, only_loss(distiller(context)))
    assert any(t.grad.abs().sum() > 0 for t in tensors_read(distiller, context.student))
    assert all(tensor.grad is None for tensor in tensors(context.teacher))


@every_distiller
def test_distiller_reads_only_the_parts_that_it_requires(name, make_distiller, make_context):
    # A teacher part that is read is a teacher part that is computed.
    distiller, context = make_distiller(name), make_context()
    expected = only_loss(make_distiller(name)(context))
    for model in ("student", "teacher"):
        read = declared(distiller, getattr(context, model), PARTS)
        setattr(context, model, SimpleNamespace(**read))
    for names in OF_THE_CONTEXT.values():
        for name in set(names) - set(declared(distiller, context, OF_THE_CONTEXT)):
            delattr(context, name)
    assert torch.equal(only_loss(distiller(context)), expected)


@every_distiller
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name, dtype, make_distiller, make_context):
    outside = only_loss(make_distiller(name)(make_context()))
    with torch.autocast("cpu", dtype=dtype):
        inside = only_loss(make_distiller(name)(make_context()))
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=0)


@every_distiller
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("who", ["both", "teacher"])
def test_half_precision_inputs_give_nearly_the_same_loss(
    name, dtype, who, make_distiller, make_context
):
    expected = only_loss(make_distiller(name)(make_context()))
    student_dtype = dtype if who == "both" else torch.float32
    distiller = make_distiller(name)
    context = make_context(student_dtype=student_dtype, teacher_dtype=dtype)
    loss = only_loss(distiller(context))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    check_gradients(distiller, context, loss)


@every_distiller
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_ten_thousand_give_finite_loss_and_gradient(
    name, dtype, make_distiller, make_context
):
    distiller = make_distiller(name)
    context = make_context(logit_scale=1e4, student_dtype=dtype, teacher_dtype=dtype)
    loss = only_loss(distiller(context))
    assert torch.isfinite(loss)
    check_gradients(distiller, context, loss)


@every_distiller
def test_no_proposals_give_a_zero_that_leaves_no_parameter_without_gradient(
    name, make_distiller, make_context
):
    # DistributedDataParallel waits forever for a parameter that one process does not use.
    distiller, context = make_distiller(name), make_context(proposals=(0, 0))
    loss = only_loss(distiller(context))
    assert torch.isfinite(loss) and loss.requires_grad
    if not distiller.requires & {"features", "objectness"}:
        assert loss == 0
    check_gradients(distiller, context, loss)


@every_distiller
@pytest.mark.parametrize("proposals", [(1,), (0, 1), (5,), (1, 0, 2)])
def test_few_proposals_and_images_without_any_just_work(
    name, proposals, make_distiller, make_context
):
    distiller, context = make_distiller(name), make_context(proposals)
    loss = only_loss(distiller(context))
    assert torch.isfinite(loss)
    check_gradients(distiller, context, loss)


@every_distiller
@pytest.mark.parametrize("target", [0, 3])
def test_proposals_of_a_single_class_or_all_background_just_work(
    name, target, make_distiller, make_context
):
    distiller, context = make_distiller(name), make_context()
    context.targets = torch.full_like(context.targets, target)
    context.gt_boxes = [boxes[:0] for boxes in context.gt_boxes]
    loss = only_loss(distiller(context))
    assert torch.isfinite(loss)
    check_gradients(distiller, context, loss)


@every_distiller
def test_one_foreground_class_just_works_and_only_dkd_warns(name, make_distiller, make_context):
    distiller = make_distiller(name, num_classes=1)
    context = make_context(num_classes=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = only_loss(distiller(context))
    assert torch.isfinite(loss)
    check_gradients(distiller, context, loss)
    assert [("NCKD" in str(warning.message)) for warning in caught] == [True] * (name == "DKD")


@every_distiller
def test_order_of_images_does_not_matter(name, make_distiller, make_context):
    proposals = (4, 3, 2)
    expected = only_loss(make_distiller(name)(make_context(proposals)))
    moved = only_loss(make_distiller(name)(make_context(proposals, order=(2, 0, 1))))
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=0)


@every_distiller
def test_loss_is_deterministic_and_draws_no_random_numbers(name, make_distiller, make_context):
    first, second, context = make_distiller(name), make_distiller(name), make_context()
    state = torch.get_rng_state()
    assert torch.equal(only_loss(first(context)), only_loss(second(context)))
    assert torch.equal(torch.get_rng_state(), state)


@every_distiller
def test_inputs_are_left_as_they_were(name, make_distiller, make_context):
    context = make_context()
    before = [
        t.detach().clone() for side in (context.student, context.teacher) for t in tensors(side)
    ]
    only_loss(make_distiller(name)(context)).backward()
    after = [t for side in (context.student, context.teacher) for t in tensors(side)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
