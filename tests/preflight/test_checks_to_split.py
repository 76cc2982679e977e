"""What would silently be wrong is said before the first step: channels, classes, resume, values."""

import json
import logging

import pytest
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from tiny import distilled_cfg, tiny_cfg, write_tiny_teacher

from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.distillers import ModelSpec, build_distiller
from kd_detectron.engine.hooks import DistillationSchedule
from kd_detectron.engine.main import main
from kd_detectron.errors import ConfigError
from kd_detectron.preflight.checks_to_split import (
    check_class_order,
    check_meta_architecture,
    check_same_run,
    pixel_statistics_warning,
    teacher_classes,
    warn_of_pixel_statistics,
)
from kd_detectron.preflight.data import DatasetSummary

RGB_MEAN, BGR_MEAN = [123.675, 116.28, 103.53], [103.53, 116.28, 123.675]
RGB_STD, BGR_STD = [58.395, 57.12, 57.375], [57.375, 57.12, 58.395]


@pytest.fixture(autouse=True)
def log_reaches_caplog(monkeypatch):
    """Detectron2's ``setup_logger``, called by any test before, would keep it from there."""
    monkeypatch.setattr(logging.getLogger("kd_detectron"), "propagate", True)


# ---- meta-architecture ----


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GeneralizedRCNN", ["KD.DISTILLERS", "distils nothing", "DistilledRCNN", "KD.ENABLED"]),
        ("DistilledRCN", ["did you mean DistilledRCNN"]),
    ],
)
def test_distillers_on_a_detector_that_has_none_are_refused(tmp_path, capsys, name, words):
    cfg = distilled_cfg(tmp_path, opts=["MODEL.META_ARCHITECTURE", name])
    (tmp_path / "run.yaml").write_text(cfg.dump())
    assert main(["--config-file", str(tmp_path / "run.yaml"), "--check"]) == 2
    error = capsys.readouterr().err
    for word in ["MODEL.META_ARCHITECTURE", name, *words]:
        assert word in error


def test_distillers_switched_off_are_no_matter(tmp_path):
    opts = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "KD.ENABLED", False]
    check_meta_architecture(distilled_cfg(tmp_path, opts=opts))


def test_debug_shows_the_traceback_of_a_users_error(tmp_path):
    cfg = distilled_cfg(tmp_path, opts=["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])
    (tmp_path / "run.yaml").write_text(cfg.dump())
    with pytest.raises(ConfigError, match="distils nothing"):
        main(["--config-file", str(tmp_path / "run.yaml"), "--check", "--debug"])


# ---- pixel statistics ----


@pytest.mark.parametrize(
    ("student", "teacher", "warned"),
    [
        ([], [], []),
        (["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", RGB_MEAN], [], []),
        (["INPUT.FORMAT", "RGB"], [], ["student"]),  # as in the release of the papers
        (["MODEL.PIXEL_MEAN", RGB_MEAN], [], ["student"]),
        (["MODEL.PIXEL_MEAN", [122.7717, 115.9465, 102.9801]], [], ["student"]),  # Caffe's
        (["MODEL.PIXEL_MEAN", [90.0, 80.0, 70.0]], [], []),  # own data may look like anything
        ([], ["INPUT.FORMAT", "RGB"], ["teacher"]),
        (["INPUT.FORMAT", "RGB"], ["MODEL.PIXEL_MEAN", RGB_MEAN], ["student", "teacher"]),
    ],
)
def test_mean_in_the_other_channel_order_is_warned_of_with_the_fix(
    tmp_path, caplog, student, teacher, warned
):
    model = build_model(distilled_cfg(tmp_path, ["CKD"], [*student, "KD.TEACHER.OPTS", teacher]))
    found = warn_of_pixel_statistics(model)
    assert [who for text in found for who in ("student", "teacher") if f"the {who}," in text] == (
        warned
    )
    for text in found:
        assert text in caplog.text
        assert "INPUT.FORMAT" in text and "PIXEL_MEAN" in text
        assert f"to {RGB_MEAN}" in text or f"to {BGR_MEAN}" in text


STATISTICS_KEYS = {"format_key": "INPUT.FORMAT", "mean_key": "the mean", "std_key": "the std"}


@pytest.mark.parametrize(
    ("order", "mean", "std", "words"),
    [
        # The standard deviation alone in the other order.
        ("RGB", RGB_MEAN, BGR_STD, ["the std", str(BGR_STD), f"to {RGB_STD}"]),
        ("BGR", BGR_MEAN, RGB_STD, ["the std", str(RGB_STD), f"to {BGR_STD}"]),
        # torchvision's, of images in 0..1; in the other order; as often rounded.
        ("RGB", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], ["0..1", "255", f"to {RGB_MEAN}"]),
        ("BGR", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], ["0..1", "RGB order", "reverse"]),
        ("BGR", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], ["0..1", "[127.5, 127.5, 127.5]"]),
        ("BGR", [0.4, 0.4, 0.4], [1.0, 1.0, 1.0], ["0..1"]),
        ("BGR", [0.0, 0.0, 0.0], [0.2, 0.2, 0.2], ["0..1"]),
        ("L", [0.5], [0.5], ["0..1"]),
    ],
)
def test_statistics_that_cannot_be_the_images_are_warned_of_with_the_fix(order, mean, std, words):
    text = pixel_statistics_warning("student", order, mean, std, **STATISTICS_KEYS)
    for word in ["student", *words]:
        assert word in text, text


