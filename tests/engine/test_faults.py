"""Training in real child processes that are killed, stopped and resumed: nothing is lost.

The children are forked by a server that has imported everything once (``forkserver``), so that a
start costs the training's own set-up and not seconds of imports.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import time

import pytest
import torch
from child_process import train
from tiny import distilled_cfg

from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic

ITERATIONS = 20
KILLS = 8


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """``start(output, **environment)``: a child process of a run, which saves after every step."""
    folder = tmp_path_factory.mktemp("faults")
    data = make_synthetic(folder / "data", 6, 2, image_size=(64, 64))
    entries = [[f"faults_{x}", str(data / f"{x}.json"), str(data / x)] for x in ("train", "val")]
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)]
    cfg = distilled_cfg(
        folder,
        opts=[
            *("DATASETS.COCO_FORMAT", entries),
            *("DATASETS.TRAIN", ("faults_train",)),
            *("MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"),
            *("MODEL.MOBILENETV2.WIDTH_MULT", 0.125),  # checkpoints of a few MB
            *("MODEL.FPN.OUT_CHANNELS", 16),
            *classes,
            *("KD.TEACHER.OPTS", classes),
            *("SOLVER.MAX_ITER", ITERATIONS),
            *("SOLVER.CHECKPOINT_PERIOD", 1),
            *("SOLVER.WARMUP_ITERS", 3),
            *("SOLVER.STEPS", (15,)),
        ],
    )
    (folder / "run.yaml").write_text(cfg.dump())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kd_detectron.engine.main"])
    children = []

    def start_child(output, **environment):
        argv = ["--config-file", str(folder / "run.yaml"), "--resume", "OUTPUT_DIR", str(output)]
        child = context.Process(target=train, args=argv, kwargs=environment)
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
    output = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start(output)) == 0
    return output


def seconds_of(output) -> tuple[float, float]:
    """How long a run took from its config to the first checkpoint, and from one to the next."""
    checkpoints = [output / f"model_{i:07d}.pth" for i in (0, ITERATIONS - 2)]
    first, last = (os.path.getmtime(path) for path in checkpoints)
    begin = os.path.getmtime(output / "config.yaml")
    return first - begin, (last - first) / (ITERATIONS - 2)


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


def losses(output) -> dict:
    """The last record of ``metrics.json``: running medians over all the last iterations."""
    record = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    return {key: value for key, value in record.items() if "loss" in key or key == "iteration"}


def assert_same_run(output, expected) -> None:
    mine, theirs = (
        torch.load(x / "model_final.pth", weights_only=True) for x in (output, expected)
    )
    assert mine["iteration"] == theirs["iteration"] == ITERATIONS - 1
    assert mine["model"].keys() == theirs["model"].keys()
    for name, tensor in theirs["model"].items():
        assert torch.equal(mine["model"][name], tensor), name
    states = [x["trainer"]["_trainer"]["optimizer"]["state"] for x in (mine, theirs)]
    for key, state in states[1].items():
        assert torch.equal(states[0][key]["momentum_buffer"], state["momentum_buffer"])
    assert losses(output) == losses(expected)


def test_killed_at_random_moments_a_resumed_run_ends_as_the_uninterrupted_one(
    start, uninterrupted, tmp_path
):
    moments = random.Random(4)
    set_up, step = seconds_of(uninterrupted)
    reached = []
    for number in range(KILLS):
        child = start(tmp_path)
        if number % 3:
            # One or two checkpoints on, and then anywhere in a step or in writing a checkpoint.
            wait_for_iteration(child, tmp_path, last_iteration(tmp_path) + moments.choice((1, 2)))
            time.sleep(moments.uniform(0, step))
        else:
            time.sleep(moments.uniform(0, set_up))
        child.kill()
        child.join()
        if child.exitcode == 0:
            break  # on a busy machine it may be faster than this test, at the end
        assert child.exitcode == -signal.SIGKILL
        reached.append(last_iteration(tmp_path))
        for name in os.listdir(tmp_path):
            if name.endswith(".pth"):
                assert "iteration" in torch.load(tmp_path / name, weights_only=True), name
    assert len(reached) >= KILLS // 2 and reached == sorted(reached)
    assert finish(start(tmp_path)) == 0
    assert [name for name in os.listdir(tmp_path) if name.endswith((".partial", ".tmp"))] == []
    assert_same_run(tmp_path, uninterrupted)


def test_sigterm_ends_a_run_with_a_checkpoint_and_its_own_exit_code(start, uninterrupted, tmp_path):
    child = start(tmp_path)
    wait_for_iteration(child, tmp_path, 2)
    child.terminate()
    assert finish(child) == 75
    assert 2 <= last_iteration(tmp_path) < ITERATIONS - 1
    assert finish(start(tmp_path)) == 0
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("dead", [0, 1])
def test_death_of_one_of_two_processes_ends_the_other_with_an_error(start, tmp_path, dead):
    """As on two machines, where no common parent process could end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [start(tmp_path, RANK=str(rank), **common, **address) for rank in range(2)]
    wait_for_iteration(children[0], tmp_path, 2)
    children[dead].kill()
    children[1 - dead].join(timeout=60)
    assert children[1 - dead].exitcode == 1
    saved = last_iteration(tmp_path)
    assert 2 <= saved < ITERATIONS - 1
    torch.load(tmp_path / f"model_{saved:07d}.pth", weights_only=True)
