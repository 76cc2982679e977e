"""RetinaNet, Panoptic FPN, Keypoint R-CNN and Cascade as students: what works, what is refused."""

from pathlib import Path

import pytest
import torch
from detectors import DETECTORS, batch_for_all
from detectors import detector_cfg as config
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import write_tiny_teacher

from kd_detectron.checkpoint import export_student
from kd_detectron.engine.main import main
from kd_detectron.errors import ConfigError

OTHERS = [name for name in DETECTORS if name not in ("Faster R-CNN", "Mask R-CNN")]
every_detector = pytest.mark.parametrize("detector", OTHERS)


def plain_config(cfg, detector):
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = DETECTORS[detector][1]
    return cfg


def build(cfg, seed=11):
    torch.manual_seed(seed)
    return build_model(cfg)


def train_step(model, batch):
    torch.manual_seed(3)
    model.train()
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
    return {name: value.item() for name, value in losses.items()}


@every_detector
def test_distillation_adds_its_losses_and_leaves_the_detectors_own(tmp_path, detector):
    cfg = config(tmp_path, detector)
    plain, distilled = build(plain_config(cfg, detector)), build(cfg)
    fingerprint = distilled.teacher.fingerprint()
    expected = train_step(plain, batch_for_all())
    actual = train_step(distilled, batch_for_all())
    added = {name: actual.pop(name) for name in set(actual) - set(expected)}
    assert actual == expected
    assert set(added) == {f"loss_{name.lower()}" for name in DETECTORS[detector][3]}
    assert all(value > 0 for value in added.values()), added
    assert all(p.grad is not None for p in distilled.parameters() if p.requires_grad)
    assert distilled.teacher.fingerprint() == fingerprint
    hooks = [m for m in distilled.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


@every_detector
def test_no_distillers_is_the_plain_detector(tmp_path, detector):
    cfg = config(tmp_path, detector, distillers=[])
    plain, distilled = build(plain_config(cfg, detector)), build(cfg)
    assert distilled.teacher is None
    batch = batch_for_all()
    # RetinaNet's focal loss is compiled by TorchScript, whose first call may differ from later ones
    # in the last bit of the gradients.
    train_step(build(plain_config(cfg, detector)), batch)
    assert train_step(plain, batch) == train_step(distilled, batch)
    gradients = dict(plain.named_parameters())
    for name, parameter in distilled.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name


@every_detector
def test_eval_mode_is_the_plain_detector_bit_for_bit(tmp_path, detector):
    cfg = config(tmp_path, detector)
    plain, distilled = build(plain_config(cfg, detector)).eval(), build(cfg).eval()
    distilled.teacher.model.backbone.register_forward_hook(lambda *a: pytest.fail("teacher ran"))
    with torch.no_grad():
        expected, actual = plain(batch_for_all()), distilled(batch_for_all())
    for one, other in zip(expected, actual, strict=True):
        assert len(one["instances"]) > 0 and one.keys() == other.keys()
        for name, value in one["instances"].get_fields().items():
            got = other["instances"].get(name)
            assert torch.equal(getattr(value, "tensor", value), getattr(got, "tensor", got)), name
        if "sem_seg" in one:
            assert torch.equal(one["sem_seg"], other["sem_seg"])


@every_detector
def test_image_without_objects_just_works(tmp_path, detector):
    batch = batch_for_all(boxes_per_image=(0, 0))
    losses = train_step(build(config(tmp_path, detector)), batch)
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values()), losses


@every_detector
def test_export_is_the_plain_detector(tmp_path, detector):
    cfg = config(tmp_path, detector)
    model = build(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    exported = export_student(
        str(tmp_path / "model_final.pth"), str(tmp_path / "student.pth"), cfg=cfg
    )
    plain = plain_config(cfg, detector)
    assert f"META_ARCHITECTURE: {plain.MODEL.META_ARCHITECTURE}" in (
        Path(exported.config).read_text()
    )
    state = torch.load(exported.checkpoint)["model"]
    build(plain, seed=5).load_state_dict(state, strict=True)
    assert not any(name.startswith("distillers.") for name in state)


@pytest.mark.parametrize("detector", ["RetinaNet", "Cascade R-CNN"])
@pytest.mark.parametrize("distiller", ["BicKD", "CKD", "CRD", "DCD", "DKD", "KD", "SupCon"])
def test_box_head_distillers_are_refused_without_one_box_head(tmp_path, detector, distiller):
    with pytest.raises(ConfigError, match=rf"KD.DISTILLERS \w+ '?{distiller}\b.*box head"):
        build(config(tmp_path, detector, ["ReviewKD", distiller]))


def test_teacher_with_other_levels_is_refused(tmp_path):
    cfg = config(tmp_path, "RetinaNet")
    cfg.KD.TEACHER.CONFIG_FILE = write_tiny_teacher(tmp_path)
    with pytest.raises(ConfigError, match=r"levels.*p7 \(stride 128\).*p2 \(stride 4\)"):
        build(cfg)


def test_test_time_augmentation_of_retinanet_is_refused_before_training(tmp_path, capsys):
    cfg = config(tmp_path, "RetinaNet")
    cfg.TEST.AUG.ENABLED = True
    (tmp_path / "run.yaml").write_text(cfg.dump())
    assert main(["--config-file", str(tmp_path / "run.yaml")]) == 2
    error = capsys.readouterr().err
    assert "TEST.AUG.ENABLED is True" in error and "DistilledRetinaNet" in error
