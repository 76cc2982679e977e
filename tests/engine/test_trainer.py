"""Training: resume follows the uninterrupted run, two processes train, results are written."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import hooks
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tiny import NUM_CLASSES, tiny_cfg
from tiny_training import run_cfg, train

from kd_detectron.engine import DistillationTrainer
from kd_detectron.engine.main import main
from kd_detectron.engine.schedule import schedule_factor
from kd_detectron.errors import ConfigError, NonFiniteLossError

TRAIN_NET = str(Path(__file__).parents[2] / "tools" / "train_net.py")


def records(cfg):
    with open(os.path.join(cfg.OUTPUT_DIR, "metrics.json"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def losses_by_iteration(cfg):
    return {
        record["iteration"]: {k: v for k, v in record.items() if "loss" in k}
        for record in records(cfg)
        if "total_loss" in record
    }


def weights(cfg):
    path = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    return torch.load(path, weights_only=True)


def test_resumed_run_equals_the_uninterrupted_one(tmp_path, dataset):
    straight = run_cfg(tmp_path, dataset, "straight")
    train(straight)
    broken = run_cfg(tmp_path, dataset, "broken")
    train(broken, until=4)  # the last checkpoint is that of iteration 2
    train(broken, resume=True)
    expected, actual = weights(straight), weights(broken)
    for name, tensor in expected["model"].items():
        assert torch.equal(tensor, actual["model"][name]), name
    momentum = expected["trainer"]["_trainer"]["optimizer"]["state"]
    for key, state in momentum.items():
        other = actual["trainer"]["_trainer"]["optimizer"]["state"][key]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], other)


def test_resumed_retinanet_knows_what_its_losses_are_divided_by(tmp_path, dataset):
    """A running number of objects that no ``state_dict`` has."""
    opts = [
        *("KD.ENABLED", False, "MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
        *("MODEL.RETINANET.NUM_CLASSES", NUM_CLASSES),
    ]
    straight, broken = (run_cfg(tmp_path, dataset, name, opts) for name in ("straight", "broken"))
    expected = train(straight)
    train(broken, until=4)
    actual = train(broken, resume=True)
    assert actual.model.loss_normalizer == expected.model.loss_normalizer != 100
    # Not equal: the focal loss is compiled after its first calls, and then rounds otherwise.
    for name, tensor in weights(straight)["model"].items():
        torch.testing.assert_close(tensor, weights(broken)["model"][name])


def test_learning_rate_and_weight_decay_can_be_changed_over_a_resume(tmp_path, dataset):
    cfg = run_cfg(tmp_path, dataset, "run", ["SOLVER.WARMUP_ITERS", 0])
    train(cfg, until=4)
    before = cfg.SOLVER.BASE_LR
    cfg.merge_from_list(
        ["SOLVER.BASE_LR", before / 8, "SOLVER.WEIGHT_DECAY", 0.03, "SOLVER.MOMENTUM", 0.5]
    )
    trainer = train(cfg, resume=True)
    rates = {line["iteration"]: line["lr"] for line in records(cfg) if "lr" in line}
    assert rates[5] == pytest.approx(before / 80)  # after the step at 5 of SOLVER.STEPS
    group = trainer.optimizer.param_groups[0]
    assert (group["weight_decay"], group["momentum"]) == (0.03, 0.5)


def test_learning_rate_that_is_logged_is_not_that_of_the_inherited_parts(tmp_path, dataset):
    same = ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 48]
    opts = ["KD.TEACHER.OPTS", same, "KD.TEACHER.INHERIT", ["auto"], "SOLVER.MAX_ITER", 1]
    opts += ["KD.TEACHER.INHERIT_LR_FACTOR", 0.125, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", ()]
    cfg = run_cfg(tmp_path, dataset, "run", [*opts, "MODEL.BACKBONE.FREEZE_AT", 5])
    trainer = train(cfg)
    largest = max(trainer.optimizer.param_groups, key=lambda group: len(group["params"]))
    assert largest["lr"] == cfg.SOLVER.BASE_LR / 8
    assert [line["lr"] for line in records(cfg) if "lr" in line] == [cfg.SOLVER.BASE_LR]


def test_precise_batch_norm_runs_no_teacher_and_leaves_the_distillers(tmp_path, dataset):
    opts = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2]
    cfg = run_cfg(tmp_path, dataset, "run", [*opts, "MODEL.RESNETS.NORM", "BN"])
    trainer = DistillationTrainer(cfg)
    (precise,) = (hook for hook in trainer._hooks if isinstance(hook, hooks.PreciseBN))
    model = trainer.model
    teacher = model.teacher.model.backbone
    running = teacher.register_forward_hook(lambda *_: pytest.fail("teacher ran"))
    before = {name: x.clone() for name, x in model.named_buffers() if "running_" in name}
    precise.update_stats()
    changed = {name for name, x in model.named_buffers() if not torch.equal(x, before.get(name, x))}
    ours = {name for name in before if name.startswith("distillers.")}
    assert ours and changed == before.keys() - ours
    running.remove()
    assert model.distillers.training and model.distillation_factor == 1
    with EventStorage():
        assert model(next(iter(trainer.data_loader)))["loss_ckd"] > 0


def test_only_the_newest_checkpoints_stay_if_a_number_is_given(tmp_path, dataset):
    opts = ["SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 2]
    cfg = run_cfg(tmp_path, dataset, "run", opts)

    def kept():
        return sorted(path.name for path in Path(cfg.OUTPUT_DIR).glob("model_*.pth"))

    foreign = Path(cfg.OUTPUT_DIR) / "model_0000000_mine.pth"
    foreign.touch()
    train(cfg, until=4)
    assert kept() == [foreign.name, "model_0000002.pth", "model_0000003.pth"]
    train(cfg, resume=True)
    assert kept() == [foreign.name, "model_0000004.pth", "model_0000005.pth", "model_final.pth"]


def test_processes_that_found_different_checkpoints_are_refused(tmp_path, dataset, monkeypatch):
    cfg = run_cfg(tmp_path, dataset, "run")
    train(cfg, until=4)
    trainer = DistillationTrainer(cfg)
    # Of two machines, one of which does not see the folder.
    monkeypatch.setattr(comm, "all_gather", lambda start: [start, 0])
    with pytest.raises(ConfigError, match=r"different iterations \(\[0, 3\]\) .*machines share"):
        trainer.resume_or_load(resume=True)


def test_run_without_a_seed_keeps_its_random_one_over_a_resume(tmp_path, dataset):
    cfg = run_cfg(tmp_path, dataset, "random", ["SEED", -1])
    first = train(cfg, until=4)
    second = train(cfg, resume=True)
    assert second.seed == first.seed
    result = json.loads((tmp_path / "random" / "result.json").read_text())
    assert result["seed"] == first.seed


def test_finished_run_leaves_student_result_and_metrics(tmp_path, dataset):
    cfg = run_cfg(tmp_path, dataset, "run", ["TEST.EVAL_PERIOD", 3, "SOLVER.BASE_LR", 1e-5])
    train(cfg)
    folder = tmp_path / "run"
    result = json.loads((folder / "result.json").read_text())
    assert result["finished"] and result["iterations"] == 6 and "AP" in result["results"]["bbox"]
    assert result["distillers"] == ["CKD", "ReviewKD"]
    assert (folder / "model_best.pth").is_file()
    student = torch.load(folder / "student_final.pth", weights_only=True)["model"]
    plain_cfg = get_cfg()
    plain_cfg.merge_from_file(str(folder / "student_final.yaml"))
    plain = build_model(plain_cfg)
    assert set(plain.state_dict()) == set(student)
    assert {"loss_ckd", "loss_reviewkd", "loss_cls"} <= set(losses_by_iteration(cfg)[5])


def test_non_finite_loss_stops_before_the_weights_change(tmp_path, dataset):
    cfg = run_cfg(tmp_path, dataset, "nan")
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    distiller = trainer.model.distillers["CKD"]
    original = distiller.forward

    def forward(context):
        losses = original(context)
        if trainer.iter == 4:
            losses["loss_ckd"] = losses["loss_ckd"] * float("nan")
        return losses

    distiller.forward = forward
    before = {}
    trainer._step_seed.before_step, seed = (
        lambda: (before.update(copy(trainer.model)), seed()),
        trainer._step_seed.before_step,
    )
    with pytest.raises(NonFiniteLossError, match=r"iteration 4.*loss_ckd=nan.*\.png"):
        trainer.train()
    for name, tensor in trainer.model.named_parameters():
        assert torch.equal(tensor, before[name]), name
    assert (tmp_path / "nan" / "model_0000002.pth").is_file()


def copy(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_accumulated_gradients_equal_the_large_batch(tmp_path, dataset):
    opts = [
        *("MODEL.RESNETS.NORM", "FrozenBN"),
        *("KD.DISTILLERS", ["FGFI"]),
        *("KD.FGFI.WEIGHT", 0.0),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4096),
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100000),
        *("SOLVER.MAX_ITER", 1),
        *("SOLVER.STEPS", ()),
        *("DATALOADER.ASPECT_RATIO_GROUPING", False),
        *("INPUT.RANDOM_FLIP", "none"),
    ]
    large = train(run_cfg(tmp_path, dataset, "large", [*opts, "SOLVER.IMS_PER_BATCH", 2]))
    small = train(
        run_cfg(
            tmp_path,
            dataset,
            "small",
            [*opts, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.ACCUMULATE_STEPS", 2],
        )
    )
    # With every anchor and proposal sampled, only loss normalisation could differ: the box losses
    # are means over all proposals of a batch, so only the RPN's, a mean over images, are compared.
    for name, parameter in large.model.named_parameters():
        if name.startswith("proposal_generator"):
            other = dict(small.model.named_parameters())[name]
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup_iters": 3}, [0.25, 0.5, 0.75, 1]),
        ({"stop_iter": 2}, [1, 1, 0, 0]),
        ({"decay": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"decay": "cosine"}, [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
        ({"decay": "linear", "warmup_iters": 1, "stop_iter": 3}, [0.5, 1, 0.5, 0]),
    ],
)
def test_schedule_warms_up_decays_and_stops(options, expected):
    options = {"warmup_iters": 0, "decay": "none", "stop_iter": 0, "max_iter": 4} | options
    assert [schedule_factor(i, **options) for i in range(4)] == pytest.approx(expected)


def test_other_number_of_processes_scales_the_distillation_schedule_as_well():
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.MAX_ITER", 100, "SOLVER.IMS_PER_BATCH", 4]
    schedule = ["KD.SCHEDULE.WARMUP_ITERS", 10, "KD.SCHEDULE.STOP_ITER", 60]
    cfg = tiny_cfg([*opts, *schedule, "SOLVER.EMA.DECAY", 0.9])
    scaled = DistillationTrainer.auto_scale_workers(cfg, 4)
    assert (scaled.SOLVER.MAX_ITER, scaled.KD.SCHEDULE.STOP_ITER) == (50, 30)
    assert scaled.KD.SCHEDULE.WARMUP_ITERS == 5
    assert pytest.approx(0.81) == scaled.SOLVER.EMA.DECAY
    assert DistillationTrainer.auto_scale_workers(scaled, 4) is scaled


def arguments(cfg, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    return ["--config-file", str(path)]


KEEP_EVALUATED_BUFFERS = """
import torch
from detectron2.utils import comm
from kd_detectron.engine import DistillationTrainer

