"""Training in real child processes that are killed, stopped and resumed: nothing is lost.

The children are forked by a server that has imported everything once (``forkserver``), so that a
start costs the training's own set-up and not seconds of imports. Every run saves a checkpoint
after every step; it holds the weights, and the losses of that step and of the 19 before it.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from child_process import free_port, train
from effort import effort
from tiny import distilled_cfg
from torch.multiprocessing import ProcessExitedException

from kd_detectron.config import get_config
from kd_detectron.data import build_train_loader, register_coco_format
from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.engine import main as command

ITERATIONS = 20
KILLS = effort(8, 20)
# For runs that are stopped: they cannot end before, however slow the machine.
LONG = ["SOLVER.MAX_ITER", 2000, "SOLVER.CHECKPOINT_MAX_TO_KEEP", 2]
# Checkpoints of a few MB, steps of a few hundredths of a second.
SMALL = [
    *("MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"),
    *("MODEL.MOBILENETV2.WIDTH_MULT", 0.125),
    *("MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds ``data`` and ``run.yaml``."""
    folder = tmp_path_factory.mktemp("faults")
    data = make_synthetic(folder / "data", 6, 2, image_size=(64, 64))
    entries = [[f"faults_{x}", str(data / f"{x}.json"), str(data / x)] for x in ("train", "val")]
    cfg = distilled_cfg(
        folder,
        opts=[
            *SMALL,
            *("DATASETS.COCO_FORMAT", entries),
            *("DATASETS.TRAIN", ("faults_train",)),
            *("MODEL.FPN.OUT_CHANNELS", 16),
            *("KD.TEACHER.OPTS", SMALL),
            *("SOLVER.MAX_ITER", ITERATIONS),
            *("SOLVER.CHECKPOINT_PERIOD", 1),
            *("SOLVER.WARMUP_ITERS", 3),
            *("SOLVER.STEPS", (15,)),
        ],
    )
    (folder / "run.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture(scope="module")
def start(folder):
    """``start(output, *opts, **options)``: a child process of a run, with ``--resume``.

    All that it prints goes to the file ``output`` with the suffix ``.txt``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kd_detectron.engine.main"])
    children = []

    def start_child(output, *opts, arguments=(), **options):
        argv = ["--config-file", str(folder / "run.yaml"), "--resume", *arguments]
        argv += ["OUTPUT_DIR", str(output)]
        options["console"] = str(output.with_suffix(".txt"))
        child = context.Process(target=train, args=[*argv, *map(str, opts)], kwargs=options)
        child.start()
        children.append(child)
        return child

    yield start_child
    for child in children:
        child.kill()


def finish(child) -> int:
    child.join(timeout=240)
    return child.exitcode


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert finish(start(output)) == 0
    return output


def seconds_of(output) -> tuple[float, float]:
    """How long a run took from its config to the first checkpoint, and from one to the next."""
    first, last = (os.path.getmtime(checkpoint(output, i)) for i in (0, ITERATIONS - 2))
    begin = os.path.getmtime(output / "config.yaml")
    return first - begin, (last - first) / (ITERATIONS - 2)


def checkpoint(output, iteration):
    return output / f"model_{iteration:07d}.pth"


def last_iteration(output) -> int:
    """The iteration of the last checkpoint; -1 before the first."""
    tag = output / "last_checkpoint"
    if not tag.is_file():
        return -1
    name = tag.read_text()
    return ITERATIONS if "final" in name else int(name.split("_")[1].split(".")[0])


def wait_for_iteration(child, output, iteration) -> None:
    deadline = time.monotonic() + 120
    while last_iteration(output) < iteration and child.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def assert_no_file_is_unreadable(output) -> None:
    for name in os.listdir(output):
        if name.endswith(".pth"):
            assert "iteration" in torch.load(output / name, weights_only=True), name


def metrics(output) -> list[tuple[int, set[str]]]:
    """The iterations in ``metrics.json``, each with the names of its losses."""
    records = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return [(record["iteration"], {key for key in record if "loss" in key}) for record in records]


def assert_same_run(output, expected) -> None:
    """Bit for bit: weights of every iteration, momentum at the end."""
    names = [f"model_{iteration:07d}.pth" for iteration in range(ITERATIONS)]
    for name in [*names, "model_final.pth"]:
        mine, theirs = (torch.load(x / name, weights_only=True) for x in (output, expected))
        assert mine["iteration"] == theirs["iteration"]
        assert mine["model"].keys() == theirs["model"].keys()
        for key, tensor in theirs["model"].items():
            assert torch.equal(mine["model"][key], tensor), (name, key)
    states = [x["trainer"]["_trainer"]["optimizer"]["state"] for x in (mine, theirs)]
    for key, state in states[1].items():
        assert torch.equal(states[0][key]["momentum_buffer"], state["momentum_buffer"])
    # A run that stops in order also writes the losses of the iteration at which it does.
    assert all(record in metrics(output) for record in metrics(expected))


def test_killed_at_random_moments_a_resumed_run_follows_the_uninterrupted_one(
    start, uninterrupted, tmp_path
):
    moments = random.Random(4)
    set_up, step = seconds_of(uninterrupted)
    size = checkpoint(uninterrupted, 0).stat().st_size
    kills, in_mid_write, runs = 0, 0, [tmp_path / "0"]
    while kills < KILLS:
        output, before = runs[-1], last_iteration(runs[-1])
        if kills % 5 == 0:  # anywhere before the first step
            child = start(output)
            time.sleep(moments.uniform(0, set_up))
            child.kill()
        elif kills % 5 < 3:  # anywhere in a step, or in what follows it
            child = start(output)
            wait_for_iteration(child, output, before + 1)
            time.sleep(moments.uniform(0, step))
            child.kill()
        else:  # anywhere in writing one of the next three checkpoints
            child = start(output, killed_after=moments.randrange(3 * size))
        if finish(child) == 0:  # It was faster than this test, at the end: the next run.
            runs.append(tmp_path / str(len(runs)))
            continue
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        if output.is_dir():
            in_mid_write += any(name.endswith(".partial") for name in os.listdir(output))
            assert_no_file_is_unreadable(output)
            assert last_iteration(output) >= before
    assert in_mid_write >= KILLS * 2 // 5
    assert finish(start(runs[-1])) == 0
    for output in runs:
        assert [x for x in os.listdir(output) if x.endswith((".partial", ".tmp"))] == []
        assert_same_run(output, uninterrupted)


def test_signals_of_a_scheduler_end_a_run_with_a_checkpoint_and_its_own_exit_code(
    start, uninterrupted, tmp_path
):
    output = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT):
        before = last_iteration(output)
        child = start(output)
        wait_for_iteration(child, output, before + 2)
        os.kill(child.pid, number)
        assert finish(child) == 75
        assert before + 2 <= last_iteration(output) < ITERATIONS - 1
        last_line = output.with_suffix(".txt").read_text().splitlines()[-1]
        assert f"stopped by {number.name} after iteration" in last_line and "--resume" in last_line
    assert finish(start(output)) == 0
    assert_same_run(output, uninterrupted)


def test_signal_to_the_parent_of_two_processes_leaves_a_checkpoint(start, tmp_path):
    output = tmp_path / "run"
    child = start(output, *LONG, arguments=["--num-gpus", "2", "--dist-url", "auto"])
    wait_for_iteration(child, output, 1)
    os.kill(child.pid, signal.SIGTERM)
    assert finish(child) == 75
    said = output.with_suffix(".txt").read_text()
    assert "stopped by SIGTERM after iteration" in said and "Traceback" not in said
    assert 1 <= last_iteration(output) < 1999
    assert_no_file_is_unreadable(output)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_data_workers_too_leaves_a_checkpoint(start, tmp_path, number):
    """As Slurm and terminals send it; the workers end with the training."""
    output = tmp_path / "run"
    child = start(output, *LONG, "DATALOADER.NUM_WORKERS", 2)
    wait_for_iteration(child, output, 0)
    processes = [*children_of(child.pid), child.pid]
    assert len(processes) == 3
    for pid in processes:
        os.kill(pid, number)
    assert finish(child) == 75, output.with_suffix(".txt").read_text()
    assert "stopped by" in output.with_suffix(".txt").read_text().splitlines()[-1]
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes[:2])


def children_of(pid) -> list[int]:
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        # Other processes of the machine may end at any moment.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # Its fourth field, behind the name in brackets, is the parent.
            number, _, rest = path.read_text().rpartition(")")
            if int(rest.split()[1]) == pid:
                children.append(int(number.split()[0]))
    return children


def test_full_disk_stops_a_run_that_goes_on_when_there_is_room(start, uninterrupted, tmp_path):
    """Also where the last checkpoint was damaged meanwhile: from the one before."""
    output = tmp_path / "run"
    assert finish(start(output, disk_full_from="model_0000003")) == 1
    last_line = output.with_suffix(".txt").read_text().splitlines()[-1]
    for words in ("error: ", "model_0000003.pth", "No space left on device", "--resume"):
        assert words in last_line
    assert last_iteration(output) == 2
    assert_no_file_is_unreadable(output)
    assert [x for x in os.listdir(output) if x.endswith((".partial", ".tmp"))] == []
    os.truncate(checkpoint(output, 2), 1000)
    assert finish(start(output)) == 0
    fallback = f"resuming from the one before, {checkpoint(output, 1)}"
    assert fallback in output.with_suffix(".txt").read_text()
    assert_same_run(output, uninterrupted)


def test_corrupt_image_in_mid_epoch_is_named_and_stops_a_run_or_is_skipped(
    start, uninterrupted, folder, tmp_path
):
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder / "data", data)
    entry = [["faults_train", str(data / "train.json"), str(data / "train")]]
    opts = ["DATASETS.TEST", "()", "DATASETS.COCO_FORMAT", entry]
    # The second of three batches of the first epoch.
    cfg = get_config(str(folder / "run.yaml"))
    register_coco_format(cfg)
    batches = iter(build_train_loader(cfg))
    next(batches)
    image = data / "train" / os.path.basename(next(batches)[0]["file_name"])
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])

    assert finish(start(output, *opts)) == 1
    last_line = output.with_suffix(".txt").read_text().splitlines()[-1]
    for words in (f"error: cannot use image '{image}'", "MAX_CORRUPT_IMAGES is 0", "--resume"):
        assert words in last_line
    assert last_iteration(output) == 0

    skipping = tmp_path / "skipping"
    shutil.copytree(output, skipping)
    opts_of_skipping = ["DATALOADER.MAX_CORRUPT_IMAGES", 1, "SOLVER.MAX_ITER", 4]
    assert finish(start(skipping, *opts, *opts_of_skipping)) == 0
    said = skipping.with_suffix(".txt").read_text()
    assert f"Skipped image '{image}'" in said and "1 of at most 1 such images" in said
    assert json.loads((skipping / "result.json").read_text())["finished"]

    image.write_bytes(whole)
    assert finish(start(output, *opts)) == 0
    assert_same_run(output, uninterrupted)


def test_diverging_run_ends_with_an_error_and_only_finite_checkpoints(start, tmp_path):
    output = tmp_path / "run"
    opts = ["SOLVER.BASE_LR", 1e12, "SOLVER.WARMUP_ITERS", 0]
    assert finish(start(output, *opts)) == 1
    last_line = output.with_suffix(".txt").read_text().splitlines()[-1]
    assert last_line.startswith("error: ") and "not finite" in last_line
    assert "last checkpoint is intact" in last_line and "--resume" in last_line
    for name in os.listdir(output):
        if name.endswith(".pth"):
            for key, tensor in torch.load(output / name, weights_only=True)["model"].items():
                assert torch.isfinite(tensor).all(), (name, key)


@pytest.mark.parametrize(
    ("signal_name", "code", "said"),
    [
        ("SIGKILL", 1, "error: process 1 was ended by SIGKILL, and the others with it"),
        (None, 2, ""),  # the process itself has said why
    ],
)
def test_process_that_was_killed_is_named_by_its_parent(
    monkeypatch, capsys, signal_name, code, said
):
    def launch(*args, **options):
        raise ProcessExitedException("", 1, 1234, exit_code=2, signal_name=signal_name)

    monkeypatch.setattr("kd_detectron.engine.launch.launch", launch)
    assert command.main(["--config-file", "any.yaml", "--num-gpus", "2"]) == code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("dead", [0, 1])
def test_death_of_one_of_two_processes_ends_the_other_with_an_error(start, tmp_path, dead):
    """As on two machines, where no common parent process could end it."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    output = tmp_path / "run"
    children = [start(output, *LONG, RANK=str(rank), **common, **address) for rank in range(2)]
    wait_for_iteration(children[0], output, 2)
    children[dead].kill()
    children[1 - dead].join(timeout=60)
    assert children[1 - dead].exitcode == 1
    saved = last_iteration(output)
    assert 2 <= saved < 1999
    torch.load(checkpoint(output, saved), weights_only=True)
