"""The DCD distiller: its embeddings, scale and bias, and its options."""

import pytest
import torch

from kd_detectron.distillers import DCD, ModelSpec, build_distiller
from kd_detectron.errors import ConfigError
from kd_detectron.losses import dcd_loss

STUDENT, TEACHER = ModelSpec(box_channels=6), ModelSpec(box_channels=7)


def test_loss_is_dcd_of_both_models_embedded_box_features(make_context, embed):
    context = make_context()
    options = {"EMBED_DIM": 5, "CONSISTENCY_WEIGHT": 0.3}
    distiller = build_distiller("DCD", options, STUDENT, TEACHER)
    losses = distiller(context)
    student, teacher = embed(distiller, context, 5)
    expected = dcd_loss(
        student, teacher, torch.tensor(1.0), torch.tensor(0.0), consistency_weight=0.3
    )
    assert set(losses) == {"loss_dcd"}
    torch.testing.assert_close(losses["loss_dcd"], expected)


def test_embeddings_scale_and_bias_are_what_trains_and_is_saved():
    assert set(DCD(6, 7).state_dict()) == {
        "student_embedding.weight",
        "student_embedding.bias",
        "teacher_embedding.weight",
        "teacher_embedding.bias",
        "scale",
        "bias",
    }
    assert all(parameter.requires_grad for parameter in DCD(6, 7).parameters())


@pytest.mark.parametrize("lacking", ["student", "teacher"])
def test_model_without_a_box_head_is_refused_by_its_role(lacking):
    specs = {"student": STUDENT, "teacher": TEACHER} | {lacking: ModelSpec()}
    with pytest.raises(ConfigError, match=f"KD.DISTILLERS names DCD.* the {lacking} has not"):
        build_distiller("DCD", {}, **specs)


@pytest.mark.parametrize(
    ("key", "value"),
    [("embed_dim", 0), ("embed_dim", 1.5), ("consistency_weight", float("nan"))],
)
def test_impossible_option_is_refused_by_its_config_key(key, value):
    with pytest.raises(ConfigError, match=f"KD.DCD.{key.upper()}"):
        DCD(6, 7, **{key: value})
