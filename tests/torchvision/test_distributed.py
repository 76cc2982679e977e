"""Under DistributedDataParallel the gradients of two processes are averaged, the teacher is not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from child_process import load_script
from run_folders_torchvision import tiny_data  # noqa: F401  a fixture

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_two_processes_have_the_average_of_their_gradients_and_a_teacher_each(tmp_path):
    two_processes = load_script(SCRIPT, "torchvision_two_processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank), "2"], env=environment) for rank in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    images, targets = two_processes.images_and_targets()
    alone = []
    for rank in range(2):
        model = two_processes.built()
        mark = next(model.teacher.model.parameters())
        mark.data += rank
        losses = model(images[rank : rank + 1], targets[rank : rank + 1])
        mark.data -= rank
        assert torch.equal(results[rank]["mark"], mark)
        sum(losses.values()).backward()
        alone.append(two_processes.gradients(model))
    assert any(name.startswith("distillers.ReviewKD") for name in alone[0])
    for name, gradient in alone[0].items():
        expected = (gradient + alone[1][name]) / 2
        for result in results:
            error = (result["gradients"][name] - expected).norm()
            assert error <= 1e-4 * expected.norm(), name


def test_failure_of_the_first_process_ends_the_others(tiny_data, tmp_path):  # noqa: F811
    script = Path(__file__).with_name("two_failing.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path), str(tiny_data)]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        assert first.wait(timeout=240) == 1
    finally:
        first.kill()
    assert "loss_cls is not finite" in (tmp_path / "log").read_text()
    # The other one touches the file ten times per second for a minute, if it is left alive.
    time.sleep(3)
    assert time.time() - (tmp_path / "waiting").stat().st_mtime > 2
