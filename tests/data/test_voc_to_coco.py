"""``datasets/voc_to_coco.py``: what it writes trains, and what it refuses."""

import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from kd_detectron.preflight.annotations import check_coco_files

SCRIPT = Path(__file__).parents[2] / "datasets" / "voc_to_coco.py"
OBJECT = """<object><name>{}</name><difficult>{}</difficult>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>10</xmax><ymax>9</ymax></bndbox></object>"""


@pytest.fixture
def voc(tmp_path):
    """A folder in Pascal VOC's layout: two images of 24x16, whose XML exchanges the sides."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    for name, objects in (("a", [("dog", 0), ("cat", 1)]), ("b", [("cat", 0)])):
        Image.new("RGB", (24, 16)).save(tmp_path / "voc" / "JPEGImages" / f"{name}.png")
        size = "<size><width>16</width><height>24</height></size>"
        xml = f"<annotation>{size}{''.join(OBJECT.format(*x) for x in objects)}</annotation>"
        (tmp_path / "voc" / "Annotations" / f"{name}.xml").write_text(xml)
        (tmp_path / "voc" / "ImageSets" / "Main" / f"only_{name}.txt").write_text(f"{name} 1\n")
    return tmp_path / "voc"


@pytest.fixture
def convert(voc):
    """Runs the command; returns the exit code and the file's content."""

    def run(*options):
        target = voc.parent / "out" / "coco.json"
        code = runpy.run_path(str(SCRIPT))["main"]([str(voc), str(target), *options])
        return code, json.loads(target.read_text()) if target.is_file() else None

    return run


def test_converted_file_passes_the_checks(convert, voc):
    assert convert()[0] == 0
    file, images = str(voc.parent / "out" / "coco.json"), str(voc / "JPEGImages")
    summary = check_coco_files(file, images, name="voc")
    assert str(summary) == "voc: 2 images, 3 annotations, 2 classes (cat, dog)"


def test_boxes_classes_and_difficult_objects(convert):
    annotations = convert()[1]["annotations"]
    assert [a["category_id"] for a in annotations] == [2, 1, 1]
    assert [a["iscrowd"] for a in annotations] == [0, 1, 0]
    assert [a["id"] for a in annotations] == [1, 2, 3]
    assert annotations[0]["bbox"] == [2, 3, 8, 6] and annotations[0]["area"] == 48
    assert convert("--one-based")[1]["annotations"][0]["bbox"] == [1, 2, 9, 7]


def test_each_split_has_the_same_classes(convert):
    parts = {name: convert("--split", f"only_{name}")[1] for name in "ab"}
    assert {name: part["images"][0]["file_name"] for name, part in parts.items()} == {
        "a": "a.png",
        "b": "b.png",
    }
    assert parts["a"]["categories"] == parts["b"]["categories"]
    ordered = convert("--classes", "dog", "cat")[1]
    assert [category["name"] for category in ordered["categories"]] == ["dog", "cat"]


def test_mistakes_are_one_sentence(convert, voc, capsys):
    for options, words in (
        (["--split", "train"], "there is no '"),
        (["--classes", "dog"], "'a.xml' has the class 'cat', not in --classes"),
        (["--images", str(voc)], "'a' needs '"),
    ):
        assert convert(*options) == (2, None)
        assert words in capsys.readouterr().err
    (voc / "Annotations" / "b.xml").write_text("<annotation><object/></annotation>")
    assert convert() == (2, None)
    assert "b.xml' is not an annotation in Pascal VOC's XML" in capsys.readouterr().err
