"""Checkpoints under failure: full disks, killed processes, damaged and foreign files."""

import errno
import logging
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from fvcore.common.checkpoint import PeriodicCheckpointer
from tiny import distilled_cfg, tiny_cfg
from torch import nn

from kd_detectron.checkpoint import (
    CheckpointWriteError,
    DistillationCheckpointer,
    UnreadableCheckpointError,
    atomic_open,
)
from kd_detectron.errors import ConfigError, NonFiniteLossError


def small_model(seed: int = 0, channels: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels))


class WithDistillers(nn.Module):
    """A model in the shape of a distilled one: its own layers, and ``distillers.*``."""

    def __init__(self, *distillers: str):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        if distillers:
            self.distillers = nn.ModuleDict({name: nn.Linear(2, 2) for name in distillers})


def partial_files(folder) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".partial")]


def truncate(path) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def run_python(code: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, "-c", code], text=True, env=environment, **options)


# ---- saving ----


def test_saved_checkpoint_is_read_by_detectron2(tmp_path):
    model = small_model()
    DistillationCheckpointer(model, str(tmp_path)).save("model_0000004", iteration=4)
    other = small_model(seed=1)
    rest = DetectionCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert rest["iteration"] == 4
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000004.pth"]


def test_renamed_checkpoint_is_flushed_to_disk_with_its_folder(tmp_path, monkeypatch):
    """A power cut after the write must not bring back the folder as it was before."""
    flushed = []

    def fsync(descriptor, real=os.fsync):
        flushed.append((os.path.samestat(os.fstat(descriptor), os.stat(tmp_path)), path.is_file()))
        real(descriptor)

    path = tmp_path / "model_final.pth"
    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_open(str(path)) as file:
        file.write(b"checkpoint")
    assert flushed == [(False, False), (True, True)]  # the file before, the folder after


def test_disk_full_in_mid_write_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    model = small_model()
    checkpointer = DistillationCheckpointer(model, str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()

    def write_half_and_fail(data, file):
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", write_half_and_fail)
    for name in ("model_final", "model_0000009"):
        with pytest.raises(CheckpointWriteError, match="No space left.*intact.*--resume") as error:
            checkpointer.save(name)
        assert name in str(error.value)
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_final.pth"]
    monkeypatch.undo()
    checkpointer.save("model_0000009")
    assert checkpointer.get_checkpoint_file().endswith("model_0000009.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_written(tmp_path, value):
    model = small_model()
    checkpointer = DistillationCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    name, tensor = next((k, v) for k, v in model.state_dict().items() if v.is_floating_point())
    tensor.view(-1)[0] = value
    with pytest.raises(NonFiniteLossError, match=f"'{name}' is not finite.*model_0000002.*intact"):
        checkpointer.save("model_0000002")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]


def test_file_size_limit_of_the_system_keeps_the_previous_checkpoint(tmp_path):
    """The same with a write that really fails, inside torch's own zip writer."""
    code = f"""
import resource, torch
from kd_detectron.checkpoint import CheckpointWriteError, DistillationCheckpointer
checkpointer = DistillationCheckpointer(torch.nn.Linear(10, 10), {str(tmp_path)!r})
checkpointer.save("model_0000001")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpointer.model = torch.nn.Linear(300, 300)
try:
    checkpointer.save("model_0000002")
except CheckpointWriteError as error:
    print("refused:", error)
"""
    process = run_python(code, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "refused:" in output and "model_0000002.pth" in output
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    DistillationCheckpointer(nn.Linear(10, 10), str(tmp_path)).resume_or_load("", resume=True)


def test_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    checkpointer = DistillationCheckpointer(small_model(), str(tmp_path / "gone"))
    with pytest.raises(CheckpointWriteError, match="gone.*free some disk space"):
        checkpointer.save("model_final")


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("CUDA error: out of memory")])
def test_error_of_the_program_is_not_taken_for_a_full_disk(tmp_path, error):
    with pytest.raises(type(error)) as caught, atomic_open(str(tmp_path / "file")):
        raise error
    assert caught.value is error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
        "PytorchStreamWriter failed writing file data/0: file write failed",
    ],
)
def test_error_of_torchs_zip_writer_is_a_failed_write(tmp_path, text):
    with (
        pytest.raises(CheckpointWriteError, match="free some disk space"),
        atomic_open(str(tmp_path / "file")),
    ):
        raise RuntimeError(text)
    assert os.listdir(tmp_path) == []


