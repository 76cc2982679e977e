"""Training on torchvision's detectors: run folder, resuming, command, what is refused."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from run_folders_torchvision import SMALL, options, tiny_data  # noqa: F401

from kd_detectron.data.synthetic import SYNTHETIC_CLASSES
from kd_detectron.errors import ConfigError
from kd_detectron.runs.run import load_run, torchvision_name
from kd_detectron.runs.tables import build_table, load_teacher
from kd_detectron.torchvision import training
from kd_detectron.torchvision.classes import check_class_order
from kd_detectron.torchvision.data import (
    BatchesByIteration,
    DetectionData,
    train_loader,
    trainable,
)
from kd_detectron.torchvision.data import test_loader as data_loader
from kd_detectron.torchvision.main import build_parser, main, read_options
from kd_detectron.torchvision.models import build_detector
from kd_detectron.torchvision.options import TrainingOptions
from kd_detectron.torchvision.training import build_model, build_trainer, train
from kd_detectron.visualize.curves import plot_curves


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory):  # noqa: F811
    """Folders of a teacher, a baseline and a distilled student, each trained for four steps."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = {"student": "fasterrcnn_resnet18_fpn", "student_options": {**SMALL, "network": {}}}
    distilled = {
        "teacher_run": str(folder / "teacher"),
        "distillers": {"CKD": 0.1, "ReviewKD": {"weight": 0.2, "mid_channels": 8}},
        "inherit": ("roi_heads",),
    }
    for name, extra in {"teacher": teacher, "baseline": {}, "ckd_reviewkd": distilled}.items():
        train(options(tiny_data, folder / name, **extra))
    return folder


def test_run_folder_is_read_as_those_of_detectron2(runs):
    run = load_run(runs / "ckd_reviewkd")
    expected = ("inherited+CKD+ReviewKD", "R18-MV2x0.25", "Faster R-CNN")
    assert (run.method, run.pair, run.detector) == expected
    assert run.finished and run.iterations == 4 and run.seed == 0 and run.seconds > 0
    assert "AP" in run.results["bbox"] and run.test_dataset == "val"
    assert {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_ckd",
            "loss_reviewkd", "total_loss"} == set(run.loss_names())  # fmt: skip
    assert run.series("loss_ckd")[0] == [1, 3] and run.series("bbox/AP")[0] == [2, 4]
    losses = run.history[3]
    total = sum(value for name, value in losses.items() if name.startswith("loss_"))
    assert losses["total_loss"] == pytest.approx(total)
    table = build_table(
        [load_run(runs / "baseline"), run], teachers=[load_teacher(runs / "teacher")]
    )
    assert [row.method for row in table.rows] == ["teacher", "baseline", expected[0]]
    assert "box gain" in table.rows[2].values and not any("differ" in note for note in table.notes)
    assert plot_curves({"baseline": [load_run(runs / "baseline")], "distilled": [run]}).axes
    assert run.teacher_folder == runs / "teacher"


def test_final_weights_are_the_plain_students(runs):
    config = yaml.safe_load((runs / "ckd_reviewkd" / "config.yaml").read_text())
    node = config["MODEL"]["TORCHVISION"]
    weights = str(runs / "ckd_reviewkd" / "model_final.pth")
    build_detector(
        node["DETECTOR"], len(SYNTHETIC_CLASSES), weights=weights, options=node["OPTIONS"]
    )


def test_inherited_parts_stay_as_the_teachers_at_a_learning_rate_of_zero(
    runs,
    tiny_data,  # noqa: F811
    tmp_path,
):
    own = {"inherit": ("roi_heads",), "inherit_lr_factor": 0.0}
    train(options(tiny_data, tmp_path, teacher_run=str(runs / "teacher"), **own))
    student, teacher, baseline = (
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (tmp_path, runs / "teacher", runs / "baseline")
    )
    for name, tensor in student.items():
        if name.startswith("roi_heads"):
            assert torch.equal(tensor, teacher[name]), name
    name = "rpn.head.cls_logits.weight"
    assert not torch.equal(student[name], teacher[name])
    assert student.keys() == baseline.keys()


