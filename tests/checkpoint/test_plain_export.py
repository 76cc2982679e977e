"""The exported student is an ordinary Detectron2 model, without this project."""

import json
import os
import subprocess
import sys

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from tiny import distilled_cfg, tiny_batch, tiny_cfg

from kd_detectron.backbones import add_backbone_config
from kd_detectron.checkpoint import DistillationCheckpointer, export_student, student_config
from kd_detectron.errors import ConfigError

IMAGE = {key: tiny_batch()[0][key] for key in ("image", "height", "width")}


def write_run(folder, cfg) -> torch.nn.Module:
    """Leaves in ``folder`` what a finished training does; returns the trained model."""
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpointer = DistillationCheckpointer(model, str(folder), optimizer=optimizer)
    checkpointer.save("model_0000009", iteration=9)
    checkpointer.save("model_final", iteration=19)
    (folder / "config.yaml").write_text(cfg.dump())
    return model.eval()


@pytest.fixture
def run(tmp_path):
    """A distilled run's folder and its model, evaluated by the distilled model itself."""
    folder = tmp_path / "run"
    folder.mkdir()
    opts = ["DATASETS.COCO_FORMAT", [["mine", "a.json", "images"]], "SOLVER.ACCUMULATE_STEPS", 2]
    return folder, write_run(folder, distilled_cfg(str(tmp_path), ["ReviewKD"], opts))


