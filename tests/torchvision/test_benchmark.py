"""The benchmark on torchvision's detectors: which parts it times, and its command."""

import json

import pytest

from kd_detectron.torchvision.benchmark import _HALF, main

COMMAND = [
    "--student",
    "fasterrcnn_mobilenet_v2_fpn",
    "--teacher",
    "fasterrcnn_resnet18_fpn",
    "--images",
    "1",
    "--size",
    "64",
    "96",
    "--classes",
    "3",
    "--repeats",
    "2",
    "--train",
    "a",
    "b",
    "--val",
    "a",
    "b",
    "--output",
    "c",
]
SMALL = ["--student-options", "{min_size: 64, out_channels: 8, box_batch_size_per_image: 16}"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_parts_are_what_the_distilled_step_runs(tmp_path, capsys, precision):
    file = tmp_path / "report.json"
    more = ["--precision", precision, "--json", str(file), "--distillers", "CKD=0.1", "PKD"]
    assert main([*COMMAND, *SMALL, *more]) == 0
    assert "overhead ratio" in capsys.readouterr().out
    report = json.loads(file.read_text())
    teacher = ["teacher backbone", "teacher box head", "teacher predictor"]
    assert list(report["parts"]) == ["student step", *teacher, "CKD", "PKD", "distilled step"]
    assert all(len(part["seconds"]) == 2 for part in report["parts"].values())
    assert report["batch"] == {"images": 1, "height": 64, "width": 96, "proposals": 16}
    assert report["ratios"]["overhead"]["median"] > 0


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_half_precision_has_lightnings_short_names_too(precision):
    assert _HALF[precision] is _HALF[f"{precision}-mixed"]


def test_mask_rcnn_has_masks_to_learn_and_keypoint_rcnn_is_refused(tmp_path, capsys):
    file, distillers = tmp_path / "report.json", ["--distillers", "CKD=0.1"]
    masks = ["--student", "maskrcnn_mobilenet_v2_fpn", "--json", str(file)]
    assert main([*COMMAND, *SMALL, *masks, *distillers]) == 0
    assert json.loads(file.read_text())["name"].startswith("maskrcnn")
    capsys.readouterr()
    keypoints = ["--student", "keypointrcnn_resnet50_fpn"]
    assert main([*COMMAND, *keypoints, *distillers]) == 2
    assert "there are no synthetic keypoints" in capsys.readouterr().err


def test_without_distillers_there_is_nothing_to_compare(capsys):
    assert main([*COMMAND, *SMALL]) == 2
    assert "name both" in capsys.readouterr().err
