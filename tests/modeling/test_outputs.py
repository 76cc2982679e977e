"""The context of a Detectron2 step: each output is what the student's own losses were made of."""

from collections import Counter

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage
from tiny import distilled_cfg, tiny_batch
from torch.nn import functional as F

from kd_detectron.distillers import Distiller
from kd_detectron.modeling import DistilledRCNN, FrozenTeacher

ALL = ("features", "objectness", "box_features", "logits", "box_deltas", "mask_logits", "anchors")
TEACHER_PARTS = ("features", "objectness", "anchor_deltas", "box_features", "logits", "box_deltas",
                 "mask_logits")  # fmt: skip


class Recorder(Distiller):
    """Keeps the context of the last step and reads what it is told to read."""

    def __init__(self, requires, reads):
        super().__init__()
        self.requires = frozenset(requires)
        self.reads = reads

    def forward(self, context):
        self.context = context
        for part in self.reads:
            getattr(context.teacher, part)
        return {"loss_recorder": sum(x.sum() for x in context.student.features.values()) * 0}


def recording(tmp_path, requires=ALL, reads=(), opts=()):
    cfg = distilled_cfg(tmp_path, opts=["MODEL.MASK_ON", True, *opts])
    cfg.KD.TEACHER.OPTS = ["MODEL.MASK_ON", True]
    torch.manual_seed(1)
    teacher = FrozenTeacher.from_config(cfg)
    distillers = {"Recorder": Recorder(requires, reads)}
    return DistilledRCNN(
        teacher=teacher, distillers=distillers, **GeneralizedRCNN.from_config(cfg)
    ).train()


def step(model, batch=None):
    torch.manual_seed(3)
    with EventStorage():
        losses = model(tiny_batch() if batch is None else batch)
    return losses, model.distillers["Recorder"].context


def intercept(owner, name, seen):
    original = getattr(owner, name)

    def method(*args):
        seen[name] = args
        return original(*args)

    setattr(owner, name, method)


def test_rpn_outputs_and_labels_are_those_of_the_rpn_losses(tmp_path):
    model, seen = recording(tmp_path), {}
    intercept(model.proposal_generator, "losses", seen)
    _, context = step(model)
    _, objectness, labels, deltas, _ = seen["losses"]
    levels = ["p2", "p3", "p4", "p5", "p6"]
    student = context.student
    assert list(student.objectness) == list(student.anchor_deltas) == levels
    for index, level in enumerate(levels):
        assert torch.equal(student.objectness[level], objectness[index])
        assert torch.equal(student.anchor_deltas[level], deltas[index])
        assert context.anchors[level].shape == student.anchor_deltas[level].shape[1:]
    assert torch.equal(torch.cat(list(context.anchor_labels.values()), 1), torch.stack(labels))
    assert student.objectness["p2"].requires_grad


@pytest.mark.parametrize("train_on_pred_boxes", [False, True])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_box_targets_and_deltas_give_the_students_own_loss(
    tmp_path, train_on_pred_boxes, class_agnostic
):
    opts = ["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", train_on_pred_boxes]
    opts += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", class_agnostic]
    # Images without objects have no ground-truth boxes.
    losses, context = step(recording(tmp_path, opts=opts), tiny_batch(boxes_per_image=(3, 0)))
    rows = (context.targets < context.num_classes).nonzero()[:, 0]
    deltas = context.student.box_deltas.unflatten(1, (-1, 4))[rows]
    classes = torch.zeros_like(rows) if class_agnostic else context.targets[rows]
    own = deltas[torch.arange(len(rows)), classes]
    expected = F.l1_loss(own, context.box_targets[rows], reduction="sum") / len(context.targets)
    assert len(rows) > 0
    torch.testing.assert_close(losses["loss_box_reg"], expected)
    assert sum(len(x) for x in context.proposal_boxes) == len(context.targets)


