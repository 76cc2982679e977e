"""Every row of the published tables has a config that says what the row says."""

import json
import re
from pathlib import Path

import pytest

import kd_detectron.runs
from kd_detectron.config import config_dir, get_config, list_configs

PUBLISHED = Path(kd_detectron.runs.__file__).with_name("published.json")
DETECTORS = {"table_iv": "rcnn", "table_v": "mask_rcnn"}
# The weights of ReviewKD by pair: alone, with CKD (the CKD release) and with DKD (the DKD release,
# which has none for Mask R-CNN; the CKD ones are used there).
REVIEWKD_WEIGHTS = {
    ("rcnn", "ReviewKD"): {"R101-R18": 1.2, "R101-R50": 1.0, "R50-MV2": 2.0},
    ("rcnn", "CKD+ReviewKD"): {"R101-R18": 1.2, "R101-R50": 1.0, "R50-MV2": 2.0},
    ("rcnn", "DKD+ReviewKD"): {"R101-R18": 1.2, "R101-R50": 1.0, "R50-MV2": 2.0},
    ("mask_rcnn", "ReviewKD"): {"R101-R18": 1.5, "R101-R50": 0.8, "R50-MV2": 1.0},
    ("mask_rcnn", "CKD+ReviewKD"): {"R101-R18": 0.8, "R101-R50": 1.0, "R50-MV2": 1.0},
    ("mask_rcnn", "DKD+ReviewKD"): {"R101-R18": 0.8, "R101-R50": 1.0, "R50-MV2": 1.0},
}


def rows():
    """(detector, pair, row) of the published tables."""
    published = json.loads(PUBLISHED.read_text())
    for table, detector in DETECTORS.items():
        for pair, numbers in published[table]["pairs"].items():
            for row in numbers:
                # The teacher is the model zoo's checkpoint: nobody trains it here.
                if row != "Teacher":
                    yield detector, pair, row


def config_name(detector: str, pair: str, row: str) -> str:
    teacher, student = pair.lower().split("-")
    if row == "Student":
        return f"baseline_{detector}_{student}.yaml"
    return f"{row.lower().replace('+', '_')}_{detector}_{teacher}_{student}.yaml"


@pytest.mark.parametrize("detector, pair, row", list(rows()))
def test_published_row_has_its_config(detector, pair, row):
    cfg = get_config(config_name(detector, pair, row))
    if row == "Student":
        assert not cfg.KD.ENABLED
        assert cfg.KD.DISTILLERS == []
        assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    else:
        assert cfg.KD.ENABLED
        assert cfg.MODEL.META_ARCHITECTURE == "DistilledRCNN"
        assert row.split("+") == list(cfg.KD.DISTILLERS)
        teacher = pair.split("-")[0].replace("R", "R_")
        assert teacher in cfg.KD.TEACHER.CONFIG_FILE
    assert (detector == "mask_rcnn") == cfg.MODEL.MASK_ON


@pytest.mark.parametrize("key, weights", REVIEWKD_WEIGHTS.items())
def test_reviewkd_weight_is_the_releases_for_each_pair(key, weights):
    detector, row = key
    for pair, weight in weights.items():
        cfg = get_config(config_name(detector, pair, row))
        assert weight == cfg.KD.REVIEWKD.WEIGHT
        assert cfg.KD.CKD.WEIGHT == 0.1


LEAF_NAME = re.compile(
    r"(?P<methods>\w+?)_(?P<detector>(mask_)?rcnn)_(r101_|r50_)?(?P<student>\w+)"
)


def leaves():
    """(file name, methods, detector, student) of the configs that are rows of tables."""
    for name in list_configs():
        match = LEAF_NAME.fullmatch(name.removesuffix(".yaml"))
        if match and match["student"] in ("r18", "r50", "mv2"):
            yield name, match["methods"], match["detector"], match["student"]


def test_rows_of_a_pair_differ_in_distillation_only():
    for name, _, detector, student in leaves():
        distilled = get_config(name)
        baseline = get_config(f"baseline_{detector}_{student}.yaml")
        baseline.KD = distilled.KD
        baseline.MODEL.META_ARCHITECTURE = distilled.MODEL.META_ARCHITECTURE
        assert distilled == baseline, name


def test_every_distilled_row_exists_for_all_three_pairs():
    students = {}
    for _, methods, detector, student in leaves():
        students.setdefault((methods, detector), set()).add(student)
    assert len(students) == 12 + 5 + 4
    assert all(found == {"r18", "r50", "mv2"} for found in students.values()), students


def test_leaf_configs_are_short_and_say_what_they_are():
    for name, *_ in leaves():
        lines = (config_dir() / name).read_text().splitlines()
        assert lines[0].startswith("# "), name
        assert len(lines) <= 9, name
