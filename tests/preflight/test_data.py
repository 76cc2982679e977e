"""Every fault of a dataset is one sentence with the key, the value and the fix, before training."""

import json
import logging
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathHandler, PathManager
from PIL import Image

from kd_detectron.errors import ConfigError
from kd_detectron.preflight.annotations import check_coco_files, image_size
from kd_detectron.preflight.classes import UNKNOWN_CLASSES
from kd_detectron.preflight.data import check_datasets


def refused(cfg, *parts, **options):
    """Asserts that the check fails with one sentence that holds all parts."""
    with pytest.raises(ConfigError) as caught:
        check_datasets(cfg, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"'{part}' is missing in: {message}"


def test_sound_dataset_gives_its_counts(make_cfg):
    summaries = check_datasets(make_cfg())
    assert list(summaries) == ["tiny"]
    summary = summaries["tiny"]
    assert (summary.images, summary.annotations, summary.classes) == (6, 6, ("cat", "dog"))
    assert str(summary) == "tiny: 6 images, 6 annotations, 2 classes (cat, dog)"


def test_unknown_name_lists_the_near_ones(make_cfg):
    cfg = make_cfg()
    cfg.DATASETS.TRAIN = ("tinny",)
    refused(cfg, "DATASETS.TRAIN names 'tinny'", "did you mean tiny")


def test_no_training_set_is_refused_unless_only_evaluating(make_cfg):
    cfg = make_cfg()
    cfg.DATASETS.TRAIN = ()
    refused(cfg, "DATASETS.TRAIN is empty")
    assert list(check_datasets(cfg, train=False)) == ["tiny"]


def test_missing_annotation_file_names_path_and_datasets_root(make_cfg, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = make_cfg()
    cfg.DATASETS.COCO_FORMAT = [["tiny", "nowhere/a.json", "tiny/images"]]
    refused(
        cfg,
        "DATASETS.TRAIN 'tiny'",
        str(tmp_path / "nowhere/a.json"),
        f"DETECTRON2_DATASETS is '{tmp_path}'",
    )


def test_missing_builtin_dataset_is_refused_like_an_own_one(make_cfg, monkeypatch, tmp_path):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    metadata = MetadataCatalog.get("coco_2017_train")
    monkeypatch.setitem(metadata.__dict__, "json_file", str(tmp_path / "instances.json"))
    cfg = make_cfg()
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    refused(
        cfg,
        "DATASETS.TRAIN 'coco_2017_train'",
        str(tmp_path / "instances.json"),
        "DETECTRON2_DATASETS is not set",
    )


def test_missing_image_folder_is_refused(make_cfg):
    cfg = make_cfg()
    cfg.DATASETS.COCO_FORMAT[0][2] += "_elsewhere"
    refused(cfg, "images_elsewhere' does not exist", "DETECTRON2_DATASETS")


@pytest.mark.parametrize("text", ['{"images": [', "", "\x00\x01"])
def test_broken_json_is_refused(make_cfg, tmp_path, text):
    cfg = make_cfg()
    (tmp_path / "tiny" / "annotations.json").write_text(text)
    refused(cfg, "DATASETS.TRAIN 'tiny'", "annotations.json' is not readable as JSON")


@pytest.mark.parametrize("content", [[], {"images": {}}, "text"])
def test_json_that_is_not_coco_is_refused(make_cfg, tmp_path, content):
    cfg = make_cfg()
    (tmp_path / "tiny" / "annotations.json").write_text(json.dumps(content))
    refused(cfg, "is not in COCO format")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("images", "lists no images"),
        ("categories", "lists no categories"),
        ("annotations", "no usable annotation"),
    ],
)
def test_empty_or_absent_part_is_refused(make_cfg, tmp_path, part, message, make_coco):
    cfg = make_cfg()
    for content in (make_coco(), make_coco()):
        content[part] = []
        (tmp_path / "tiny" / "annotations.json").write_text(json.dumps(content))
        refused(cfg, message)
        del content[part]
        (tmp_path / "tiny" / "annotations.json").write_text(json.dumps(content))
        refused(cfg, message)


def test_unlabelled_test_set_is_only_a_warning(make_cfg, tmp_path, caplog, make_coco, write_coco):
    cfg = make_cfg()
    content = make_coco(2)
    del content["annotations"]
    cfg.DATASETS.COCO_FORMAT.append(write_coco(tmp_path / "unlabelled", content))
    cfg.DATASETS.TEST = ("unlabelled",)
    with caplog.at_level(logging.WARNING):
        assert check_datasets(cfg)["unlabelled"].annotations == 0
    assert "cannot be used to compute AP" in caplog.text