def test_a_folder_that_holds_a_run_is_not_overwritten(runs, tiny_data):  # noqa: F811
    with pytest.raises(ConfigError, match="--resume"):
        train(options(tiny_data, runs / "baseline"), resume=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tiny_data, tmp_path, capsys):  # noqa: F811
    arguments = command(tiny_data, tmp_path / "run", "--learning-rate", "1e30", "--warmup", "0")
    assert main(arguments) == 1
    assert "is not finite at iteration" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_stops_a_training_is_told_from_a_mistake_of_the_user(
    tiny_data,  # noqa: F811
    tmp_path,
    capsys,
    workers,
):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    image = sorted((data / "train").iterdir())[0]
    image.write_bytes(image.read_bytes()[:100])
    assert main(command(data, tmp_path / "run", "--workers", workers)) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f"the image {image} cannot be read: " in said[0]
    (tmp_path / "file").touch()
    for wrong in (
        ["--output", str(tmp_path / "file" / "run")],
        ["--train", str(data), str(data / "train")],
    ):
        assert main(command(data, tmp_path / "run", *wrong)) == 2
        assert capsys.readouterr().err.startswith("error: ")


def command(data, output, *more):
    return [
        *("--train", str(data / "train.json"), str(data / "train")),
        *("--val", str(data / "val.json"), str(data / "val")),
        *("--student", "fasterrcnn_mobilenet_v2_fpn", "--student-options", json.dumps(SMALL)),
        *("--output", str(output), "--iterations", "4", "--batch-size", "2", "--workers", "0"),
        *more,
    ]


