"""KD.TEACHER.INHERIT: parts of the student start as the teacher's, with and without distillers."""

import gc
import logging
import weakref

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import distilled_cfg, tiny_batch, tiny_cfg

from kd_detectron.engine import DistillationTrainer
from kd_detectron.errors import ConfigError
from kd_detectron.modeling import DistilledRCNN, build
from kd_detectron.modeling.teacher_loading import load_teacher

ALIKE = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 48]
DEEPER = [*ALIKE, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]


def config(tmp_path, teacher_opts, inherit, distillers=("CKD",), opts=()):
    """A student's config with a teacher checkpoint; also returns that checkpoint."""
    cfg = distilled_cfg(tmp_path, distillers, opts=list(opts))
    cfg.KD.TEACHER.OPTS = list(teacher_opts)
    torch.manual_seed(4)
    state = load_teacher(cfg)[0].state_dict()
    torch.save({"model": state}, tmp_path / "teacher.pth")
    cfg.KD.TEACHER.WEIGHTS = str(tmp_path / "teacher.pth")
    cfg.KD.TEACHER.INHERIT = list(inherit)
    return cfg, state


def student(cfg):
    torch.manual_seed(0)
    model = build_model(cfg)
    return model, {k: v for k, v in model.state_dict().items() if "distillers" not in k}


def inherited_parts(after, before, teacher):
    """Names of tensors that are the teacher's; all others are as without inheriting."""
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert all(torch.equal(after[key], teacher[key]) for key in changed)
    return {key.rpartition(".")[0] for key in changed}


@pytest.mark.parametrize("distillers", [["CKD"], []])
def test_inherited_parts_start_as_the_teachers_and_the_others_as_without(tmp_path, distillers):
    parts = ("proposal_generator", "roi_heads")
    cfg, teacher = config(tmp_path, ALIKE, parts, distillers)
    _, after = student(cfg)
    cfg.KD.TEACHER.INHERIT = []
    _, before = student(cfg)
    for key, tensor in after.items():
        source = teacher if key.startswith(parts) else before
        assert torch.equal(tensor, source[key]), key


@pytest.mark.parametrize("distillers", [["CKD"], []])
def test_inherited_parts_learn_at_a_rate_of_their_own(tmp_path, distillers):
    cfg, _ = config(tmp_path, ALIKE, ["roi_heads"], distillers)
    cfg.KD.TEACHER.INHERIT_LR_FACTOR = 0.1
    model, _ = student(cfg)
    optimizer = DistillationTrainer.build_optimizer(cfg, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        factor = 0.1 if name.startswith("roi_heads") else 1.0
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(cfg.SOLVER.BASE_LR * factor), name


def test_inheriting_without_distillers_leaves_the_plain_model_and_no_teacher(tmp_path, monkeypatch):
    cfg, teacher = config(tmp_path, ALIKE, ["auto"], distillers=())
    seen = []
    monkeypatch.setattr(build, "load_teacher", lambda cfg: _noted(seen, load_teacher(cfg)))
    model, state = student(cfg)
    gc.collect()
    assert type(model) is DistilledRCNN and model.teacher is None and not len(model.distillers)
    assert seen[0]() is None, "the teacher is still in memory"
    # The same training step as GeneralizedRCNN with these weights.
    plain = build_model(tiny_cfg(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]))
    plain.load_state_dict(state)
    steps = []
    for one in (plain, model):
        torch.manual_seed(3)
        with EventStorage():
            steps.append({k: v.item() for k, v in one.train()(tiny_batch()).items()})
    assert steps[0] == steps[1]


def _noted(seen, loaded):
    seen.append(weakref.ref(loaded[0]))
    return loaded