def test_killed_process_leaves_complete_checkpoints_only(tmp_path):
    code = f"""
import torch
from kd_detectron.checkpoint import DistillationCheckpointer
checkpointer = DistillationCheckpointer(torch.nn.Linear(400, 400), {str(tmp_path)!r})
for iteration in range(10**6):
    checkpointer.save(f"model_{{iteration % 3:07d}}", iteration=iteration)
    if iteration == 2:
        print("started", flush=True)
"""
    for _ in range(2):
        process = run_python(code, stdout=subprocess.PIPE)
        assert process.stdout.readline() == "started\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        process.stdout.close()
        for name in os.listdir(tmp_path):
            if name.endswith(".pth"):
                torch.load(tmp_path / name, weights_only=True)
        model = nn.Linear(400, 400)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        checkpointer = DistillationCheckpointer(model, str(tmp_path), optimizer=optimizer)
        assert partial_files(tmp_path) == []
        assert "iteration" in checkpointer.resume_or_load("", resume=True)
        assert len(checkpointer.incompatible.missing_keys) == 0


def test_unfinished_file_of_a_killed_training_is_removed_when_it_goes_on(tmp_path):
    code = f"""
import os, signal
from kd_detectron.checkpoint import atomic_open
with atomic_open({str(tmp_path / "model_final.pth")!r}) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_python(code).wait(timeout=120) == -signal.SIGKILL
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DistillationCheckpointer(model, str(tmp_path))  # of an evaluation, beside a training perhaps
    DistillationCheckpointer(model, str(tmp_path), save_to_disk=False, optimizer=optimizer)
    assert len(partial_files(tmp_path)) == 1
    DistillationCheckpointer(model, str(tmp_path), optimizer=optimizer)
    assert os.listdir(tmp_path) == []


def test_best_checkpoint_is_not_the_one_to_resume_from(tmp_path):
    checkpointer = DistillationCheckpointer(small_model(), str(tmp_path))
    checkpointer.save("model_0000001")
    checkpointer.save("model_best")
    assert checkpointer.get_checkpoint_file().endswith("model_0000001.pth")
    checkpointer.save("model_0000002")
    assert checkpointer.get_checkpoint_file().endswith("model_0000002.pth")


def test_periodic_checkpointer_still_deletes_old_checkpoints(tmp_path):
    checkpointer = DistillationCheckpointer(small_model(), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=1, max_to_keep=1)
    for iteration in range(3):
        periodic.step(iteration)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000002.pth"]


# ---- resuming ----


def save_three(folder) -> None:
    checkpointer = DistillationCheckpointer(small_model(), str(folder))
    for iteration in (9, 19, 29):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


def test_resume_falls_back_to_the_checkpoint_before_a_truncated_one(tmp_path, caplog):
    save_three(tmp_path)
    truncate(tmp_path / "model_0000029.pth")
    checkpointer = DistillationCheckpointer(small_model(seed=1), str(tmp_path))
    with caplog.at_level(logging.WARNING, "kd_detectron"):
        assert checkpointer.resume_or_load("", resume=True)["iteration"] == 19
    assert "model_0000029.pth" in caplog.text and "model_0000019.pth" in caplog.text
    torch.testing.assert_close(checkpointer.model.state_dict(), small_model().state_dict())


def test_resume_falls_back_past_every_damaged_checkpoint(tmp_path):
    save_three(tmp_path)
    (tmp_path / "model_0000029.pth").unlink()
    (tmp_path / "model_0000019.pth").write_bytes(b"")
    checkpointer = DistillationCheckpointer(small_model(), str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 9


def test_resume_of_a_finished_run_falls_back_to_the_newest_numbered(tmp_path):
    save_three(tmp_path)
    checkpointer = DistillationCheckpointer(small_model(), str(tmp_path))
    checkpointer.save("model_final", iteration=29)
    truncate(tmp_path / "model_final.pth")
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 29


def test_resume_with_no_readable_checkpoint_is_refused(tmp_path):
    save_three(tmp_path)
    for path in tmp_path.glob("*.pth"):
        truncate(path)
    with pytest.raises(ConfigError, match="OUTPUT_DIR.*without --resume"):
        DistillationCheckpointer(small_model(), str(tmp_path)).resume_or_load("", resume=True)


def test_resume_with_other_distillers_is_refused_not_silently_restarted(tmp_path):
    def checkpointer_of(*distillers):
        model = WithDistillers(*distillers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return DistillationCheckpointer(model, str(tmp_path), optimizer=optimizer)

    checkpointer_of("ReviewKD").save("model_0000009", iteration=9)
    with pytest.raises(ConfigError, match="optimizer.*KD.DISTILLERS"):
        checkpointer_of("ReviewKD", "FitNet").resume_or_load("", resume=True)
    assert checkpointer_of("ReviewKD").resume_or_load("", resume=True)["iteration"] == 9


def test_optimizer_and_scheduler_survive_a_tensors_only_load(tmp_path):
    def build():
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
        checkpointer = DistillationCheckpointer(
            model, str(tmp_path), optimizer=optimizer, scheduler=scheduler
        )
        return model, optimizer, scheduler, checkpointer

    model, optimizer, scheduler, checkpointer = build()
    model(torch.rand(2, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    checkpointer.save("model_0000000", iteration=0, generator=torch.get_rng_state())
    _, other_optimizer, other_scheduler, checkpointer = build()
    rest = checkpointer.resume_or_load("", resume=True)
    assert other_scheduler.state_dict() == scheduler.state_dict()
    torch.testing.assert_close(other_optimizer.state_dict(), optimizer.state_dict())
    assert set(rest) == {"iteration", "generator"}


# ---- files that cannot be loaded ----


def write_truncated(path):
    torch.save(small_model().state_dict(), path)
    truncate(path)


UNREADABLE = {
    "truncated": write_truncated,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404 not found</html>"),
    "image": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "list": lambda path: torch.save([torch.zeros(3)], path),
    "no_tensors": lambda path: torch.save({"epoch": 3, "note": "hello"}, path),
    "other_layout": lambda path: torch.save({"net": small_model().state_dict()}, path),
    "empty_model": lambda path: torch.save({"model": {}}, path),
    "folder": lambda path: path.mkdir(),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
def test_unreadable_file_is_one_sentence_with_key_and_path(tmp_path, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    UNREADABLE[kind](path)
    checkpointer = DistillationCheckpointer(small_model(), weights_key="KD.TEACHER.WEIGHTS")
    with pytest.raises(UnreadableCheckpointError) as error:
        checkpointer.load(str(path))
    message = str(error.value)
    assert message.startswith(f"KD.TEACHER.WEIGHTS '{path}'") and "\n" not in message
    # and the checkpointer still works
    torch.save(small_model(seed=3).state_dict(), tmp_path / "good.pth")
    checkpointer.load(str(tmp_path / "good.pth"))
    assert not any(checkpointer.incompatible)


def test_missing_file_shows_the_near_ones(tmp_path):
    torch.save(small_model().state_dict(), tmp_path / "model_0000099.pth")
    with pytest.raises(ConfigError, match=r"MODEL.WEIGHTS.*did you mean model_0000099.pth\?"):
        DistillationCheckpointer(small_model()).load(str(tmp_path / "model_000099.pth"))


class RunsCode:
    """What a malicious checkpoint holds: unpickling it would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("suffix", [".pth", ".pyth"])
