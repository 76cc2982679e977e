"""The meta-architecture: it is the student, the teacher stands outside, and no layer runs twice."""

import copy
from collections import Counter

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from tiny import distilled_cfg, every_distiller_cfg, tiny_batch, tiny_cfg, write_tiny_teacher

from kd_detectron.distillers import Distiller
from kd_detectron.errors import ConfigError
from kd_detectron.modeling import DistilledRCNN, FrozenTeacher
from kd_detectron.modeling.frozen_teacher import FrozenTeacherStep


def train_step(model, batch, seed=3):
    """Losses of one training pass under a fixed seed; gradients are left in the model."""
    torch.manual_seed(seed)
    model.train()
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
    return losses


def build(cfg: CfgNode, seed=11):
    torch.manual_seed(seed)
    return build_model(cfg)


@pytest.mark.parametrize("mask_on", [False, True])
@pytest.mark.parametrize("off", [{"KD.ENABLED": False}, {"KD.DISTILLERS": []}])
def test_empty_distillers_is_generalized_rcnn(tmp_path, off, mask_on):
    opts = [item for pair in off.items() for item in pair] + ["MODEL.MASK_ON", mask_on]
    distilled = build(distilled_cfg(tmp_path, opts=opts))
    plain = build(
        tiny_cfg(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", mask_on])
    )
    assert type(distilled) is DistilledRCNN and distilled.teacher is None
    batch = tiny_batch()
    expected, actual = train_step(plain, batch), train_step(distilled, batch)
    assert {k: v.item() for k, v in expected.items()} == {k: v.item() for k, v in actual.items()}
    gradients = dict(plain.named_parameters())
    for name, parameter in distilled.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name


def test_distillation_leaves_the_detection_losses_as_they_are(tmp_path):
    batch = tiny_batch()
    plain = train_step(build(tiny_cfg(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])), batch)
    distilled = train_step(build(distilled_cfg(tmp_path)), batch)
    assert set(distilled) - set(plain) == {"loss_ckd", "loss_reviewkd"}
    assert {k: distilled[k].item() for k in plain} == {k: v.item() for k, v in plain.items()}


def test_student_box_head_runs_once(tmp_path):
    model = build(every_distiller_cfg(tmp_path))
    calls = Counter()
    for name, module in model.named_modules():
        if not list(module.children()) and not name.startswith("distillers"):
            module.register_forward_hook(lambda m, i, o, name=name: calls.update([name]))
    for name in ("box_pooler", "box_head", "box_predictor"):
        getattr(model.roi_heads, name).register_forward_hook(
            lambda m, i, o, name=name: calls.update([name])
        )
    train_step(model, tiny_batch())
    assert calls["box_pooler"] == calls["box_head"] == calls["box_predictor"] == 1
    # The RPN head is shared by the five levels; no other layer runs more than once.
    repeated = {n: c for n, c in calls.items() if c > 1 and "proposal_generator" not in n}
    assert repeated == {}


def test_no_teacher_layer_runs_twice_or_unread_with_every_distiller(tmp_path):
    cfg = every_distiller_cfg(tmp_path)
    model = build(cfg)
    calls = Counter()
    with_weights = {name.rpartition(".")[0] for name, _ in model.teacher.model.named_parameters()}
    for name in with_weights:
        model.teacher.model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: calls.update([name])
        )
    train_step(model, tiny_batch())
    rpn = {name: count for name, count in calls.items() if name.startswith("proposal_generator")}
    assert set(rpn.values()) == {5}, "the RPN's head runs once on each of the five levels"
    assert set(calls) >= {"roi_heads.box_predictor.cls_score", "roi_heads.mask_head.predictor"}
    assert {name: n for name, n in calls.items() if n > 1 and name not in rpn} == {}
    assert set(calls) == with_weights, "the teacher keeps what it does not run"