def detections(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        instances = model([IMAGE])[0]["instances"]
    return instances.pred_boxes.tensor, instances.scores, instances.pred_classes


IN_PLAIN_DETECTRON2 = """
import json, sys
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

config, checkpoint, image, out = sys.argv[1:]
cfg = get_cfg()
cfg.merge_from_file(config)
model = build_model(cfg).eval()
saved = torch.load(checkpoint, weights_only=True)
result = model.load_state_dict(saved["model"], strict=False)
DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
with torch.no_grad():
    instances = model([torch.load(image)])[0]["instances"]
torch.save([instances.pred_boxes.tensor, instances.scores, instances.pred_classes], out)
print(json.dumps({
    "type": type(model).__name__, "keys": list(saved), "missing": result.missing_keys,
    "unexpected": result.unexpected_keys, "foreign": "kd_detectron" in sys.modules,
}))
"""


def test_exported_student_loads_in_plain_detectron2(run, tmp_path):
    folder, model = run
    exported = export_student(str(folder), str(tmp_path / "export"))
    assert exported.checkpoint == str(tmp_path / "export" / "student_final.pth")
    assert exported.config == str(tmp_path / "export" / "config.yaml")
    torch.save(IMAGE, tmp_path / "image.pt")
    arguments = [exported.config, exported.checkpoint, str(tmp_path / "image.pt")]
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_PLAIN_DETECTRON2, *arguments, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert output.returncode == 0, output.stderr
    assert json.loads(output.stdout.splitlines()[-1]) == {
        "type": "GeneralizedRCNN",
        "keys": ["model"],
        "missing": [],
        "unexpected": [],
        "foreign": False,
    }
    for found, expected in zip(torch.load(tmp_path / "out"), detections(model), strict=True):
        assert len(expected) > 0 and torch.equal(found, expected)


def test_exported_config_has_no_key_that_detectron2_does_not_know(run, tmp_path):
    exported = export_student(str(run[0] / "model_0000009.pth"), str(tmp_path / "a" / "s.pth"))
    text = (tmp_path / "a" / "config.yaml").read_text()
    for key in ("KD:", "COCO_FORMAT", "ACCUMULATE_STEPS", "MOBILENETV2", "TIMM", "Distilled"):
        assert key not in text
    cfg = get_cfg()
    cfg.merge_from_file(exported.config)
    assert cfg.MODEL.FPN.OUT_CHANNELS == 32 and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert cfg.MODEL.get("WEIGHTS") == exported.checkpoint


def test_export_into_the_runs_own_folder_leaves_the_run_as_it_is(run):
    folder, _ = run
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    exported = export_student(str(folder), str(folder))
    assert exported.config == str(folder / "student_final.yaml")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == ["student_final.pth", "student_final.yaml"]


def test_config_can_be_given_for_a_checkpoint_without_one(run, tmp_path):
    folder, _ = run
    cfg = get_cfg_of(folder)
    (folder / "config.yaml").rename(tmp_path / "elsewhere.yaml")
    for given in (cfg, str(tmp_path / "elsewhere.yaml")):
        exported = export_student(str(folder / "model_final.pth"), str(tmp_path / "out"), cfg=given)
        assert os.path.isfile(exported.checkpoint)
    with pytest.raises(ConfigError, match="no config.yaml beside .*--config-file"):
        export_student(str(folder / "model_final.pth"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def get_cfg_of(folder):
    cfg = tiny_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"))
    return cfg


def test_given_config_is_not_changed(run, tmp_path):
    cfg = get_cfg_of(run[0])
    before = cfg.dump()
    export_student(str(run[0]), str(tmp_path / "out"), cfg=cfg)
    assert cfg.dump() == before


def test_checkpoint_that_does_not_fit_its_config_is_refused_and_nothing_is_written(run, tmp_path):
    folder, _ = run
    cfg = get_cfg_of(folder)
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 40
    with pytest.raises(ConfigError, match="model_final.pth' does not fit its config"):
        export_student(str(folder), str(tmp_path / "out"), cfg=cfg)
    assert not (tmp_path / "out").exists()


def test_run_that_cannot_be_exported_is_refused(run, tmp_path):
    folder, _ = run
    with pytest.raises(ConfigError, match="would overwrite it"):
        export_student(str(folder), str(folder / "model_final.pth"))
    with pytest.raises(ConfigError, match="does not exist"):
        export_student(str(folder / "model_0000099.pth"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="model_final.pth' does not exist"):
        export_student(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="rum' does not exist.*did you mean run"):
        export_student(str(tmp_path / "rum"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"model_best.pth' does not exist.*model_\w+.pth"):
        export_student(str(folder), str(tmp_path / "out"), checkpoint="best")
    os.truncate(folder / "model_final.pth", 1000)
    with pytest.raises(ConfigError, match="truncated"):
        export_student(str(folder), str(tmp_path / "out"))


def test_final_checkpoint_is_exported_unless_another_is_named(run, tmp_path):
    folder, model = run
    name, tensor = next(iter(model.state_dict().items()))
    for file, value in (("model_best", 5.0), ("model_0000029", 7.0)):
        tensor.fill_(value)
        DistillationCheckpointer(model, str(folder)).save(file)
    for given, value in (
        ({}, None),
        ({"checkpoint": "best"}, 5),
        ({"checkpoint": file + ".pth"}, 7),
    ):
        exported = export_student(str(folder), str(tmp_path / "out"), **given)
        student = torch.load(exported.checkpoint, weights_only=True)["model"]
        final = torch.load(folder / "model_final.pth", weights_only=True)["model"][name]
        assert (student[name] == (final if value is None else value)).all()


@pytest.mark.parametrize(
    ("config", "meta"),
    [
        (None, "GeneralizedRCNN"),  # a file of few keys
        ("ckd_rcnn_r101_r18.yaml", "GeneralizedRCNN"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "RetinaNet"),
    ],
)
def test_config_can_be_partial_a_bare_name_or_based_on_the_zoo(tmp_path, config, meta):
    if config is None:
        config = str(tmp_path / "partial.yaml")
        (tmp_path / "partial.yaml").write_text(
            "MODEL: {META_ARCHITECTURE: DistilledRCNN}\n"
            "KD: {OPTIONS: {}, NOTREGISTEREDHERE: {WEIGHT: 1.0}}\n"
        )
    elif "/" in config:
        config = model_zoo.get_config_file(config)
    assert student_config(config).MODEL.get("META_ARCHITECTURE") == meta


@pytest.mark.parametrize("meta", ["GeneralizedRCNN", "PanopticFPN"])
def test_meta_architectures_of_detectron2_stay(meta):
    plain = student_config(tiny_cfg(["MODEL.META_ARCHITECTURE", meta]))
    assert plain.MODEL.get("META_ARCHITECTURE") == meta


@pytest.mark.parametrize(
    "backbone, opts",
    [
        ("build_mobilenetv2_fpn_backbone", ["MODEL.MOBILENETV2.WIDTH_MULT", 0.25]),
        ("build_timm_fpn_backbone", ["MODEL.TIMM.NAME", "mobilenetv3_small_050"]),
        ("build_torchvision_fpn_backbone", ["MODEL.TORCHVISION.NAME", "mobilenet_v3_small"]),
    ],
)
def test_student_with_a_backbone_of_this_project_keeps_its_node_only(
    tmp_path, caplog, backbone, opts
):
    folder = tmp_path / "run"
    folder.mkdir()
    opts = ["MODEL.BACKBONE.NAME", backbone, "MODEL.TIMM.PRETRAINED", False, *opts]
    model = write_run(folder, tiny_cfg([*opts, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]))
    exported = export_student(str(folder), str(tmp_path / "export"))
    assert "add_backbone_config" in caplog.text
    cfg = get_cfg()
    add_backbone_config(cfg)
    cfg.merge_from_file(exported.config)
    student = build_model(cfg).eval()
    student.load_state_dict(torch.load(exported.checkpoint, weights_only=True)["model"])
    for found, expected in zip(detections(student), detections(model), strict=True):
        assert torch.equal(found, expected)