@pytest.mark.parametrize(
    ("order", "mean", "std"),
    [
        ("BGR", BGR_MEAN, [1.0, 1.0, 1.0]),  # Detectron2's default
        ("BGR", BGR_MEAN, BGR_STD),
        ("RGB", RGB_MEAN, RGB_STD),
        ("RGB", RGB_MEAN, [58.0, 57.0, 57.0]),  # rounded
        ("RGB", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),  # the network normalises by itself
        ("RGB", [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]),
        ("RGB", [90.0, 80.0, 70.0], BGR_STD),  # own data may look like anything
        ("L", [120.0], [60.0]),
        ("RGB", [], []),  # a detector without statistics
    ],
)
def test_statistics_that_can_be_the_images_are_not_warned_of(order, mean, std):
    assert pixel_statistics_warning("student", order, mean, std, **STATISTICS_KEYS) is None


def test_channel_order_of_a_plain_detector_is_checked_too(tmp_path):
    opts = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "INPUT.FORMAT", "RGB"]
    assert len(warn_of_pixel_statistics(build_model(tiny_cfg(opts)))) == 1


# ---- class order ----


def summaries(*classes, name="own_data"):
    return {name: DatasetSummary(name, 1, 1, classes)}


@pytest.fixture
def class_cfg(tmp_path):
    """A student on "own_data" and a teacher that was trained on "teachers_data", registered."""

    def make(theirs=("cat", "dog", "cow"), distillers=("CKD", "ReviewKD")):
        MetadataCatalog.pop("teachers_data", None)
        MetadataCatalog.get("teachers_data").thing_classes = list(theirs)
        cfg = distilled_cfg(tmp_path, distillers)
        write_tiny_teacher(tmp_path, ["DATASETS.TRAIN", ("teachers_data",)])
        cfg.DATASETS.TRAIN = ("own_data",)
        return cfg

    yield make
    MetadataCatalog.pop("teachers_data", None)


def test_classes_of_the_teacher_in_another_order_are_refused(class_cfg):
    with pytest.raises(ConfigError) as error:
        check_class_order(class_cfg(), summaries("cat", "cow", "dog"))
    for word in ["class 1 is 'cow'", "'dog'", "DATASETS.TRAIN 'own_data'", "'teachers_data'"]:
        assert word in str(error.value)
    assert "KD.TEACHER.CONFIG_FILE" in str(error.value) and "['CKD']" in str(error.value)


def test_same_classes_fit_whatever_their_case(class_cfg):
    check_class_order(class_cfg(), summaries("Cat", "dog", "COW"))


def test_class_order_is_no_matter_where_no_logits_are_compared(class_cfg):
    other = summaries("cat", "cow", "dog")
    check_class_order(class_cfg(distillers=["ReviewKD", "FitNet"]), other)
    cfg = class_cfg()
    cfg.KD.ENABLED = False
    check_class_order(cfg, other)


def test_override_that_the_message_offers_is_accepted(class_cfg):
    cfg = class_cfg()
    cfg.KD.TEACHER.OPTS = ["DATASETS.TRAIN", "('own_data',)"]
    check_class_order(cfg, summaries("cat", "cow", "dog"))


def test_classes_that_are_not_named_or_not_known_are_not_compared(class_cfg, tmp_path):
    check_class_order(class_cfg(), summaries())
    check_class_order(class_cfg(theirs=()), summaries("cat", "cow", "dog"))
    cfg = class_cfg()
    write_tiny_teacher(tmp_path)  # trained on no named dataset
    check_class_order(cfg, summaries("cat", "cow", "dog"))


def test_classes_of_a_teachers_own_coco_format_data_are_read_from_its_file(tmp_path):
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    (tmp_path / "theirs.json").write_text(json.dumps({"categories": categories}))
    cfg = distilled_cfg(tmp_path, ["CKD"])
    # The same name as the student's data, but another file.
    for entry, expected in (
        (["own_data", str(tmp_path / "theirs.json"), "images"], ("cat", "dog")),
        (["own_data", str(tmp_path / "not_here.json"), "images"], ()),
    ):
        opts = ["DATASETS.COCO_FORMAT", [entry], "DATASETS.TRAIN", ("own_data",)]
        write_tiny_teacher(tmp_path, opts)
        assert teacher_classes(cfg, summaries("dog", "cat")) == ("own_data", expected)


@pytest.mark.parametrize("suffix", ["yaml", "py"])
def test_classes_of_a_zoo_teacher_are_cocos(tmp_path, suffix):
    name = {
        "yaml": "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
        "py": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    }[suffix]
    cfg = distilled_cfg(tmp_path, opts=["KD.TEACHER.CONFIG_FILE", name])
    dataset, classes = teacher_classes(cfg, {})
    assert dataset == "coco_2017_train" and classes[:2] == ("person", "bicycle")
    assert len(classes) == 80


