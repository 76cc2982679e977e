"""The SupCon distiller: its embedding, its options, and that it needs no teacher."""

import pytest
import torch

from kd_detectron.distillers import ModelSpec, SupCon, build_distiller
from kd_detectron.errors import ConfigError
from kd_detectron.losses import supcon_loss

STUDENT, TEACHER = ModelSpec(box_channels=6), ModelSpec(box_channels=7)


def test_loss_is_supcon_of_the_students_embedded_box_features(make_context):
    context = make_context()
    options = {"EMBED_DIM": 5, "TEMPERATURE": 0.3}
    distiller = build_distiller("SupCon", options, STUDENT, TEACHER)
    losses = distiller(context)
    layer = distiller.student_embedding
    assert layer.weight.shape == (5, 6)
    embeddings = context.student.box_features @ layer.weight.T + layer.bias
    assert set(losses) == {"loss_supcon"}
    expected = supcon_loss(embeddings, context.targets, temperature=0.3)
    torch.testing.assert_close(losses["loss_supcon"], expected)


def test_teacher_is_never_asked_for_anything(make_context):
    context = make_context()
    del context.teacher
    assert SupCon(6)(context)["loss_supcon"] > 0


def test_student_without_a_box_head_is_refused():
    with pytest.raises(ConfigError, match="KD.DISTILLERS names SupCon.* the student has not"):
        build_distiller("SupCon", {}, ModelSpec(), TEACHER)


@pytest.mark.parametrize(("key", "value"), [("embed_dim", 0), ("temperature", float("inf"))])
def test_impossible_option_is_refused_by_its_config_key(key, value):
    with pytest.raises(ConfigError, match=f"KD.SUPCON.{key.upper()}"):
        SupCon(6, **{key: value})
