import shutil
from types import SimpleNamespace

import pytest
import torch

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.models import (
    LoadedModel,
    choose_records,
    dataset_records,
    find_records,
    load_models,
    load_run_student,
    match_test_size,
)


@pytest.fixture
def teacher_opts(write_trained_run):
    folder = write_trained_run("teacher", depth=101, seed=7, ap=[40.0])
    return ["KD.TEACHER.WEIGHTS", str(folder / "student_final.pth")], str(folder / "config.yaml")


def test_student_is_loaded_from_its_run_without_a_teacher(write_trained_run):
    folder = write_trained_run(
        "run", distillers=["CKD"], ap=[37.04], teacher="no_such_teacher.yaml"
    )
    student = load_run_student(folder)
    assert (student.label, student.ap) == ("CKD R50", "37.0 box AP")
    assert not student.model.training
    saved = torch.load(folder / "student_final.pth")["model"]
    loaded = student.model.state_dict()
    assert all(torch.equal(loaded[key], saved[key]) for key in saved)


def test_teacher_is_the_one_that_the_run_names(write_trained_run, teacher_opts):
    opts, config = teacher_opts
    folder = write_trained_run("run", distillers=["CKD"], teacher=config, opts=opts)
    teacher = load_models([folder])[0]
    assert (teacher.label, teacher.ap) == ("teacher R101", "40.0 box AP")
    saved = torch.load(opts[1])["model"]
    assert torch.equal(
        teacher.model.state_dict()["backbone.fpn_lateral2.weight"],
        saved["backbone.fpn_lateral2.weight"],
    )


def test_detections_are_in_pixels_of_the_image_file(write_trained_run):
    student = load_run_student(write_trained_run("run", opts=["INPUT.MIN_SIZE_TEST", 96]))
    records, _ = dataset_records(student.cfg)
    assert student.inputs(records[0])["image"].shape == (3, 96, 128)
    found = student.detect(records[0])
    assert found.image_size == (48, 64) and len(found) > 0
    assert found.pred_boxes.tensor[:, 2].max() <= 64


def test_image_is_read_in_the_models_channel_order(write_trained_run):
    bgr = load_run_student(write_trained_run("bgr", opts=["INPUT.FORMAT", "BGR"]))
    rgb = load_run_student(write_trained_run("rgb", opts=["INPUT.FORMAT", "RGB"]))
    records, _ = dataset_records(bgr.cfg)
    image = rgb.inputs(records[0])["image"]
    assert torch.equal(bgr.inputs(records[0])["image"], image.flip(0))


def test_image_larger_than_the_square_that_a_model_pads_to_is_made_smaller(write_trained_run):
    student = load_run_student(write_trained_run("run", opts=["INPUT.MAX_SIZE_TEST", 128]))
    for square, size in ((0, 128), (256, 128), (96, 96)):
        backbone = SimpleNamespace(padding_constraints={"square_size": square})
        vitdet = LoadedModel("ViTDet", SimpleNamespace(backbone=backbone), student.cfg.clone())
        match_test_size(vitdet, student.cfg)
        found = vitdet.cfg.INPUT.MAX_SIZE_TEST
        assert found == size


def test_run_without_checkpoint_gets_one_sentence(write_run):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        load_run_student(write_run("run"))


def test_checkpoint_of_another_model_is_refused(write_trained_run):
    folder = write_trained_run("run")
    other = write_trained_run("other", depth=101)
    shutil.copy(folder / "student_final.pth", other)
    with pytest.raises(ConfigError, match=r"does not fit the run's config\.yaml"):
        load_run_student(other)


def test_records_are_chosen_reproducibly_and_found_by_name(write_trained_run):
    records, names = dataset_records(load_run_student(write_trained_run("run")).cfg)
    assert names == ["cat", "dog", "hen"]
    chosen = choose_records(records, 3, seed=1)
    assert chosen == choose_records(records, 3, seed=1) and len(chosen) == 3
    assert len(choose_records(records, 99)) == 6
    assert find_records(records, ["4.png", "3"]) == [records[4], records[2]]
    with pytest.raises(ConfigError, match=r"no image of the dataset is called '44\.png'"):
        find_records(records, ["44.png"])


def test_image_of_a_name_that_several_folders_have_is_told_by_its_folder():
    records = [
        {"file_name": f"data/{name}.png", "image_id": number}
        for number, name in enumerate(["a/1", "b/1", "b/2"])
    ]
    found = find_records(records, ["a/1.png", "/home/data/b/1.png", "2.png", "data/a/1.png", "1"])
    assert [record["image_id"] for record in found] == [0, 1, 2, 0, 1]
    with pytest.raises(ConfigError, match=r"'1\.png' may be data/a/1\.png or data/b/1\.png; give"):
        find_records(records, ["1.png"])
    with pytest.raises(ConfigError, match=r"is called 'c/2\.png'; did you mean 2\.png"):
        find_records(records, ["c/2.png"])


def test_unknown_dataset_gets_one_sentence(write_trained_run):
    cfg = load_run_student(write_trained_run("run")).cfg
    with pytest.raises(ConfigError, match=r"coco_2017_vall.*did you mean"):
        dataset_records(cfg, "coco_2017_vall")