class Recorder(Distiller):
    """Keeps the context of the last step and reads what it is told to read."""

    requires = frozenset({"features", "logits"})

    def __init__(self, reads=()):
        super().__init__()
        self.reads = reads

    def forward(self, context):
        self.context = context
        for part in self.reads:
            getattr(context.teacher, part)
        return {"loss_recorder": context.student.logits.sum() * 0}


def recording(tmp_path, reads=(), opts=None):
    cfg = distilled_cfg(tmp_path, opts=opts)
    teacher = FrozenTeacher.from_config(cfg)
    student = GeneralizedRCNN.from_config(cfg)
    return DistilledRCNN(teacher=teacher, distillers={"Recorder": Recorder(reads)}, **student)


@pytest.mark.parametrize("train_on_pred_boxes", [False, True])
def test_recorded_logits_are_the_tensor_that_feeds_loss_cls(tmp_path, train_on_pred_boxes):
    model = recording(
        tmp_path, opts=["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", train_on_pred_boxes]
    )
    predictor, pooler = model.roi_heads.box_predictor, model.roi_heads.box_pooler
    seen = {}
    original = predictor.losses

    def losses(predictions, proposals):
        seen["logits"] = predictions[0]
        seen["targets"] = torch.cat([p.gt_classes for p in proposals])
        seen["boxes"] = [p.proposal_boxes.tensor.clone() for p in proposals]
        return original(predictions, proposals)

    predictor.losses = losses
    train_step(model, tiny_batch())
    context = model.distillers["Recorder"].context
    assert context.student.logits is seen["logits"]
    assert torch.equal(context.targets, seen["targets"])
    for recorded, used in zip(context.proposal_boxes, seen["boxes"], strict=True):
        assert torch.equal(recorded, used)
    assert pooler._forward_pre_hooks == {}


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ((), {"backbone": 0, "box_head": 0, "box_predictor": 0}),
        (("features", "features"), {"backbone": 1, "box_head": 0, "box_predictor": 0}),
        (("box_features",), {"backbone": 1, "box_head": 1, "box_predictor": 0}),
        (("logits", "features", "logits"), {"backbone": 1, "box_head": 1, "box_predictor": 1}),
    ],
)
def test_teacher_parts_run_at_most_once_and_only_when_read(tmp_path, reads, expected):
    model = recording(tmp_path, reads)
    teacher, calls = model.teacher.model, Counter()
    for name, module in (
        ("backbone", teacher.backbone),
        ("box_head", teacher.roi_heads.box_head),
        ("box_predictor", teacher.roi_heads.box_predictor),
    ):
        module.register_forward_hook(lambda m, i, o, name=name: calls.update([name]))
    train_step(model, tiny_batch())
    assert {name: calls[name] for name in expected} == expected


def test_hooks_are_removed_also_when_the_step_fails(tmp_path):
    model = build(distilled_cfg(tmp_path))
    batch = tiny_batch()
    del batch[1]["instances"]
    with pytest.raises(KeyError):
        train_step(model, batch)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


@pytest.mark.parametrize("student_format", ["BGR", "RGB"])
@pytest.mark.parametrize("teacher_format", ["BGR", "RGB"])
def test_teacher_sees_the_image_as_it_was_trained_to(tmp_path, student_format, teacher_format):
    cfg = distilled_cfg(tmp_path, opts=["INPUT.FORMAT", student_format])
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    cfg.KD.TEACHER.OPTS = ["INPUT.FORMAT", teacher_format, "MODEL.PIXEL_STD", [57.0, 58.0, 59.0]]
    teacher = FrozenTeacher.from_config(cfg)
    student_batch = tiny_batch()
    # What the teacher alone computes from the same picture, read in its own channel order.
    alone = [
        {"image": x["image"] if student_format == teacher_format else x["image"][[2, 1, 0]]}
        for x in student_batch
    ]
    expected = teacher.model.preprocess_image(alone).tensor
    actual = teacher.preprocess(student_batch, student_format).tensor
    assert torch.equal(actual, expected)
    channel = 0 if student_format == teacher_format else 2
    mean, std = teacher.model.pixel_mean[0].item(), teacher.model.pixel_std[0].item()
    pixel = (student_batch[0]["image"][channel, 5, 7].float().item() - mean) / std
    assert actual[0, 0, 5, 7].item() == pytest.approx(pixel, rel=1e-6)


