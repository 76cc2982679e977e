"""Resuming a training on torchvision's detectors: where it goes on, and what is refused."""

import json
import os
import shutil
import signal
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
import yaml
from run_folders_torchvision import SMALL, options, tiny_data  # noqa: F401

from kd_detectron.errors import ConfigError, NonFiniteLossError
from kd_detectron.finite import non_finite_key
from kd_detectron.runs.files import is_finished, read_metrics, read_result
from kd_detectron.torchvision import main as command
from kd_detectron.torchvision import training
from kd_detectron.torchvision.callbacks import AtomicCheckpoints
from kd_detectron.torchvision.training import train


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):  # noqa: F811
    """The folder of a run of four iterations, whose last is a checkpoint too."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(options(tiny_data, folder))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def logged(folder) -> list[tuple]:
    """What does not depend on chance in ``metrics.json``: iterations, keys, learning rates."""
    return [(x["iteration"], sorted(x), x.get("lr")) for x in read_metrics(folder)]


def losses(folder) -> dict[tuple[int, str], float]:
    """The losses in ``metrics.json`` by iteration and name."""
    return {
        (record["iteration"], name): value
        for record in read_metrics(folder)
        for name, value in record.items()
        if "loss" in name
    }


def at_step(monkeypatch, step, what) -> None:
    """Has ``what()`` called in the training step of this iteration, once."""
    original, called = training.DetectionModule.training_step, []

    def training_step(self, batch, index):
        if self.global_step == step and not called:
            called.append(step)
            what()
        return original(self, batch, index)

    monkeypatch.setattr(training.DetectionModule, "training_step", training_step)


def test_run_stopped_after_its_last_checkpoint_can_be_finished(run, finished, tiny_data):  # noqa: F811
    (run / "result.json").unlink()
    (run / "model_final.pth").unlink()
    results = train(options(tiny_data, run))
    assert results["bbox"]["AP"] == pytest.approx(read_result(finished)["results"]["bbox"]["AP"])
    assert is_finished(run) and (run / "model_final.pth").is_file()
    assert logged(run) == logged(finished)


def test_finished_run_is_left_as_it_is(run, tiny_data):  # noqa: F811
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    train(options(tiny_data, run))
    train(options(tiny_data, run, iterations=3))
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_finished_run_of_another_model_is_not_returned(run, tiny_data):  # noqa: F811
    with pytest.raises(ConfigError, match="holds another run.*DETECTOR"):
        train(options(tiny_data, run, student="fasterrcnn_resnet18_fpn"))


def test_more_iterations_extend_a_finished_run_as_if_it_had_had_them(
    run,
    tiny_data,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    def goes_down():
        assert not (run / "result.json").exists() and not (run / "model_final.pth").exists()
        raise RuntimeError("the machine went down")

    whole = options(tiny_data, tmp_path / "whole", iterations=6)
    train(whole)
    at_step(monkeypatch, 5, goes_down)
    longer = options(tiny_data, run, iterations=6)
    with pytest.raises(RuntimeError, match="went down"):
        train(longer)
    train(longer)
    assert read_result(run)["iterations"] == 6 and is_finished(run)
    assert logged(run) == logged(tmp_path / "whole")


def test_interrupted_run_beyond_its_end_is_refused(run, tiny_data):  # noqa: F811
    (run / "result.json").unlink()
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="--iterations is 3 but the run in .* has done 4"):
        train(options(tiny_data, run, iterations=3))
    assert (run / "config.yaml").read_bytes() == before


def test_finished_run_without_a_checkpoint_is_not_begun_anew(run, tiny_data):  # noqa: F811
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="holds a finished run of 4 iterations and no"):
        train(options(tiny_data, run, iterations=6))
    assert is_finished(run)


@pytest.mark.parametrize("kept", ["metrics.json", "result.json", "checkpoints/last.ckpt"])
def test_what_a_run_left_is_not_gone_on_with_unless_it_is_asked_for(run, tiny_data, kept):  # noqa: F811
    for name in {"metrics.json", "result.json", "checkpoints/last.ckpt"} - {kept}:
        (run / name).unlink()
    with pytest.raises(ConfigError, match="give --resume to go on"):
        train(options(tiny_data, run, iterations=6), resume=False)


def test_checkpoint_is_written_beside_its_place_and_leftovers_of_killed_processes_go(
    run,
    tiny_data,  # noqa: F811
    monkeypatch,
):
    leftovers = [run / ".result.json.1.partial", run / "checkpoints" / ".last.ckpt.1.partial"]
    for path in leftovers:
        path.write_text("cut sh")
    before, at_saving = (run / "checkpoints" / "last.ckpt").read_bytes(), []
    original = torch.save

    def save(content, file):
        at_saving.append((os.path.basename(file.name), [path.exists() for path in leftovers]))
        if "optimizer_states" in content:
            raise OSError(28, "No space left on device")
        original(content, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left.*another disk"):
        train(options(tiny_data, run, iterations=5))
    assert at_saving == [(f".last.ckpt.{os.getpid()}.partial", [False, False])]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_checkpoint_that_cannot_be_read_is_named(run, tiny_data, content):  # noqa: F811
    (run / "checkpoints" / "last.ckpt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"last\.ckpt cannot be read .*; remove it"):
        train(options(tiny_data, run, iterations=6))


class Touches:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_checkpoint_that_would_run_code_is_refused_and_the_code_does_not_run(run, tiny_data):  # noqa: F811
    checkpoint = run / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"more": Touches(run / "touched")}, checkpoint)
    with pytest.raises(ConfigError, match=r"last\.ckpt cannot be read .*other objects.*remove it"):
        train(options(tiny_data, run, iterations=6))
    with pytest.raises(UnpicklingError):  # as Lightning loads it
        AtomicCheckpoints().load_checkpoint(checkpoint)
    assert not (run / "touched").exists()


@pytest.mark.parametrize(
    ("step", "words", "kept"),
    [(1, "no checkpoint before it: .* start anew", None), (3, "the one before it is intact", 3)],
)
def test_weights_that_are_not_finite_are_never_written_to_a_checkpoint(
    tiny_data,  # noqa: F811
    tmp_path,
    monkeypatch,
    step,
    words,
    kept,
):
    original = training.DetectionModule.optimizer_step

    def optimizer_step(self, *arguments, **more):
        original(self, *arguments, **more)
        if self.global_step == step:
            self.model.student.rpn.head.cls_logits.bias.data.fill_(float("nan"))

    monkeypatch.setattr(training.DetectionModule, "optimizer_step", optimizer_step)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(NonFiniteLossError, match=f"cls_logits.bias' is not finite .*{words}"):
        train(options(tiny_data, tmp_path))
    assert not (tmp_path / "model_final.pth").exists() and not is_finished(tmp_path)
    assert checkpoint.is_file() == bool(kept)
    if kept:
        content = torch.load(checkpoint, weights_only=True)
        assert content["global_step"] == kept and not non_finite_key(content["state_dict"])


def test_student_that_is_not_finite_is_no_result(run, tiny_data):  # noqa: F811
    checkpoint = run / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["model.rpn.head.cls_logits.bias"].fill_(float("nan"))
    torch.save(content, checkpoint)
    (run / "result.json").unlink()
    with pytest.raises(NonFiniteLossError, match="'rpn.head.cls_logits.bias' is not finite"):
        train(options(tiny_data, run))
    assert not (run / "model_final.pth").exists() and not is_finished(run)


def test_command_prints_a_finished_run_without_objects_of_some_size(
    run,
    tiny_data,  # noqa: F811
    monkeypatch,
    capsys,
):
    result = json.loads((run / "result.json").read_text())
    result["results"]["bbox"]["APl"] = None
    (run / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(command, "read_options", lambda args: options(tiny_data, run))
    assert command.main(["--resume"]) == 0
    assert "APl nan" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_interrupted_run_follows_the_uninterrupted_one(
    finished,
    tiny_data,  # noqa: F811
    tmp_path,
    monkeypatch,
    workers,
):
    def goes_down():
        raise RuntimeError("the machine went down")

    folder = tmp_path / "run"
    at_step(monkeypatch, 3, goes_down)
    with pytest.raises(RuntimeError, match="went down"):
        train(options(tiny_data, folder, workers=workers))
    assert not (folder / "result.json").exists()
    train(options(tiny_data, folder, workers=workers))
    assert is_finished(folder) and read_result(folder)["iterations"] == 4
    assert logged(folder) == logged(finished)
    assert losses(folder) == pytest.approx(losses(finished))


def test_losses_are_averaged_over_an_interruption(tiny_data, tmp_path, monkeypatch):  # noqa: F811
    original = training.DetectionModule.training_step

    def training_step(self, batch, index):
        total = original(self, batch, index)
        self.losses = {"loss_cls": float(self.global_step)}
        if self.global_step == 0 and not (tmp_path / "checkpoints").exists():
            signal.raise_signal(signal.SIGINT)
        return total

    monkeypatch.setattr(training.DetectionModule, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        train(options(tiny_data, tmp_path, iterations=2))
    train(options(tiny_data, tmp_path, iterations=2))
    assert read_metrics(tmp_path)[0]["loss_cls"] == 0.5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_command_with_a_checkpoint_of_its_iteration(
    finished,
    tiny_data,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    number,
):
    handler, folder = signal.getsignal(number), tmp_path / "run"
    at_step(monkeypatch, 0, lambda: signal.raise_signal(number))
    monkeypatch.setattr(command, "read_options", lambda args: options(tiny_data, folder))
    assert command.main([]) == 75
    assert "the same command with --resume continues" in capsys.readouterr().out
    assert signal.getsignal(number) is handler
    checkpoint = torch.load(folder / training.LAST_CHECKPOINT, weights_only=False)
    assert checkpoint["global_step"] == 1
    assert command.main(["--resume"]) == 0
    assert logged(folder) == logged(finished)


def test_evaluation_that_was_interrupted_is_done_when_the_run_goes_on(
    finished,
    tiny_data,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    original = training.DetectionModule.validation_step

    def validation_step(self, batch, index):
        if self.trainer.world_size == 1 and not (tmp_path / "seen").exists():
            (tmp_path / "seen").touch()
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch, index)

    monkeypatch.setattr(training.DetectionModule, "validation_step", validation_step)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(options(tiny_data, folder))
    assert not any("bbox/AP" in record for record in read_metrics(folder))
    train(options(tiny_data, folder))
    assert logged(folder) == logged(finished)


def test_changed_learning_rate_momentum_and_weight_decay_hold_from_the_resumed_iteration(
    finished,
    tiny_data,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    teacher = {
        "student_options": SMALL,
        "teacher": "fasterrcnn_mobilenet_v2_fpn",
        "teacher_options": SMALL,
        "teacher_weights": str(finished / "model_final.pth"),
        "inherit": ("roi_heads",),
        "inherit_lr_factor": 0.5,
    }
    train(options(tiny_data, tmp_path, iterations=2, eval_period=0, log_period=1, **teacher))
    seen = []
    original = training.DetectionModule.training_step

    def training_step(self, batch, index):
        seen.extend(dict(group) for group in self.trainer.optimizers[0].param_groups)
        return original(self, batch, index)

    monkeypatch.setattr(training.DetectionModule, "training_step", training_step)
    changed = {"learning_rate": 4e-4, "momentum": 0.8, "weight_decay": 2e-4, "warmup": 0}
    longer = {"iterations": 4, "eval_period": 0, "log_period": 1, "steps": (3,)}
    train(options(tiny_data, tmp_path, **teacher, **longer, **changed))
    rates = [4e-4, 2e-4, 4e-5, 2e-5]  # of the groups at iteration 2, and at 3
    assert [group["lr"] for group in seen] == pytest.approx(rates)
    assert {(group["momentum"], group["weight_decay"]) for group in seen} == {(0.8, 2e-4)}
    logged_rates = {x["iteration"]: x["lr"] for x in read_metrics(tmp_path) if "lr" in x}
    assert logged_rates == pytest.approx({0: 5e-4, 1: 1e-3, 2: 4e-5, 3: 4e-5}, rel=2e-3)


def run_of(folder, first) -> None:
    """A folder of which only the config is of interest."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(first.config(8)))


