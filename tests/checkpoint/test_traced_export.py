"""TorchScript and ONNX files that detect what the model detects, at other image sizes too."""

import json

import onnxruntime
import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from PIL import Image
from tiny import tiny_cfg

from kd_detectron.checkpoint import DistillationCheckpointer
from kd_detectron.checkpoint import traced_export as export
from kd_detectron.checkpoint.export_command import main
from kd_detectron.errors import ConfigError

STUDENTS = {
    "mask": ["MODEL.MASK_ON", True],
    "mobilenet": [
        *("MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"),
        *("MODEL.MOBILENETV2.WIDTH_MULT", 0.25),
    ],
    "timm": [
        *("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone"),
        *("MODEL.TIMM.NAME", "mobilenetv3_small_050"),
        *("MODEL.TIMM.PRETRAINED", False),
    ],
    "torchvision": [
        *("MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone"),
        *("MODEL.TORCHVISION.NAME", "mobilenet_v3_small"),
    ],
    "retinanet": [
        *("MODEL.META_ARCHITECTURE", "RetinaNet"),
        *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
        *("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
        *("MODEL.RETINANET.NUM_CLASSES", 3),
        *("MODEL.RETINANET.NUM_CONVS", 1),
        *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
        *("MODEL.ANCHOR_GENERATOR.SIZES", [[8]] * 5),
    ],
}


@pytest.fixture
def image(tmp_path) -> str:
    pixels = torch.randint(0, 256, (64, 96, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def write_run(folder, opts) -> torch.nn.Module:
    torch.manual_seed(0)
    cfg = tiny_cfg(["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *opts])
    model = build_model(cfg).eval()
    # Scores that differ and boxes near the image, as a trained model's: RetinaNet does not clip
    # boxes before NMS, and torchvision's NMS by class is inexact for boxes far outside.
    spread = 0.0003 if "RetinaNet" in opts else 0.5
    for name, parameter in model.named_parameters():
        if "cls_score" in name or "objectness" in name:
            torch.nn.init.normal_(parameter, std=spread)
        elif "head.bbox_pred" in name:
            torch.nn.init.zeros_(parameter)
    DistillationCheckpointer(model, str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return model


def assert_detects_the_same(run_exported, model) -> None:
    """Compares an exported file with the model at sizes it was not traced at.

    Rounding can keep a box in one of them that the other drops, where its overlap or score is at a
    threshold: one in ten, or two, may differ.
    """
    for seed, size in enumerate(((64, 96), (96, 64), (50, 70), (128, 160))):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (3, *size), generator=generator).float()
        with torch.no_grad():
            expected = export._detect(model, [{"image": pixels}])[0]["instances"]
        fields = [expected.get(name) for name in sorted(expected.get_fields())]
        fields[0] = fields[0].tensor
        *found, image_size = run_exported(pixels)
        assert tuple(image_size.tolist()) == size and len(expected) > 0
        same = torch.ones(len(expected), len(found[0]), dtype=torch.bool)
        for a, b in zip(found, fields, strict=True):
            near = torch.isclose(a[None].float(), b[:, None].float(), rtol=1e-3, atol=5e-3)
            same &= near.flatten(2).all(2) if near.dim() > 2 else near
        assert same.any(1).sum() > len(expected) / 2
        for matched in (same.any(0), same.any(1)):
            assert (~matched).sum() <= max(1, 0.1 * len(expected)), (size, same.shape, same.sum())


@pytest.mark.parametrize("student", STUDENTS)
def test_torchscript_detects_what_the_model_does(tmp_path, image, student):
    model = write_run(tmp_path, STUDENTS[student])
    path = export.export_torchscript(str(tmp_path), str(tmp_path / "out"), image)
    assert path == str(tmp_path / "out" / "student_final.ts")
    assert_detects_the_same(torch.jit.load(path), model)


@pytest.mark.parametrize("student", STUDENTS)
def test_onnx_detects_what_the_model_does(tmp_path, image, student):
    model = write_run(tmp_path, STUDENTS[student])
    path = export.export_onnx(str(tmp_path), str(tmp_path / "student.onnx"), image)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == [
        "pred_boxes",
        "pred_classes",
        *(["pred_masks"] if student == "mask" else []),
        "scores",
        "image_size",
    ]

    def run_exported(pixels):
        return [torch.from_numpy(output) for output in session.run(None, {"image": pixels.numpy()})]

    assert_detects_the_same(run_exported, model)


def test_files_say_how_they_are_fed_and_in_which_frame_boxes_are(tmp_path, image):
    write_run(tmp_path, ["INPUT.FORMAT", "RGB"])
    path = export.export_onnx(str(tmp_path), str(tmp_path / "student.onnx"), image)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["input_format"] == "RGB" and facts["min_size_test"] == "64"
    assert "given (resized) image" in facts["pred_boxes"]
    path = export.export_torchscript(str(tmp_path), str(tmp_path / "student.ts"), image)
    extra = {"metadata.json": ""}
    torch.jit.load(path, _extra_files=extra)
    assert json.loads(extra["metadata.json"]) == facts


def test_adapter_traces_two_images_of_different_sizes_as_well(tmp_path):
    model = write_run(tmp_path, [])
    generator = torch.Generator().manual_seed(0)

    def images(*sizes):
        return [{"image": 255 * torch.rand(3, *size, generator=generator)} for size in sizes]

    def detect(model, inputs):
        return [{"instances": one} for one in model.inference(inputs, do_postprocess=False)]

    adapter = TracingAdapter(model, images((64, 96), (64, 96)), detect).eval()
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    others = images((96, 64), (50, 70))
    with torch.no_grad():
        expected = detect(model, others)
        found = adapter.outputs_schema(traced(*(one["image"] for one in others)))
    for a, b in zip(found, expected, strict=True):
        a, b = a["instances"], b["instances"]
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-3, atol=5e-3)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=5e-3)


def test_export_that_detects_something_else_is_not_written(tmp_path, image, monkeypatch):
    write_run(tmp_path, [])
    original = torch.jit.load

    def load_and_shift(buffer):
        traced = original(buffer)
        return lambda pixels: (traced(pixels)[0] + 5.0, *traced(pixels)[1:])

    monkeypatch.setattr(torch.jit, "load", load_and_shift)
    with pytest.raises(ConfigError, match="was not written: it misses"):
        export.export_torchscript(str(tmp_path), str(tmp_path / "out"), image)
    assert not (tmp_path / "out").exists()


def test_command_exports_each_format(tmp_path, image):
    write_run(tmp_path, [])
    for name, suffix in (("detectron2", "pth"), ("torchscript", "ts"), ("onnx", "onnx")):
        arguments = [str(tmp_path), str(tmp_path / "out"), "--format", name, "--image", image]
        assert main(arguments) == 0
        assert (tmp_path / "out" / f"student_final.{suffix}").is_file()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["{run}", "{run}/out", "--format", "onnx"], "needs --image"),
        (["{run}", "{run}/out", "--format", "onnx", "--image", "gone.jpg"], "gone.jpg"),
        (["{run}/none.pth", "{run}/out"], "none.pth"),
        (["{run}", "{run}/out", "--config-file", "gone.yaml"], "gone.yaml"),
        (
            ["{run}", "{run}/out", "--format", "torchscript", "--image", "{run}/config.yaml"],
            "image",
        ),
    ],
)
def test_command_answers_bad_input_with_one_line(tmp_path, capsys, arguments, expected):
    write_run(tmp_path, [])
    assert main([argument.format(run=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and expected in error and "\n" not in error


def test_image_without_detections_is_refused(tmp_path, image):
    write_run(tmp_path, ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0])
    with pytest.raises(ConfigError, match="detects nothing on --image"):
        export.export_torchscript(str(tmp_path), str(tmp_path / "out"), image)


def test_panoptic_student_is_refused(tmp_path, image):
    panoptic = ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", True]
    write_run(tmp_path, panoptic)
    with pytest.raises(ConfigError, match="PanopticFPN, which has no export as TorchScript"):
        export.export_torchscript(str(tmp_path), str(tmp_path / "out"), image)