def test_only_crowds_cannot_be_learned_from(make_cfg, make_coco):
    content = make_coco(2)
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    refused(make_cfg(content), "no usable annotation among 2")


def test_unknown_category_ids_are_refused(make_cfg, make_coco):
    content = make_coco()
    content["annotations"][3]["category_id"] = 77
    refused(make_cfg(content), "category ids 77", "'categories'")


def test_class_count_that_differs_names_both_numbers(make_cfg):
    cfg = make_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    refused(cfg, "2 classes (cat, dog) but MODEL.ROI_HEADS.NUM_CLASSES is 80", "to 2")


def test_class_count_that_the_model_does_not_tell_is_not_compared(make_cfg):
    cfg = make_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = UNKNOWN_CLASSES
    assert check_datasets(cfg)["tiny"].images == 6


def test_class_count_of_a_retinanet_is_its_own_key(make_cfg):
    cfg = make_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    refused(cfg, "MODEL.RETINANET.NUM_CLASSES is 80")
    cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    assert check_datasets(cfg)["tiny"].images == 6


def test_classes_in_another_order_are_refused(make_cfg, tmp_path, make_coco, write_coco):
    cfg = make_cfg()
    content = make_coco(2)
    content["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    cfg.DATASETS.COCO_FORMAT.append(write_coco(tmp_path / "val", content))
    cfg.DATASETS.TEST = ("val",)
    refused(cfg, "DATASETS.TEST 'val' and 'tiny'", "'dog' where the other has 'cat'")


def test_images_not_on_disk_are_counted_and_the_first_ten_named(make_cfg, tmp_path, make_coco):
    cfg = make_cfg(make_coco(14))
    for number in range(12):
        (tmp_path / "tiny" / "images" / f"{number}.png").unlink()
    refused(cfg, "12 of 14 images are not on disk", "/0.png'", "/9.png', ...")
    with pytest.raises(ConfigError) as caught:
        check_datasets(cfg)
    assert "/10.png" not in str(caught.value)


def test_images_in_subfolders_are_found(make_cfg, tmp_path, make_coco):
    content = make_coco(2)
    cfg = make_cfg(content)
    images = tmp_path / "tiny" / "images"
    (images / "part").mkdir()
    (images / "0.png").rename(images / "part" / "0.png")
    content["images"][0]["file_name"] = "part/0.png"
    (tmp_path / "tiny" / "annotations.json").write_text(json.dumps(content))
    assert check_datasets(cfg)["tiny"].images == 2


def test_useless_boxes_are_counted_and_not_fatal(make_cfg, caplog, make_coco):
    content = make_coco(6)
    content["annotations"][0]["bbox"] = [2.0, 3.0, -1.0, 6.0]
    content["annotations"][1]["bbox"] = [2.0, 300.0, 5.0, 6.0]
    content["annotations"][2]["image_id"] = 99
    with caplog.at_level(logging.WARNING):
        summary = check_datasets(make_cfg(content))["tiny"]
    assert summary.annotations == 3
    assert "3 annotations are not used" in caplog.text


def test_annotations_that_all_miss_their_images_are_refused(make_cfg, make_coco):
    content = make_coco(3)
    for annotation in content["annotations"]:
        annotation["image_id"] += 100
    refused(make_cfg(content), "no usable annotation among 3", "of unknown images")


def test_masks_are_required_of_a_mask_model(make_cfg, make_coco):
    content = make_coco(3)
    cfg = make_cfg(content)
    cfg.MODEL.MASK_ON = True
    assert check_datasets(cfg)["tiny"].annotations == 3
    del content["annotations"][1]["segmentation"]
    cfg = make_cfg(content)
    assert check_datasets(cfg)["tiny"].annotations == 3
    cfg.MODEL.MASK_ON = True
    refused(cfg, "MODEL.MASK_ON is True", "the first (id 2) has no 'segmentation'")


def test_rle_masks_need_the_bitmask_format(make_cfg, make_coco):
    content = make_coco(3)
    content["annotations"][0]["segmentation"] = {"size": [24, 16], "counts": "abc"}
    cfg = make_cfg(content)
    cfg.MODEL.MASK_ON = True
    refused(cfg, "INPUT.MASK_FORMAT is 'polygon'", "RLE with INPUT.MASK_FORMAT 'bitmask'")
    cfg.INPUT.MASK_FORMAT = "bitmask"
    assert check_datasets(cfg)["tiny"].annotations == 3
    content["annotations"][0]["segmentation"]["size"] = [16, 24]
    cfg = make_cfg(content)
    assert check_datasets(cfg)["tiny"].annotations == 3
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
    refused(cfg, "RLE mask of annotation 1 has the size [16, 24] on an image", "width [24, 16]")


@pytest.fixture
def keypoint_cfg(make_cfg, make_coco):
    """Returns a function that gives a sound config of two keypoints, its content changed."""

    def make(change=lambda content: None):
        content = make_coco(3)
        for annotation in content["annotations"]:
            annotation["keypoints"], annotation["num_keypoints"] = [3, 4, 2, 5, 6, 2], 2
        change(content)
        cfg = make_cfg(content)
        cfg.MODEL.KEYPOINT_ON = True
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 2
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
        return cfg

    return make


def test_keypoints_are_required_of_a_keypoint_model(keypoint_cfg):
    assert check_datasets(keypoint_cfg())["tiny"].annotations == 3
    cfg = keypoint_cfg(lambda content: content["annotations"][1].pop("keypoints"))
    refused(cfg, "MODEL.KEYPOINT_ON is True", "the first (id 2) has no 'keypoints'")
    cfg.MODEL.KEYPOINT_ON = False
    assert check_datasets(cfg)["tiny"].annotations == 3


def test_crowds_need_no_keypoints(keypoint_cfg):
    def change(content):
        content["annotations"][1]["iscrowd"] = 1
        del content["annotations"][1]["keypoints"]

    assert check_datasets(keypoint_cfg(change))["tiny"].annotations == 3


@pytest.mark.parametrize("keypoints", [[3, 4, 2], "left"])
def test_keypoints_of_another_number_are_refused(keypoint_cfg, keypoints):
    cfg = keypoint_cfg(lambda content: content["annotations"][0].update(keypoints=keypoints))
    refused(cfg, "(id 1) has the keypoints", "NUM_KEYPOINTS is 2", "6 numbers")


def test_what_the_evaluation_of_keypoints_needs_is_required(keypoint_cfg):
    cfg = keypoint_cfg(lambda content: content["annotations"][2].pop("num_keypoints"))
    refused(cfg, "1 of 3 annotations have no valid 'num_keypoints'")
    cfg = keypoint_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = []
    refused(cfg, "NUM_KEYPOINTS is 2 but TEST.KEYPOINT_OKS_SIGMAS are for 17 keypoints")
    cfg.DATASETS.TEST = ()
    assert check_datasets(cfg)["tiny"].annotations == 3


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_what_the_evaluation_reads_is_required_before_training(make_cfg, key, make_coco):
    content = make_coco(3)
    del content["annotations"][2][key]
    cfg = make_cfg(content)
    refused(cfg, f"1 of 3 annotations have no valid '{key}'")
    cfg.DATASETS.TEST = ()
    assert check_datasets(cfg)["tiny"].annotations == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].pop("width"), "1 of 3 images have no valid 'width'"),
        (lambda c: c["images"][0].update(height=0), "height 0; it must be a positive number"),
        (lambda c: c["images"][0].update(file_name=7), "file_name 7; it must be text"),
        (lambda c: c["images"][1].update(id=1), "several images have the same id (1)"),
        (
            lambda c: c["images"][1].update(id="a"),
            "mixes numbers and text as image ids",
        ),
        (lambda c: c["categories"][0].update(name=3), "name 3; it must be text"),
        (lambda c: c["categories"][0].update(name=" "), "name ' '; it must be text, not empty"),
        (lambda c: c["categories"][0].update(id="1"), "id '1'; it must be a whole number"),
        (lambda c: c["annotations"][1].update(id=1), "several annotations have the same id (1)"),
        (lambda c: c["annotations"][1].update(image_id="2"), "also in 'image_id'"),
        (lambda c: c["annotations"][1].update(image_id=[2]), "image_id [2]; it must be"),
        (lambda c: c["annotations"][1].update(category_id="1"), "category_id '1'; it must be a"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "(id 2) has the bbox [1, 2, 3]"),
        (lambda c: c["annotations"][1].update(bbox=["1", 2, 3, 4]), "(id 2) has the bbox"),
        (lambda c: c["annotations"].append(5), "1 of 4 annotations have no valid 'id'"),
    ],
)
def test_malformed_entry_is_named(make_cfg, tmp_path, change, message, make_coco):
    cfg = make_cfg(make_coco(3))
    content = make_coco(3)
    change(content)
    (tmp_path / "tiny" / "annotations.json").write_text(json.dumps(content))
    refused(cfg, message)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        *([1, 1, 5, 1, 5, 5], "1 1 5 1 5 5", {"size": [24, 16]}, {"counts": [10, 5, 369]}),
        *({"size": [24, 16], "counts": 5}, {"size": None, "counts": [10, 5, 369]}),
    ],
)
def test_mask_that_detectron2_cannot_read_is_refused(make_cfg, make_coco, mask, masks):
    # Detectron2 reads the masks of a file, whether the model learns them or not.
    content = make_coco(3)
    for annotation in content["annotations"]:
        annotation["segmentation"] = mask
    cfg = make_cfg(content)
    cfg.MODEL.MASK_ON = masks
    refused(cfg, "3 of 3 annotations have no valid 'segmentation'", "polygons", "RLE")


