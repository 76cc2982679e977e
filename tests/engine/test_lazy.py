"""LazyConfig students: the example is its YAML twin, trains, resumes, and evaluates alone.

Its checks are those of the YAML command; here, that they are made.
"""

import json
import os

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, build_model
from tiny import distilled_cfg, write_tiny_teacher

from kd_detectron import get_config
from kd_detectron.config import config_dir
from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.engine.lazy import (
    LazyTrainer,
    as_yaml,
    build,
    describe_model,
    main,
    plain,
)
from kd_detectron.engine.train_loop import DistillationTrainLoop
from kd_detectron.errors import ConfigError
from kd_detectron.preflight.classes import UNKNOWN_CLASSES

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


# Images of a registered dataset instead, as a user's own file has them; the classes are theirs.
DATA = """
import detectron2.data.transforms as T
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances

if "lazy_shapes" not in DatasetCatalog:
    register_coco_instances("lazy_shapes", {{}}, {json_file!r}, {images!r})
dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="lazy_shapes"),
        mapper=L(DatasetMapper)(
            is_train=True, augmentations=[L(T.RandomFlip)()], image_format="RGB"
        ),
        total_batch_size=2,
    )
)
model.roi_heads.num_classes = {classes}
model.teacher.opts = ["MODEL.ROI_HEADS.NUM_CLASSES", {classes}]
"""


ANCHORS = ["MODEL.ANCHOR_GENERATOR.SIZES", "[[32],[64],[128],[256],[512]]"]


@pytest.fixture
def config(tmp_path):
    """Writes the tiny LazyConfig; returns its path and the output folder."""
    path, output = tmp_path / "tiny_lazy.py", tmp_path / "run"
    teacher = write_tiny_teacher(tmp_path)
    path.write_text(TINY.format(example=str(EXAMPLE), teacher=teacher, output=str(output)))
    return str(path), output


@pytest.fixture
def config_with_data(config, tmp_path):
    """The same on images of a dataset; a folder's ``train.json`` lists them."""
    path, output = config
    data = make_synthetic(tmp_path / "data", 5, 1, image_size=(64, 64))
    files = {"json_file": str(data / "train.json"), "images": str(data / "train")}
    with open(path, "a", encoding="utf-8") as file:
        file.write(DATA.format(**files, classes=len(SYNTHETIC_CLASSES)))
    yield path, output
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop("lazy_shapes", None)


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
    result = json.loads((output / "result.json").read_text())
    assert result["finished"] and result["iterations"] == 2 and result["results"] == {}
    assert result["distillers"] == ["CKD", "ReviewKD"]
    assert result["teacher_parameters"] > 0


def test_export_of_a_run_on_a_gpu_is_for_any_machine(tmp_path, monkeypatch):
    model = {"weight": torch.ones(2), "distillers.CKD.weight": torch.ones(2)}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"model": model}, tmp_path / "model_final.pth")
    trainer = LazyTrainer.__new__(LazyTrainer)
    trainer.cfg = CfgNode({"OUTPUT_DIR": str(tmp_path)})
    trainer.export()
    monkeypatch.setattr(torch.serialization, "default_restore_location", only_cpu)
    state = torch.load(tmp_path / "student_final.pth", weights_only=True)
    assert list(state["model"]) == ["weight"] and list(state) == ["model"]


def only_cpu(storage, location):
    """Restores a tensor that was written from the CPU."""
    assert location == "cpu"
    return storage


def test_options_of_distributed_training_are_those_of_the_file(config, monkeypatch):
    path, output = config
    given = []
    monkeypatch.setattr(
        "kd_detectron.engine.trainer.create_ddp_model",
        lambda model, **options: given.append(options) or model,
    )
    opts = ["train.max_iter=1", "train.ddp.find_unused_parameters=True"]
    assert main(["--config-file", path, *opts]) == 0
    assert given[0]["find_unused_parameters"] is True


# Distillers of the FPN's maps, the RPN and the boxes, with a teacher of the same anchors and width.
OTHER_OUTPUTS = """
from kd_detectron.distillers import PKD, RPNKD, BoxKD

model.distillers = [
    L(PKD)(strides=[4, 8, 16, 32, 64]), L(RPNKD)(), L(BoxKD)(form="bounded")
]
model.distillation_weights = dict(PKD=0.5)
sizes = [[32], [64], [128], [256], [512]]
model.teacher.opts = ["MODEL.FPN.OUT_CHANNELS", 24, "MODEL.ANCHOR_GENERATOR.SIZES", sizes]
"""


def test_distillers_of_other_outputs_train_or_are_refused(config, capsys):
    path, output = config
    with open(path, "a", encoding="utf-8") as file:
        file.write(OTHER_OUTPUTS)
    assert main(["--config-file", path, "train.ema_decay=0.9", "train.seed=2"]) == 0
    first = metrics(output)[0]
    assert all(first[f"loss_{name}"] > 0 for name in ("pkd", "rpnkd", "boxkd"))
    assert json.loads((output / "result.json").read_text())["distillation_weights"]["PKD"] == 0.5
    for words, opt in (
        (["'RPNKD'", "set of anchors of p2"], "model.teacher.opts=[MODEL.FPN.OUT_CHANNELS,24]"),
        (["PKD", "compares the maps as they are"], f"model.teacher.opts={[*ANCHORS]}"),
    ):
        refused(capsys, path, [opt, f"train.output_dir={output}2"], words)


