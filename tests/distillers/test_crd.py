"""The CRD distiller: its embeddings and its options."""

import pytest
import torch

from kd_detectron.distillers import CRD, ModelSpec, build_distiller
from kd_detectron.errors import ConfigError
from kd_detectron.losses import crd_loss

STUDENT, TEACHER = ModelSpec(box_channels=6), ModelSpec(box_channels=7)


def test_loss_is_crd_of_both_models_embedded_box_features_by_assigned_class(make_context, embed):
    context = make_context()
    options = {"EMBED_DIM": 5, "TEMPERATURE": 0.3}
    distiller = build_distiller("CRD", options, STUDENT, TEACHER)
    losses = distiller(context)
    student, teacher = embed(distiller, context, 5)
    assert set(losses) == {"loss_crd"}
    expected = crd_loss(student, teacher, context.targets, temperature=0.3)
    torch.testing.assert_close(losses["loss_crd"], expected)


@pytest.mark.parametrize("lacking", ["student", "teacher"])
def test_model_without_a_box_head_is_refused_by_its_role(lacking):
    specs = {"student": STUDENT, "teacher": TEACHER} | {lacking: ModelSpec()}
    with pytest.raises(ConfigError, match=f"KD.DISTILLERS names CRD.* the {lacking} has not"):
        build_distiller("CRD", {}, **specs)


@pytest.mark.parametrize(("key", "value"), [("embed_dim", 0), ("temperature", 0.0)])
def test_impossible_option_is_refused_by_its_config_key(key, value):
    with pytest.raises(ConfigError, match=f"KD.CRD.{key.upper()}"):
        CRD(6, 7, **{key: value})
