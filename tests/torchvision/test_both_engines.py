"""Properties of a distilled step that hold whatever library the detector is from."""

from collections import Counter

import pytest
import torch
from engines import ALL, OUTPUTS, Recorder
from torch import nn


def step(engine, model, batch=None, seed=3):
    """Losses of one training pass under a fixed seed; gradients are left in the model."""
    torch.manual_seed(seed)
    losses = engine.losses(model, engine.batch() if batch is None else batch)
    sum(losses.values()).backward()
    return losses


def count_calls(root: nn.Module, parts: dict[str, str]) -> Counter:
    calls = Counter()
    for name, path in parts.items():
        module = root.get_submodule(path)
        module.register_forward_hook(lambda m, i, o, name=name: calls.update([name]))
    return calls


def fingerprint(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_student_runs_once_and_its_losses_are_those_without_distillation(engine):
    model = engine.build(ALL)
    calls = count_calls(engine.student(model), engine.parts)
    losses = step(engine, model)
    assert set(calls.values()) == {1} and set(calls) == set(engine.parts)
    plain = step(engine, engine.plain())
    assert set(losses) - set(plain) == {f"loss_{name.lower()}" for name in ALL}
    for name, value in plain.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_row_i_of_both_models_is_the_same_box_anchor_and_location(engine):
    # A teacher with the student's weights computes the student's outputs, row by row. Batch
    # statistics would make the student differ.
    recorder = Recorder()
    model = engine.build([recorder], same_weights=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    step(engine, model)
    context = recorder.context
    for part in OUTPUTS:
        student, teacher = getattr(context.student, part), getattr(context.teacher, part)
        if not isinstance(student, dict):
            student, teacher = {part: student}, {part: teacher}
        assert list(student) == list(teacher)
        for key, value in student.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(
                teacher[key], value.detach(), rtol=0, atol=1e-4 * scale, msg=f"{part} {key}"
            )
            assert value.requires_grad and not teacher[key].requires_grad


def test_outputs_have_the_shapes_of_the_context(engine):
    recorder = Recorder()
    step(engine, engine.build([recorder]), engine.batch(boxes_per_image=(3, 0)))
    context = recorder.context
    rows, classes, images = len(context.targets), context.num_classes, len(context.image_sizes)
    foreground = int((context.targets < classes).sum())
    assert images == 2 and foreground > 0
    assert [len(boxes) for boxes in context.gt_boxes] == [3, 0]
    assert sum(len(boxes) for boxes in context.proposal_boxes) == rows
    assert context.targets.min() >= 0 and context.targets.max() == classes
    assert context.box_targets.shape == (rows, 4)
    assert len(context.mask_classes) == foreground and (context.mask_classes < classes).all()
    for side in (context.student, context.teacher):
        assert side.logits.shape == (rows, classes + 1)
        assert side.box_deltas.shape in [(rows, 4), (rows, 4 * classes)]
        assert len(side.box_features) == rows
        assert side.mask_logits.shape[:2] in [(foreground, 1), (foreground, classes)]
        for level, maps in side.features.items():
            anchors = len(context.anchors[level])
            assert anchors % (maps.shape[-2] * maps.shape[-1]) == 0
            assert side.objectness[level].shape == (images, anchors)
            assert side.anchor_deltas[level].shape == (images, anchors, 4)
            assert context.anchor_labels[level].shape == (images, anchors)
            assert maps.shape[-2:] == context.student.features[level].shape[-2:]
    labels = torch.cat(list(context.anchor_labels.values()), dim=1)
    assert set(labels.unique().tolist()) == {-1, 0, 1} and (labels[1] != 1).all()


def test_objects_are_classified_and_located_in_one_convention(engine):
    # The classification loss of the context's logits and targets is the student's own.
    recorder = Recorder()
    losses = step(engine, engine.build([recorder]))
    context = recorder.context
    expected = nn.functional.cross_entropy(context.student.logits, context.targets)
    assert any(torch.isclose(value, expected, rtol=1e-5) for value in losses.values())
    # A ground-truth box is among the proposals: its deltas are zeros, its class is an object's.
    boxes, exact = torch.cat(context.proposal_boxes), torch.cat(context.gt_boxes)
    rows = (boxes[:, None] == exact[None]).all(-1).any(1)
    assert rows.any() and (context.targets[rows] < context.num_classes).all()
    torch.testing.assert_close(context.box_targets[rows], torch.zeros(int(rows.sum()), 4))
    # Anchors sampled as positive overlap an object.
    for image, gt in enumerate(context.gt_boxes):
        for level, labels in context.anchor_labels.items():
            for box in context.anchors[level][labels[image] == 1]:
                low, high = torch.maximum(box[:2], gt[:, :2]), torch.minimum(box[2:], gt[:, 2:])
                assert (high > low).all(1).any()


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ((), set()),
        (("features", "features"), {"backbone"}),
        (("objectness", "anchor_deltas"), {"backbone", "rpn"}),
        (("box_features",), {"backbone", "box_head"}),
        (("logits", "box_deltas", "logits"), {"backbone", "box_head", "box_predictor"}),
        (("mask_logits",), {"backbone", "mask_predictor"}),
        (OUTPUTS, {"backbone", "rpn", "box_head", "box_predictor", "mask_predictor"}),
    ],
)
def test_teacher_parts_run_at_most_once_and_only_when_read(engine, reads, expected):
    model = engine.build([Recorder(reads)])
    calls = count_calls(model.teacher.model, engine.parts)
    step(engine, model)
    assert calls == dict.fromkeys(expected, 1)


