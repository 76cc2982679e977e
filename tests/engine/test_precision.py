"""Mixed precision through the train loop: a bfloat16 student, its losses and weights float32."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import all_distillers, distilled_cfg, every_distiller_cfg, tiny_batch
from torch import nn

from kd_detectron.engine.train_loop import DistillationTrainLoop
from kd_detectron.errors import ConfigError
from kd_detectron.precision import half_precision, slow_precision

BFLOAT16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bf16"]


def trained_steps(cfg, steps=3):
    """Runs a few iterations; returns the model, the context of the last one and all losses."""
    torch.manual_seed(0)
    model = build_model(cfg)
    seen = {}
    next(iter(model.distillers.values())).register_forward_pre_hook(
        lambda module, args: seen.update(context=args[0])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loop = DistillationTrainLoop.from_config(cfg, model, [tiny_batch()] * steps, optimizer)
    losses = []
    with EventStorage() as loop.storage:
        for loop.iter in range(steps):
            loop.run_step()
            losses.append({n: v for n, (v, _) in loop.storage.latest().items() if "loss" in n})
    return model, seen["context"], losses


def test_bfloat16_trains_with_finite_losses_and_float32_weights(tmp_path):
    model, context, losses = trained_steps(every_distiller_cfg(tmp_path, BFLOAT16))
    for step in losses:
        assert len(step) > len(all_distillers())
        assert all(torch.isfinite(torch.tensor(value)) for value in step.values()), step
    assert context.student.logits.dtype == torch.bfloat16, "autocast was not on"
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.isfinite(parameter).all() and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(
    ("opts", "dtype"),
    [
        ([], torch.float32),
        (BFLOAT16, torch.bfloat16),
        ([*BFLOAT16, "KD.TEACHER.AMP", False], torch.float32),
    ],
)
def test_teacher_on_the_cpu_is_in_bfloat16_beside_a_bfloat16_student_unless_told_otherwise(
    tmp_path, opts, dtype
):
    _, context, _ = trained_steps(distilled_cfg(tmp_path, opts=opts), steps=1)
    assert context.teacher.logits.dtype == dtype
    assert {map_.dtype for map_ in context.teacher.features.values()} == {dtype}


def test_bfloat16_losses_are_near_those_of_float32(tmp_path):
    """In the first step, from the same weights, with every anchor and proposal sampled."""
    opts = ["MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4096]
    expected = trained_steps(distilled_cfg(tmp_path, opts=opts), steps=1)[2][0]
    actual = trained_steps(distilled_cfg(tmp_path, opts=[*opts, *BFLOAT16]), steps=1)[2][0]
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=0.1), name


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["SOLVER.AMP.PRECISION", "fp16"], ["SOLVER.AMP.PRECISION", "cpu", "bf16"]),
        (["SOLVER.AMP.PRECISION", "fp8"], ["SOLVER.AMP.PRECISION", "fp8", "fp16"]),
    ],
)
def test_precision_that_cannot_work_is_refused(tmp_path, opts, words):
    cfg = distilled_cfg(tmp_path, opts=["SOLVER.AMP.ENABLED", True, *opts])
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError) as error:
        DistillationTrainLoop.from_config(cfg, model, [], optimizer)
    assert all(word in str(error.value) for word in words)


class Scaler:
    """A loss scaler as fp16 has one; a real one needs a GPU."""

    def __init__(self):
        self.loaded = None

    def state_dict(self):
        return {"scale": 8.0}

    def load_state_dict(self, state):
        if not state:
            raise RuntimeError("The source state dict is empty")
        self.loaded = state


def test_run_without_fp16_can_be_resumed_with_it():
    model = torch.nn.Linear(2, 2)
    loops = [
        DistillationTrainLoop(model, [], torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(2)
    ]
    plain, half = loops
    for loop in loops:
        loop.iter = 3
    state = plain.state_dict()
    assert state["grad_scaler"] == {}
    half.grad_scaler = Scaler()
    half.load_state_dict(state)
    assert half.iter == 3 and half.grad_scaler.loaded is None, "the scaler starts anew"
    half.load_state_dict(half.state_dict())
    assert half.grad_scaler.loaded == {"scale": 8.0}


def test_teacher_on_a_gpu_that_emulates_bfloat16_runs_in_float16(monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert half_precision(torch.device("cuda")) is torch.float16
    assert half_precision(torch.device("cpu")) is torch.bfloat16


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_on_a_gpu_that_emulates_it_is_warned_of(tmp_path, monkeypatch, emulated):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not emulated)
    cfg = distilled_cfg(tmp_path, opts=[*BFLOAT16, "MODEL.DEVICE", "cuda"])
    warning = (
        "SOLVER.AMP.PRECISION is 'bf16', which this GPU (Tesla T4, older than Ampere) emulates, "
        "slower than float32; set SOLVER.AMP.PRECISION fp16"
    )
    assert slow_precision(cfg) == (warning if emulated else None)
    cfg.SOLVER.AMP.PRECISION = "fp16"
    assert slow_precision(cfg) is None


@pytest.mark.parametrize(
    ("machine", "instructions", "opts", "warned"),
    [
        ("x86_64", "AVX2", BFLOAT16, True),
        ("x86_64", "DEFAULT", BFLOAT16, True),
        ("x86_64", "AVX512", BFLOAT16, False),
        ("aarch64", "DEFAULT", BFLOAT16, False),
        ("x86_64", "AVX2", [], False),
    ],
)
def test_bfloat16_on_a_cpu_that_is_slow_in_it_is_warned_of(
    tmp_path, monkeypatch, caplog, machine, instructions, opts, warned
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    model = nn.Linear(1, 1)
    cfg = distilled_cfg(tmp_path, opts=opts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DistillationTrainLoop.from_config(cfg, model, [tiny_batch()], optimizer)
    assert [record.getMessage() for record in caplog.records] == warned * [
        f"SOLVER.AMP.PRECISION is 'bf16', but this CPU ({instructions}, without AVX-512) is many "
        "times slower in bfloat16 than in float32; set SOLVER.AMP.ENABLED False"
    ]