def test_checkpoint_cannot_run_code(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save({"model": {"a": torch.zeros(1)}, "x": RunsCode(tmp_path / "owned")}, path)
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS.*other objects than tensors"):
        DistillationCheckpointer(small_model()).load(str(path))
    assert not (tmp_path / "owned").exists()


def test_torch_files_are_read_as_tensors_only_whatever_torchs_default(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch.save(small_model().state_dict(), path)
    asked = []
    original = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *args, **kwargs: asked.append(kwargs) or original(*args, **kwargs)
    )
    DistillationCheckpointer(small_model()).load(str(path))
    assert [kwargs["weights_only"] for kwargs in asked] == [True]


def test_file_with_nothing_in_common_is_refused(tmp_path):
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS.*nothing in common.*'0.weight'"):
        DistillationCheckpointer(small_model()).load(str(tmp_path / "other.pth"))


# ---- what loads ----


def test_what_did_not_match_is_kept_and_counted(tmp_path, caplog):
    state = small_model().state_dict()
    state["0.weight"] = torch.zeros(5, 3, 1, 1)
    state["extra"] = torch.zeros(1)
    del state["1.weight"]
    torch.save({"model": state}, tmp_path / "weights.pth")
    checkpointer = DistillationCheckpointer(small_model())
    with caplog.at_level(logging.INFO, "kd_detectron"):
        checkpointer.load(str(tmp_path / "weights.pth"))
    assert checkpointer.incompatible.missing_keys == ["0.weight", "1.weight"]
    assert checkpointer.incompatible.unexpected_keys == ["extra"]
    assert checkpointer.incompatible.incorrect_shapes == [("0.weight", (5, 3, 1, 1), (4, 3, 1, 1))]
    assert "loaded 5 of 7 tensors from MODEL.WEIGHTS" in caplog.text
    checkpointer.load("")
    assert checkpointer.incompatible is None


def test_zoo_pickle_loads_as_in_detectron2(tmp_path):
    model = small_model()
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays |= {"pixel_mean": np.zeros((3, 1, 1)), "rpn.anchor_generator.cell_anchors.0": np.ones(1)}
    with open(tmp_path / "model.pkl", "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file)
    checkpointer = DistillationCheckpointer(small_model(seed=1))
    checkpointer.load(str(tmp_path / "model.pkl"))
    assert not any(checkpointer.incompatible)
    torch.testing.assert_close(checkpointer.model.state_dict(), model.state_dict())


def test_query_for_matching_heuristics_still_works(tmp_path):
    state = {f"net.{name}": tensor for name, tensor in small_model().state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"net": small_model(seed=1)})})
    DistillationCheckpointer(model).load(f"{tmp_path / 'weights.pth'}?matching_heuristics=True")
    torch.testing.assert_close(model["backbone"]["net"].state_dict(), small_model().state_dict())


