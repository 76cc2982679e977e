import json

import pytest

from kd_detectron.errors import ConfigError
from kd_detectron.runs.run import load_run, metrics_by_iteration


def test_run_is_named_by_its_config_not_by_its_folder(write_run):
    run = load_run(write_run("x", distillers=["ReviewKD", "CKD"], ap=[37.0]))
    assert (run.method, run.pair, run.detector) == ("CKD+ReviewKD", "R101-R18", "Faster R-CNN")
    assert run.results == {"bbox": {"AP": 37.0}}
    assert (run.iterations, run.seconds, run.seed, run.finished) == (100, 3600.0, 0, True)


def test_run_without_distillation_is_a_baseline_without_teacher(write_run):
    empty = load_run(write_run("empty", ap=[33.0]))
    off = load_run(write_run("off", distillers=["CKD"], opts=["KD.ENABLED", False], ap=[33.0]))
    for run in (empty, off):
        assert (run.method, run.pair, run.teacher) == ("baseline", "R18", None)


@pytest.mark.parametrize(
    ("opts", "name"),
    [
        ([], "R18"),
        (["MODEL.RESNETS.NUM_GROUPS", 32], "X18"),
        (["MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"], "MV2"),
        (["MODEL.BACKBONE.NAME", "build_some_fpn_backbone"], "some"),
        (["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "net_a"], "net_a"),
    ],
)
def test_student_is_named_by_its_backbone(write_run, opts, name):
    assert load_run(write_run("x", opts=opts)).student == name


@pytest.mark.parametrize(
    ("config_file", "name"),
    [
        ("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml", "X101"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "R50"),
        ("baseline_rcnn_r50.yaml", "R50"),
        ("ckd_rcnn_r101_r18.yaml", "R18"),
        ("baseline_rcnn_mv2.yaml", "MV2"),
        ("my_teacher.yaml", "my_teacher"),
    ],
)
def test_teacher_is_named_by_its_config_file(write_run, config_file, name):
    assert load_run(write_run("x", distillers=["KD"], teacher=config_file)).teacher == name


def test_teacher_that_is_a_run_folder_is_named_by_its_backbone(write_run):
    teacher = write_run("teacher", depth=50)
    run = load_run(write_run("x", distillers=["KD"], teacher=str(teacher / "config.yaml")))
    assert run.pair == "R50-R18"


def test_later_line_of_a_resumed_run_wins(tmp_path):
    lines = [
        {"iteration": 19, "total_loss": 3.0, "lr": 0.1},
        {"iteration": 39, "total_loss": 2.0},
        {"iteration": 19, "total_loss": 2.5},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "metrics.json").write_text(text + '\n{"iteration": 59, "total_l')
    history = metrics_by_iteration(tmp_path)
    assert history == {19: {"total_loss": 2.5, "lr": 0.1}, 39: {"total_loss": 2.0}}


def test_without_result_the_last_evaluation_counts_and_the_run_is_unfinished(write_run):
    metrics = [
        {"iteration": 49, "bbox/AP": 10.0, "bbox/APs": float("nan"), "total_loss": 1.0},
        {"iteration": 99, "bbox/AP": 20.0, "bbox/AP50": 40.0, "bbox/APs": float("nan")},
        {"iteration": 109, "total_loss": 0.5},
    ]
    run = load_run(write_run("x", metrics=metrics, result=False))
    assert run.results == {"bbox": {"AP": 20.0, "AP50": 40.0}}
    assert (run.finished, run.iterations, run.seconds) == (False, 110, None)
    assert run.series("bbox/AP") == ([49, 99], [10.0, 20.0])
    assert run.series("bbox/APs") == ([], [])
    assert run.loss_names() == ["total_loss"]


def test_folder_that_is_no_run_gets_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        load_run(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("A: 1\n")
    with pytest.raises(ConfigError, match="not a Detectron2 config"):
        load_run(tmp_path)


def test_damaged_result_file_gets_one_sentence(write_run):
    folder = write_run("x")
    (folder / "result.json").write_text('{"results": ')
    with pytest.raises(ConfigError, match="not what a training writes"):
        load_run(folder)


@pytest.mark.parametrize(
    ("distillers", "opts", "method"),
    [
        ((), (), "baseline"),
        ((), ("KD.TEACHER.INHERIT", ["auto"]), "inherited"),
        (("PKD",), ("KD.TEACHER.INHERIT", ["auto"]), "inherited+PKD"),
        (("ReviewKD", "CKD"), (), "CKD+ReviewKD"),
        (("PKD",), ("KD.TEACHER.INHERIT", ["auto"], "KD.ENABLED", False), "baseline"),
    ],
)
def test_run_is_named_by_all_that_it_takes_from_its_teacher(write_run, distillers, opts, method):
    run = load_run(write_run("run", distillers=distillers, opts=opts))
    assert run.method == method
    assert (run.teacher is None) == (method == "baseline")
