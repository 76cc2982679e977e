"""A run is resumed as itself; another one in its folder is refused."""

from pathlib import Path

import pytest
from tiny import distilled_cfg, tiny_cfg

from kd_detectron.engine.main import main
from kd_detectron.errors import ConfigError
from kd_detectron.preflight.resume import check_output_dir, check_same_run


@pytest.fixture
def run_cfg(tmp_path):
    """A config, and the folder of the run that was started with it."""
    cfg = distilled_cfg(tmp_path, opts=["OUTPUT_DIR", str(tmp_path / "run")])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    return cfg


def test_resume_of_the_same_run_is_accepted_in_silence(run_cfg, caplog):
    assert check_same_run(run_cfg) == []
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("KD.DISTILLERS", ["CKD"]),
        ("KD.CKD.TEMPERATURE", 2.0),
        ("KD.TEACHER.WEIGHTS", "another.pth"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", 4),
        ("MODEL.RESNETS.NORM", "FrozenBN"),
        ("DATASETS.TRAIN", ("other_data",)),
        ("DATASETS.PROPOSAL_FILES_TRAIN", ("other_proposals.pkl",)),
        ("INPUT.FORMAT", "RGB"),
    ],
)
def test_resume_into_the_folder_of_another_run_is_refused(run_cfg, key, value):
    run_cfg.merge_from_list([key, value, "SOLVER.BASE_LR", 0.1])
    with pytest.raises(ConfigError) as error:
        check_same_run(run_cfg)
    for word in (f"{key} was ", "OUTPUT_DIR", "another run", "MODEL.WEIGHTS", "config.yaml"):
        assert word in str(error.value)
    assert "SOLVER.BASE_LR" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.MAX_ITER", 90),
        ("TEST.EVAL_PERIOD", 5),
        ("DATALOADER.NUM_WORKERS", 1),
        ("VIS_PERIOD", 10),
        ("MODEL.DEVICE", "cuda"),
        ("MODEL.WEIGHTS", "elsewhere.pth"),
        ("KD.CKD.WEIGHT", 0.5),
        ("KD.SCHEDULE.WARMUP_ITERS", 100),
    ],
)
def test_what_may_change_over_a_resume_is_said(run_cfg, caplog, key, value):
    run_cfg.merge_from_list([key, value])
    (changed,) = check_same_run(run_cfg)
    assert changed.startswith(f"{key} was ") and changed in caplog.text


def test_annotation_file_of_the_training_may_not_change_and_its_images_may_move(run_cfg, caplog):
    path, name = Path(run_cfg.OUTPUT_DIR, "config.yaml"), "own_train"
    test = ["extra_val", "val.json", "val"]
    run_cfg.DATASETS.TRAIN = (name,)
    run_cfg.DATASETS.COCO_FORMAT = [[name, "train.json", "images"], test]
    path.write_text(run_cfg.dump())
    assert check_same_run(run_cfg) == []
    run_cfg.DATASETS.COCO_FORMAT = [["new_val", "new.json", "new"], [name, "train.json", "moved"]]
    assert check_same_run(run_cfg) == [
        f"DATASETS.COCO_FORMAT.{name}.images was 'images' and is 'moved'"
    ]
    run_cfg.DATASETS.COCO_FORMAT = [[name, "by_teacher.json", "images"], test]
    with pytest.raises(ConfigError, match="annotations was 'train.json' and is 'by_teacher.json'"):
        check_same_run(run_cfg)


def test_run_of_another_version_or_without_a_config_can_be_resumed(run_cfg, tmp_path):
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("TRIPLE: tss", "GONE: 1"))
    assert check_same_run(run_cfg) == []
    path.write_text("a: b: c")
    assert check_same_run(run_cfg) == []
    path.unlink()
    assert check_same_run(run_cfg) == []


def test_command_line_refuses_to_resume_another_run_and_leaves_its_config(run_cfg, tmp_path, capfd):
    path = tmp_path / "run.yaml"
    path.write_text(run_cfg.dump())
    before = (tmp_path / "run" / "config.yaml").read_text()
    command = ["--config-file", str(path), "--resume", "KD.DISTILLERS", "['KD']"]
    assert main(command) == 2
    assert "KD.DISTILLERS was ['CKD', 'ReviewKD'] and is ['KD']" in capfd.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == before


# ---- the output folder ----


@pytest.mark.parametrize("left", ["last_checkpoint", "model_0000099.pth", "result.json"])
def test_folder_of_a_run_is_not_trained_over(tmp_path, left):
    cfg = tiny_cfg(["OUTPUT_DIR", str(tmp_path)])
    check_output_dir(cfg, resume=False, training=True)
    (tmp_path / left).touch()
    with pytest.raises(ConfigError, match="already holds a run; give --resume"):
        check_output_dir(cfg, resume=False, training=True)
    check_output_dir(cfg, resume=False, training=False)


def test_checkpoints_that_resume_cannot_find_are_not_trained_over(tmp_path):
    cfg = tiny_cfg(["OUTPUT_DIR", str(tmp_path)])
    (tmp_path / "model_0000099.pth").touch()
    with pytest.raises(ConfigError, match="such as model_0000099.pth, into .*last_checkpoint'"):
        check_output_dir(cfg, resume=True, training=True)


def test_resume_that_finds_nothing_says_so(tmp_path, caplog):
    cfg = tiny_cfg(["OUTPUT_DIR", str(tmp_path / "mistyped")])
    check_output_dir(cfg, resume=True, training=True)
    assert "mistyped' holds no checkpoint: training starts at iteration 0" in caplog.text
    caplog.clear()
    # What a run leaves that was killed between its first evaluation and its first checkpoint.
    (tmp_path / "mistyped").mkdir()
    (tmp_path / "mistyped" / "model_best.pth").touch()
    check_output_dir(cfg, resume=True, training=True)
    assert "training starts at iteration 0" in caplog.text
    caplog.clear()
    (tmp_path / "last_checkpoint").touch()
    cfg.OUTPUT_DIR = str(tmp_path)
    check_output_dir(cfg, resume=True, training=True)
    assert caplog.text == ""