@pytest.mark.parametrize("train_on_pred_boxes", [False, True])
def test_mask_logits_of_both_are_of_the_boxes_that_the_mask_head_was_given(
    tmp_path, train_on_pred_boxes
):
    opts = ["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", train_on_pred_boxes]
    model, pooled = recording(tmp_path, reads=["mask_logits"], opts=opts), {}
    intercept(model.roi_heads.mask_head, "forward", pooled)
    _, context = step(model)
    features, instances = pooled["forward"]
    torch.testing.assert_close(
        context.student.mask_logits, model.roi_heads.mask_head.layers(features)
    )
    assert torch.equal(context.mask_classes, torch.cat([x.gt_classes for x in instances]))
    heads = model.teacher.model.roi_heads
    levels = [context.teacher.features[level] for level in heads.mask_in_features]
    expected = heads.mask_head.layers(
        heads.mask_pooler(levels, [x.proposal_boxes for x in instances])
    )
    torch.testing.assert_close(context.teacher.mask_logits, expected)
    assert context.teacher.mask_logits.shape == context.student.mask_logits.shape


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        (["objectness", "anchor_deltas", "objectness"], {"backbone": 1, "rpn_head": 1}),
        (["box_deltas", "logits"], {"backbone": 1, "box_head": 1, "box_predictor": 1}),
        (["mask_logits", "mask_logits"], {"backbone": 1, "predictor": 1}),
        (
            TEACHER_PARTS,
            {"backbone": 1, "rpn_head": 1, "box_head": 1, "box_predictor": 1, "predictor": 1},
        ),
    ],
)
def test_teacher_parts_run_at_most_once_and_only_when_read(tmp_path, reads, expected):
    model = recording(tmp_path, reads=reads)
    teacher, calls = model.teacher.model, Counter()
    for name, module in (
        ("backbone", teacher.backbone),
        ("rpn_head", teacher.proposal_generator.rpn_head),
        ("box_head", teacher.roi_heads.box_head),
        ("box_predictor", teacher.roi_heads.box_predictor),
        ("predictor", teacher.roi_heads.mask_head.predictor),
    ):
        module.register_forward_hook(lambda m, i, o, name=name: calls.update([name]))
    _, context = step(model)
    assert calls == expected
    for part in reads:
        value = getattr(context.teacher, part)
        own = getattr(context.student, part)
        for one, other in (
            zip(value.values(), own.values(), strict=True)
            if isinstance(value, dict)
            else [(value, own)]
        ):
            assert not one.requires_grad
            assert one.shape[0] == other.shape[0] and one.shape[2:] == other.shape[2:]


def test_what_no_distiller_requires_is_neither_recorded_nor_kept_in_memory(tmp_path):
    model = recording(tmp_path, requires=["features"])
    _, context = step(model)
    recorded = {
        k: v for k, v in {**vars(context.student), **vars(context)}.items() if v is not None
    }
    always = {"student", "teacher", "num_classes", "image_sizes", "gt_boxes", "proposal_boxes"}
    assert set(recorded) == {"features"} | always
    heads = model.teacher.model.roi_heads
    dropped = [model.teacher.model.proposal_generator, heads.mask_head, heads.mask_pooler]
    dropped += [heads.box_head, heads.box_predictor, heads.box_pooler]
    assert dropped == [None] * 6
    kept = {name.split(".")[0] for name, _ in model.teacher.model.named_parameters()}
    assert kept == {"backbone"}


def test_a_distiller_that_declares_nothing_may_read_features_and_logits(tmp_path):
    model = recording(tmp_path, requires=[], reads=["logits"])
    _, context = step(model)
    assert context.student.logits.shape == context.teacher.logits.shape
    assert context.targets is not None and context.anchors is not None


@pytest.mark.parametrize("fails", [False, True])
def test_wrapped_method_and_hooks_are_gone_after_the_step(tmp_path, fails):
    model = recording(tmp_path)
    batch = tiny_batch()
    if fails:
        for item in batch:  # The mask loss, late in the step, asks for them.
            item["instances"].remove("gt_masks")
        with pytest.raises(AttributeError):
            step(model, batch)
    else:
        step(model, batch)
    assert "label_and_sample_anchors" not in vars(model.proposal_generator)
    assert [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks] == []
