"""The programs on the pages of docs/ do what the pages say."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import build_model
from PIL import Image
from tiny import distilled_cfg, tiny_cfg

from kd_detectron.checkpoint import DistillationCheckpointer
from kd_detectron.checkpoint.traced_export import main as export

DOCS = Path(__file__).resolve().parents[1] / "docs"


def code(page: str, containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return found


# ---- docs/export.md ----


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("form", "suffix", "channels", "masks"),
    [("onnx", "onnx", "RGB", False), ("torchscript", "ts", "BGR", True)],
)
def test_program_of_the_export_page_finds_what_the_predictor_finds(
    tmp_path, picture, form, suffix, channels, masks
):
    torch.manual_seed(0)
    cfg = tiny_cfg(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "INPUT.FORMAT", channels])
    cfg.MODEL.MASK_ON = masks
    # The longer side decides: 150 x 100 becomes 90 x 60.
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 90
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if "cls_score" in name:  # Scores that differ, some of them high.
            torch.nn.init.normal_(parameter, std=5)
    DistillationCheckpointer(model, str(tmp_path)).save("model_final")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    checkpoint, exported = str(tmp_path / "model_final.pth"), str(tmp_path / f"student.{suffix}")
    assert export([checkpoint, exported, "--format", form, "--image", picture]) == 0

    (tmp_path / "detect.py").write_text(code("export.md", "onnxruntime"))
    command = [sys.executable, "detect.py", exported, "config.yaml", picture]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = [line.split() for line in done.stdout.splitlines()]

    cfg.MODEL.WEIGHTS = checkpoint
    pixels = np.asarray(Image.open(picture))[:, :, ::-1]  # The predictor takes BGR.
    expected = DefaultPredictor(cfg)(pixels)["instances"]
    expected = expected[expected.scores > 0.501]
    assert len(expected) > 0
    found = np.array([[float(value) for value in line] for line in printed])
    for box, label, score in zip(
        expected.pred_boxes.tensor.numpy(), expected.pred_classes, expected.scores, strict=True
    ):
        same = (found[:, 0] == int(label)) & (abs(found[:, 1] - float(score)) < 0.002)
        assert (abs(found[same, 2:] - box) < 0.5).all(axis=1).any(), (label, score, box)


def test_mask_of_the_export_page_is_detectron2s():
    space = {}
    exec(code("export.md", "whole_mask"), space)
    ys, xs = np.mgrid[:28, :28]
    probabilities = np.exp(-((ys - 10) ** 2 + (xs - 16) ** 2) / 100).astype("float32")
    box = [20.3, 11.8, 75.9, 60.1]
    mask = space["whole_mask"](probabilities, box, 96, 64)
    expected = paste_masks_in_image(
        torch.from_numpy(probabilities)[None], torch.tensor([box]), (64, 96), threshold=0.5
    )[0].numpy()
    assert mask.shape == (64, 96)
    assert (mask & expected).sum() / (mask | expected).sum() > 0.9


# ---- docs/own_distiller.md ----

TRAIN_ONE_STEP = """
import sys
sys.path.insert(0, sys.argv[1])
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from kd_detectron.commands import import_user_code
from tiny import tiny_batch
import_user_code("hint.py")
from kd_detectron.config import get_config
model = build_model(get_config("run.yaml", ["KD.DISTILLERS", ["Hint", "CKD"], *sys.argv[2:]]))
with EventStorage():
    losses = model.train()(tiny_batch())
sum(losses.values()).backward()
distiller = model.distillers["Hint"]
assert distiller.adapter.weight.grad.abs().sum() > 0
assert any(name.startswith("distillers.") for name in model.state_dict())
print(sorted(losses), distiller.level, model.distillation_weights["Hint"])
"""


def run_hint(folder, *opts):
    (folder / "hint.py").write_text(code("own_distiller.md", "class Hint"))
    (folder / "run.yaml").write_text(distilled_cfg(folder, ["CKD"]).dump())
    command = [sys.executable, "-c", TRAIN_ONE_STEP, str(Path(__file__).parent), *opts]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_method_of_the_page_trains_with_its_options_from_the_command_line(tmp_path):
    done = run_hint(tmp_path, "KD.HINT.LEVEL", "p4", "KD.HINT.WEIGHT", "0.2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss_hint" in done.stdout and "loss_ckd" in done.stdout
    assert done.stdout.endswith(" p4 0.2\n")


def test_method_of_the_page_has_its_default_weight_and_refuses_an_unknown_level(tmp_path):
    assert run_hint(tmp_path).stdout.endswith(" p3 0.5\n")
    assert (
        "KD.HINT.LEVEL is 'p9'; the student has p2, p3"
        in run_hint(tmp_path, "KD.HINT.LEVEL", "p9").stderr
    )
