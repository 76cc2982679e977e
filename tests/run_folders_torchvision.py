"""A tiny synthetic data set, and options of trainings on it that take a second per step."""

import pytest

from kd_detectron.data.synthetic import make_synthetic
from kd_detectron.torchvision.options import TrainingOptions

SMALL = {
    "min_size": 64,
    "max_size": 64,
    "out_channels": 16,
    "anchor_sizes": [8, 16, 32, 64, 96],
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
    "network": {"width_mult": 0.25},
}


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    return make_synthetic(tmp_path_factory.mktemp("synthetic") / "data", 8, 2, image_size=(64, 64))


def options(data, output, **more) -> TrainingOptions:
    values = {
        "output": str(output),
        "train": (str(data / "train.json"), str(data / "train")),
        "val": (str(data / "val.json"), str(data / "val")),
        "student": "fasterrcnn_mobilenet_v2_fpn",
        "student_options": SMALL,
        "iterations": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "warmup": 2,
        "eval_period": 3,
        "checkpoint_period": 2,
        "log_period": 2,
        "workers": 0,
        "accelerator": "cpu",
        "devices": "1",
    }
    return TrainingOptions(**values | more)
