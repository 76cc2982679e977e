"""The CKD distiller: its options, and that it contrasts what the context holds."""

import pytest
import torch

from kd_detectron.distillers import CKD, ModelSpec, build_distiller
from kd_detectron.errors import ConfigError
from kd_detectron.losses import ckd_loss


def test_loss_is_ckd_of_both_models_logits(make_context):
    context = make_context()
    options = {"TEMPERATURE": 0.5, "TRIPLE": "sts", "GROUP_SIZE": 3, "CHUNK_SIZE": 2}
    distiller = build_distiller("CKD", options, ModelSpec(), ModelSpec())
    torch.manual_seed(3)
    losses = distiller(context)
    torch.manual_seed(3)
    expected = ckd_loss(context.student.logits, context.teacher.logits, 0.5, "sts", 3, 2)
    assert set(losses) == {"loss_ckd"} and torch.equal(losses["loss_ckd"], expected)


def test_defaults_are_the_papers_for_detection():
    distiller = CKD()
    assert (distiller.temperature, distiller.triple) == (1.0, "tss")
    assert (distiller.group_size, distiller.chunk_size) == (0, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("triple", "tst"),
        ("triple", "tsss"),
        ("group_size", -1),
        ("group_size", 2.5),
        ("chunk_size", -8),
        ("chunk_size", True),
    ],
)
def test_impossible_option_is_refused_by_its_config_key(key, value):
    with pytest.raises(ConfigError, match=f"KD.CKD.{key.upper()}"):
        CKD(**{key: value})
