"""Labels from a teacher: a COCO-format file that trains, whatever happens while it is written."""

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import Boxes, Instances
from tiny import tiny_cfg, write_tiny_teacher
from torch import nn

from kd_detectron.data import build_train_loader, register_coco_format
from kd_detectron.errors import ConfigError
from kd_detectron.labelling.labels import (
    categories_of,
    find_images,
    label_images,
    parse_thresholds,
    teacher_cfg_from,
)
from kd_detectron.labelling.main import main
from kd_detectron.preflight.data import check_datasets

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 5, "name": "white"}, {"id": 9, "name": "plate"}]
NAMES = [category["name"] for category in CATEGORIES]


class FixedDetector(nn.Module):
    """Finds three objects, of scores 0.9, 0.6 and 0.3 and classes 0, 1 and 2, in every image."""

    num_classes = 3

    def __init__(self, *, masks=False, fail_after=None):
        super().__init__()
        self.masks, self.fail_after, self.seen = masks, fail_after, []

    def forward(self, batch):
        outputs = []
        for record in batch:
            if self.fail_after is not None and len(self.seen) >= self.fail_after:
                raise KeyboardInterrupt
            self.seen.append(record["name"])
            found = Instances((record["height"], record["width"]))
            found.pred_boxes = Boxes(torch.tensor([[2.0, 3, 8, 7]] * 3))
            found.scores = torch.tensor([0.9, 0.6, 0.3])
            found.pred_classes = torch.arange(3)
            if self.masks:
                found.pred_masks = torch.zeros(3, *found.image_size, dtype=torch.bool)
                found.pred_masks[:2, 3:6, 2:8] = True
            outputs.append({"instances": found})
        return outputs


@pytest.fixture
def folder(tmp_path):
    """Five images, one of them in a folder of its own."""
    for number in range(5):
        path = tmp_path / "images" / ("more" if number == 4 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(path), pixels)
    return str(tmp_path / "images")


def run(model, folder, output, *, images=None, thresholds=("0.5",), **options):
    written = label_images(
        model,
        DatasetMapper(is_train=False, augmentations=[], image_format="BGR"),
        find_images(folder) if images is None else images,
        str(output),
        categories=CATEGORIES,
        thresholds=parse_thresholds(thresholds, NAMES),
        source="a teacher",
        workers=0,
        batch_size=2,
        **options,
    )
    assert written == json.loads(Path(output).read_text())
    return written


def test_labels_above_the_threshold_are_written_with_score_and_own_category_ids(folder, tmp_path):
    coco = run(FixedDetector(), folder, tmp_path / "out.json")
    assert [each["category_id"] for each in coco["annotations"]] == [3, 5] * 5
    assert [image["file_name"] for image in coco["images"]][-1] == "more/4.png"
    assert coco["images"][0] == {"id": 1, "file_name": "0.png", "height": 48, "width": 64}
    assert [each["id"] for each in coco["annotations"]] == list(range(1, 11))
    first = coco["annotations"][0]
    assert first["bbox"] == [2, 3, 6, 4] and first["area"] == 24 and first["iscrowd"] == 0
    assert (first["category_id"], first["score"]) == (3, 0.9)
    assert coco["categories"] == CATEGORIES
    assert coco["info"]["score_threshold"] == dict.fromkeys(NAMES, 0.5)


def test_each_class_can_have_its_own_threshold(folder, tmp_path):
    coco = run(FixedDetector(), folder, tmp_path / "o.json", thresholds=("0.95", "plate=0.2"))
    assert {each["category_id"] for each in coco["annotations"]} == {9}


