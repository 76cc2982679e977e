"""``--eval-only`` and ``--eval-teacher`` leave a run's folder as the training wrote it."""

import pytest
from tiny import distilled_cfg

from kd_detectron.engine import main as command


@pytest.mark.parametrize("option", ["--eval-only", "--eval-teacher"])
def test_evaluation_leaves_the_config_of_the_run(tmp_path, monkeypatch, option):
    run = tmp_path / "run"
    run.mkdir()
    cfg = distilled_cfg(tmp_path, opts=["OUTPUT_DIR", str(run), "SOLVER.MAX_ITER", 17])
    (run / "config.yaml").write_text(cfg.dump())
    evaluated = []
    for name in ("evaluate_student", "evaluate_teacher"):
        monkeypatch.setattr(command, name, lambda cfg, **kwargs: evaluated.append(cfg))
    before = (run / "config.yaml").read_text()
    config_file = str(run / "config.yaml")
    assert command.main(["--config-file", config_file, option, "SOLVER.MAX_ITER", "90"]) == 0
    assert evaluated[0].SOLVER.MAX_ITER == 90
    assert (run / "config.yaml").read_text() == before