def test_weights_can_be_averaged(config):
    path, output = config
    assert main(["--config-file", path, "train.ema_decay=0.9", "train.max_iter=3"]) == 0
    final = torch.load(output / "model_final.pth")
    trained = final["trainer"]["hooks"]["WeightAverage"]["trained"]
    name = "roi_heads.box_predictor.cls_score.weight"
    assert not torch.equal(final["model"][name], trained[name])
    assert torch.equal(
        torch.load(output / "student_final.pth")["model"][name], final["model"][name]
    )


@pytest.mark.parametrize("earlier", [False, True], ids=["this version", "an earlier one"])
def test_resume_goes_on_where_it_stopped_with_the_random_seed_of_the_run(config, capsys, earlier):
    path, output = config
    assert main(["--config-file", path]) == 0
    final = torch.load(output / "model_final.pth")
    seed = final["trainer"]["seed"]
    if earlier:
        final["trainer"] |= final["trainer"].pop("_trainer")
        torch.save(final, output / "model_final.pth")
    assert main(["--config-file", path, "--resume", "train.max_iter=3"]) == 0
    assert [record["iteration"] for record in metrics(output) if "loss_ckd" in record] == [0, 1, 2]
    assert json.loads((output / "result.json").read_text())["seed"] == seed
    # A list is no loader that can be continued.
    assert "draws its batches anew" in capsys.readouterr().out


def interrupted(path, monkeypatch, iteration, opts=()):
    """Runs a config until an exception before this iteration."""
    run_step = DistillationTrainLoop.run_step

    def run_step_or_stop(self):
        if self.iter == iteration:
            raise InterruptedError
        run_step(self)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(DistillationTrainLoop, "run_step", run_step_or_stop)
        main(["--config-file", path, *opts])


def test_resumed_run_equals_the_uninterrupted_one(config_with_data, monkeypatch, tmp_path):
    path, output = config_with_data
    opts = ["train.seed=5", "train.max_iter=3", "train.checkpointer.period=2"]
    straight = tmp_path / "straight"
    assert main(["--config-file", path, *opts, f"train.output_dir={straight}"]) == 0
    interrupted(path, monkeypatch, 2, opts)
    assert main(["--config-file", path, "--resume", *opts]) == 0
    actual, expected = (torch.load(x / "model_final.pth") for x in (output, straight))
    for name, tensor in expected["model"].items():
        assert torch.equal(actual["model"][name], tensor), name
    iterations = [record["iteration"] for record in metrics(output) if "loss_ckd" in record]
    assert iterations == [0, 1, 2]


def test_learning_rate_can_be_changed_over_a_resume(config_with_data, monkeypatch):
    path, output = config_with_data
    opts = ["train.max_iter=3", "train.checkpointer.period=1"]
    interrupted(path, monkeypatch, 2, opts)
    rate = LazyConfig.load(path).optimizer.lr / 8
    assert main(["--config-file", path, "--resume", *opts, f"optimizer.lr={rate}"]) == 0
    rates = {record["iteration"]: record["lr"] for record in metrics(output) if "lr" in record}
    multiplier = instantiate(LazyConfig.load(path).lr_multiplier)
    assert rates[2] == pytest.approx(rate * multiplier(2 / 3))


def test_evaluation_builds_no_teacher_and_leaves_the_runs_config(config, monkeypatch):
    path, output = config
    output.mkdir()
    (output / "config.yaml").write_text("model: {distillers: []}\n")
    monkeypatch.setattr(
        "kd_detectron.modeling.FrozenTeacher.from_name", lambda *a, **k: pytest.fail("built")
    )
    assert main(["--config-file", path, "--eval-only"]) == 0
    assert (output / "config.yaml").read_text() == "model: {distillers: []}\n"


def refused(capsys, path, opts, words):
    """Exit code 2 and one sentence in which all of these words are."""
    assert main(["--config-file", path, *opts]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    for word in ["error: ", *words]:
        assert word in last, last


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["train"], ["'train'", "key=value"]),
        (["optimzer.lr=0.1"], ["optimzer.lr", "did you mean optimizer"]),
        (["modl=1"], ["modl", "did you mean model"]),
        (
            ["model.distillers.1.out_channels=[40,40,40,40,32]"],
            ["of ReviewKD is (", "teacher's [40, 40, 40, 40, 40]", "set the arguments"],
        ),
        (["model.distillers.1.in_channels=[24,24,24,24]"], ["cannot be built (ValueError: "]),
        (["model.distillation_weights.ckd=0.1"], ["names 'ckd'", "did you mean CKD"]),
        (
            ["distillation_schedule.DECAI=linear"],
            ["KD.SCHEDULE.DECAI", "did you mean KD.SCHEDULE.DECAY"],
        ),
        (["train.amp.enabled=True"], ["SOLVER.AMP.PRECISION is 'fp16'", "cpu"]),
        (
            ["dataloader.train.mapper.image_format=BGR"],
            ["dataloader.train.mapper.image_format is BGR but model.input_format is RGB"],
        ),
        (
            ["dataloader.train.dataset.names=lazy_shape"],
            ["'lazy_shape'", "lazy_shapes?", "DATASETS.TRAIN"],
        ),
        (
            ["model.roi_heads.num_classes=9", "model.teacher.opts.1=9"],
            ["lazy_shapes", "NUM_CLASSES is 9"],
        ),
        (
            ["dataloader.train.total_batch_size=0"],
            ["IMS_PER_BATCH is 0 for 1 processes"],
        ),
    ],
)
def test_wrong_input_is_refused(config_with_data, capsys, opts, words):
    path, output = config_with_data
    refused(capsys, path, opts, words)
    assert not os.path.isfile(output / "last_checkpoint")