def test_command_line_overrides_the_file(tmp_path):
    file = {"train": ["a.json", "a"], "val": ["b.json", "b"], "student": "x", "iterations": 7}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(file | {"output": "here", "steps": [3, 5]}))
    (tmp_path / "run.yaml").write_text("_BASE_: base.yaml\nbatch_size: 3\n")
    line = ["--config", str(tmp_path / "run.yaml"), "--iterations", "9"]
    line += ["--distillers", "CKD=0.1", "ReviewKD", "--inherit", "rpn"]
    read = read_options(build_parser().parse_args(line))
    assert (read.iterations, read.steps, read.inherit) == (9, (3, 5), ("rpn",))
    assert (read.student, read.batch_size) == ("x", 3)
    assert read.distillers == {"CKD": {"weight": 0.1}, "ReviewKD": {}}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--train", "gone.json", "images"], ["annotation file gone.json", "does not exist"]),
        (["--student", "fasterrcnn_resnet19_fpn"], ["fasterrcnn_resnet19_fpn", "did you mean"]),
        (["--student-options", "{min_sise: 3}"], ["min_sise"]),
        (["--distillers", "CKD"], ["teacher", "teacher_run"]),
        (["--distillers", "CKD=much"], ["CKD=much", "NAME=WEIGHT"]),
        (["--weights", "gone.pth"], ["gone.pth"]),
        (["--teacher-run", "gone", "--inherit", "rpn"], ["gone", "run folder"]),
        (["--teacher-run", "gone", "--teacher", "x"], ["teacher is 'x'", "teacher_run 'gone'"]),
        (["--config", "gone.yaml"], ["gone.yaml"]),
        (["--iterations", "0"], ["iterations is 0", "at least 1"]),
        (["--batch-size", "0"], ["batch_size is 0", "at least 1"]),
        (["--learning-rate", "-1"], ["learning_rate is -1", "at least 0"]),
        (["--log-period", "0"], ["log_period is 0", "at least 1"]),
        (["--precision", "bf17"], ["precision is 'bf17'", "bf16-mixed"]),
        (["--precision", "bf16-true"], ["precision is 'bf16-true'", "bf16-mixed"]),
        (["--accelerator", "foo"], ["accelerator 'foo'", "cpu"]),
        (["--accelerator", "cpu", "--devices", "0,1"], ["devices '0,1'", "int > 0"]),
        (["--student", "keypointrcnn_resnet50_fpn"], ["keypointrcnn", "DistilledDetector"]),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(tiny_data, tmp_path, capsys, more, words):  # noqa: F811
    assert main(command(tiny_data, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"iterationes": 3}, ["iterationes", "did you mean iterations"]),
        ({"output": ""}, ["output", "missing"]),
        ({"train": ["a.json"]}, ["train", "image folder"]),
        ({"iterations": "many"}, ["iterations is 'many'", "whole number"]),
        ({"iterations": 2.5}, ["iterations is 2.5", "whole number"]),
        ({"momentum": float("nan")}, ["momentum is nan", "finite"]),
        ({"steps": [10, "late"]}, ["steps is 'late'"]),
        ({"inherit": [3]}, ["inherit is [3]", "text"]),
        ({"student": ["s"]}, ["student is ['s']", "text"]),
        ({"student_options": 3}, ["student_options is 3", "mapping"]),
        ({"distillers": 3}, ["distillers is 3", "names"]),
        ({"distillers": {"CKD": "much"}}, ["CKD: 'much'", "weight"]),
    ],
)
def test_wrong_options_are_refused(values, words):
    whole = {"output": "o", "student": "s", "train": ["a", "b"], "val": ["a", "b"]}
    with pytest.raises(ConfigError) as error:
        TrainingOptions.from_mapping(whole | values)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inherit: auto", ("auto",)),
        ("inherit: [rpn, roi_heads]", ("rpn", "roi_heads")),
        ("steps: 3", (3,)),
        ("steps: [3, 1e1]", (3, 10)),
        ("iterations: 1e4", 10_000),
        ("learning_rate: 1e-3", 0.001),
        ("inherit_lr_factor: 1", 1.0),
        ("devices: 2", "2"),
        ("devices: [0, 1]", "0,1"),
        ("devices: [1]", "1,"),  # the second device, not one
        ("precision: 32", "32"),
        ("distillers: CKD", {"CKD": {}}),
        ("distillers: [CKD=0.1, ReviewKD]", {"CKD": {"weight": 0.1}, "ReviewKD": {}}),
        ("distillers: {CKD: 1e-1, PKD: }", {"CKD": 0.1, "PKD": {}}),
        ("distillers: {KD: {weight: 1e-1, x: 8}}", {"KD": {"weight": 0.1, "x": 8}}),
        ("student_options: {box_score_thresh: 5e-2}", {"box_score_thresh": 0.05}),
    ],
)
def test_values_of_a_yaml_file_are_read_as_they_are_meant(text, expected):
    given = yaml.safe_load(text)
    whole = {"output": "o", "student": "s", "train": ["a", "b"], "val": ["a", "b"]}
    value = getattr(TrainingOptions.from_mapping(whole | given), next(iter(given)))
    assert value == expected and type(value) is type(expected)


def test_several_machines_share_the_batch(tiny_data, tmp_path):  # noqa: F811
    trainer = build_trainer(options(tiny_data, tmp_path, nodes=2, batch_size=4), [])
    assert (trainer.num_nodes, trainer.world_size) == (2, 2)
    with pytest.raises(ConfigError, match="batch_size is 3 for 2 processes"):
        build_trainer(options(tiny_data, tmp_path, nodes=2, batch_size=3), [])


