"""The BicKD distiller: its options, and that it compares what the context holds."""

import pytest
import torch

from kd_detectron.distillers import BicKD, ModelSpec, build_distiller
from kd_detectron.errors import ConfigError
from kd_detectron.losses import bickd_loss


@pytest.mark.parametrize("form", ["contrastive", "orthogonal"])
def test_loss_is_bickd_of_both_models_logits(form, make_context):
    context = make_context()
    options = {
        "TEMPERATURE": 2.0,
        "CONTRAST_TEMPERATURE": 0.3,
        "CONTRAST_WEIGHT": 0.7,
        "FORM": form,
    }
    losses = build_distiller("BicKD", options, ModelSpec(), ModelSpec())(context)
    expected = bickd_loss(context.student.logits, context.teacher.logits, 2.0, 0.3, 0.7, form)
    assert set(losses) == {"loss_bickd"} and torch.equal(losses["loss_bickd"], expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0.0),
        ("contrast_temperature", -1.0),
        ("contrast_temperature", float("nan")),
        ("contrast_weight", float("inf")),
        ("contrast_weight", -0.5),
        ("form", "orthogonall"),
    ],
)
def test_impossible_option_is_refused_by_its_config_key(key, value):
    with pytest.raises(ConfigError, match=f"KD.BICKD.{key.upper()}"):
        BicKD(**{key: value})