def test_image_ids_may_be_text_if_all_are(make_cfg, make_coco):
    content = make_coco(3)
    cfg = make_cfg(content)
    for image in content["images"]:
        image["id"] = f"a{image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"a{annotation['image_id']}"
    Path(cfg.DATASETS.COCO_FORMAT[0][1]).write_text(json.dumps(content))
    assert check_datasets(cfg)["tiny"].annotations == 3


def test_annotation_id_0_is_refused_where_ap_is_computed(make_cfg, make_coco):
    content = make_coco(3)
    for annotation in content["annotations"]:
        annotation["id"] -= 1
    cfg = make_cfg(content)
    refused(cfg, "id 0; it must be a number from 1", "COCO's evaluation")
    cfg.DATASETS.TEST = ()
    assert check_datasets(cfg)["tiny"].annotations == 3


def test_boxes_by_their_corners_are_refused(make_cfg, make_coco):
    content = make_coco(6)
    for number, annotation in enumerate(content["annotations"]):
        annotation["bbox"] = [9.0, 9.0, 14.0, 15.0] if number else [1.0, 1.0, 9.0, 9.0]
    refused(make_cfg(content), "5 of 6 boxes reach past their image", "[x, y, width, height]")
    # One box that is not of this form, and all are boxes that reach past their image.
    content["annotations"][0]["bbox"] = [5.0, 5.0, 2.0, 2.0]
    assert check_datasets(make_cfg(content))["tiny"].annotations == 6


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_width_and_height_exchanged_in_the_annotations_are_refused(make_cfg, make_coco, key):
    cfg = make_cfg()
    name, json_file, image_dir = cfg.DATASETS.COCO_FORMAT[0]
    content = make_coco()
    for image in content["images"]:
        image["width"], image["height"] = image["height"], image["width"]
    wrong = json_file.replace(".json", "_wrong.json")
    Path(wrong).write_text(json.dumps(content))
    cfg.DATASETS.COCO_FORMAT.append(["wrong", wrong, image_dir])
    cfg.DATASETS[key] = ("wrong",)
    words = ("6 of 6 images ", "not of the annotated size", "0.png", "(24, 16)", "(16, 24)")
    refused(cfg, f"DATASETS.{key} 'wrong'", *words, "swap 'width' and 'height'")
    cfg.DATALOADER.MAX_CORRUPT_IMAGES = 6
    if key == "TEST":
        refused(cfg, *words)
    else:
        assert check_datasets(cfg)["wrong"].images == 6


