"""The teacher, folded, is the plain teacher: same outputs, checkpoint checked before."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from tiny import distilled_cfg, tiny_batch
from torch import nn

from kd_detectron.modeling import FrozenTeacher
from kd_detectron.modeling.fold import fold_batch_norm
from kd_detectron.modeling.frozen_teacher import FrozenTeacherStep
from kd_detectron.modeling.teacher_loading import build_teacher_model, teacher_config

NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


def train_statistics(model, seed=0):
    """Fills every BatchNorm with numbers as training leaves them: far from the identity."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NORMS):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def trained_teacher(tmp_path, norm):
    """A distilled config whose teacher has a checkpoint, and that teacher as it was trained."""
    cfg = distilled_cfg(tmp_path, opts=["KD.TEACHER.OPTS", ["MODEL.RESNETS.NORM", norm]])
    torch.manual_seed(0)
    model = build_teacher_model(teacher_config(cfg))
    train_statistics(model)
    path = tmp_path / "teacher.pth"
    torch.save({"model": model.state_dict()}, path)
    cfg.KD.TEACHER.WEIGHTS = str(path)
    return cfg, FrozenTeacher(model, teacher_config(cfg).INPUT.FORMAT)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_folded_teacher_gives_the_plain_teachers_outputs(tmp_path, norm):
    cfg, plain = trained_teacher(tmp_path, norm)
    folded = FrozenTeacher.from_config(cfg)
    assert any(isinstance(module, NORMS) for module in plain.model.modules())
    assert not any(isinstance(module, NORMS) for module in folded.model.modules())
    batch = tiny_batch()
    taps = SimpleNamespace(proposal_boxes=[x["instances"].gt_boxes for x in batch])
    plain, folded = (FrozenTeacherStep(x, batch, "BGR", taps) for x in (plain, folded))
    expected, actual = plain.features(), folded.features()
    assert list(actual) == list(expected)
    for level in expected:
        assert relative_error(actual[level], expected[level]) < 1e-4
        assert actual[level].is_contiguous()
    expected, actual = plain.box_features(expected), folded.box_features(actual)
    assert relative_error(actual, expected) < 1e-4
    expected, actual = plain.box_predictions(expected), folded.box_predictions(actual)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-4


def test_folded_teacher_needs_no_gradient_and_counts_the_parameters_it_was_trained_with(tmp_path):
    cfg, plain = trained_teacher(tmp_path, "BN")
    folded = FrozenTeacher.from_config(cfg)
    assert not any(p.requires_grad for p in folded.model.parameters())
    assert folded.num_parameters == plain.num_parameters


def test_bias_of_the_convolution_is_folded_too():
    torch.manual_seed(0)
    model = nn.Sequential(Conv2d(3, 5, 3, bias=True, norm=nn.BatchNorm2d(5)))
    train_statistics(model)
    model.eval()
    maps = torch.randn(2, 3, 8, 8)
    expected = model(maps)
    assert fold_batch_norm(model) == 1
    torch.testing.assert_close(model(maps), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(nn.BatchNorm2d(5), id="training"),
        pytest.param(nn.BatchNorm2d(5, track_running_stats=False).eval(), id="no statistics"),
        pytest.param(nn.GroupNorm(1, 5), id="depends on the image"),
        pytest.param(None, id="none"),
    ],
)
def test_norm_without_fixed_statistics_stays(norm):
    convolution = Conv2d(3, 5, 3, norm=norm)
    assert fold_batch_norm(convolution) == 0
    assert convolution.norm is norm


def test_convolution_that_changes_its_weight_is_left_alone():
    class Standardised(Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
            return self.norm(nn.functional.conv2d(x, weight))

    assert fold_batch_norm(Standardised(3, 5, 3, norm=FrozenBatchNorm2d(5))) == 0


def test_student_is_never_folded(tmp_path):
    cfg, _ = trained_teacher(tmp_path, "FrozenBN")
    student = build_model(cfg)
    assert any(isinstance(module, nn.BatchNorm2d) for module in student.backbone.modules())
