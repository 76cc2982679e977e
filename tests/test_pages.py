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
from kd_detectron.checkpoint.export_command import main as export

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

TRAIN = """
import sys
sys.path.insert(0, sys.argv[1])
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from kd_detectron.commands import import_user_code
from kd_detectron.errors import ConfigError
from tiny import tiny_batch
import_user_code("hint.py")
from kd_detectron.config import get_config
opts = ["KD.DISTILLERS", ["Hint", "CKD"]]
model = build_model(get_config("run.yaml", opts))
print(model.distillers["Hint"].level, model.distillation_weights["Hint"])
model = build_model(get_config("run.yaml", [*opts, "KD.HINT.LEVEL", "p4", "KD.HINT.WEIGHT", 0.2]))
print(model.distillers["Hint"].level, model.distillation_weights["Hint"])
with EventStorage():
    losses = model.train()(tiny_batch())
sum(losses.values()).backward()
assert model.distillers["Hint"].adapter.weight.grad.abs().sum() > 0
print("loss_ckd" in losses, "loss_hint" in losses)
try:
    build_model(get_config("run.yaml", [*opts, "KD.HINT.LEVEL", "p9"]))
except ConfigError as error:
    print(error)
"""


def test_method_of_the_page_trains_has_its_options_as_keys_and_refuses_a_wrong_one(tmp_path):
    (tmp_path / "hint.py").write_text(code("own_distiller.md", "class Hint"))
    (tmp_path / "run.yaml").write_text(distilled_cfg(tmp_path, ["CKD"]).dump())
    command = [sys.executable, "-c", TRAIN, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-4:] == [
        "p3 0.5",
        "p4 0.2",
        "True True",
        "KD.HINT.LEVEL is 'p9'; the student has p2, p3, p4, p5, p6",
    ]


# ---- docs/differences.md ----


def test_program_of_the_differences_page_prints_the_cosines_that_the_page_states(capsys):
    exec(code("differences.md", "columns_first"), {})
    printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    page = " ".join((DOCS / "differences.md").read_text("utf-8").split())
    stated = re.search(r"cosine is ([\d.]+) at scale 1, ([\d.]+) at 5 and ([\d.]+) at 10", page)
    assert printed == pytest.approx([float(number) for number in stated.groups()], abs=0.002)