def test_photo_that_a_camera_turned_has_the_size_in_which_it_is_read(tmp_path):
    path = str(tmp_path / "photo.jpg")
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    Image.new("RGB", (24, 16)).save(path, exif=exif)
    height, width = read_image(path, "BGR").shape[:2]
    assert image_size(path) == (width, height) == (16, 24)


def test_unreadable_image_of_the_test_set_is_refused_before_training(make_cfg, tmp_path):
    cfg = make_cfg()
    (tmp_path / "tiny" / "images" / "2.png").write_bytes(b"no image")
    refused(cfg, "1 of 6 images cannot be read", "2.png", "no readable header")
    cfg.DATASETS.TEST = ()
    assert check_datasets(cfg)["tiny"].images == 6


def test_missing_proposal_file_is_refused(make_cfg, tmp_path):
    cfg = make_cfg()
    cfg.MODEL.LOAD_PROPOSALS = True
    refused(
        cfg, "DATASETS.TRAIN names 1 datasets", "DATASETS.PROPOSAL_FILES_TRAIN names 0 files; give"
    )
    there = str(tmp_path / "proposals.pkl")
    Path(there).touch()
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = (there,)
    cfg.DATASETS.PROPOSAL_FILES_TEST = (there + "x",)
    refused(cfg, "PROPOSAL_FILES_TEST names 1 files", f"['{there}x'] do not exist")
    refused(cfg, "PROPOSAL_FILES_TEST names 1 files", train=False)
    cfg.DATASETS.PROPOSAL_FILES_TEST = (there,)
    assert check_datasets(cfg)["tiny"].images == 6


