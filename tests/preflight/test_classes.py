"""Classes of the teacher in another order are refused where logits are compared."""

import json
from types import SimpleNamespace

import pytest
from detectron2.data import MetadataCatalog
from tiny import distilled_cfg, write_tiny_teacher

from kd_detectron.errors import ConfigError
from kd_detectron.preflight.annotations import DatasetSummary
from kd_detectron.preflight.classes import (
    check_class_order,
    check_teacher_to_evaluate,
    teacher_categories,
)


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
    MetadataCatalog.pop("own_data", None)


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


def test_layers_of_each_class_are_inherited_from_a_teacher_of_the_same_classes(class_cfg):
    cfg = class_cfg(distillers=["ReviewKD"])
    for part in ("roi_heads", "roi_heads.box_predictor", "auto"):
        cfg.KD.TEACHER.INHERIT = [part]
        with pytest.raises(ConfigError, match="INHERIT.*copies the layers of each cla") as error:
            check_class_order(cfg, summaries("cat", "cow", "dog"))
        assert "such as proposal_generator and roi_heads.box_head" in str(error.value)
    # What the message offers.
    cfg.KD.TEACHER.INHERIT = ["proposal_generator", "roi_heads.box_head"]
    check_class_order(cfg, summaries("cat", "cow", "dog"))


def test_teacher_of_other_classes_is_not_evaluated(class_cfg):
    cfg = class_cfg()
    cfg.DATASETS.TEST = ("own_data",)
    teacher = SimpleNamespace(roi_heads=SimpleNamespace(num_classes=3))
    check_teacher_to_evaluate(cfg, summaries("cat", "dog", "cow"), teacher)
    with pytest.raises(ConfigError, match="DATASETS.TEST 'own_data' and 'dog' in the teacher's"):
        check_teacher_to_evaluate(cfg, summaries("cat", "cow", "dog"), teacher)
    with pytest.raises(ConfigError, match="KD.TEACHER.CONFIG_FILE.*detects 3 classes.*has 2 clas"):
        check_teacher_to_evaluate(cfg, summaries("cat", "cow"), teacher)
    with pytest.raises(ConfigError, match=r"3 classes \(MODEL.RETINANET.NUM_CLASSES\)"):
        check_teacher_to_evaluate(cfg, summaries("cat", "cow"), SimpleNamespace(num_classes=3))


def test_override_that_the_message_offers_is_accepted(class_cfg):
    cfg = class_cfg()
    MetadataCatalog.get("own_data").thing_classes = ["cat", "cow", "dog"]
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
        (["own_data", str(tmp_path / "theirs.json"), "images"], categories[::-1]),
        (["own_data", str(tmp_path / "not_here.json"), "images"], []),
    ):
        opts = ["DATASETS.COCO_FORMAT", [entry], "DATASETS.TRAIN", ("own_data",)]
        write_tiny_teacher(tmp_path, opts)
        assert teacher_categories(cfg) == ("own_data", expected)


@pytest.mark.parametrize("suffix", ["yaml", "py"])
def test_classes_of_a_zoo_teacher_are_cocos(tmp_path, suffix):
    name = {
        "yaml": "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
        "py": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
    }[suffix]
    cfg = distilled_cfg(tmp_path, opts=["KD.TEACHER.CONFIG_FILE", name])
    dataset, categories = teacher_categories(cfg)
    assert dataset == "coco_2017_train" and len(categories) == 80
    assert categories[0] == {"id": 1, "name": "person"}
    assert categories[-1] == {"id": 90, "name": "toothbrush"}
