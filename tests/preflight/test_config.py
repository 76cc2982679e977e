"""A meta-architecture that distils nothing, and values that cannot work, are refused."""

import pytest
from detectron2.modeling import build_model
from tiny import distilled_cfg, tiny_cfg

from kd_detectron.distillers import ModelSpec, build_distiller
from kd_detectron.engine.main import main
from kd_detectron.engine.schedule import DistillationSchedule
from kd_detectron.errors import ConfigError
from kd_detectron.preflight.config import check_meta_architecture


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


def test_inheriting_into_a_detector_that_does_not_read_it_is_refused(tmp_path):
    opts = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "KD.TEACHER.INHERIT", ["auto"]]
    with pytest.raises(ConfigError, match="KD.TEACHER.INHERIT is .*auto.*DistilledRCNN"):
        check_meta_architecture(distilled_cfg(tmp_path, distillers=(), opts=opts))


def test_distillers_switched_off_are_no_matter(tmp_path):
    opts = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "KD.ENABLED", False]
    check_meta_architecture(distilled_cfg(tmp_path, opts=opts))


def test_debug_shows_the_traceback_of_a_users_error(tmp_path):
    cfg = distilled_cfg(tmp_path, opts=["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])
    (tmp_path / "run.yaml").write_text(cfg.dump())
    with pytest.raises(ConfigError, match="distils nothing"):
        main(["--config-file", str(tmp_path / "run.yaml"), "--check", "--debug"])


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
