"""``datasets/check.py``: one line per dataset, or one sentence and exit code 2."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "datasets" / "check.py"


@pytest.fixture
def main():
    return runpy.run_path(str(SCRIPT))["main"]


def test_files_are_summarised(main, make_cfg, capsys):
    _, json_file, image_dir = make_cfg().DATASETS.COCO_FORMAT[0]
    assert main(["--json", json_file, "--images", image_dir, "--masks", "polygon"]) == 0
    assert "6 images, 6 annotations, 2 classes (cat, dog)" in capsys.readouterr().out


def test_fault_is_one_line_and_exit_code_2(main, make_cfg, capsys):
    _, json_file, image_dir = make_cfg().DATASETS.COCO_FORMAT[0]
    assert main(["--json", json_file, "--images", image_dir + "x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_config_with_overrides_is_checked(main, make_cfg, tmp_path, capsys):
    cfg = make_cfg()
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "DATASETS:\n"
        f"  COCO_FORMAT: {list(cfg.DATASETS.COCO_FORMAT)}\n"
        '  TRAIN: ("tiny",)\n'
        '  TEST: ("tiny",)\n'
    )
    arguments = ["--config-file", str(file), "MODEL.ROI_HEADS.NUM_CLASSES"]
    assert main([*arguments, "2"]) == 0
    assert capsys.readouterr().out == "tiny: 6 images, 6 annotations, 2 classes (cat, dog)\n"
    assert main([*arguments, "3"]) == 2
    assert "MODEL.ROI_HEADS.NUM_CLASSES is 3" in capsys.readouterr().err


def test_annotation_file_without_images_folder_is_a_usage_error(main):
    with pytest.raises(SystemExit) as caught:
        main(["--json", "a.json"])
    assert caught.value.code == 2


def test_paths_are_those_of_the_config_or_of_the_working_directory(
    main, make_cfg, tmp_path, monkeypatch, capsys
):
    make_cfg()
    for variable, folder in (("", tmp_path), (str(tmp_path), tmp_path.parent)):
        monkeypatch.setenv("DETECTRON2_DATASETS", variable)
        monkeypatch.chdir(folder)
        assert main(["--json", "tiny/annotations.json", "--images", "tiny/images"]) == 0
    assert capsys.readouterr().out.count("6 images") == 2


def test_all_test_images_are_compared_with_their_annotated_size(main, make_cfg, make_coco, capsys):
    content = make_coco()
    _, json_file, image_dir = make_cfg(content).DATASETS.COCO_FORMAT[0]
    content["images"][5]["width"] += 1
    Path(json_file).write_text(json.dumps(content))
    assert main(["--json", json_file, "--images", image_dir]) == 2
    assert "1 of 6 images cannot be read or are not of the annotated" in capsys.readouterr().err
