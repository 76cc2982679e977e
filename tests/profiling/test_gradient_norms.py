"""Gradient norms: of each loss as autograd alone computes them, by part of the student."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import distilled_cfg, tiny_batch

from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.profiling.gradient_norms import (
    DETECTION,
    PARTS,
    gradient_norms,
    main,
    student_parts,
)


def measured(cfg, batches=2):
    torch.manual_seed(0)
    model = build_model(cfg).train()
    with EventStorage():
        return model, gradient_norms(model, [tiny_batch()] * batches)


def test_every_trained_parameter_of_the_student_is_in_one_part(tmp_path):
    model = build_model(distilled_cfg(tmp_path, ["ReviewKD"]))
    parts = student_parts(model)
    trained = {id(p) for n, p in model.named_parameters() if "distillers." not in n}
    assert all(parts[part] for part in PARTS)
    assert sorted(id(p) for part in parts.values() for p in part) == sorted(trained)


def test_feature_losses_pull_below_the_heads_and_in_proportion_to_their_weight(tmp_path):
    cfg = distilled_cfg(tmp_path, ["CKD", "ReviewKD"], ["KD.REVIEWKD.WEIGHT", 1.0])
    rows = {row["loss"]: row for row in measured(cfg)[1]}
    assert list(rows) == [DETECTION, "loss_ckd", "loss_reviewkd"]
    assert rows["loss_reviewkd"]["heads: norm"] == 0
    assert rows["loss_ckd"]["heads: norm"] > 0
    for part in PARTS:
        assert rows[DETECTION][f"{part}: ratio"] == pytest.approx(1)
        assert rows[DETECTION][f"{part}: cosine"] == pytest.approx(1, abs=1e-3)
    cfg = distilled_cfg(tmp_path, ["CKD", "ReviewKD"], ["KD.REVIEWKD.WEIGHT", 10.0])
    stronger = {row["loss"]: row for row in measured(cfg)[1]}["loss_reviewkd"]
    for key in ("norm", "ratio"):
        expected = 10 * rows["loss_reviewkd"][f"FPN: {key}"]
        assert stronger[f"FPN: {key}"] == pytest.approx(expected, rel=1e-3)


def test_command_prints_a_table_and_writes_nothing(tmp_path, monkeypatch, capsys):
    make_synthetic(tmp_path / "data", 4, 2, image_size=(64, 64))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    name = f"train_{tmp_path.name}"
    opts = ["DATASETS.COCO_FORMAT", [[name, "train.json", "train"]], "DATASETS.TRAIN", (name,)]
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)]
    opts += ["DATASETS.TEST", (), *classes, "OUTPUT_DIR", str(tmp_path / "o")]
    cfg = distilled_cfg(tmp_path, ["ReviewKD"], opts)
    cfg.KD.TEACHER.OPTS = classes
    (tmp_path / "run.yaml").write_text(cfg.dump())
    assert main(["--config-file", str(tmp_path / "run.yaml"), "--batches", "1"]) == 0
    printed = capsys.readouterr().out
    assert "loss_reviewkd" in printed and "backbone: ratio" in printed
    assert not (tmp_path / "o").exists()


def test_measuring_leaves_no_gradient_and_no_hook(tmp_path):
    model, rows = measured(distilled_cfg(tmp_path, ["CKD"]), batches=1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.distillers["CKD"]._forward_hooks
    assert [row["loss"] for row in rows] == [DETECTION, "loss_ckd"]