TEACHER = {"teacher": "fasterrcnn_resnet18_fpn", "teacher_weights": "teacher.pth"}


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        ({}, {"distillers": {"PKD": {}}, **TEACHER}, "KD.DISTILLERS"),
        ({}, {"student_options": {"min_size": 96}}, "MODEL.TORCHVISION.OPTIONS.min_size"),
        (
            {"student_options": {}},
            {"student_options": {"min_size": 64}},
            "MODEL.TORCHVISION.OPTIONS.min_size",
        ),
        (
            {"distillers": {"ReviewKD": 1.0}, **TEACHER},
            {"distillers": {"ReviewKD": {"mid_channels": 8}}, **TEACHER},
            "KD.REVIEWKD.MID_CHANNELS",
        ),
        (TEACHER, {"teacher_options": {"min_size": 96}, **TEACHER}, "KD.TEACHER.OPTIONS.min_size"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(tiny_data, tmp_path, before, now, key):  # noqa: F811
    run_of(tmp_path, options(tiny_data, tmp_path, **before))
    with pytest.raises(ConfigError, match=f"holds another run.*{key}"):
        train(options(tiny_data, tmp_path, **now))


def test_a_run_is_not_resumed_on_other_data_of_the_same_name(run, tiny_data, tmp_path):  # noqa: F811
    moved = shutil.copytree(tiny_data, tmp_path / "elsewhere")
    train(options(moved, run))
    content = json.loads((moved / "train.json").read_text())
    content["images"].pop()
    (moved / "train.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="holds another run.*DATASETS.TRAIN"):
        train(options(moved, run))


def test_a_run_of_an_earlier_version_goes_on(run, tiny_data, caplog):  # noqa: F811
    (run / "result.json").unlink()
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in ("TRAIN_SHA256", "TRAIN_CLASSES"):  # which earlier versions did not write
        del config["DATASETS"][key]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with caplog.at_level("WARNING"):
        train(options(tiny_data, run, iterations=5))
    assert read_result(run)["iterations"] == 5 and "TRAIN_" not in caplog.text