def test_distillers_of_a_distilled_run_are_no_matter_in_evaluation(tmp_path, caplog):
    torch.save({"model": WithDistillers("ReviewKD").state_dict()}, tmp_path / "run.pth")
    checkpointer = DistillationCheckpointer(WithDistillers())
    with caplog.at_level(logging.WARNING):
        checkpointer.load(str(tmp_path / "run.pth"))
    assert not any(checkpointer.incompatible) and caplog.text == ""


def test_plain_student_starts_a_distilled_run_without_complaint(tmp_path):
    torch.save({"model": WithDistillers().state_dict()}, tmp_path / "plain.pth")
    checkpointer = DistillationCheckpointer(WithDistillers("ReviewKD"))
    checkpointer.load(str(tmp_path / "plain.pth"))
    assert not any(checkpointer.incompatible)


def test_distillers_that_changed_between_runs_are_reported(tmp_path):
    torch.save({"model": WithDistillers("FitNet").state_dict()}, tmp_path / "run.pth")
    checkpointer = DistillationCheckpointer(WithDistillers("ReviewKD"))
    checkpointer.load(str(tmp_path / "run.pth"))
    assert "distillers.ReviewKD.weight" in checkpointer.incompatible.missing_keys
    assert "distillers.FitNet.weight" in checkpointer.incompatible.unexpected_keys


def test_checkpoint_of_a_distilled_detector_holds_no_teacher_and_loads_in_the_student(tmp_path):
    torch.manual_seed(0)
    distilled = build_model(distilled_cfg(str(tmp_path), ["ReviewKD"]))
    DistillationCheckpointer(distilled, str(tmp_path)).save("model_final")
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    student = build_model(tiny_cfg(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]))
    own = set(student.state_dict())
    assert {name for name in saved if not name.startswith("distillers.")} == own
    assert any(name.startswith("distillers.") for name in saved)
    checkpointer = DistillationCheckpointer(student)
    checkpointer.load(str(tmp_path / "model_final.pth"))
    assert not any(checkpointer.incompatible)
