"""VIS_PERIOD: pictures in the event storage, and a training that does not notice them."""

import random
import re

import cv2
import numpy as np
import pytest
import torch
import torchvision
from coco_files import coco_content, write_coco_files
from detectron2.modeling import build_model
from detectron2.utils import comm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import NUM_CLASSES, distilled_cfg, write_tiny_teacher
from torchvision.models.feature_extraction import create_feature_extractor

from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.engine import DistillationTrainer
from kd_detectron.engine.pictures import (
    FEATURES,
    PREDICTIONS,
    TrainingPictures,
    eval_without_side_effects,
)

PROPOSALS = "Left: GT bounding boxes;  Right: Predicted proposals"


@pytest.fixture
def picture_cfg(tmp_path):
    """Returns a function that gives the config of a tiny run with a teacher that has weights."""
    classes = [f"kind {index}" for index in range(NUM_CLASSES)]
    content = coco_content(4, size=(64, 96), turned=False, classes=classes, box=(8, 8, 40, 32))
    dataset = write_coco_files(tmp_path / "pictures", content)

    def make(output, opts=(), teacher_opts=()):
        cfg = distilled_cfg(
            tmp_path,
            opts=[
                *("DATASETS.COCO_FORMAT", [dataset]),
                *("DATASETS.TRAIN", (dataset[0],), "DATASETS.TEST", ()),
                *("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 100),
                *("OUTPUT_DIR", str(tmp_path / output)),
                *opts,
            ],
        )
        teacher = tmp_path / output / "teacher"
        teacher.mkdir(parents=True)
        cfg.KD.TEACHER.CONFIG_FILE = write_tiny_teacher(teacher, list(teacher_opts))
        teacher_cfg = cfg.clone()
        teacher_cfg.merge_from_file(cfg.KD.TEACHER.CONFIG_FILE)
        torch.manual_seed(1)
        torch.save({"model": build_model(teacher_cfg).state_dict()}, teacher / "model.pth")
        cfg.KD.TEACHER.WEIGHTS = str(teacher / "model.pth")
        register_coco_format(cfg)
        return cfg

    return make


def train(cfg):
    torch.manual_seed(0)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer.model


def pictures(cfg):
    events = EventAccumulator(cfg.OUTPUT_DIR, size_guidance={"images": 0}).Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


def test_pictures_reach_tensorboard_and_training_is_the_same_bit_for_bit(picture_cfg):
    # The same FPN width, so that the features compare; Detectron2's own pictures come as well.
    same_levels = ["MODEL.FPN.OUT_CHANNELS", 32]
    seen = picture_cfg("seen", ["VIS_PERIOD", 2], same_levels)
    unseen = picture_cfg("unseen", [], same_levels)
    with_pictures, without = train(seen), train(unseen)
    found = pictures(seen)
    assert set(found) == {PREDICTIONS, FEATURES, PROPOSALS} and pictures(unseen) == {}
    for tag, images in found.items():
        assert [image.step for image in images] == [0], tag
        pixels = np.frombuffer(images[0].encoded_image_string, dtype=np.uint8)
        assert cv2.imdecode(pixels, cv2.IMREAD_COLOR).std() > 0
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_pictures.state_dict()[name]), name


class Trainer:
    """As much of a trainer as the hook reads."""

    def __init__(self, iteration):
        self.iter = iteration


def test_pictures_come_every_vis_period_iterations(picture_cfg, monkeypatch):
    cfg = picture_cfg("run", ["VIS_PERIOD", 3])
    hook, drawn = TrainingPictures(cfg, build_model(cfg)), []
    monkeypatch.setattr(hook, "_draw", lambda: drawn.append(hook.trainer.iter))
    for iteration in range(8):
        hook.trainer = Trainer(iteration)
        hook.after_step()
    assert drawn == [0, 3, 6]


@pytest.mark.parametrize(
    ("student_opts", "teacher_opts", "shown", "warning"),
    [
        # 40 channels against 32.
        ([], [], {"teacher R18", "student"}, "no feature difference is drawn: level p2"),
        (
            ["KD.DISTILLERS", ["ReviewKD"]],
            ["MODEL.ROI_HEADS.NUM_CLASSES", 7, "MODEL.FPN.OUT_CHANNELS", 32],
            {"student"},
            "the teacher's detections are not drawn: .*7 classes",
        ),
        (["KD.ENABLED", False], [], {"student"}, None),
    ],
    ids=["other levels", "other classes", "no teacher"],
)
def test_what_cannot_be_drawn_is_left_out_with_a_reason(
    picture_cfg, caplog, student_opts, teacher_opts, shown, warning
):
    cfg = picture_cfg("run", ["VIS_PERIOD", 1, *student_opts], teacher_opts)
    hook = TrainingPictures(cfg, build_model(cfg))
    hook.before_train()
    assert {model.label for model in hook._shown_models} == shown
    assert (hook._teacher_outputs is None) == (warning is None or "difference" in warning)
    warnings = [record.getMessage() for record in caplog.records if "VIS_" in record.getMessage()]
    assert len(warnings) == (warning is not None)
    assert all(re.search(warning, text) for text in warnings)


def test_only_the_main_process_draws(picture_cfg, monkeypatch):
    trainer = DistillationTrainer(picture_cfg("run", ["VIS_PERIOD", 1]))
    assert any(isinstance(hook, TrainingPictures) for hook in trainer.build_hooks())
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert not any(isinstance(hook, TrainingPictures) for hook in trainer.build_hooks())


def test_modes_and_random_states_are_put_back():
    network = torchvision.models.mobilenet_v3_small()
    # Its graphs for training and evaluation differ; they are exchanged by train() and eval().
    model = torch.nn.Sequential(create_feature_extractor(network, ["features.1"]), network)
    model.train()
    model[1].features.eval()
    modes = [module.training for module in model.modules()]
    graph = model[0].graph
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with eval_without_side_effects(model):
        assert not any(module.training for module in model.modules())
        assert model[0].graph is not graph
        random.random(), np.random.rand(), torch.rand(1)
    assert [module.training for module in model.modules()] == modes
    assert model[0].graph is graph
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
