"""Averages over processes, and over accumulated batches, are the gradients of the large batch.

Compared on every parameter of student and distillers, with nothing left to chance: every anchor and
proposal is sampled and each image has as many of them. Two things are not averages over images, by
definition, and are left out: CKD, which contrasts the proposals of one batch with each other, and
statistics of batch normalisation in training, which each process and each batch has of its own
(here: frozen in the student, running statistics in ReviewKD).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_process import load_script
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import distilled_cfg, tiny_batch
from torch import nn

from kd_detectron.engine.train_loop import DistillationTrainLoop
from kd_detectron.modeling import DistilledRCNN

SCRIPT = Path(__file__).with_name("two_processes.py")
AVERAGES = ["ReviewKD", "KD", "DKD", "FitNet"]


two_processes = load_script(SCRIPT, "two_processes")


def cfg_without_chance(tmp_path):
    return distilled_cfg(
        tmp_path,
        AVERAGES,
        [
            *("MODEL.RESNETS.NORM", "FrozenBN"),
            *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 12),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4096),
            # A random teacher's features are large: no loss shall drown the others.
            *("KD.FITNET.WEIGHT", 1e-5, "KD.REVIEWKD.WEIGHT", 1e-5),
        ],
    )


def two_alike_images():
    return tiny_batch(sizes=((64, 96), (64, 96)), boxes_per_image=(2, 2))


def built(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


def run_steps(model, batches, **options):
    """One iteration of the train loop on these batches; gradients are left in the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loop = DistillationTrainLoop(
        model, batches, optimizer, accumulate_steps=len(batches), **options
    )
    if isinstance(model, DistilledRCNN):
        two_processes.make_comparable(model)
    loop.iter = 0
    with EventStorage() as loop.storage:
        loop.run_step()
        return {name: value for name, (value, _) in loop.storage.latest().items()}


def assert_same_gradients(actual, expected):
    """Equal up to rounding.

    Batches of other shapes round differently. Now and then a value near 0 then falls on the other
    side of a ReLU, which shows in the gradients of a few layers.
    """
    assert set(actual) == set(expected)
    assert all(gradient.norm() > 0 for gradient in expected.values())
    errors = {
        name: ((actual[name] - gradient).norm() / gradient.norm()).item()
        for name, gradient in expected.items()
    }
    assert max(errors.values()) < 1e-2, errors
    assert sum(error < 1e-4 for error in errors.values()) >= 0.9 * len(errors), errors


def test_two_processes_give_the_gradients_of_one_on_the_union_of_their_batches(tmp_path):
    cfg, batch = cfg_without_chance(tmp_path), two_alike_images()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save(batch, tmp_path / "batch.pt")
    paths = [str(tmp_path / "config.yaml"), str(tmp_path / "batch.pt"), str(tmp_path)]
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *paths]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(rank), "2"], env=environment) for rank in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    model = built(cfg)
    two_processes.make_comparable(model)
    with EventStorage():
        sum(model(batch).values()).backward()
    expected = two_processes.gradients(model)
    assert any(name.startswith("distillers.ReviewKD.fusions.0.output") for name in expected)
    for result in results:
        assert_same_gradients(result["gradients"], expected)

    # The teacher is neither broadcast (each process kept its own mark) nor reduced.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for rank, result in enumerate(results):
        assert result["exchanged"] == trained
        assert result["mark"] == rank
        assert result["teacher"][0] == result["teacher"][1]
    assert results[0]["teacher"] != results[1]["teacher"]


def test_accumulated_gradients_and_losses_equal_the_large_batch(tmp_path):
    cfg, batch = cfg_without_chance(tmp_path), two_alike_images()
    large, small = built(cfg), built(cfg)
    expected = run_steps(large, [batch])
    actual = run_steps(small, [[image] for image in batch])
    assert_same_gradients(two_processes.gradients(small), two_processes.gradients(large))
    losses = [name for name in expected if "loss" in name]
    assert len(losses) == 4 + len(AVERAGES) + 1  # the detector's, the distillers', the total
    for name in losses:
        assert actual[name] == pytest.approx(expected[name], rel=1e-4), name


class MeanSquare(nn.Module):
    """A toy detector: its loss is a mean over the images of a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4)

    def forward(self, batch):
        output = self.layer(torch.stack([x["image"] for x in batch]))
        self.dtype = output.dtype
        return {"loss": output.float().square().mean()}


def test_accumulation_under_autocast_equals_the_large_batch():
    pixels = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    images = [{"image": image} for image in pixels]
    large, small = MeanSquare(), MeanSquare()
    run_steps(large, [images], amp_dtype=torch.bfloat16)
    run_steps(small, [images[:2], images[2:]], amp_dtype=torch.bfloat16)
    assert large.dtype == small.dtype == torch.bfloat16
    torch.testing.assert_close(small.layer.weight.grad, large.layer.weight.grad, rtol=0, atol=0.01)