def test_dicts_of_a_users_own_function_are_evaluated_as_coco_without_a_json_file(
    make_cfg, tmp_path
):
    file_name = str(tmp_path / "tiny" / "images" / "0.png")
    cfg = make_cfg()
    DatasetCatalog.register("own", lambda: [{"file_name": file_name, "annotations": [{}]}])
    MetadataCatalog.get("own").evaluator_type = "coco"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("own",)
    refused(cfg, "DATASETS.TRAIN 'own'", "no class names", ".thing_classes")
    MetadataCatalog.get("own").thing_classes = ["cat", "dog"]
    assert check_datasets(cfg)["own"].classes == ("cat", "dog")


class DownloadOnly(PathHandler):
    """A source that opens files and, as a web server, lists and tests none."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def _get_supported_prefixes(self):
        return ["source://"]

    def _get_local_path(self, path, **kwargs):
        return str(self.folder / path.removeprefix("source://"))

    def _open(self, path, mode="r", **kwargs):
        return open(self._get_local_path(path), mode)


def test_files_may_be_of_any_source_that_detectron2_opens(make_cfg, tmp_path):
    cfg = make_cfg()
    PathManager.register_handler(DownloadOnly(tmp_path / "tiny"), allow_override=True)
    cfg.DATASETS.COCO_FORMAT = [["tiny", "source://annotations.json", "source://images"]]
    assert check_datasets(cfg)["tiny"].images == 6
    (record, *_) = DatasetCatalog.get("tiny")
    assert record["file_name"].startswith("source://images/")
    assert read_image(record["file_name"]).shape == (record["height"], record["width"], 3)
    (tmp_path / "tiny" / "images" / "2.png").unlink()
    refused(cfg, "1 of 6 images cannot be read", "'source://images/2.png'")
    (tmp_path / "tiny" / "annotations.json").unlink()
    refused(cfg, "'source://annotations.json' is not readable as JSON")


def test_dataset_of_a_users_own_function_is_checked_too(make_cfg, tmp_path):
    cfg = make_cfg()
    file_name = str(tmp_path / "tiny" / "images" / "0.png")
    record = {"file_name": file_name, "width": 16, "height": 24, "annotations": [{}]}
    DatasetCatalog.register("own", lambda: [record, {**record, "file_name": file_name + "x"}])
    MetadataCatalog.get("own").thing_classes = ["cat", "dog"]
    cfg.DATASETS.TRAIN = ("own",)
    refused(cfg, "DATASETS.TRAIN 'own': 1 of 2 images are not on disk", "0.pngx")
    DatasetCatalog.remove("own")
    DatasetCatalog.register("own", lambda: [record])
    assert check_datasets(cfg)["own"].annotations == 1


def test_files_are_checked_without_a_config(make_cfg):
    _, json_file, image_dir = make_cfg().DATASETS.COCO_FORMAT[0]
    assert check_coco_files(json_file, image_dir, name="mine").images == 6
    with pytest.raises(ConfigError, match="^mine: image folder"):
        check_coco_files(json_file, image_dir + "x", name="mine")


def test_images_may_be_named_without_a_folder_or_with_a_doubled_slash(
    make_cfg, tmp_path, monkeypatch
):
    cfg = make_cfg()
    monkeypatch.chdir(tmp_path / "tiny" / "images")
    names = ["0.png", str(tmp_path / "tiny") + "//images/./1.png"]
    records = [{"file_name": x, "width": 16, "height": 24, "annotations": [{}]} for x in names]
    DatasetCatalog.register("own", lambda: records)
    MetadataCatalog.get("own").thing_classes = ["cat", "dog"]
    cfg.DATASETS.TRAIN = ("own",)
    assert check_datasets(cfg)["own"].annotations == 2
