"""Averaged weights: the formula, resume, what is evaluated, exported and saved, two processes."""

import json
import os

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from tiny_training import run_cfg, train
from torch import nn

from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.engine import DistillationTrainer
from kd_detectron.engine.weight_average import WeightAverage, decay_at
from kd_detectron.errors import ConfigError

AVERAGED = ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.9]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.BatchNorm1d(1)
        self.distillers = nn.ModuleDict({"Mine": nn.Linear(1, 1)})


def test_average_is_the_formula_on_weights_and_a_copy_of_buffers():
    model, decay = Model(), 0.3
    average = WeightAverage(model, decay)
    expected = None
    for step, value in enumerate((1.0, 5.0, -2.0, 7.0)):
        with torch.no_grad():
            for tensor in (model.layer.weight, model.layer.running_mean, *model.parameters()):
                tensor.fill_(value)
        average.after_step()
        share = min(decay, (1 + step) / (10 + step))
        expected = value if expected is None else share * expected + (1 - share) * value
    with average.applied():
        assert model.layer.weight.item() == pytest.approx(expected)
        assert model.layer.running_mean.item() == 7.0
        assert model.distillers["Mine"].weight.item() == 7.0, "distillers are not averaged"
        with average.applied():  # as of a checkpoint that an interrupted evaluation leaves
            assert model.layer.weight.item() == pytest.approx(expected)
        assert model.layer.weight.item() == pytest.approx(expected)
    assert model.layer.weight.item() == 7.0
    assert [decay_at(step, 0.999) for step in (0, 90)] == [0.1, 0.91]


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ConfigError, match="SOLVER.EMA.DECAY is"):
        WeightAverage(Model(), decay)


def checkpoint(cfg, name="model_final.pth"):
    return torch.load(os.path.join(cfg.OUTPUT_DIR, name), weights_only=True)


@pytest.fixture
def evaluated(monkeypatch):
    """Evaluations note the weights that they see here, and find better and better results."""
    seen = []

    def test(cls, cfg, model, evaluators=None):
        seen.append({name: x.clone() for name, x in model.state_dict().items()})
        return {"bbox": {"AP": float(len(seen))}}

    monkeypatch.setattr(DistillationTrainer, "test", classmethod(test))
    return seen


def assert_same(one, other):
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_resumed_run_equals_the_uninterrupted_one(tmp_path, dataset, evaluated):
    straight, broken = (run_cfg(tmp_path, dataset, name, AVERAGED) for name in "ab")
    train(straight)
    train(broken, until=4)
    train(broken, resume=True)
    expected, actual = checkpoint(straight), checkpoint(broken)
    assert_same(actual["model"], expected["model"])
    states = [x["trainer"]["hooks"]["WeightAverage"] for x in (actual, expected)]
    assert_same(states[0]["trained"], states[1]["trained"])
    assert states[0]["n_averaged"] == states[1]["n_averaged"] == 6


def test_training_itself_is_as_without_averages(tmp_path, dataset, evaluated):
    plain, averaged = (run_cfg(tmp_path, dataset, *x) for x in (("a", []), ("b", AVERAGED)))
    train(plain)
    train(averaged)
    trained = checkpoint(averaged)["trainer"]["hooks"]["WeightAverage"]["trained"]
    expected = checkpoint(plain)["model"]
    assert_same(trained, {name: expected[name] for name in trained})


def test_evaluation_best_checkpoint_and_export_have_the_averaged_weights(
    tmp_path, dataset, evaluated
):
    cfg = run_cfg(tmp_path, dataset, "run", [*AVERAGED, "TEST.EVAL_PERIOD", 3])
    trainer = train(cfg)
    final, best = checkpoint(cfg), checkpoint(cfg, "model_best.pth")
    for name, weight in trainer.model.state_dict().items():
        averaged = torch.equal(final["model"][name], weight)
        if name == "roi_heads.box_head.fc1.weight":
            assert not averaged, "the trained weights go on beside the average"
    assert_same(evaluated[-1], final["model"])
    assert_same(best["model"], final["model"])
    # Plain Detectron2 loads the export.
    plain_cfg = get_cfg()
    plain_cfg.merge_from_file(os.path.join(cfg.OUTPUT_DIR, "student_final.yaml"))
    student = build_model(plain_cfg)
    student.load_state_dict(checkpoint(cfg, "student_final.pth")["model"], strict=True)
    names = student.state_dict().keys()
    assert_same(student.state_dict(), {name: final["model"][name] for name in names})


def test_run_cannot_go_on_without_its_averages_but_can_begin_to_average(
    tmp_path, dataset, evaluated
):
    averaged = run_cfg(tmp_path, dataset, "averaged", AVERAGED)
    train(averaged, until=4)
    with pytest.raises(ConfigError, match="SOLVER.EMA.ENABLED is False"):
        train(run_cfg(tmp_path, dataset, "averaged"), resume=True)
    plain = run_cfg(tmp_path, dataset, "plain")
    train(plain, until=4)
    train(run_cfg(tmp_path, dataset, "plain", AVERAGED), resume=True)
    assert checkpoint(plain)["trainer"]["hooks"]["WeightAverage"]["n_averaged"] == 3


def train_and_compare(cfg):
    """One of two processes: trains, and writes down whether the others have its averages."""
    register_coco_format(cfg)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    with trainer.checkpointer.saved_weights():
        averages = [x.detach().clone() for x in trainer.model.parameters()]
    all_averages = comm.all_gather(averages)
    if comm.is_main_process():
        same = [torch.equal(a, b) for a, b in zip(*all_averages, strict=True)]
        with open(os.path.join(cfg.OUTPUT_DIR, "same.json"), "w", encoding="utf-8") as file:
            json.dump(same, file)


@pytest.mark.slow
def test_two_processes_agree_also_after_distillation_stopped_that_alone_read_a_level(
    tmp_path, dataset
):
    """DistributedDataParallel waits for p2's layers, which then get no gradient."""
    levels = ["p3", "p4", "p5"]
    opts = [
        *AVERAGED,
        *("KD.DISTILLERS", ["ReviewKD"], "KD.SCHEDULE.STOP_ITER", 1, "SOLVER.MAX_ITER", 3),
        *("SOLVER.STEPS", (2,), "MODEL.RPN.IN_FEATURES", [*levels, "p6"]),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128]]),
        *("MODEL.ROI_HEADS.IN_FEATURES", levels, "DATASETS.TEST", ()),
    ]
    cfg = run_cfg(tmp_path, dataset, "two", opts)
    launch(train_and_compare, 2, dist_url="auto", args=(cfg,))
    with open(os.path.join(cfg.OUTPUT_DIR, "same.json"), encoding="utf-8") as file:
        same = json.load(file)
    assert same and all(same)
