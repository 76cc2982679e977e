"""The KD distiller: its options, and that it compares what the context holds."""

from types import SimpleNamespace

import pytest
import torch

from kd_detectron.distillers import KD, ModelSpec, build_distiller
from kd_detectron.errors import ConfigError
from kd_detectron.losses import kd_loss


def make_context():
    return SimpleNamespace(
        student=SimpleNamespace(logits=torch.randn(4, 6, requires_grad=True)),
        teacher=SimpleNamespace(logits=torch.randn(4, 6)),
    )


def test_loss_is_kd_of_both_models_logits():
    context = make_context()
    distiller = build_distiller("KD", {"TEMPERATURE": 2.0}, ModelSpec(), ModelSpec())
    losses = distiller(context)
    assert set(losses) == {"loss_kd"}
    assert torch.equal(
        losses["loss_kd"], kd_loss(context.student.logits, context.teacher.logits, 2.0)
    )


def test_it_adds_no_parameters():
    assert list(KD().parameters()) == []


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "warm"])
def test_impossible_temperature_is_refused_by_its_config_key(temperature):
    with pytest.raises(ConfigError, match="KD.KD.TEMPERATURE"):
        KD(temperature=temperature)