def test_auto_inherits_everything_behind_the_bottom_up_network_that_fits(tmp_path, caplog):
    mask = ["MODEL.MASK_ON", True]
    cfg, teacher = config(tmp_path, [*DEEPER, *mask], ["auto"], opts=mask)
    with caplog.at_level(logging.INFO, logger="kd_detectron"):
        _, after = student(cfg)
    cfg.KD.TEACHER.INHERIT = []
    _, before = student(cfg)
    parts = inherited_parts(after, before, teacher)
    # ResNet-50's maps are four times as wide, so its lateral convolutions do not fit.
    assert {x for x in parts if x.startswith("backbone")} == {
        f"backbone.fpn_output{level}" for level in (2, 3, 4, 5)
    }
    assert {".".join(x.split(".")[:2]) for x in parts if not x.startswith("backbone")} == {
        "proposal_generator.rpn_head",
        *("roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.mask_head"),
    }
    assert "Inherited from the teacher: " in caplog.text
    assert "backbone.fpn_lateral2 (weight is (32, 64, 1, 1), the teacher's (32, 256, 1, 1))" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("teacher_opts", "left_out"),
    [
        # Whole modules: not the box predictor's two layers of four that would fit.
        (["MODEL.ROI_HEADS.NUM_CLASSES", 5], {"roi_heads.box_predictor"}),
        # A predictor is nothing without the head that it reads.
        (["MODEL.ROI_BOX_HEAD.NUM_FC", 2], {"roi_heads.box_head", "roi_heads.box_predictor"}),
        (
            ["MODEL.ANCHOR_GENERATOR.SIZES", [[9], [16], [32], [64], [128]]],
            {"proposal_generator"},
        ),
        (
            ["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)],
            {"roi_heads.box_predictor"},
        ),
        (["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True], {"roi_heads.box_predictor"}),
    ],
)
def test_auto_leaves_out_what_means_something_else_in_the_teacher(
    tmp_path, teacher_opts, left_out, caplog
):
    cfg, teacher = config(tmp_path, [*ALIKE, *teacher_opts], ["auto"], ["FitNet"])
    with caplog.at_level(logging.INFO, logger="kd_detectron"):
        _, after = student(cfg)
    cfg.KD.TEACHER.INHERIT = []
    _, before = student(cfg)
    parts = inherited_parts(after, before, teacher)
    expected = {"roi_heads.box_head", "roi_heads.box_predictor", "proposal_generator"} - left_out
    assert {
        part for part in expected | left_out if any(x.startswith(part) for x in parts)
    } == expected
    assert all(f"{part} (" in caplog.text for part in left_out)


@pytest.mark.parametrize(
    ("teacher_opts", "inherited"),
    [
        ([], True),
        (["MODEL.ROI_BOX_HEAD.NUM_FC", 2], False),
        (["MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", [[1.0] * 4] * 3], False),
    ],
)
def test_auto_leaves_out_what_means_something_else_in_a_cascade(tmp_path, teacher_opts, inherited):
    cascade = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"]
    cascade += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
    cfg, teacher = config(tmp_path, [*ALIKE, *cascade, *teacher_opts], ["auto"], [])
    cfg.merge_from_list(cascade)
    _, after = student(cfg)
    cfg.KD.TEACHER.INHERIT = []
    _, before = student(cfg)
    parts = inherited_parts(after, before, teacher)
    assert any(x.startswith("roi_heads.box_predictor.2") for x in parts) == inherited
    assert any(x.startswith("proposal_generator") for x in parts)


@pytest.mark.parametrize(
    ("teacher_opts", "inherit", "words"),
    [
        (ALIKE, ["roi_head."], ["KD.TEACHER.INHERIT", "no part of that name", "mean roi_heads"]),
        (
            [],
            ["roi_heads"],
            ["has 'roi_heads', but roi_heads.box_head.fc1.weight is (48, 1568), the", "'auto'"],
        ),
        (
            [*ALIKE, "MODEL.ROI_BOX_HEAD.NUM_FC", 2],
            ["roi_heads"],
            ["roi_heads.box_head.fc2.weight is absent, the teacher's (48, 48)"],
        ),
        # What fits in shape and means something else.
        (
            [*ALIKE, "MODEL.ANCHOR_GENERATOR.SIZES", [[9], [16], [32], [64], [128]]],
            ["proposal_generator.rpn_head"],
            ["of proposal_generator, its anchors are others"],
        ),
        (
            [*ALIKE, "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)],
            ["roi_heads"],
            ["of roi_heads.box_predictor, MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS are others"],
        ),
        (
            ["MODEL.META_ARCHITECTURE", "ProposalNetwork"],
            ["auto"],
            ["KD.TEACHER.INHERIT", "no part", "(weight is (32, 64, 1, 1), the teacher's (40"],
        ),
    ],
)
@pytest.mark.parametrize("distillers", [["FitNet"], []])
def test_what_cannot_be_inherited_is_refused(tmp_path, teacher_opts, inherit, words, distillers):
    cfg = distilled_cfg(tmp_path, distillers)
    cfg.KD.TEACHER.OPTS, cfg.KD.TEACHER.INHERIT = teacher_opts, inherit
    with pytest.raises(ConfigError) as error:
        build_model(cfg)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_part_that_would_keep_random_layers_is_refused(tmp_path):
    cfg, _ = config(tmp_path, ALIKE, ["roi_heads"], opts=["MODEL.ROI_BOX_HEAD.NUM_FC", 2])
    cfg.KD.TEACHER.OPTS = [*ALIKE, "MODEL.ROI_BOX_HEAD.NUM_FC", 1]
    with pytest.raises(ConfigError, match=r"fc2.weight is \(48, 48\), the teacher's absent"):
        build_model(cfg)


def test_a_mask_head_that_pools_other_sizes_is_left_out(tmp_path, caplog):
    mask = ["MODEL.MASK_ON", True]
    resolution = ["MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7]
    cfg, _ = config(tmp_path, [*ALIKE, *mask, *resolution], ["auto"], opts=mask)
    with caplog.at_level(logging.INFO, logger="kd_detectron"):
        build_model(cfg)
    assert "roi_heads.mask_head (its POOLER_RESOLUTION is another)" in caplog.text


def test_a_head_that_the_teacher_lacks_stays_the_students(tmp_path, caplog):
    mask = ["MODEL.MASK_ON", True]
    cfg, teacher = config(tmp_path, ALIKE, ["roi_heads"], opts=mask)
    with caplog.at_level(logging.INFO, logger="kd_detectron"):
        _, after = student(cfg)
    assert "Not in the teacher: roi_heads.mask_head" in caplog.text
    assert torch.equal(
        after["roi_heads.box_head.fc1.weight"], teacher["roi_heads.box_head.fc1.weight"]
    )


def test_weights_that_would_replace_inherited_parts_are_refused(tmp_path):
    cfg, teacher = config(tmp_path, ALIKE, ["roi_heads"])
    weights = tmp_path / "whole_detector.pth"
    torch.save({"model": student(cfg)[1]}, weights)
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = str(weights), str(tmp_path / "run")
    trainer = _Trainer(cfg)
    with pytest.raises(
        ConfigError, match=r"MODEL.WEIGHTS is .* KD.TEACHER.INHERIT \['roi_heads'\]"
    ):
        trainer.resume_or_load(resume=False)


def test_weights_of_a_backbone_leave_inherited_parts_as_they_are(tmp_path):
    cfg, teacher = config(tmp_path, ALIKE, ["roi_heads"])
    state = {k: v + 1 for k, v in student(cfg)[1].items() if k.startswith("backbone")}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "backbone.pth")
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    trainer = _Trainer(cfg)
    trainer.resume_or_load(resume=False)
    loaded = trainer.model.state_dict()
    for key, tensor in {**state, **_of(teacher, "roi_heads")}.items():
        assert torch.equal(loaded[key], tensor), key


class _Trainer(DistillationTrainer):
    """One without data."""

    @classmethod
    def build_train_loader(cls, cfg):
        return []


def _of(state, start):
    return {key: tensor for key, tensor in state.items() if key.startswith(start)}


def test_a_rate_of_inherited_parts_without_any_is_warned_of(tmp_path, caplog):
    cfg, _ = config(tmp_path, ALIKE, [])
    cfg.KD.TEACHER.INHERIT_LR_FACTOR = 0.1
    build_model(cfg)
    assert "INHERIT_LR_FACTOR is 0.1 but KD.TEACHER.INHERIT is empty" in caplog.text


def test_inheriting_needs_a_teacher(tmp_path):
    cfg = tiny_cfg(["KD.TEACHER.INHERIT", ["auto"]])
    with pytest.raises(ConfigError, match="KD.TEACHER.CONFIG_FILE is empty.*KD.TEACHER.INHERIT"):
        build_model(cfg)


def test_nothing_is_inherited_where_distillation_is_off(tmp_path):
    cfg = tiny_cfg(["KD.TEACHER.INHERIT", ["auto"], "KD.ENABLED", False])
    assert build_model(cfg).teacher is None
