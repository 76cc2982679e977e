"""The FitNet distiller: adapters between different widths, and levels matched by name."""

from types import SimpleNamespace

import pytest
import torch

from kd_detectron.distillers import FitNet, ModelSpec
from kd_detectron.errors import ConfigError

STUDENT = ModelSpec(channels={"p2": 3, "p3": 5})
TEACHER = ModelSpec(channels={"p2": 4, "p3": 4, "p4": 4})


def make_context():
    return SimpleNamespace(
        student=SimpleNamespace(
            features={"p2": torch.randn(2, 3, 5, 7), "p3": torch.randn(2, 5, 3, 4)}
        ),
        # Another order and one level more than the student: names decide.
        teacher=SimpleNamespace(
            features={
                "p4": torch.randn(2, 4, 2, 2),
                "p3": torch.randn(2, 4, 3, 4),
                "p2": torch.randn(2, 4, 5, 7),
            }
        ),
    )


def test_loss_compares_adapted_levels_of_the_same_name():
    context, distiller = make_context(), FitNet.from_specs(STUDENT, TEACHER)
    losses = distiller(context)
    assert set(losses) == {"loss_fitnet"}
    expected = 0.0
    for adapter, (level, feature) in zip(
        distiller.adapters, context.student.features.items(), strict=True
    ):
        # A 1x1 convolution is one matrix at every location.
        adapted = torch.einsum("oi,nihw->nohw", adapter.weight[:, :, 0, 0], feature)
        adapted = adapted + adapter.bias[:, None, None]
        expected = expected + (adapted - context.teacher.features[level]).square().mean()
    torch.testing.assert_close(losses["loss_fitnet"], expected)


def test_without_adapter_the_maps_are_compared_as_they_are():
    spec = ModelSpec(channels={"p2": 4, "p3": 4})
    distiller = FitNet.from_specs(spec, TEACHER, adapter=False)
    assert not list(distiller.parameters())
    context = make_context()
    features = context.teacher.features
    context.student.features = {level: 3 + features[level] for level in spec.channels}
    torch.testing.assert_close(distiller(context)["loss_fitnet"], torch.tensor(2 * 9.0))


def test_without_adapter_other_widths_are_refused():
    words = r"FitNet.*have \[3, 5\] channels and the teacher's \[4, 4\].*KD.FITNET.ADAPTER True"
    with pytest.raises(ConfigError, match=words):
        FitNet.from_specs(STUDENT, TEACHER, adapter=False)


def test_every_parameter_gets_a_gradient():
    distiller = FitNet.from_specs(STUDENT, TEACHER)
    distiller(make_context())["loss_fitnet"].backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_autocast_changes_nothing():
    context, distiller = make_context(), FitNet.from_specs(STUDENT, TEACHER)
    outside = distiller(context)["loss_fitnet"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distiller(context)["loss_fitnet"]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("channels", [{"p2": 3, "p7": 5}, {}])
def test_levels_that_the_teacher_lacks_are_refused(channels):
    with pytest.raises(ConfigError, match="FitNet.*KD.TEACHER.CONFIG_FILE"):
        FitNet.from_specs(ModelSpec(channels=channels), TEACHER)