def test_teacher_is_frozen(tmp_path):
    cfg = every_distiller_cfg(tmp_path, ["KD.TEACHER.OPTS", ["MODEL.RESNETS.NORM", "BN"]])
    model = build(cfg)
    model.train()
    teacher = model.teacher
    assert not any(module.training for module in teacher.model.modules())
    before = teacher.fingerprint()
    optimizer = build_optimizer(cfg, model)
    for seed in range(3):
        optimizer.zero_grad()
        train_step(model, tiny_batch(seed=seed), seed)
        optimizer.step()
    assert teacher.fingerprint() == before
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    next(iter(teacher.model.parameters())).data.view(-1)[0] += 1e-3
    assert teacher.fingerprint() != before


def test_state_dict_holds_the_student_under_its_stock_names(tmp_path):
    distilled = build(distilled_cfg(tmp_path))
    plain = build(tiny_cfg(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]), seed=5)
    state = distilled.state_dict()
    student = {k: v for k, v in state.items() if not k.startswith("distillers.")}
    assert not any("teacher" in name for name in state)
    assert not any("teacher" in name for name, _ in distilled.named_parameters())
    assert not any(m is distilled.teacher.model for m in distilled.modules())
    result = plain.load_state_dict(student, strict=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert any(name.startswith("distillers.ReviewKD.") for name in state)


def test_eval_mode_is_the_student_and_runs_no_teacher(tmp_path):
    distilled = build(distilled_cfg(tmp_path)).eval()
    plain = build(tiny_cfg(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])).eval()
    distilled.teacher.model.backbone.register_forward_hook(lambda *a: pytest.fail("teacher ran"))
    assert isinstance(distilled, GeneralizedRCNN)
    batch = tiny_batch()
    with torch.no_grad():
        for expected, actual in zip(plain(batch), distilled(batch), strict=True):
            expected, actual = expected["instances"], actual["instances"]
            assert torch.equal(expected.pred_boxes.tensor, actual.pred_boxes.tensor)
            assert torch.equal(expected.scores, actual.scores)


def test_test_time_augmentation_works(tmp_path):
    cfg = distilled_cfg(tmp_path, opts=["TEST.AUG.MIN_SIZES", [48, 64], "TEST.AUG.FLIP", True])
    model = build(cfg).eval()
    with torch.no_grad():
        output = GeneralizedRCNNWithTTA(cfg, model)(tiny_batch())
    assert len(output) == 2 and all(x["instances"].has("pred_boxes") for x in output)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(tiny_batch(boxes_per_image=(0, 0)), id="no objects"),
        pytest.param(tiny_batch(boxes_per_image=(0, 3)), id="one image without objects"),
        pytest.param(tiny_batch(((40, 72),), (2,)), id="one image"),
        pytest.param(tiny_batch(((64, 96), (96, 64), (33, 65)), (1, 30, 2)), id="mixed sizes"),
    ],
)
@pytest.mark.parametrize("mask_on", [False, True])
def test_unusual_batches_just_work(tmp_path, batch, mask_on):
    cfg = every_distiller_cfg(tmp_path)
    if not mask_on:
        cfg.MODEL.MASK_ON = False
        cfg.KD.DISTILLERS.remove("MaskKD")
    model = build(cfg)
    losses = train_step(model, batch)
    assert all(torch.isfinite(value) for value in losses.values()), losses
    assert all(p.grad is not None for p in model.distillers.parameters())


