"""Boxes are pooled where they are, whatever the precision of the maps."""

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from tiny import distilled_cfg, tiny_batch
from torch import nn

from kd_detectron.modeling.autocast import pool_in_float32
from kd_detectron.profiling.benchmark import Step

BFLOAT16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bf16"]


def test_boxes_are_not_rounded_to_the_precision_of_the_maps():
    pooler = ROIPooler(7, scales=(1 / 4, 1 / 8), sampling_ratio=0, pooler_type="ROIAlignV2")
    torch.manual_seed(0)
    maps = [torch.randn(1, 2, size, 280).bfloat16() for size in (60, 30)]
    boxes = [Boxes(torch.tensor([[1001.0, 100, 1033, 132], [513.0, 9, 747, 201]]))]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = pooler(maps, boxes)
        pool_in_float32(nn.ModuleList([pooler]))
        pooled = pooler(maps, boxes)
    assert torch.equal(pooled, pooler([one.float() for one in maps], boxes))
    assert not torch.allclose(rounded.float(), pooled, atol=0.1)


def test_student_and_teacher_in_bfloat16_pool_in_float32(tmp_path, monkeypatch):
    seen = []
    forward = ROIPooler.forward
    monkeypatch.setattr(
        ROIPooler,
        "forward",
        lambda self, x, boxes: seen.append(x[0].dtype) or forward(self, x, boxes),
    )
    cfg = distilled_cfg(tmp_path, distillers=["CKD"], opts=BFLOAT16)
    step = Step(cfg, tiny_batch(), distilled=True)
    step()
    assert seen == [torch.float32] * 2
