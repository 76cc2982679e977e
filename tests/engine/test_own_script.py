"""Training scripts of a user's own, as docs/how_it_works.md describes them."""

import os
import re
from pathlib import Path

import torch
from detectron2.engine import DefaultTrainer
from tiny_training import run_cfg

from kd_detectron.checkpoint import export_student
from kd_detectron.modeling.distilled_rcnn import DistilledRCNN

HOW_IT_WORKS = Path(__file__).parents[2] / "docs" / "how_it_works.md"


def test_the_script_of_the_docs_trains(tmp_path, dataset, monkeypatch):
    cfg = run_cfg(tmp_path, dataset, "own", opts=["SOLVER.MAX_ITER", 1])
    (tmp_path / "my_student.yaml").write_text(cfg.dump())
    (script,) = re.findall(r"```python\n(.*?)```", HOW_IT_WORKS.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, str(HOW_IT_WORKS), "exec"), {})
    assert os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "student_final.pth"))


def test_default_trainer_distils_and_its_checkpoint_exports(tmp_path, dataset):
    cfg = run_cfg(tmp_path, dataset, "default", opts=["SOLVER.MAX_ITER", 1, "DATASETS.TEST", ()])
    trainer = DefaultTrainer(cfg)
    assert isinstance(trainer.model, DistilledRCNN)
    trainer.resume_or_load(resume=False)
    distillation = [v.clone() for k, v in trainer.model.named_parameters() if "distillers" in k]
    trainer.train()
    metrics = trainer.storage.latest()
    assert {f"loss_{name.lower()}" for name in trainer.model.distillers} <= set(metrics)
    trained = [v for k, v in trainer.model.named_parameters() if "distillers" in k]
    moved = [not torch.equal(a, b) for a, b in zip(distillation, trained, strict=True)]
    assert moved and all(moved)
    checkpoint = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    export_student(checkpoint, str(tmp_path / "exported"), cfg=cfg)
    exported = torch.load(tmp_path / "exported" / "student_final.pth", weights_only=True)
    own = {name for name in trainer.model.state_dict() if "distillers" not in name}
    assert exported["model"].keys() == own