def test_more_processes_than_cores_are_refused(tiny_data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    two = options(tiny_data, tmp_path, accelerator="cpu", devices="2")
    with pytest.raises(ConfigError, match="devices is 2, .* CPU of 1 cores"):
        build_trainer(two, [])


@pytest.mark.parametrize(
    ("instructions", "precision", "warned"),
    [("AVX2", "bf16-mixed", True), ("AVX512", "bf16-mixed", False), ("AVX2", "32-true", False)],
)
def test_bfloat16_on_a_cpu_that_is_slow_in_it_is_warned_of(
    tiny_data,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
    instructions,
    precision,
    warned,
):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    build_trainer(options(tiny_data, tmp_path, accelerator="cpu", precision=precision), [])
    found = [r.getMessage() for r in caplog.records if "bfloat16" in r.getMessage()]
    assert len(found) == warned
    assert all("'bf16-mixed'" in text and "set precision 32-true" in text for text in found)


@pytest.mark.parametrize(("rank", "lines"), [(0, 2), (1, 0)])
def test_only_the_first_process_prints_the_results(
    tiny_data,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    rank,
    lines,
):
    from lightning.pytorch.utilities import rank_zero_only

    results = {"bbox": {"AP": 31.0, "APs": math.nan}}
    monkeypatch.setattr("kd_detectron.torchvision.training.train", lambda *_, **__: results)
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    assert main(command(tiny_data, tmp_path)) == 0
    assert len(capsys.readouterr().out.splitlines()) == lines


def test_gap_closed_is_known_where_the_teacher_was_given_by_name_and_weights(
    runs,
    tiny_data,  # noqa: F811
    tmp_path,
):
    teacher = {
        "teacher": "fasterrcnn_resnet18_fpn",
        "teacher_options": SMALL | {"network": {}},
        "teacher_weights": str(runs / "teacher" / "model_final.pth"),
    }
    by_name = options(tiny_data, tmp_path, distillers={"CKD": 0.1}, **teacher)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(by_name.config(8)))
    distilled, baseline, teacher = (
        replace(load_run(folder), results={"bbox": {"AP": ap}})
        for folder, ap in ((tmp_path, 20.0), (runs / "baseline", 10.0), (runs / "teacher", 30.0))
    )
    row = build_table([baseline, distilled], teachers=[teacher]).rows[2]
    assert (row.pair, row.values["box gap closed"].mean) == ("R18-MV2x0.25", 50.0)


def test_teachers_weights_must_fit_in_every_key(runs, tiny_data):  # noqa: F811
    weights = str(runs / "baseline" / "model_final.pth")
    wrong = options(
        tiny_data,
        "unused",
        teacher="fasterrcnn_resnet18_fpn",
        teacher_options=SMALL | {"network": {}},
        teacher_weights=weights,
        distillers={"CKD": 1.0},
    )
    with pytest.raises(ConfigError, match="keys missing"):
        build_model(wrong, 8)


@pytest.mark.parametrize(
    ("own", "warning"),
    [
        ({"teacher": "x", "teacher_weights": "x.pth"}, "teacher is 'x' but distillers and inherit"),
        ({"teacher_weights": "x.pth"}, "teacher_weights is 'x.pth' but distillers and inherit"),
        ({"teacher_run": "x"}, "teacher_run is 'x' but distillers and inherit"),
        ({"inherit_lr_factor": 0.1}, "inherit_lr_factor is 0.1 but inherit is empty"),
        ({}, None),
    ],
)
def test_options_that_change_nothing_are_warned_of(tiny_data, caplog, own, warning):  # noqa: F811
    build_model(options(tiny_data, "unused", **own), 4)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == bool(warning) and all(text.startswith(warning) for text in said)


def test_teachers_run_and_other_options_of_it_are_refused(runs, tiny_data):  # noqa: F811
    own = {"teacher_run": str(runs / "teacher"), "distillers": {"CKD": 0.1}}
    two = options(tiny_data, "unused", teacher_options={"min_size": 64}, **own)
    with pytest.raises(ConfigError, match="teacher_options .*min_size.* and teacher_run '"):
        build_model(two, 4)


def with_other_names(data, folder, names):
    """Copies of the annotation files with these names of the categories."""
    folder.mkdir()
    for split in ("train", "val"):
        content = json.loads((data / f"{split}.json").read_text())
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name
        (folder / f"{split}.json").write_text(json.dumps(content))
        (folder / split).symlink_to(data / split)
    return folder


