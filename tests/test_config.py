"""Configs: every file loads, resolves its teacher and builds; mistakes are answered plainly."""

import inspect
import os

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import GeneralizedRCNN, build_model
from tiny import MAIN_ROWS, distilled_cfg

from kd_detectron import add_kd_config, get_config
from kd_detectron.config import config_dir, find_config, list_configs
from kd_detectron.distillers import DISTILLER_REGISTRY, Distiller
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling import DistilledRCNN

BUILT_IN = {
    name: cls for name, cls in DISTILLER_REGISTRY if cls.__module__.startswith("kd_detectron.")
}


def test_the_24_rows_of_the_main_job_are_there():
    assert len(MAIN_ROWS) == 24 and set(MAIN_ROWS) <= set(list_configs())


@pytest.mark.parametrize("name", list_configs())
def test_every_config_builds_with_its_teacher(name):
    # On the meta device shapes are real and memory is not: seconds for all of them.
    cfg = get_config(name, ["MODEL.DEVICE", "meta", "KD.TEACHER.WEIGHTS", "none"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    if name.startswith("baseline"):
        assert not hasattr(model, "teacher")
        return
    assert set(model.distillers) == set(cfg.KD.DISTILLERS) and model.distillers
    if isinstance(model, DistilledRCNN):
        assert isinstance(model, GeneralizedRCNN)
    resnet_101 = 42e6
    parameters = model.teacher.num_parameters
    assert parameters > resnet_101 if "r101" in name else parameters > 25e6


@pytest.mark.parametrize("name", list_configs())
def test_teacher_of_every_config_is_in_the_model_zoo(name):
    from detectron2 import model_zoo

    teacher = get_config(name).KD.TEACHER.CONFIG_FILE
    if not name.startswith("baseline"):
        assert model_zoo.get_checkpoint_url(teacher).endswith(".pkl")


@pytest.mark.parametrize("name", list_configs())
def test_channel_order_mean_and_std_of_every_student_agree(name):
    cfg = get_config(name)
    mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    if cfg.MODEL.WEIGHTS.startswith("torchvision://"):
        assert cfg.INPUT.FORMAT == "RGB"
        assert mean == [123.675, 116.28, 103.53] and std == [58.395, 57.12, 57.375]
    else:
        assert "ImageNetPretrained/MSRA" in cfg.MODEL.WEIGHTS and cfg.INPUT.FORMAT == "BGR"
        assert mean == [103.53, 116.28, 123.675] and std == [1.0, 1.0, 1.0]


def test_leaves_are_short():
    for name in list_configs():
        lines = (config_dir() / name).read_text().splitlines()
        assert len(lines) <= 9, name


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_config_node_and_constructor_have_the_same_defaults(name):
    cfg = get_cfg()
    add_kd_config(cfg)
    node = {key.lower(): value for key, value in cfg.KD[name.upper()].items()}
    assert node.pop("weight") >= 0
    cls = BUILT_IN[name]
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(cls.__init__).parameters.items()
        # in_channels, out_channels and the like come from the two models, not from the config.
        if key != "self" and not key.endswith("_channels") or key == "mid_channels"
    }
    assert node == defaults


def test_a_distiller_from_elsewhere_needs_no_edit_of_ours(tmp_path):
    @DISTILLER_REGISTRY.register()
    class Scaled(Distiller):
        requires = frozenset({"logits"})

        def __init__(self, factor=1.0):
            super().__init__()
            self.factor = factor

        def forward(self, context):
            return {"loss_scaled": context.student.logits.square().mean() * self.factor}

    try:
        cfg = distilled_cfg(tmp_path, ["Scaled", "CKD"])
        cfg.KD.OPTIONS.Scaled = CfgNode({"WEIGHT": 2.5, "FACTOR": 3.0})
        model = build_model(cfg)
        assert model.distillation_weights == {"Scaled": 2.5, "CKD": 0.1}
        assert model.distillers["Scaled"].factor == 3.0
        cfg.KD.OPTIONS.Scaled = CfgNode({"FACTR": 3.0})
        with pytest.raises(ConfigError, match="FACTR; did you mean FACTOR"):
            build_model(cfg)
    finally:
        DISTILLER_REGISTRY._obj_map.pop("Scaled")


def test_configs_are_found_by_bare_name_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert os.path.isfile(find_config("ckd_rcnn_r101_r18.yaml"))
    assert find_config("ckd_rcnn_r101_r18") == find_config("ckd_rcnn_r101_r18.yaml")
    own = tmp_path / "own.yaml"
    own.write_text("VERSION: 2\n")
    assert find_config(str(own)) == str(own)


@pytest.mark.parametrize(
    ("name", "opts", "words"),
    [
        ("ckd_rcnn_r101_r81.yaml", [], ["ckd_rcnn_r101_r18.yaml", "did you mean"]),
        ("/home/me/ckd_rcnn_r101_r81.yaml", [], ["ckd_rcnn_r101_r18.yaml", "did you mean"]),
        ("bccd/small_ckd_r18.yaml", [], ["bccd/small_ckd_reviewkd_r18.yaml", "did you mean"]),
        ("", [], ["--config-file", "ckd_rcnn_r101_r18.yaml"]),
        ("ckd_rcnn_r101_r18.yaml", ["KD.CKD.TEMPRATURE", 1], ["KD.CKD.TEMPERATURE"]),
        ("ckd_rcnn_r101_r18.yaml", ["KD.CKD.TEMPERATURE", "warm"], ["KD.CKD.TEMPERATURE", "warm"]),
        ("ckd_rcnn_r101_r18.yaml", ["KD.CKD.TEMPERATURE"], ["pairs"]),
    ],
)
def test_mistakes_are_answered_with_the_key_and_the_near_names(name, opts, words):
    with pytest.raises(ConfigError) as error:
        get_config(name, opts)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_error_with_no_near_name_does_not_list_hundreds():
    few = did_you_mean("zzz", ["b", "a"])
    assert few == "; known: a, b"
    many = did_you_mean("zzz", [f"name {number:03}" for number in range(140)])
    assert many.endswith("name 011, ... (140 in all)") and "name 012" not in many


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('_BASE_: "ckd_rcnn_r101_r18.yaml"', ["_BASE_", "is a path", "write '", "_r101_r18.yaml"]),
        ('_BASE_: "gone.yaml"', ["gone.yaml", "does not exist", "is a path"]),
        ("MODEL: {META: [}", ["own.yaml is not readable YAML (line 1", "correct the file"]),
        ("MODEL: 1\n MASK_ON: True", ["own.yaml is not readable YAML (line 2"]),
        ("just text", ["own.yaml", "KEY: VALUE"]),
        ("- MODEL", ["own.yaml", "KEY: VALUE"]),
        ("MODEL: 3", ["own.yaml", "KEY: VALUE"]),
        ("# nothing yet", ["own.yaml", "KEY: VALUE"]),
    ],
)
def test_config_file_that_cannot_be_read_is_answered_in_a_sentence(tmp_path, text, words):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        get_config(str(tmp_path / "own.yaml"))
    for word in words:
        assert word in str(error.value), str(error.value)
