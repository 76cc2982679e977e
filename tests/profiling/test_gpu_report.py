"""``tools/gpu_report.py`` at a small size on the CPU: every part runs, and failures are named."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from kd_detectron.config import find_config
from kd_detectron.errors import ConfigError
from kd_detectron.profiling import gpu_report
from kd_detectron.profiling.gpu_command import main

SMALL = {"device": "cpu", "small": True}


def test_steps_are_checked_in_each_precision_and_refusals_are_no_failures():
    checks = {c["check"]: c["result"] for c in gpu_report.method_checks(**SMALL, methods=["KD"])}
    whats = ("fp32", "bf16", "the teacher's autocast")
    assert set(checks) == {
        *(f"{d}, KD, {what}" for d in ("Faster R-CNN", "Mask R-CNN") for what in whats),
        "RetinaNet, KD",
    }
    refused = checks.pop("RetinaNet, KD")
    assert set(checks.values()) == {"ok"}
    assert refused.startswith("does not apply: KD.DISTILLERS has 'KD'")


def test_unknown_method_is_refused():
    with pytest.raises(ConfigError, match="did you mean CKD"):
        list(gpu_report.method_checks(**SMALL, methods=["CKDD"]))


class BrokenModel(torch.nn.Module):
    """A detector one of whose losses has another name and is multiplied by a factor."""

    def __init__(self, factor, name="loss_kd"):
        super().__init__()
        self.factor, self.name = factor, name
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {"loss_cls": self.weight, self.name: self.weight * self.factor}


def test_loss_that_is_not_finite_fails_the_check():
    with pytest.raises(RuntimeError, match="not finite.*loss_kd"):
        gpu_report.distilled_step(BrokenModel(float("nan")), [], "fp32")


def test_step_without_distillation_fails_the_check():
    with pytest.raises(RuntimeError, match="no distillation loss among .*loss_cls"):
        gpu_report.distilled_step(BrokenModel(1.0, "loss_mask"), [], "fp32")


def test_step_that_changes_no_weight_fails_the_check():
    with pytest.raises(RuntimeError, match="changes no weight"):
        gpu_report.distilled_step(BrokenModel(-1.0), [], "fp32")


def test_failed_command_is_reported_with_its_last_line(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text(
        "import sys\ndef main(args): sys.exit(f'read\\nno {args}')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"exit code 1: no \['--now'\]"):
        gpu_report.run_command("fails", ["--now"])


def test_resumed_run_with_another_loss_scale_fails(tmp_path):
    def write(name, scale, weight):
        content = {
            "model": {"w": torch.full((2,), weight)},
            "trainer": {"_trainer": {"grad_scaler": {"scale": scale}}},
        }
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    whole = write("whole.pth", 65536.0, 1.0)
    gpu_report.compare_checkpoints(whole, write("same.pth", 65536.0, 1.0001))
    with pytest.raises(RuntimeError, match="loss scaler ends as"):
        gpu_report.compare_checkpoints(whole, write("scale.pth", 32768.0, 1.0))
    with pytest.raises(RuntimeError, match="weights 'w' differ"):
        gpu_report.compare_checkpoints(whole, write("weights.pth", 65536.0, 1.1))


def test_loss_scale_may_fall_for_some_steps_but_not_for_ever():
    model = BrokenModel(1e36)
    gpu_report.distilled_step(model, [], "fp16")
    assert model.weight.item() != 1
    with pytest.raises(RuntimeError, match="overflow float16 at a loss scale of 16"):
        gpu_report.distilled_step(BrokenModel(1e38), [], "fp16")


@pytest.mark.slow
def test_commands_train_resume_evaluate_and_export(tmp_path):
    def run_here(module, arguments):
        assert importlib.import_module(module).main(arguments) == 0

    checks = list(gpu_report.command_checks(str(tmp_path / "work"), **SMALL, run=run_here))
    results = {check["check"]: check["result"] for check in checks}
    assert results.pop("training, two processes").startswith(("ok", "skipped: this machine has"))
    assert len(results) == 8 and set(results.values()) == {"ok"}, results


def test_tables_and_teacher_variants_are_written_and_survive_a_config_that_fails(tmp_path, capsys):
    output = tmp_path / "reports" / "report.json"
    arguments = ["--parts", "tables", "teacher", "--repeats", "1", "--size", "64", "96"]
    arguments += ["--configs", "ckd_rcnn_r101_r18.yaml", "no_such.yaml", "--images", "1"]
    assert main([*arguments, "--output", str(output)]) == 0
    report = json.loads(output.read_text())
    measured, failed = report["tables"]
    assert measured["report"]["parts"]["distilled step"]["median"] > 0
    assert measured["report"]["memory"] == {}
    assert "no_such.yaml" in failed["failed"]
    assert all(row["seconds"] > 0 for row in report["teacher"])
    printed = capsys.readouterr().out
    assert "student step after the backbone" in printed and "small models on the CPU" in printed


WITHOUT_COMPILED_PART = """
import sys
sys.modules["detectron2._C"] = None  # The import fails, as where it was never built.
from kd_detectron.profiling import gpu_report
for check in gpu_report.method_checks(device="cpu", small=True, methods=["CKD"]):
    print(check["result"])
"""


@pytest.mark.slow
def test_steps_run_without_the_compiled_part_of_detectron2():
    command = [sys.executable, "-c", WITHOUT_COMPILED_PART]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = done.stdout.splitlines()
    assert results[:6] == ["ok"] * 6 and results[6].startswith("does not apply")


def test_configs_of_the_tables_exist():
    assert all(find_config(name) for name in gpu_report.TABLE_CONFIGS)
