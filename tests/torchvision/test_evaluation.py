"""Evaluation of torchvision's detectors: the same with any number of processes, in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_process import free_port, load_script
from run_folders_torchvision import options, tiny_data  # noqa: F401
from tiny_torchvision import detector

from kd_detectron.errors import ConfigError
from kd_detectron.torchvision import DistilledDetector
from kd_detectron.torchvision.data import DetectionData
from kd_detectron.torchvision.training import DetectionModule, build_trainer, train

SCRIPT = Path(__file__).with_name("two_evaluations.py")


def test_two_processes_with_three_and_two_images_have_the_ap_of_all_five(tmp_path, monkeypatch):
    two_evaluations = load_script(SCRIPT, "torchvision_two_evaluations")
    two_evaluations.write_data(tmp_path)
    monkeypatch.setattr(os, "cpu_count", os.cpu_count)  # The script changes it.
    expected = two_evaluations.evaluate(tmp_path, 1)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path), str(rank), "2"],
            env=environment | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert 5 < expected["bbox"]["AP"] < 95 and 5 < expected["segm"]["AP"] < 95
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for task, scores in expected.items():
            assert results[task] == pytest.approx(scores, nan_ok=True)


def test_more_processes_than_images_to_evaluate_on_are_refused(tiny_data, tmp_path):  # noqa: F811
    three = options(tiny_data, tmp_path / "run", nodes=3, batch_size=3)
    with pytest.raises(ConfigError, match=r"val\.json has 2 images for 3 processes"):
        train(three)
    assert not (tmp_path / "run").exists()


def test_evaluation_of_a_half_precision_training_is_in_float32(tiny_data, tmp_path):  # noqa: F811
    half = options(tiny_data, tmp_path, accelerator="cpu", precision="bf16-mixed")
    val = DetectionData(*half.val, training=False)
    model = DistilledDetector(detector("faster", num_classes=8))
    module = DetectionModule(model, half, val, val)
    evaluated = []
    module._average_precision.update = lambda found, targets: evaluated.extend(found)
    module.on_validation_epoch_end = lambda: None
    build_trainer(half, []).validate(module, verbose=False)
    with torch.no_grad():
        expected = model.eval()([val[number][0] for number in range(len(val))])
    assert len(evaluated) == len(val) and len(expected[0]["boxes"])
    for found, plain in zip(evaluated, expected, strict=True):
        assert all(torch.equal(found[key], plain[key]) for key in ("boxes", "labels", "scores"))