def test_pixel_statistics_corrupt_and_missing_images_are_looked_at(
    config_with_data, capsys, tmp_path
):
    path, _ = config_with_data
    images = sorted((tmp_path / "data" / "train").iterdir())
    for image in images:
        image.write_bytes(b"no image")
    assert main(["--config-file", path, "model.pixel_mean=[0.485,0.456,0.406]"]) == 1
    said = capsys.readouterr()
    assert "MODEL.PIXEL_MEAN [0.485, 0.456, 0.406] and" in said.out
    assert "cannot use image" in said.err
    images[0].unlink()
    words = ["'lazy_shapes'", "1 of 5 images", images[0].name]
    refused(capsys, path, [], words)


def test_classes_of_the_teacher_in_another_order_are_refused(config_with_data, capsys, tmp_path):
    path, _ = config_with_data
    content = json.loads((tmp_path / "data" / "train.json").read_text())
    for category in content["categories"]:
        category["id"] = len(SYNTHETIC_CLASSES) + 1 - category["id"]
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    entry = [["theirs", str(tmp_path / "theirs.json"), "images"]]
    write_tiny_teacher(tmp_path, ["DATASETS.COCO_FORMAT", entry, "DATASETS.TRAIN", ("theirs",)])
    words = ["class 0 is 'disc'", f"'{SYNTHETIC_CLASSES[-1]}'"]
    refused(capsys, path, [], words)


def test_folder_that_holds_another_run_is_refused(config, capsys, tmp_path):
    path, output = config
    assert main(["--config-file", path, "train.max_iter=1"]) == 0
    refused(capsys, path, [], ["OUTPUT_DIR", "already holds a run", "--resume"])
    before = (output / "config.yaml").read_text()
    opts = ["--resume", "model.roi_heads.box_head.fc_dims=[48]", "optimizer.lr=0.1"]
    words = ["model.roi_heads.box_head.fc_dims was [40] and is [48]", "another run"]
    refused(capsys, path, opts, words)
    words = ["model.roi_heads.score_thresh was absent and is 0.5"]
    refused(capsys, path, ["--resume", "model.roi_heads.score_thresh=0.5"], words)
    assert (output / "config.yaml").read_text() == before
    (output / "config.yaml").write_text(distilled_cfg(tmp_path).dump())
    refused(capsys, path, ["--resume"], ["the other kind of config"])
    (output / "config.yaml").write_text(before)
    opts = ["--resume", "train.max_iter=2", "model.distillation_weights.CKD=0.2"]
    assert main(["--config-file", path, *opts]) == 0
    assert "model.distillation_weights.CKD was 0.1 and is 0.2" in capsys.readouterr().out


def test_file_that_is_no_lazy_config_is_refused(config, capsys, tmp_path):
    for name, text, words in (
        ("broken.py", "model = ", ["cannot be read", "SyntaxError"]),
        ("part.py", "model = dict(a=1)", ["defines no 'dataloader'"]),
        ("no_lazy.yaml", "a: !!python/object/apply:os.abort []", ["a .py file", "train_net.py"]),
    ):
        (tmp_path / name).write_text(text)
        refused(capsys, str(tmp_path / name), [], words)
    with pytest.raises(ConfigError, match="cannot be read"):
        main(["--config-file", str(tmp_path / "broken.py"), "--debug"])


def test_model_that_tells_nothing_of_itself_is_no_error():
    model = torch.nn.Linear(1, 1)
    describe_model(yaml_view := as_yaml(LazyConfig.load(str(EXAMPLE))), model)
    assert yaml_view.MODEL.ROI_HEADS.NUM_CLASSES == UNKNOWN_CLASSES
    assert (
        not yaml_view.MODEL.MASK_ON
        and not yaml_view.MODEL.KEYPOINT_ON
        and not yaml_view.KD.DISTILLERS
    )


def test_distillers_that_do_not_fit_are_refused(config, capsys):
    path, output = config
    opts = ["model.roi_heads.num_classes=4"]
    assert main(["--config-file", path, *opts]) == 2
    said = capsys.readouterr().err
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 4 for the student and 3 for the teacher" in said
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
