"""Learning rates of parts of a model: a factor on some parameters, under any optimizer."""

import pytest
import torch
from torch import nn

from kd_detectron.errors import ConfigError
from kd_detectron.learning_rate import scale_learning_rate


def two_groups():
    layers = [nn.Linear(2, 2) for _ in range(3)]
    optimizer = torch.optim.SGD(
        [
            {"params": [*layers[0].parameters(), layers[1].weight], "weight_decay": 0.1},
            {"params": [layers[1].bias, *layers[2].parameters()]},
        ],
        lr=0.5,
        momentum=0.9,
    )
    return layers, optimizer


def settings_by_parameter(optimizer):
    return {
        id(p): (group["lr"], group["weight_decay"], group["momentum"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_only_the_rate_of_the_named_parameters_changes():
    layers, optimizer = two_groups()
    before = settings_by_parameter(optimizer)
    chosen = [*layers[1].parameters(), *layers[2].parameters()]
    scale_learning_rate(optimizer, chosen, 0.1)
    after = settings_by_parameter(optimizer)
    assert after.keys() == before.keys()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    for key, (rate, *others) in before.items():
        factor = 0.1 if key in {id(p) for p in chosen} else 1
        assert after[key] == (pytest.approx(rate * factor), *others)
    assert all(group["params"] for group in optimizer.param_groups)


def test_scheduler_keeps_the_ratio():
    layers, optimizer = two_groups()
    scale_learning_rate(optimizer, layers[2].parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    rates = settings_by_parameter(optimizer)
    assert rates[id(layers[0].weight)][0] == pytest.approx(0.25)
    assert rates[id(layers[2].weight)][0] == pytest.approx(0.025)


@pytest.mark.parametrize("factor", [1, 1.0])
def test_factor_one_changes_no_group(factor):
    layers, optimizer = two_groups()
    scale_learning_rate(optimizer, layers[0].parameters(), factor)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf"), "0.1"])
def test_factor_that_cannot_be_used_is_refused(factor):
    with pytest.raises(ConfigError, match="INHERIT_LR_FACTOR is"):
        scale_learning_rate(two_groups()[1], [], factor)
