"""Losses and distillers are plain PyTorch: they run where Detectron2 is not installed."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import torch
import kd_detectron
from kd_detectron import losses
from kd_detectron.distillers import CKD, DISTILLER_REGISTRY, ReviewKD

logits = torch.randn(8, 4, requires_grad=True)
losses.ckd_loss(logits, torch.randn(8, 4)).backward()
assert logits.grad.abs().sum() > 0
fused = ReviewKD(in_channels=[8] * 2, out_channels=[8] * 2, mid_channels=8).fuse(
    [torch.randn(2, 8, 16, 16), torch.randn(2, 8, 8, 8)]
)
assert [tuple(f.shape[-2:]) for f in fused] == [(16, 16), (8, 8)]
assert len(list(DISTILLER_REGISTRY)) == 14 and sys.modules["detectron2"] is None
for name in (
    "ckd_loss kd_loss dkd_loss bickd_loss hcl_loss dcd_loss supcon_loss crd_loss".split()
):
    assert callable(getattr(losses, name)), name
try:
    from kd_detectron import get_config
except ImportError as error:
    assert "Detectron2, which is not installed" in str(error), error
else:
    raise AssertionError
print("ran")
"""


BLOCKER = Path(__file__).parent / "without_detectron2"


def python_without_detectron2(*arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(BLOCKER), *sys.path]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_losses_and_distillers_run_without_detectron2():
    done = python_without_detectron2("-c", PROGRAM)
    assert done.returncode == 0 and "ran" in done.stdout, done.stderr[-2000:]


def test_tests_that_need_detectron2_are_counted_and_not_run_without_it():
    files = ["test_config.py", "losses/test_contrastive.py"]
    paths = [str(Path(__file__).parent / file) for file in files]
    done = python_without_detectron2("-m", "pytest", "-q", *paths)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "passed" in done.stdout
    assert "which need Detectron2: it is not installed" in done.stdout.splitlines()[-1]