def test_schedule_at_zero_runs_no_teacher_and_leaves_no_parameter_without_gradient(tmp_path):
    model = build(distilled_cfg(tmp_path))
    model.teacher.model.backbone.register_forward_hook(lambda *a: pytest.fail("teacher ran"))
    model.distillation_factor = 0.0
    losses = train_step(model, tiny_batch())
    assert losses["loss_distillation"].item() == 0
    assert all(p.grad is not None for p in model.parameters())


def test_level_read_by_distillation_alone_gets_a_gradient_also_when_the_schedule_ended(tmp_path):
    # DistributedDataParallel waits for each parameter, here for those of fpn_output2.
    levels = ["p3", "p4", "p5", "p6"]
    opts = ["MODEL.RPN.IN_FEATURES", levels, "MODEL.ROI_HEADS.IN_FEATURES", levels[:-1]]
    opts += ["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128]]]
    model = build(distilled_cfg(tmp_path, ["ReviewKD"], opts))
    for factor in (1.0, 0.0):
        model.zero_grad()
        model.distillation_factor = factor
        train_step(model, tiny_batch())
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_copy_of_the_student_shares_the_teacher(tmp_path):
    model = build(distilled_cfg(tmp_path))
    copied = copy.deepcopy(model)
    assert copied.teacher is model.teacher
    batch = tiny_batch()
    expected, actual = train_step(model, batch), train_step(copied, batch)
    assert {k: v.item() for k, v in actual.items()} == {k: v.item() for k, v in expected.items()}


def test_only_the_devices_random_state_that_is_used_is_forked(tmp_path, monkeypatch):
    # fork_rng() without devices forks all of them, and warns where there are several.
    forked = []
    original = torch.random.fork_rng
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda *a, **kw: forked.append(kw) or original(*a, **kw)
    )
    build(distilled_cfg(tmp_path))
    assert forked == [{"devices": []}]