@pytest.mark.parametrize("command", [["--check"], []])
def test_both_training_and_check_look_at_class_and_channel_order(tmp_path, capfd, caplog, command):
    data = make_synthetic(tmp_path / "data", 2, 1, image_size=(64, 64))
    content = json.loads((data / "train.json").read_text())
    for category in content["categories"]:
        category["id"] = 9 - category["id"]
    (data / "reversed.json").write_text(json.dumps(content))
    name, opts = f"train_{tmp_path.name}", ["MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)]
    cfg = distilled_cfg(
        tmp_path, ["CKD"], [*opts, "INPUT.FORMAT", "RGB", "DATASETS.TRAIN", (name,)]
    )
    cfg.DATASETS.COCO_FORMAT = [[name, str(data / "train.json"), str(data / "train")]]
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = (), str(tmp_path / "run")
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1, ()
    path = tmp_path / "run.yaml"
    path.write_text(cfg.dump())
    for file, code, words in (
        ("train.json", 0, ["INPUT.FORMAT is RGB for the student"]),
        ("reversed.json", 2, ["class 0 is 'disc'", "'cross'"]),
    ):
        entry = [["of_the_teacher", str(data / file), str(data / "train")]]
        trained_on = ["DATASETS.COCO_FORMAT", entry, "DATASETS.TRAIN", ("of_the_teacher",)]
        write_tiny_teacher(tmp_path, [*opts, *trained_on])
        output = ["OUTPUT_DIR", str(tmp_path / file)]
        assert main(["--config-file", str(path), *command, *output]) == code
        captured = capfd.readouterr()
        said = captured.out + captured.err + caplog.text
        for word in words:
            assert word in said, said


# ---- resume ----


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


# ---- values ----


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["KD.SCHEDULE.WARMUP_ITERS", -1], ["KD.SCHEDULE.WARMUP_ITERS", "-1"]),
        (["KD.SCHEDULE.STOP_ITER", -5], ["KD.SCHEDULE.STOP_ITER", "-5"]),
        (["KD.SCHEDULE.DECAY", "step"], ["KD.SCHEDULE.DECAY", "step", "cosine"]),
        (
            ["KD.SCHEDULE.STOP_ITER", 5, "KD.SCHEDULE.WARMUP_ITERS", 9],
            ["KD.SCHEDULE.STOP_ITER is 5", "KD.SCHEDULE.WARMUP_ITERS is 9"],
        ),
    ],
)
def test_schedule_that_cannot_work_is_refused(opts, words):
    with pytest.raises(ConfigError) as error:
        DistillationSchedule(None, tiny_cfg(opts).KD.SCHEDULE, max_iter=20)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("distiller", "key", "value"),
    [
        ("CKD", "KD.CKD.TEMPERATURE", 0.0),
        ("CKD", "KD.CKD.TEMPERATURE", -1.0),
        ("CKD", "KD.CKD.TEMPERATURE", float("nan")),
        ("CKD", "KD.CKD.GROUP_SIZE", -4),
        ("CKD", "KD.CKD.CHUNK_SIZE", -1),
        ("CKD", "KD.CKD.WEIGHT", float("inf")),
        ("ReviewKD", "KD.REVIEWKD.MID_CHANNELS", 0),
        ("KD", "KD.KD.TEMPERATURE", 0.0),
        ("DKD", "KD.DKD.TEMPERATURE", float("inf")),
        ("DKD", "KD.DKD.ALPHA", -1.0),
        ("DKD", "KD.DKD.BETA", float("nan")),
        ("FGFI", "KD.FGFI.PSI", -0.5),
        ("DCD", "KD.DCD.EMBED_DIM", 0),
        ("DCD", "KD.DCD.CONSISTENCY_WEIGHT", -1.0),
        ("BicKD", "KD.BICKD.TEMPERATURE", 0.0),
        ("BicKD", "KD.BICKD.CONTRAST_TEMPERATURE", 0.0),
        ("BicKD", "KD.BICKD.CONTRAST_WEIGHT", float("nan")),
        ("SupCon", "KD.SUPCON.TEMPERATURE", 0.0),
        ("CRD", "KD.CRD.TEMPERATURE", -0.1),
        ("CRD", "KD.CRD.EMBED_DIM", 0),
    ],
)
def test_value_that_cannot_work_is_refused_before_the_teacher_is_built(
    tmp_path, distiller, key, value
):
    # The teacher's config does not exist: the value must be looked at first.
    opts = [key, value, "KD.TEACHER.CONFIG_FILE", "no_such_teacher.yaml"]
    with pytest.raises(ConfigError) as error:
        build_model(distilled_cfg(tmp_path, [distiller], opts))
    assert key in str(error.value) and str(value) in str(error.value)


def test_unknown_option_of_a_distiller_is_refused_with_the_near_ones():
    with pytest.raises(
        ConfigError, match="KD.CKD has no option TEMPRATURE; did you mean TEMPERATU"
    ):
        build_distiller("CKD", {"TEMPRATURE": 2.0}, ModelSpec(), ModelSpec())