def test_thresholds_that_cannot_be_meant_are_refused():
    assert parse_thresholds(["a=0.1", "0.4"], ["a", "b"]) == {"a": 0.1, "b": 0.4}
    assert parse_thresholds(["a=0.1"], ["a", "b"]) == {"a": 0.1, "b": 0.5}
    for values, message in (
        (["1.5"], "from 0 to 1"),
        (["high"], "from 0 to 1"),
        (["0.5", "rad=0.3"], "did you mean red"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_thresholds(values, NAMES)


def test_masks_are_written_as_rle_and_empty_ones_left_out(folder, tmp_path):
    model = FixedDetector(masks=True)
    coco = run(model, folder, tmp_path / "out.json", thresholds=("0.1",))
    assert len(coco["annotations"]) == 10  # The third object's mask has no pixel.
    mask = coco["annotations"][0]["segmentation"]
    assert mask["size"] == [48, 64] and isinstance(mask["counts"], str)
    assert coco["annotations"][0]["area"] == 18


def test_interrupted_run_goes_on_and_gives_the_same_file(folder, tmp_path):
    whole = run(FixedDetector(), folder, tmp_path / "whole.json")
    with pytest.raises(KeyboardInterrupt):
        run(FixedDetector(fail_after=3), folder, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    with open(tmp_path / "out.json.partial", "a") as file:
        file.write('{"id": 3, "file_na')  # The process was killed within a line.
    rest = FixedDetector()
    resumed = run(rest, folder, tmp_path / "out.json")
    assert rest.seen == ["2.png", "3.png", "more/4.png"]
    assert resumed == whole
    assert not (tmp_path / "out.json.partial").exists()


def test_run_that_goes_on_after_the_folder_changed_has_the_ids_of_the_folder_as_it_is(
    folder, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        run(FixedDetector(fail_after=3), folder, tmp_path / "out.json")
    Path(folder, "0b.png").write_bytes(Path(folder, "0.png").read_bytes())
    resumed = run(FixedDetector(), folder, tmp_path / "out.json")
    assert {image["file_name"]: image["id"] for image in resumed["images"]} == {
        "0.png": 1, "0b.png": 2, "1.png": 3, "2.png": 4, "3.png": 5, "more/4.png": 6
    }  # fmt: skip
    owners = [each["image_id"] for each in resumed["annotations"]]
    assert owners == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_run_with_other_settings_does_not_go_on(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(FixedDetector(fail_after=3), folder, tmp_path / "out.json")
    with pytest.raises(ConfigError, match="other thresholds"):
        run(FixedDetector(), folder, tmp_path / "out.json", thresholds=("0.7",))


def test_finished_labels_are_not_overwritten(folder, tmp_path):
    run(FixedDetector(), folder, tmp_path / "out.json")
    with pytest.raises(ConfigError, match="exists already"):
        run(FixedDetector(), folder, tmp_path / "out.json")


def test_bad_images_are_named_and_skipped(folder, tmp_path, caplog, monkeypatch):
    # Detectron2's ``setup_logger``, called by any test before, would keep it from there.
    monkeypatch.setattr(logging.getLogger("kd_detectron"), "propagate", True)
    Path(folder, "1.png").write_bytes(b"no image")
    Path(folder, "3.png").write_bytes(Path(folder, "3.png").read_bytes()[:200])
    coco = run(FixedDetector(), folder, tmp_path / "out.json")
    assert [image["id"] for image in coco["images"]] == [1, 3, 5]
    assert "skipped '1.png'" in caplog.text and "skipped '3.png'" in caplog.text


def test_image_that_was_repaired_meanwhile_is_labelled_when_the_run_goes_on(folder, tmp_path):
    whole = run(FixedDetector(), folder, tmp_path / "whole.json")
    sound = Path(folder, "0.png").read_bytes()
    Path(folder, "0.png").write_bytes(b"no image")
    with pytest.raises(KeyboardInterrupt):
        run(FixedDetector(fail_after=3), folder, tmp_path / "out.json")
    Path(folder, "0.png").write_bytes(sound)
    assert run(FixedDetector(), folder, tmp_path / "out.json") == whole


def write_list(path, names):
    images = [{"id": 70 + i, "file_name": name} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": [], "categories": CATEGORIES}))
    return str(path)


def test_images_can_be_taken_from_one_list_and_left_out_by_another(folder, tmp_path):
    all_but_first = write_list(tmp_path / "list.json", ["1.png", "2.png", "more/4.png"])
    labelled = write_list(tmp_path / "train.json", ["0.png", "2.png"])
    found = find_images(folder, listed_in=all_but_first, labelled_in=[labelled])
    assert [(image["id"], image["name"]) for image in found] == [
        (70, "1.png"),
        (72, "more/4.png"),
    ]


def test_lists_that_leave_nothing_or_fit_nothing_are_refused(folder, tmp_path):
    others = write_list(tmp_path / "others.json", ["x.png"])
    everything = write_list(tmp_path / "all.json", [image["name"] for image in find_images(folder)])
    with pytest.raises(ConfigError, match="lists no image of"):
        find_images(folder, labelled_in=[others])
    with pytest.raises(ConfigError, match="all its 5 images are listed"):
        find_images(folder, labelled_in=[everything])
    with pytest.raises(ConfigError, match="--images-from .*not readable"):
        find_images(folder, listed_in=str(tmp_path / "missing.json"))
    with pytest.raises(ConfigError, match="has no image to label"):
        (tmp_path / "empty").mkdir()
        find_images(str(tmp_path / "empty"))


def test_category_count_must_be_the_teachers(tmp_path):
    cfg = teacher_cfg_from(teacher=write_tiny_teacher(tmp_path), weights="none")
    path = tmp_path / "two.json"
    path.write_text(
        json.dumps({"images": [], "annotations": [], "categories": CATEGORIES[::-1][:2]})
    )
    with pytest.raises(ConfigError, match="detects 3 classes, but 2 categories"):
        categories_of(cfg, FixedDetector(), str(path))
    with pytest.raises(ConfigError, match="give --categories"):
        categories_of(cfg, FixedDetector())


@pytest.mark.parametrize("masks", [False, True], ids=["faster", "mask"])
def test_command_labels_with_a_real_teacher_and_its_file_trains(folder, tmp_path, masks, capsys):
    """The names of the classes come from the dataset of the teacher's config."""
    known = write_list(tmp_path / "known.json", ["0.png"])
    teacher = write_tiny_teacher(
        tmp_path,
        [
            *("MODEL.MASK_ON", masks),
            *("DATASETS.COCO_FORMAT", [["teachers_data", known, folder]]),
            *("DATASETS.TRAIN", ("teachers_data",)),
        ],
    )
    output = tmp_path / "labels" / "new.json"
    arguments = ["--teacher", teacher, "--weights", "none", "--images", folder]
    arguments += ["--skip-labelled", known, "--output", str(output), "--workers", "0"]
    opts = ["KD.TEACHER.OPTS", "['MODEL.ROI_HEADS.NMS_THRESH_TEST', 0.6]"]
    torch.manual_seed(0)  # the teacher's weights
    assert main([*arguments, "--score-threshold", "0.0", *opts]) == 0
    printed = capsys.readouterr().out
    assert "labels on 4 images (0 of them without any), 0 images skipped" in printed
    assert "labels by class: red " in printed
    coco = json.loads(output.read_text())
    assert coco["categories"] == CATEGORIES and len(coco["images"]) == 4
    # Labels of a teacher with other options are not continued with these.
    assert coco["info"]["teacher"].endswith("none MODEL.ROI_HEADS.NMS_THRESH_TEST 0.6")
    assert all(("segmentation" in each) == masks for each in coco["annotations"])

    cfg = tiny_cfg(["MODEL.MASK_ON", masks, "INPUT.MASK_FORMAT", "bitmask"])
    cfg.DATASETS.COCO_FORMAT = [["new_images", str(output), folder]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("new_images",)
    register_coco_format(cfg)
    assert check_datasets(cfg)
    batch = next(iter(build_train_loader(cfg)))
    assert all(len(record["instances"]) > 0 for record in batch)
    assert all(record["instances"].has("gt_masks") == masks for record in batch)


def test_command_says_mistakes_in_one_sentence(folder, tmp_path, capsys):
    assert main(["--images", folder, "--output", str(tmp_path / "o.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no teacher is named") and error.count("\n") == 1
