"""Every method trains on real images: ten iterations on two of BCCD, its loss finite and falling.

Each step sees both images, never flipped: otherwise a loss would differ more from batch to batch
than training changes it.
"""

import json
import math
import os
from collections import defaultdict
from pathlib import Path

import pytest

from kd_detectron import get_config
from kd_detectron.distillers import DISTILLER_REGISTRY
from kd_detectron.engine.main import main
from kd_detectron.engine.train_loop import DistillationTrainLoop

# All but the one that compares masks, which BCCD does not have.
METHODS = sorted(
    name
    for name, cls in DISTILLER_REGISTRY
    if cls.__module__.startswith("kd_detectron.") and name != "MaskKD"
)
ITERATIONS = 10


@pytest.fixture(scope="module")
def two_images(tmp_path_factory):
    """Config options that train on the first two images with objects of all three classes."""
    bccd = Path(os.environ["KD_DETECTRON_TEST_DATA"]) / "bccd"
    content = json.loads((bccd / "train.json").read_text())
    classes = defaultdict(set)
    for annotation in content["annotations"]:
        classes[annotation["image_id"]].add(annotation["category_id"])
    content["images"] = [one for one in content["images"] if len(classes[one["id"]]) == 3][:2]
    kept = {one["id"] for one in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in kept]
    path = tmp_path_factory.mktemp("bccd") / "two_images.json"
    path.write_text(json.dumps(content))
    datasets = [["bccd_train", str(path), str(bccd / "images")]]
    return ("DATASETS.COCO_FORMAT", repr(datasets), "DATASETS.TEST", "()")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, two_images):
    """The BCCD teacher after a few iterations: random weights that fit the images and the labels.

    With untrained ones the detection losses and the imitation of its outputs would pull apart, and
    its maps would be hundreds of times as large as the student's.
    """
    output = tmp_path_factory.mktemp("teacher")
    run("bccd/teacher_r50.yaml", output, 40, two_images)
    return str(output / "model_final.pth")


def losses(output):
    lines = (output / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def train(output, images, teacher, distillers, iterations=ITERATIONS):
    # Ten times the weights: in so few iterations a random teacher's opinion must count beside the
    # detection losses, which at first pull away from it.
    weights = get_config("bccd/ckd_reviewkd_r18.yaml").KD
    stronger = [
        item
        for name in distillers
        for item in (f"KD.{name.upper()}.WEIGHT", 10.0 * weights[name.upper()].WEIGHT)
    ]
    run(
        "bccd/ckd_reviewkd_r18.yaml",
        output,
        iterations,
        (*images, "KD.DISTILLERS", repr(distillers), "KD.TEACHER.WEIGHTS", teacher, *stronger),
    )


def run(config, output, iterations, opts):
    opts = [
        *("MODEL.DEVICE", "cpu"),
        *("SOLVER.MAX_ITER", iterations),
        *("SOLVER.STEPS", "()"),
        *("SOLVER.WARMUP_ITERS", 5),
        *("SOLVER.IMS_PER_BATCH", 2),
        *("INPUT.MIN_SIZE_TRAIN", "(96,)"),
        *("INPUT.RANDOM_FLIP", "none"),
        *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
        *("TEST.EVAL_PERIOD", 0),
        *("OUTPUT_DIR", output),
        *opts,
    ]
    assert main(["--config-file", config, *map(str, opts)]) == 0


@pytest.fixture
def every_loss(monkeypatch):
    """The losses of every iteration, unsmoothed, as a list of dicts."""
    records = []
    write_metrics = DistillationTrainLoop._write_metrics

    def record(self, losses, *args, **kwargs):
        records.append({name: float(value) for name, value in losses.items()})
        write_metrics(self, losses, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainLoop, "_write_metrics", record)
    return records


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_with_finite_falling_losses(
    method, tmp_path, two_images, teacher, every_loss
):
    train(tmp_path / "run", two_images, teacher, [method])
    assert len(every_loss) == ITERATIONS
    assert all(math.isfinite(value) for record in every_loss for value in record.values())
    values = [record[f"loss_{method.lower()}"] for record in every_loss]
    assert values[-1] < values[0], values


def test_all_methods_at_once_train(tmp_path, two_images, teacher):
    train(tmp_path / "run", two_images, teacher, METHODS, iterations=1)
    record = losses(tmp_path / "run")[-1]
    assert {f"loss_{method.lower()}" for method in METHODS} <= set(record)
    assert all(math.isfinite(v) for k, v in record.items() if "loss" in k), record
