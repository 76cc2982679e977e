"""The DKD distiller: its options, and that it compares what the context holds."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from kd_detectron.distillers import DKD, ModelSpec, build_distiller
from kd_detectron.errors import ConfigError
from kd_detectron.losses import dkd_loss


def make_context(classes=6):
    return SimpleNamespace(
        student=SimpleNamespace(logits=torch.randn(4, classes, requires_grad=True)),
        teacher=SimpleNamespace(logits=torch.randn(4, classes)),
        targets=torch.tensor([0, 1, classes - 1, classes - 1]),
    )


def test_loss_is_dkd_of_both_models_logits_at_the_assigned_classes():
    context = make_context()
    options = {"ALPHA": 2.0, "BETA": 0.5, "TEMPERATURE": 3.0}
    losses = build_distiller("DKD", options, ModelSpec(), ModelSpec())(context)
    assert set(losses) == {"loss_dkd"}
    expected = dkd_loss(
        context.student.logits, context.teacher.logits, context.targets, 2.0, 0.5, 3.0
    )
    assert torch.equal(losses["loss_dkd"], expected)


def test_defaults_are_the_papers_for_detection():
    distiller = DKD()
    assert (distiller.alpha, distiller.beta, distiller.temperature) == (1.0, 0.25, 1.0)


def test_single_foreground_class_warns_once_and_trains():
    distiller = DKD()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            loss = distiller(make_context(classes=2))["loss_dkd"]
            assert torch.isfinite(loss)
    assert len([w for w in caught if "NCKD" in str(w.message)]) == 1


@pytest.mark.parametrize(
    "key, value",
    [("alpha", -1.0), ("beta", float("nan")), ("beta", float("inf")), ("temperature", 0.0)],
)
def test_impossible_option_is_refused_by_its_config_key(key, value):
    with pytest.raises(ConfigError, match=f"KD.DKD.{key.upper()}"):
        DKD(**{key: value})