def test_weights_and_schedule_scale_the_losses(tmp_path):
    batch = tiny_batch()
    model = build(distilled_cfg(tmp_path, opts=["KD.CKD.WEIGHT", 1.0]))
    reference = train_step(model, batch)
    model = build(distilled_cfg(tmp_path, opts=["KD.CKD.WEIGHT", 3.0]))
    model.distillation_factor = 0.5
    scaled = train_step(model, batch)
    assert scaled["loss_ckd"].item() == pytest.approx(1.5 * reference["loss_ckd"].item())
    assert scaled["loss_reviewkd"].item() == pytest.approx(0.5 * reference["loss_reviewkd"].item())


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["KD.DISTILLERS", ["ReviewKd"]], ["KD.DISTILLERS", "ReviewKd", "did you mean ReviewKD"]),
        (["KD.DISTILLERS", ["CKD", "CKD"]], ["KD.DISTILLERS", "once"]),
        (["KD.CKD.WEIGHT", float("nan")], ["KD.CKD.WEIGHT", "nan"]),
        (["KD.CKD.WEIGHT", -1.0], ["KD.CKD.WEIGHT", "-1.0"]),
        (["KD.CKD.TRIPLE", "tst"], ["KD.CKD.TRIPLE", "tst", "fixed"]),
        (["KD.TEACHER.CONFIG_FILE", ""], ["KD.TEACHER.CONFIG_FILE", "empty"]),
        (
            ["KD.TEACHER.CONFIG_FILE", "COCO-Detection/faster_rcnn_R_101_FPN_3.yaml"],
            ["KD.TEACHER.CONFIG_FILE", "faster_rcnn_R_101_FPN_3x.yaml"],
        ),
        (["KD.TEACHER.WEIGHTS", ""], ["KD.TEACHER.WEIGHTS", "trained teacher"]),
        (["KD.TEACHER.WEIGHTS", "gone.pth"], ["KD.TEACHER.WEIGHTS", "gone.pth"]),
        (["KD.TEACHER.OPTS", ["MODEL.DEPHT", 1]], ["KD.TEACHER.OPTS", "DEPHT"]),
        (
            ["KD.TEACHER.OPTS", ["MODEL.ROI_HEADS.NUM_CLASSES", 5]],
            ["NUM_CLASSES", "3", "5", "teacher"],
        ),
        (
            ["KD.TEACHER.OPTS", ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
                                 "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]],
            ["KD.DISTILLERS", "CKD", "Cascade"],
        ),
        (
            ["KD.TEACHER.OPTS", ["MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
                                 "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"],
                                 "MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"],
                                 "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
                                 "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]],
            ["levels", "p2 (stride 4)", "p7 (stride 128)"],
        ),
        (
            ["KD.DISTILLERS", ["PKD"]],
            ["PKD", "MODEL.FPN.OUT_CHANNELS", "[32, 32, 32, 32, 32]", "[40, 40, 40, 40, 40]"],
        ),
        (
            ["KD.DISTILLERS", ["RPNKD"],
             "KD.TEACHER.OPTS", ["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [99]]]],
            ["RPNKD", "anchors of p6", "128x128", "99x99", "MODEL.ANCHOR_GENERATOR"],
        ),
        (
            ["KD.DISTILLERS", ["RPNKD"],
             "KD.TEACHER.OPTS", ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]]],
            ["RPNKD", "anchors of p2", "11x6, 8x8, 6x11", "for the student and 8x8"],
        ),
        (
            ["KD.DISTILLERS", ["RPNKD"],
             "KD.TEACHER.OPTS", ["MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5"],
                                 "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64]]]],
            ["RPNKD", "anchors of p6", "not there", "MODEL.RPN.IN_FEATURES"],
        ),
        (
            ["KD.DISTILLERS", ["RPNKD"],
             "KD.TEACHER.OPTS", ["MODEL.RPN.BBOX_REG_WEIGHTS", (2.0, 2.0, 1.0, 1.0)]],
            ["RPNKD", "BBOX_REG_WEIGHTS", "(1.0, 1.0, 1.0, 1.0)", "(2.0, 2.0, 1.0, 1.0)"],
        ),
        (
            ["KD.DISTILLERS", ["RPNKD"],
             "KD.TEACHER.OPTS", ["MODEL.META_ARCHITECTURE", "ProposalNetwork",
                                 "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]],
            ["RPNKD", "teacher has no RPN", "MODEL.PROPOSAL_GENERATOR.NAME"],
        ),
        (
            ["KD.DISTILLERS", ["BoxKD"],
             "KD.TEACHER.OPTS", ["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)]],
            ["BoxKD", "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(10.0, 10.0, 5.0, 5.0)"],
        ),
        (
            ["KD.DISTILLERS", ["BoxKD"], "KD.TEACHER.OPTS", ["MODEL.ROI_HEADS.NUM_CLASSES", 5]],
            ["BoxKD", "NUM_CLASSES", "3", "5", "class by class"],
        ),
        (
            ["KD.DISTILLERS", ["MaskKD"], "KD.TEACHER.OPTS", ["MODEL.MASK_ON", True]],
            ["MaskKD", "the student has no mask head", "MODEL.MASK_ON"],
        ),
        (
            ["KD.DISTILLERS", ["MaskKD"], "MODEL.MASK_ON", True],
            ["MaskKD", "the teacher has no mask head", "MODEL.MASK_ON"],
        ),
        (
            ["KD.DISTILLERS", ["MaskKD"], "MODEL.MASK_ON", True,
             "KD.TEACHER.OPTS", ["MODEL.MASK_ON", True,
                                 "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7]],
            ["MaskKD", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", "(14, 14)", "(7, 7)"],
        ),
        (
            ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True],
            ["CKD", "USE_SIGMOID_CE is True for the student", "background"],
        ),
        (
            ["KD.TEACHER.OPTS", ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]],
            ["CKD", "USE_SIGMOID_CE is True for the teacher", "background"],
        ),
        (
            ["KD.DISTILLERS", ["FGFI"], "MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5", "p6"],
             "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128]]],
            ["FGFI", "MODEL.RPN.IN_FEATURES", "['p2'] have no anchors"],
        ),
        (["INPUT.FORMAT", "L"], ["INPUT.FORMAT", "student is L", "BGR"]),
        (
            ["KD.TEACHER.OPTS", ["INPUT.FORMAT", "YUV-BT.601"]],
            ["INPUT.FORMAT", "KD.TEACHER.CONFIG_FILE", "YUV-BT.601", "BGR"],
        ),
        (
            ["KD.TEACHER.OPTS", ["MODEL.META_ARCHITECTURE", "GeneralisedRCNN"]],
            ["KD.TEACHER", "GeneralisedRCNN", "META_ARCH", "--import"],
        ),
        (
            ["KD.TEACHER.OPTS", ["MODEL.BACKBONE.NAME", "build_resnet"]],
            ["KD.TEACHER", "build_resnet", "BACKBONE", "--import"],
        ),
        (
            ["KD.TEACHER.OPTS", ["MODEL.WEIGHTS", "gone.pth"], "KD.TEACHER.WEIGHTS", ""],
            ["gone.pth"],
        ),
        (
            ["KD.TEACHER.OPTS", ["MODEL.WEIGHTS", "a.pth"], "KD.TEACHER.WEIGHTS", "b.pth"],
            ["KD.TEACHER.WEIGHTS is 'b.pth'", "KD.TEACHER.OPTS is 'a.pth'"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, opts, words):
    cfg = distilled_cfg(tmp_path, opts=opts)
    with pytest.raises(ConfigError) as error:
        build_model(cfg)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_half_loaded_teacher_never_trains(tmp_path):
    cfg = distilled_cfg(tmp_path)
    other = build_model(tiny_cfg(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]))
    path = tmp_path / "other.pth"
    state = other.state_dict()
    state.pop("roi_heads.box_predictor.cls_score.weight")
    torch.save({"model": state}, path)
    cfg.KD.TEACHER.WEIGHTS = str(path)
    with pytest.raises(ConfigError, match="1 keys missing .*cls_score.weight.*of another shape"):
        build_model(cfg)


def test_matching_teacher_checkpoint_is_loaded(tmp_path):
    cfg = distilled_cfg(tmp_path)
    config_file = write_tiny_teacher(tmp_path)
    teacher_cfg = tiny_cfg()
    teacher_cfg.merge_from_file(config_file)
    trained = build(teacher_cfg, seed=99)
    torch.save({"model": trained.state_dict()}, tmp_path / "teacher.pth")
    cfg.KD.TEACHER.WEIGHTS = str(tmp_path / "teacher.pth")
    teacher = build(cfg).teacher
    assert teacher.model.proposal_generator is None
    batch, trained = tiny_batch(), FrozenTeacher(trained, "BGR")
    expected, actual = (
        FrozenTeacherStep(one, batch, "BGR", None).features() for one in (trained, teacher)
    )
    for level in expected:
        largest = expected[level].abs().max().item()
        torch.testing.assert_close(actual[level], expected[level], rtol=0, atol=1e-4 * largest)
    expected, actual = (x.model.roi_heads.state_dict() for x in (trained, teacher))
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def test_two_distillers_of_one_class_need_names_of_their_own(tmp_path):
    parts = DistilledRCNN.from_config(distilled_cfg(tmp_path, distillers=["CKD"]))
    parts["distillation_weights"] = {}
    two = [parts["distillers"]["CKD"], copy.deepcopy(parts["distillers"]["CKD"])]
    with pytest.raises(ConfigError, match=r"two of one class among \['CKD', 'CKD'\]"):
        DistilledRCNN(**parts | {"distillers": two})
    named = DistilledRCNN(**parts | {"distillers": {"one": two[0], "other": two[1]}})
    assert list(named.distillers) == ["one", "other"]