def test_teacher_of_another_class_order_is_refused(runs, tiny_data, tmp_path):  # noqa: F811
    names = list(SYNTHETIC_CLASSES)
    data = with_other_names(tiny_data, tmp_path / "data", names[::-1])
    own = {"teacher_run": str(runs / "teacher"), "distillers": {"KD": 1.0}}
    with pytest.raises(ConfigError) as error:
        train(options(data, tmp_path / "run", **own))
    assert all(word in str(error.value) for word in (f"'{names[0]}'", f"'{names[-1]}'", "KD", "1"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("own", "refused"),
    [
        ({"distillers": {"PKD": {}}, "inherit": ("rpn",)}, False),
        ({"distillers": {"BoxKD": {}}}, True),
        ({"inherit": ("roi_heads.box_predictor",)}, True),
        ({"inherit": ("auto",)}, True),
        ({"inherit": ("roi_heads.box_head",)}, False),
    ],
)
def test_class_order_matters_to_what_goes_class_by_class(runs, tiny_data, tmp_path, own, refused):  # noqa: F811
    teacher = shutil.copytree(runs / "teacher", tmp_path / "teacher")
    model = build_model(options(tiny_data, "unused", teacher_run=str(teacher), **own), 4)
    names = [name.upper() for name in SYNTHETIC_CLASSES]
    check_class_order(model, names, str(teacher))
    if refused:
        with pytest.raises(ConfigError, match="class 1 is"):
            check_class_order(model, names[::-1], str(teacher))
    else:
        check_class_order(model, names[::-1], str(teacher))
    config = yaml.safe_load((teacher / "config.yaml").read_text())
    del config["DATASETS"]["TRAIN_CLASSES"]  # which earlier versions did not write
    (teacher / "config.yaml").write_text(yaml.safe_dump(config))
    check_class_order(model, names[::-1], str(teacher))


def test_teacher_that_torchvision_has_trained_keeps_its_own_classes(tiny_data, monkeypatch):  # noqa: F811
    given = {}

    def build(name, num_classes, **_):
        given[name] = num_classes

    monkeypatch.setattr(training, "build_detector", build)
    teacher = {"teacher": "fasterrcnn_resnet50_fpn", "teacher_weights": "COCO_V1"}
    training.build_teacher(options(tiny_data, "unused", distillers={"PKD": {}}, **teacher), 8)
    assert given == {"fasterrcnn_resnet50_fpn": None}


def test_batches_are_a_function_of_seed_and_iteration_and_shared_out():
    whole = list(BatchesByIteration(7, 4, 5, seed=3))
    assert [len(batch) for batch in whole] == [4] * 5 and len(
        BatchesByIteration(7, 4, 5, seed=3)
    ) == 5
    positions, indices = zip(*sum(whole, []), strict=True)
    assert positions == tuple(range(20)) and sorted(indices[:7]) == list(range(7))
    assert list(BatchesByIteration(7, 4, 5, seed=3, start=2)) == whole[2:]
    halves = [list(BatchesByIteration(7, 4, 5, seed=3, rank=r, world_size=2)) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(x) for x in whole]


@pytest.mark.parametrize("workers", [0, 1])
def test_flips_are_a_function_of_seed_and_position(tiny_data, workers):  # noqa: F811
    data = DetectionData(tiny_data / "train.json", tiny_data / "train", training=True)

    def images(seed, start=0, **share):
        batches = BatchesByIteration(len(data), 2, 12, seed=seed, start=start, **share)
        return [image for batch, _ in train_loader(data, batches, workers) for image in batch]

    whole = images(5)
    assert any(torch.equal(one, other.flip(-1)) for one in whole for other in whole)
    for part, same in (
        (images(5, start=3), whole[6:]),
        (images(5, rank=1, world_size=2), whole[1::2]),
    ):
        assert all(torch.equal(one, other) for one, other in zip(part, same, strict=True))


def coco_file(folder, annotations):
    """Three images of 40x30 pixels, the classes cat (3) and dog (7), and these annotations."""
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (40, 30)).save(folder / f"{number}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(3)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


def test_data_numbers_classes_from_one_and_keeps_crowds_from_training(tmp_path):
    box = {"area": 100, "iscrowd": 0, "segmentation": [[1, 1, 11, 1, 11, 11]]}
    annotations = [
        box | {"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 2, 10, 11]},
        box | {"id": 2, "image_id": 0, "category_id": 3, "bbox": [5, 5, 0, 8]},
        box | {"id": 3, "image_id": 1, "category_id": 3, "bbox": [5, 5, 9, 8], "iscrowd": 1},
    ]
    annotations[2]["segmentation"] = {"counts": [0, 1200], "size": [30, 40]}
    file = coco_file(tmp_path, annotations)
    train_data = DetectionData(file, tmp_path, training=True)
    val = DetectionData(file, tmp_path, training=False)
    assert val.class_names == ["cat", "dog"] and (len(train_data), len(val)) == (1, 3)
    image, target = val[0]
    assert image.dtype == torch.float32 and image.shape == (3, 30, 40)
    assert target["boxes"][0].tolist() == [1, 2, 11, 13] and target["labels"].tolist() == [2, 1]
    assert trainable(target)["labels"].tolist() == [2]
    assert val[2][1]["boxes"].shape == (0, 4) and val[2][1]["labels"].dtype == torch.long


OBJECT = {"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 2, 10, 11]}


def test_objects_without_iscrowd_or_area_are_no_crowd_and_as_large_as_their_box(tmp_path):
    crowd = OBJECT | {"id": 2, "iscrowd": 1, "area": 50}
    target = DetectionData(coco_file(tmp_path, [OBJECT, crowd]), tmp_path, training=True)[0][1]
    assert target["iscrowd"].tolist() == [0, 1] and target["area"].tolist() == [110, 50]
    assert len(trainable(target)["labels"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"category_id": 5}, ["id 1", "category_id 5", "categories"]),
        ({"bbox": [1, 2, 3]}, ["id 1", "bbox [1, 2, 3]", "width"]),
        ({"bbox": [1, 2, 3, "4"]}, ["id 1", "bbox [1, 2, 3, '4']", "width"]),
        ({"segmentation": []}, ["id 1", "segmentation", "Mask R-CNN"]),
    ],
)
def test_annotations_that_cannot_be_used_are_named(tmp_path, change, words):
    file = coco_file(tmp_path, [OBJECT | change])
    with pytest.raises(ConfigError) as error:
        DetectionData(file, tmp_path, training=True, masks="segmentation" in change)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_repeated_ids_are_named(tmp_path, key):
    file = coco_file(tmp_path, [OBJECT, OBJECT | {"id": 2, "image_id": 1}])
    content = json.loads(file.read_text())
    content[key][1]["id"] = content[key][0]["id"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"a\.json: 2 of the {key} have the id \d; give"):
        DetectionData(file, tmp_path, training=True)


def test_image_and_masks_are_turned_as_the_images_exif_orientation_says(tmp_path):
    from PIL import Image

    shown = Image.new("RGB", (30, 40))
    shown.paste((255, 255, 255), (2, 5, 12, 25))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    corners = [2, 5, 12, 5, 12, 25, 2, 25]
    file = coco_file(tmp_path, [OBJECT | {"bbox": [2, 5, 10, 20], "segmentation": [corners]}])
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "0.png", exif=exif)
    content = json.loads(file.read_text())
    content["images"][0] |= {"width": 30, "height": 40}
    file.write_text(json.dumps(content))
    image, target = DetectionData(file, tmp_path, training=False, masks=True)[0]
    assert image.shape == (3, 40, 30)
    assert torch.equal(target["masks"][0].bool(), image[0] == 1)
    assert target["boxes"].tolist() == [[2, 5, 12, 25]]
    content["images"][0] |= {"width": 40, "height": 30}
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"0\.png is \(30, 40\) .* annotated as \(40, 30\)"):
        DetectionData(file, tmp_path, training=False)[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"annotations": [{}]}'])
def test_file_that_is_not_in_coco_format_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="a.json is not in COCO format"):
        DetectionData(tmp_path / "a.json", tmp_path, training=False)


class InterruptsAreIgnored(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return signal.getsignal(signal.SIGINT) is signal.SIG_IGN, {}


def test_interrupts_of_a_terminal_leave_the_processes_that_read_images():
    (images, _), *_ = data_loader(InterruptsAreIgnored(), 1, 1, range(1))
    assert images == [True]


def test_short_names():
    half = {"network": {"width_mult": 0.5}}
    assert torchvision_name("fasterrcnn_resnet50_fpn_v2") == "R50"
    assert torchvision_name("fasterrcnn_mobilenet_v3_large_320_fpn") == "MV3"
    assert torchvision_name("fasterrcnn_mobilenet_v2_fpn", half) == "MV2x0.5"
    assert torchvision_name("retinanet_regnet_y_400mf_fpn") == "regnet_y_400mf"
