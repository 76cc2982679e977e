"""The teacher's heads on fused features: the teacher itself where the fusion gives its features."""

import pytest
import torch
from detectron2.modeling import build_model
from tiny import distilled_cfg, tiny_batch

from kd_detectron.analysis.transplant import TeacherHeadsOnFusedFeatures
from kd_detectron.errors import ConfigError
from kd_detectron.modeling.teacher import load_teacher


def test_perfectly_fused_features_detect_as_the_teacher_does(tmp_path):
    cfg = distilled_cfg(tmp_path, ["ReviewKD"])
    student, (teacher, _) = build_model(cfg), load_teacher(cfg)
    model = TeacherHeadsOnFusedFeatures(student, teacher)
    inputs = tiny_batch()
    with torch.no_grad():
        expected = teacher(inputs)
        maps = teacher.backbone(teacher.preprocess_image(inputs).tensor)
    student.distillers["ReviewKD"].fuse = lambda features: list(maps.values())
    for ours, own in zip(model(inputs), expected, strict=True):
        assert torch.equal(ours["instances"].pred_boxes.tensor, own["instances"].pred_boxes.tensor)
        assert torch.equal(ours["instances"].scores, own["instances"].scores)


def test_run_without_reviewkd_is_refused(tmp_path):
    cfg = distilled_cfg(tmp_path, ["CKD"])
    with pytest.raises(ConfigError, match="KD.DISTILLERS"):
        TeacherHeadsOnFusedFeatures(build_model(cfg), load_teacher(cfg)[0])