test = DistillationTrainer.test.__func__

@classmethod
def keep_buffers_and_test(cls, cfg, model, evaluators=None):
    state = getattr(model, "module", model).state_dict()
    kept = {name: x for name, x in state.items() if "running" in name}
    torch.save(kept, f"{cfg.OUTPUT_DIR}/evaluated_by_{comm.get_rank()}.pth")
    return test(cls, cfg, model, evaluators)

DistillationTrainer.test = keep_buffers_and_test
"""


@pytest.mark.parametrize(
    "starter", ["detectron2", pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_two_processes_train_a_distilled_step(tmp_path, dataset, starter):
    """DistributedDataParallel waits for every parameter: one left out would be an error."""
    opts = ["SOLVER.MAX_ITER", 2, "KD.DISTILLERS", ["CKD", "ReviewKD", "DKD", "FitNet"]]
    cfg = run_cfg(tmp_path, dataset, "two", opts)
    kept = tmp_path / "keep_evaluated_buffers.py"
    kept.write_text(KEEP_EVALUATED_BUFFERS)
    command_line = ["--import", str(kept), *arguments(cfg, tmp_path)]
    if starter == "detectron2":
        assert main(["--num-gpus", "2", "--dist-url", "auto", *command_line]) == 0
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc_per_node=2", TRAIN_NET, *command_line]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "result.json").read_text())["finished"]
    # Both have evaluated the BatchNorm statistics that are saved, each trained on its own images.
    saved = torch.load(tmp_path / "two" / "model_final.pth")["model"]
    for rank in range(2):
        evaluated = torch.load(tmp_path / "two" / f"evaluated_by_{rank}.pth")
        assert any(name.endswith("running_mean") for name in evaluated)
        assert all(torch.equal(saved[name], buffer) for name, buffer in evaluated.items())


def test_command_line_checks_evaluates_and_refuses(tmp_path, dataset, capfd):
    cfg = run_cfg(tmp_path, dataset, "cli", ["SOLVER.MAX_ITER", 2])
    command = arguments(cfg, tmp_path)
    os.rmdir(cfg.OUTPUT_DIR)
    assert main([*command, "--check", "SOLVER.ACCUMULATE_STEPS", "2"]) == 0
    printed = capfd.readouterr().out
    assert "loss_ckd" in printed and "ready to train" in printed
    assert " s for 4 images" in printed
    assert not os.path.exists(cfg.OUTPUT_DIR), "--check leaves nothing behind"

    assert main(command) == 0
    assert "bbox" in json.loads((tmp_path / "cli" / "result.json").read_text())["results"]
    assert main(command) == 2
    assert "OUTPUT_DIR" in capfd.readouterr().err
    assert main([*command, "--resume"]) == 0

    final = str(tmp_path / "cli" / "model_final.pth")
    for mode in ("--eval-only", "--eval-teacher"):
        opts = ["MODEL.WEIGHTS", final, "OUTPUT_DIR", str(tmp_path / mode)]
        assert main([*command, mode, *opts]) == 0
        assert "AP50" in capfd.readouterr().out

    assert main([*command, "--check", "KD.DISTILLERS", "['Ckdd']"]) == 2
    assert main([*command, "--check", "KD.CKD.TEMPERATUR", "1"]) == 2
    assert "did you mean KD.CKD.TEMPERATURE" in capfd.readouterr().err
