"""LazyConfig students: the example is its YAML twin, trains, resumes, and evaluates alone."""

import json
import os

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import GeneralizedRCNN, build_model
from tiny import write_tiny_teacher

from kd_detectron import get_config
from kd_detectron.config import config_dir
from kd_detectron.engine.lazy import build, main, plain

EXAMPLE = config_dir() / "lazy" / "ckd_reviewkd_rcnn_r101_r18.py"

# The example, shrunk: the head sizes of the tiny models and random batches as data.
TINY = """
from detectron2.config import LazyCall as L, LazyConfig
from detectron2.evaluation import DatasetEvaluators
from detectron2.layers import ShapeSpec
from tiny import tiny_batch

cfg = LazyConfig.load({example!r})
model, optimizer, lr_multiplier, train = cfg.model, cfg.optimizer, cfg.lr_multiplier, cfg.train
model.backbone.bottom_up.freeze_at = 0
model.backbone.out_channels = 24
model.proposal_generator.head.in_channels = 24
model.roi_heads.num_classes = 3
model.roi_heads.box_head.input_shape = ShapeSpec(channels=24, height=7, width=7)
model.roi_heads.box_head.fc_dims = [40]
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=40)
model.teacher.config_file = {teacher!r}
model.teacher.weights = "none"
model.distillers[1].update(in_channels=[24] * 5, out_channels=[40] * 5, mid_channels=16)
optimizer.lr = 0.001
train.update(init_checkpoint="", max_iter=2, device="cpu", output_dir={output!r}, log_period=1)
train.checkpointer.period = 1
dataloader = dict(
    train=L(lambda: [tiny_batch(seed=seed) for seed in range(4)])(),
    test=L(lambda: [tiny_batch(seed=9)])(),
    evaluator=L(DatasetEvaluators)(evaluators=[]),
)
distillation_schedule = dict(WARMUP_ITERS=1, DECAY="none", STOP_ITER=0)
"""


@pytest.fixture
def config(tmp_path):
    """Writes the tiny LazyConfig; returns its path and the output folder."""
    path, output = tmp_path / "tiny_lazy.py", tmp_path / "run"
    teacher = write_tiny_teacher(tmp_path)
    path.write_text(TINY.format(example=str(EXAMPLE), teacher=teacher, output=str(output)))
    return str(path), output


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_trains_and_writes_the_student_alone(config):
    path, output = config
    assert main(["--config-file", path]) == 0
    first, second = metrics(output)[:2]
    assert first["loss_ckd"] > 0 and first["loss_reviewkd"] > 0 and first["loss_cls"] > 0
    assert (first["distillation_factor"], second["distillation_factor"]) == (0.5, 1.0)
    state = torch.load(output / "student_final.pth")["model"]
    cfg = LazyConfig.load(path)
    plain(cfg.model)
    cfg.model._target_ = GeneralizedRCNN
    instantiate(cfg.model).load_state_dict(state, strict=True)
    assert any("distillers." in x for x in torch.load(output / "model_final.pth")["model"])


def test_resume_goes_on_where_it_stopped(config):
    path, output = config
    assert main(["--config-file", path]) == 0
    assert main(["--config-file", path, "--resume", "train.max_iter=3"]) == 0
    assert [record["iteration"] for record in metrics(output) if "loss_ckd" in record] == [0, 1, 2]


def test_evaluation_builds_no_teacher(config, monkeypatch):
    path, _ = config
    monkeypatch.setattr(
        "kd_detectron.modeling.FrozenTeacher.from_name", lambda *a, **k: pytest.fail("built")
    )
    assert main(["--config-file", path, "--eval-only"]) == 0


def test_distillers_that_do_not_fit_are_refused(config, capsys):
    path, output = config
    opts = ["model.roi_heads.num_classes=4"]
    assert main(["--config-file", path, *opts]) == 2
    assert "NUM_CLASSES is 4 for the student and 3 for the teacher" in capsys.readouterr().err
    assert not os.path.isfile(output / "model_final.pth")


def test_example_is_its_yaml_twin():
    lazy_cfg = LazyConfig.load(str(EXAMPLE))
    yaml_cfg = get_config(f"{EXAMPLE.stem}.yaml", ["MODEL.DEVICE", "meta"])
    yaml_cfg.KD.TEACHER.WEIGHTS = lazy_cfg.model.teacher.weights = "none"
    lazy_cfg.train.device = "meta"
    with torch.device("meta"):
        lazy, yaml = build(lazy_cfg), build_model(yaml_cfg)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (lazy, yaml)]
    assert shapes[0] == shapes[1]
    trained = [{k for k, p in m.named_parameters() if p.requires_grad} for m in (lazy, yaml)]
    assert trained[0] == trained[1]
    assert lazy.distillation_weights == yaml.distillation_weights
    assert lazy.input_format == yaml.input_format == "RGB"
    assert lazy.teacher.name == yaml.teacher.name
    assert lazy_cfg.model.pixel_mean == list(yaml_cfg.MODEL.PIXEL_MEAN)
    assert lazy_cfg.model.pixel_std == list(yaml_cfg.MODEL.PIXEL_STD)
    assert lazy_cfg.train.init_checkpoint == yaml_cfg.MODEL.WEIGHTS
    assert lazy_cfg.train.max_iter == yaml_cfg.SOLVER.MAX_ITER
    assert lazy_cfg.optimizer.lr == yaml_cfg.SOLVER.BASE_LR
    assert lazy_cfg.dataloader.train.total_batch_size == yaml_cfg.SOLVER.IMS_PER_BATCH