def test_teacher_is_frozen_in_eval_mode_and_no_part_of_the_model(engine):
    model = engine.build(ALL)
    teacher = model.teacher.model
    before = fingerprint(teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for seed in range(3):
        optimizer.zero_grad()
        step(engine, model.train(), seed=seed)
        optimizer.step()
        assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in fingerprint(teacher).items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    of_model = {id(p) for p in model.parameters()} | {id(m) for m in model.modules()}
    assert not of_model & {id(x) for x in (*teacher.parameters(), *teacher.modules())}
    assert not any(name.startswith("teacher") for name in model.state_dict())


def test_student_and_distillers_get_finite_gradients(engine):
    model = engine.build(ALL)
    losses = step(engine, model)
    assert all(torch.isfinite(value) for value in losses.values()), losses
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert all(p.grad is not None for p in model.distillers.parameters())


@pytest.mark.parametrize(
    ("boxes_per_image", "sizes"),
    [
        pytest.param((0, 0), ((64, 96), (48, 64)), id="no objects"),
        pytest.param((0, 3), ((64, 96), (48, 64)), id="one image without objects"),
        pytest.param((2,), ((64, 96),), id="one image"),
        pytest.param((1, 30, 2), ((64, 96), (96, 64), (64, 65)), id="mixed sizes"),
    ],
)
def test_unusual_batches_just_work(engine, boxes_per_image, sizes):
    model = engine.build(ALL)
    losses = step(engine, model, engine.batch(boxes_per_image, sizes))
    assert all(torch.isfinite(value) for value in losses.values()), losses
    assert all(p.grad is not None for p in model.distillers.parameters())


def test_autocast_gives_finite_losses_and_gradients(engine):
    model = engine.build(ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(3)
        losses = engine.losses(model, engine.batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values()), losses
    assert all(losses[f"loss_{name.lower()}"].dtype == torch.float32 for name in ALL)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_eval_mode_is_the_student_and_runs_no_teacher(engine):
    model, plain, batch = engine.build(ALL).eval(), engine.plain().eval(), engine.batch()
    model.teacher.model.get_submodule(engine.parts["backbone"]).register_forward_hook(
        lambda *a: pytest.fail("teacher ran")
    )
    pairs = zip(engine.inference(model, batch), engine.inference(plain, batch), strict=True)
    for actual, expected in pairs:
        assert len(actual["boxes"]) > 0
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_state_dict_is_the_students_and_that_of_the_distillers(engine):
    model, plain = engine.build(ALL), engine.plain()
    state = model.state_dict()
    student = {k: v for k, v in state.items() if not k.startswith("distillers.")}
    plain.load_state_dict(student, strict=True)
    assert any(name.startswith("distillers.ReviewKD.") for name in state)
    other = engine.build(ALL)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(tensor, state[key]) for key, tensor in other.state_dict().items())


def test_schedule_at_zero_runs_no_teacher_and_leaves_no_parameter_without_gradient(engine):
    model = engine.build(ALL)
    calls = count_calls(model.teacher.model, {"backbone": engine.parts["backbone"]})
    model.distillation_factor = 0.0
    losses = step(engine, model)
    assert not calls and losses["loss_distillation"].item() == 0
    assert all(p.grad is not None for p in model.distillers.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_the_student_is_as_it_was_after_the_step(engine, fails):
    model = engine.build([Recorder()])
    modules = list(engine.student(model).modules())

    def functions():
        return [{k: id(v) for k, v in vars(module).items() if callable(v)} for module in modules]

    step(engine, model)  # Torchvision's own pooler sets an attribute in its first step.
    before = functions()
    if fails:
        model.distillers["Recorder"].forward = None
        predictor = engine.student(model).get_submodule(engine.parts["mask_predictor"])
        predictor.forward = None
        with pytest.raises(TypeError):
            step(engine, model)
        del predictor.forward
    else:
        step(engine, model)
    assert [m for m in modules if m._forward_hooks or m._forward_pre_hooks] == []
    assert functions() == before
