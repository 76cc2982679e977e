import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from kd_detectron.runs.groups import named_groups
from kd_detectron.runs.run import load_run
from kd_detectron.visualize import main
from kd_detectron.visualize.main import main as visualize
from kd_detectron.visualize.models import dataset_records, load_models


@pytest.fixture
def runs(write_trained_run):
    """A teacher, a baseline, and a distilled run that names the teacher."""
    teacher = write_trained_run("teacher", depth=101, seed=5, ap=[40.0])
    metrics = [{"iteration": 9, "bbox/AP": 1.0, "total_loss": 2.0}]
    baseline = write_trained_run("baseline", ap=[30.0], metrics=metrics)
    weights = ["KD.TEACHER.WEIGHTS", str(teacher / "student_final.pth")]
    distilled = write_trained_run(
        "distilled",
        distillers=["CKD"],
        teacher=str(teacher / "config.yaml"),
        opts=weights,
        ap=[34.0],
        seed=3,
        metrics=metrics,
    )
    return [str(path) for path in (teacher, baseline, distilled)]


@pytest.mark.parametrize(
    "command",
    [
        ["predictions", "--count", "2", "--threshold", "0.1"],
        ["predictions", "--seed", "3"],
        ["cam", "--count", "1"],
        ["features", "--images", "3.png", "1.png"],
        ["ap"],
        ["curves"],
    ],
    ids=" ".join,
)
def test_every_subcommand_writes_its_picture(runs, command, tmp_path, capsys, check_picture):
    output = tmp_path / "pictures" / "picture.png"
    _, baseline, distilled = runs
    name, *options = command
    assert visualize([name, baseline, distilled, "--output", str(output), *options]) == 0
    check_picture(output)
    assert str(output) in capsys.readouterr().out


def test_teacher_can_be_named(runs, tmp_path):
    teacher, baseline, _ = runs
    output = str(tmp_path / "picture.png")
    assert visualize(["features", baseline, "--teacher", teacher, "--output", output]) == 0
    assert visualize(["curves", baseline, "--teacher", teacher, "--output", output]) == 0


def test_teacher_s_run_is_found_by_itself_and_is_no_method(runs, tmp_path, monkeypatch):
    drawn = {}

    def plot(groups, path, *, teacher_ap):
        drawn.update(groups=groups, teacher_ap=teacher_ap)
        path.write_text("")

    monkeypatch.setattr(main, "plot_ap", plot)
    output = ["--output", str(tmp_path / "p.png")]
    for given in (runs, runs[1:]):
        assert visualize(["ap", *given, *output]) == 0
        assert drawn["teacher_ap"] == {"bbox": 40.0}
        assert list(drawn["groups"]) == ["baseline", "CKD"]
    assert visualize(["ap", *runs[:2], *output]) == 0
    assert drawn["teacher_ap"] == {} and len(drawn["groups"]) == 2


def test_all_pictures_call_a_method_by_the_same_name(runs):
    models = load_models(runs)
    assert [model.label for model in models] == ["teacher R101", "baseline", "CKD"]
    assert [model.is_teacher for model in models] == [True, False, False]
    assert list(named_groups([load_run(run) for run in runs]))[1:] == ["baseline", "CKD"]


LAZY_TEACHER = """
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config

model = get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stages.norm = "BN"
del model.backbone.bottom_up.stages["stride_in_1x1"]
model.backbone.out_channels = 16
model.proposal_generator.head.in_channels = 16
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.roi_heads.num_classes = 3
model.roi_heads.box_head.input_shape = ShapeSpec(channels=16, height=7, width=7)
model.roi_heads.box_head.fc_dims = [16]
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=16)
model.roi_heads.mask_in_features = None
model.input_format = "RGB"
"""


@pytest.fixture
def lazy_teacher(tmp_path):
    """A LazyConfig with the levels of the students, and its checkpoint."""
    config, weights = tmp_path / "lazy_teacher.py", tmp_path / "lazy.pth"
    config.write_text(LAZY_TEACHER)
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(config)).model)
    torch.save({"model": model.state_dict()}, weights)
    return str(config), str(weights)


@pytest.mark.parametrize("command", ["predictions", "features"])
def test_lazy_config_teacher_is_drawn(
    write_trained_run, lazy_teacher, tmp_path, command, check_picture
):
    config, weights = lazy_teacher
    opts = ["KD.TEACHER.WEIGHTS", weights]
    run = write_trained_run("distilled", distillers=["CKD"], teacher=config, opts=opts)
    output = tmp_path / "picture.png"
    assert visualize([command, str(run), "--count", "2", "--output", str(output)]) == 0
    check_picture(output)


def test_lazy_config_teacher_reads_images_in_its_own_channel_order(
    write_trained_run, lazy_teacher, tmp_path
):
    config, weights = lazy_teacher
    opts = ["INPUT.FORMAT", "BGR", "KD.TEACHER.WEIGHTS", weights]
    run = write_trained_run("run", distillers=["CKD"], teacher=config, opts=opts)
    teacher, student = load_models([run])
    assert teacher.label == "teacher lazy_teacher"
    record = dataset_records(student.cfg)[0][0]
    assert torch.equal(teacher.inputs(record)["image"], student.inputs(record)["image"].flip(0))


def test_user_error_is_one_sentence_and_exit_code_2(runs, tmp_path, capsys):
    baseline = runs[1]
    output = ["--output", str(tmp_path / "picture.png")]
    assert visualize(["features", baseline, *output]) == 2
    assert "give --teacher" in capsys.readouterr().err
    assert not (tmp_path / "picture.png").exists()
