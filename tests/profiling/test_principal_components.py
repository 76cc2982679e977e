"""Principal components of maps, maps and AP without some of them, and a student's errors."""

import pytest
import torch
from detectron2.modeling import build_model
from tiny import distilled_cfg
from torch import nn

from kd_detectron.config import get_config
from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.profiling.principal_components import (
    component_errors,
    kept_components,
    main,
    principal_components,
)


def batches(seed=0, count=3):
    """Maps of 4 channels whose components have variances of about 100, 1, 0.01 and 0."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(7)))[0]
    scale = torch.tensor([10.0, 1.0, 0.1, 0.0])
    return [
        {"p2": (torch.randn(2, 6, 5, 4, generator=generator) * scale @ mix + 2).permute(0, 3, 1, 2)}
        for _ in range(count)
    ]


def test_components_are_those_of_the_covariance_over_all_images_and_locations():
    maps = batches()
    found = principal_components(maps)["p2"]
    flat = torch.cat([x["p2"].transpose(0, 1).flatten(1) for x in maps], dim=1).double()
    covariance = torch.cov(flat, correction=0)
    torch.testing.assert_close(found.mean.double(), flat.mean(dim=1), rtol=1e-5, atol=1e-5)
    directions, variances = found.directions.double(), found.variances.double()
    rebuilt = directions * variances @ directions.T
    torch.testing.assert_close(rebuilt, covariance, rtol=1e-4, atol=1e-4)
    assert variances.tolist() == sorted(variances.tolist(), reverse=True)
    assert found.project(maps[0]["p2"]).shape == (4, 2 * 6 * 5)


def test_keeping_all_components_keeps_the_maps_and_keeping_none_the_mean():
    maps = batches()
    found = principal_components(maps)["p2"]
    features = maps[0]["p2"]
    torch.testing.assert_close(found.keep(features, 4), features, rtol=1e-4, atol=1e-4)
    mean = found.mean[:, None, None].expand_as(features)
    torch.testing.assert_close(found.keep(features, 0), mean)
    lost = (features - found.keep(features, 1)).square().mean() * 4
    assert lost.item() == pytest.approx(1.01, rel=0.3)


def test_hook_restricts_what_the_backbone_returns_until_it_is_removed():
    class Backbone(nn.Module):
        def forward(self, maps):
            return maps

    maps, backbone = batches(), Backbone()
    components = principal_components(maps)
    handle = kept_components(backbone, components, 1)
    restricted = backbone(maps[0])["p2"]
    handle.remove()
    torch.testing.assert_close(restricted, components["p2"].keep(maps[0]["p2"], 1))
    assert torch.equal(backbone(maps[0])["p2"], maps[0]["p2"])


def test_errors_are_zero_for_the_teachers_maps_and_one_where_a_component_is_unrelated():
    maps, others = batches(), batches(1)
    components = principal_components(maps)
    same = component_errors(zip(maps, maps, strict=True), components)["p2"]
    torch.testing.assert_close(same, torch.zeros(4, dtype=torch.double))
    unrelated = component_errors(zip(others, maps, strict=True), components)["p2"]
    assert unrelated[:3].tolist() == pytest.approx([1, 1, 1], abs=0.3)
    # A student that has the first component alone.
    first = [{"p2": components["p2"].keep(x["p2"], 1)} for x in maps]
    lacking = component_errors(zip(first, maps, strict=True), components)["p2"]
    assert lacking[:3].tolist() == pytest.approx([0, 1, 1], abs=1e-3)


@pytest.fixture
def config(tmp_path, monkeypatch):
    make_synthetic(tmp_path / "data", 2, 3, image_size=(64, 64))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    name = f"val_{tmp_path.name}"
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)]
    opts = ["DATASETS.COCO_FORMAT", [[name, "val.json", "val"]], "DATASETS.TEST", (name,)]
    cfg = distilled_cfg(
        tmp_path,
        ["PCKD"],
        [*opts, *classes, "DATASETS.TRAIN", (), "OUTPUT_DIR", str(tmp_path / "o")],
    )
    cfg.KD.TEACHER.OPTS = [*classes, "MODEL.FPN.OUT_CHANNELS", 32]
    file = tmp_path / "run.yaml"
    file.write_text(cfg.dump())
    return file


def checkpoint(config, file, opts=()):
    cfg = get_config(str(config), ["KD.ENABLED", False, *opts])
    torch.save({"model": build_model(cfg).state_dict()}, file)
    return str(file)


def test_command_prints_a_row_for_each_number_of_components(config, tmp_path, capsys):
    assert main(["--keep", "1", "8", "100", "--config-file", str(config)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()[-5:]
    assert "variance" in lines[0] and "box AP" in lines[0] and "error" not in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "1 to 8", "all"]
    assert "100.0 %" in lines[-1]
    assert not (tmp_path / "o").exists()


def test_command_measures_a_trained_student(config, tmp_path, capsys):
    student = checkpoint(config, tmp_path / "student.pth")
    assert main(["--keep", "4", "--student", student, "--config-file", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "error, p2" in printed and "error, p6" in printed


def test_command_refuses_a_student_of_another_config_or_fpn_width(config, tmp_path, capsys):
    wide = checkpoint(config, tmp_path / "wide.pth", ["MODEL.ROI_BOX_HEAD.FC_DIM", 80])
    arguments = ["--student", wide, "--config-file", str(config)]
    assert main(arguments) != 0
    assert "does not fit its config" in capsys.readouterr().err
    width = ["MODEL.FPN.OUT_CHANNELS", 40]
    wide = checkpoint(config, tmp_path / "wider.pth", width)
    assert main(["--student", wide, "--config-file", str(config), *map(str, width)]) != 0
    assert "one MODEL.FPN.OUT_CHANNELS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "opts", "message"),
    [
        (["--keep", "4", "2"], [], "--keep is [4, 2]; give rising numbers"),
        (["--images", "0"], [], "--images is 0; give a number of at least 1"),
        ([], ["KD.TEACHER.CONFIG_FILE", ""], "KD.TEACHER.CONFIG_FILE is ''"),
        ([], ["DATASETS.TEST", "()"], "DATASETS.TEST is []"),
    ],
)
def test_command_refuses_what_it_cannot_measure(config, arguments, opts, message, capsys):
    assert main([*arguments, "--config-file", str(config), *opts]) != 0
    assert message in capsys.readouterr().err
