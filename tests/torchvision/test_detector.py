"""``DistilledDetector``: what is torchvision's own about it."""

import copy
import io
import re
import sys
import warnings

import pytest
import torch
from engines import ALL, Recorder
from tiny_torchvision import NUM_CLASSES, batch, detector
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from kd_detectron.errors import ConfigError
from kd_detectron.torchvision import DistilledDetector
from kd_detectron.torchvision.conventions import level_names, renormalize

OF_FEATURES = ["FGFI", "FitNet", "PCKD", "PKD", "ReviewKD"]
UNTRAINED = {"weights": None, "weights_backbone": None, "num_classes": 4}


def distilled(distillers=("CKD", "ReviewKD"), kind="faster", **options) -> DistilledDetector:
    width = {} if "HeadKD" in distillers else {"box_channels": 20}
    teacher = detector(kind, seed=2, width=12, **width)
    return DistilledDetector(detector(kind, seed=1), teacher, distillers, **options).train()


def step(model, inputs=None, seed=3):
    torch.manual_seed(seed)
    losses = model(*(inputs or batch()))
    sum(losses.values()).backward()
    return losses


def test_losses_are_torchvisions_and_one_per_distiller():
    assert set(step(distilled())) == {
        "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg",
        "loss_ckd", "loss_reviewkd",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["faster", "mask", "keypoint"])
def test_every_distiller_trains_on_two_stage_detectors(kind):
    names = ALL if kind == "mask" else [name for name in ALL if name != "MaskKD"]
    losses = step(distilled(names, kind))
    assert all(torch.isfinite(value) for value in losses.values())
    assert {f"loss_{name.lower()}" for name in names} <= set(losses)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_feature_distillers_train_on_single_stage_detectors(kind):
    losses = step(distilled(OF_FEATURES, kind))
    assert {f"loss_{name.lower()}" for name in OF_FEATURES} <= set(losses)
    assert all(torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("boxes_per_image", [(0, 0), (0, 3)])
@pytest.mark.parametrize("kind", ["keypoint", "retinanet", "fcos"])
def test_images_without_objects_just_work(kind, boxes_per_image):
    single = kind in ("retinanet", "fcos")
    model = distilled(OF_FEATURES if single else ["CKD", "BoxKD", "RPNKD", "PKD"], kind)
    losses = step(model, batch(boxes_per_image=boxes_per_image))
    assert all(torch.isfinite(value) for value in losses.values())


def test_feature_distillers_train_between_single_stage_and_two_stage_detectors():
    student = detector("fcos", image_std=[0.5, 0.5, 0.5])
    model = DistilledDetector(student, detector("mask", seed=2), ["ReviewKD"]).train()
    assert torch.isfinite(step(model)["loss_reviewkd"])


@pytest.mark.parametrize(
    ("kind", "distillers"),
    [("faster", ["CKD"]), ("faster", []), ("retinanet", ["PKD"]), ("fcos", ["PKD"])],
)
def test_boxes_stay_float32_under_autocast(kind, distillers):
    """Bfloat16 would round those of 600 pixels to multiples of 4."""
    size = {"min_size": 450, "max_size": 900}
    student = detector(kind, **size)
    model = DistilledDetector(student, detector(kind, **size), distillers).train()
    images, targets = batch(sizes=((450, 900),), boxes_per_image=(4,))
    anchors, proposals = [], []
    rpn = getattr(student, "rpn", student)
    rpn.anchor_generator.register_forward_hook(lambda m, args, output: anchors.append(output[0]))
    if kind == "faster":
        pool = student.roi_heads.box_roi_pool
        pool.register_forward_pre_hook(lambda m, args: proposals.append(args[1][0]))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = step(model, (images, targets))
        assert all(torch.isfinite(value) for value in losses.values())
    assert torch.equal(*anchors)
    for boxes in proposals:
        # Torchvision adds the ground truth to the proposals.
        distances = (boxes[:, None] - targets[0]["boxes"]).abs().amax(dim=2)
        assert boxes.dtype == torch.float32 and distances.min(dim=0).values.max() < 1e-3


def test_levels_are_matched_by_measured_stride_and_not_by_name():
    # MobileNetV3's levels "0" and "1" both have stride 32, the teacher's "0" has stride 4.
    student = fasterrcnn_mobilenet_v3_large_320_fpn(**UNTRAINED, min_size=64, max_size=128)
    recorder = Recorder(["features"])
    recorder.requires = frozenset({"features"})
    model = DistilledDetector(student, detector(levels=4), [recorder]).train()
    step(model, batch(sizes=((64, 96), (64, 96))))
    context, maps = recorder.context, model.student.backbone(torch.zeros(1, 3, 64, 96))
    assert list(maps) == ["0", "1", "pool"]
    expected = {"stride32": maps["1"].shape[-2:], "stride64": maps["pool"].shape[-2:]}
    for side in (context.student, context.teacher):
        assert {level: one.shape[-2:] for level, one in side.features.items()} == expected


def test_level_names_count_levels_of_one_stride_from_the_last():
    assert level_names([4, 8, 16]) == ["stride4", "stride8", "stride16"]
    assert level_names([32, 32, 64]) == ["stride32_2", "stride32", "stride64"]


def test_teacher_sees_the_students_pixels_with_its_own_mean_and_std():
    student = detector(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    teacher = detector(seed=2, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    seen = []
    teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model = DistilledDetector(student, teacher, ["ReviewKD"]).train()
    seen.clear()
    images, targets = batch(sizes=((64, 96), (40, 64)))
    step(model, (images, targets))
    # The student resizes to a shorter side of 64; so does the teacher's own transform here.
    expected = teacher.transform(images)[0].tensors
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert (seen[0][0, :, :, 96:] == 0).all() and len(seen) == 1


def test_equal_normalisation_hands_on_the_same_tensor():
    pixels = torch.rand(1, 3, 4, 4)
    mean, std = [0.4, 0.4, 0.4], [0.2, 0.2, 0.2]
    assert renormalize(pixels, [(4, 4)], mean, std, tuple(mean), tuple(std)) is pixels


def test_teacher_box_deltas_are_in_the_students_box_coding():
    student = detector("faster", bbox_reg_weights=(5.0, 5.0, 2.5, 2.5))
    teacher, recorder = copy.deepcopy(student), Recorder(["box_deltas"])
    recorder.requires = frozenset({"box_deltas"})
    teacher.roi_heads.box_coder.weights = (10.0, 10.0, 5.0, 5.0)
    model = DistilledDetector(student, teacher, [recorder]).train()
    model.student.backbone.eval()
    step(model)
    context = recorder.context
    torch.testing.assert_close(
        context.teacher.box_deltas, context.student.box_deltas.detach() / 2, rtol=1e-4, atol=1e-6
    )


def test_without_distillers_it_is_the_student():
    model, plain = DistilledDetector(detector(seed=1)).train(), detector(seed=1).train()
    actual, expected = step(model), step(plain)
    assert {k: v.item() for k, v in actual.items()} == {k: v.item() for k, v in expected.items()}
    assert model.teacher is None and set(model.state_dict()) == set(plain.state_dict())


def test_student_checkpoint_of_torchvision_and_state_of_the_whole_model_are_checkpointable():
    model, buffer = distilled(), io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    wrapped = nn.ModuleDict({"model": distilled(["CKD", "ReviewKD"])})  # as Lightning and DDP do
    prefixed = {f"model.{k}": v for k, v in torch.load(buffer).items()}
    wrapped.load_state_dict(prefixed, strict=True)
    assert set(wrapped.state_dict()) == set(prefixed)
    model.student.load_state_dict(detector("faster", seed=7).state_dict(), strict=True)


def test_student_is_scripted_as_torchvisions_own():
    model = distilled()
    step(model)
    scripted = torch.jit.script(model.student.eval())
    images, _ = batch()
    with torch.no_grad():
        _, found = scripted(images)
        expected = model.eval()(images)
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(found, expected, strict=True))


def test_student_is_exported_to_onnx_as_torchvisions_own(tmp_path):
    import onnxruntime

    model = distilled()
    step(model)
    images, _ = batch()
    path = tmp_path / "student.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.student.eval(), ([images[0]],), path, dynamo=False, opset_version=17
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    boxes, *_ = session.run(None, {session.get_inputs()[0].name: images[0].numpy()})
    expected = model.eval()(images[:1])[0]["boxes"].detach()
    assert len(expected) and torch.allclose(torch.from_numpy(boxes), expected, atol=1e-3)


def test_step_of_the_reference_training_loop_runs_unchanged():
    # As in torchvision's references/detection/engine.py.
    model = distilled()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.001, momentum=0.9)
    images, targets = batch()
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss_dict = model(list(images), [dict(target) for target in targets])
    losses = sum(loss for loss in loss_dict.values())
    optimizer.zero_grad()
    losses.backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("student.backbone") for name in changed)
    assert any(name.startswith("distillers.ReviewKD") for name in changed)
    model.eval()
    assert set(model(images)[0]) == {"boxes", "labels", "scores"}


def test_copies_share_the_frozen_teacher():
    model = distilled()
    average = torch.optim.swa_utils.AveragedModel(model)
    assert average.module.teacher is model.teacher
    assert average.module.student is not model.student


def test_weights_options_and_objects():
    model = distilled({"CKD": 0.5, "ReviewKD": {"weight": 2, "mid_channels": 8}})
    assert model.distillation_weights == {"CKD": 0.5, "ReviewKD": 2.0}
    assert model.distillers["ReviewKD"].fusions[0].reduce[0].out_channels == 8
    assert distilled([Recorder()], "mask").distillation_weights == {"Recorder": 1.0}
    halved = distilled({"CKD": 1.0})
    halved.distillation_factor = 0.5
    full = step(distilled({"CKD": 1.0}))["loss_ckd"]
    torch.testing.assert_close(step(halved)["loss_ckd"], full / 2)


def test_building_a_distilled_model_draws_no_random_numbers():
    student, teacher = detector(seed=1), detector(seed=2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    DistilledDetector(student, teacher, ALL)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("distillers", [(), ["ReviewKD"]])
def test_inherited_parts_start_as_the_teachers_and_the_others_as_before(distillers):
    student, teacher = detector("faster", seed=1), detector("faster", seed=2, width=12)
    before = copy.deepcopy(student.state_dict())
    model = DistilledDetector(student, teacher, distillers, inherit=["rpn", "roi_heads"])
    assert (model.teacher is None) == (not distillers)
    for key, tensor in model.student.state_dict().items():
        heads = key.startswith(("rpn", "roi_heads"))
        source = teacher.state_dict() if heads else before
        assert torch.equal(tensor, source[key]), key


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        # The whole FPN or none of it.
        ({"width": 12}, {"rpn.head", "roi_heads"}),
        ({"width": 8}, {"backbone.fpn", "rpn.head", "roi_heads"}),
        ({"first_stride": 8}, {"roi_heads"}),
        ({"box_channels": 20}, {"backbone.fpn", "rpn.head"}),
        (
            {"bbox_reg_weights": (5.0, 5.0, 2.5, 2.5)},
            {"backbone.fpn", "rpn.head", "roi_heads.box_head"},
        ),
        ({"num_classes": 5}, {"backbone.fpn", "rpn.head", "roi_heads.box_head"}),
    ],
)
def test_auto_inherits_what_fits_in_whole_and_means_the_same(teacher, expected):
    student = detector("faster", seed=1)
    teacher = detector("faster", seed=2, **teacher)
    before = copy.deepcopy(student.state_dict())
    DistilledDetector(student, teacher, inherit=["auto"])
    changed = {k for k, t in student.state_dict().items() if not torch.equal(t, before[k])}
    assert {part for part in expected if any(k.startswith(part) for k in changed)} == expected
    assert all(key.startswith(tuple(expected)) for key in changed), changed


def test_auto_with_nothing_to_inherit_is_refused():
    student = detector("faster", num_classes=2, out_channels=8)
    with pytest.raises(ConfigError, match="auto.*FPN, RPN, heads"):
        DistilledDetector(student, detector("faster"), inherit=["auto"])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: distilled(["ReviewKd"]), ["ReviewKd", "did you mean ReviewKD"]),
        (lambda: distilled(["CKD", "CKD"]), ["CKD", "once"]),
        (lambda: distilled({"CKD": float("nan")}), ["CKD", "nan"]),
        (lambda: distilled({"CKD": -1}), ["CKD", "-1"]),
        (lambda: distilled({"CKD": {"temprature": 2}}), ["TEMPRATURE", "TEMPERATURE"]),
        (lambda: distilled({"CKD": {"temperature": 0}}), ["CKD's TEMPERATURE is 0"]),
        (lambda: distilled({"PKD": {"max_stride": 2}}), ["PKD's MAX_STRIDE is 2"]),
        (
            lambda: DistilledDetector(detector(), detector(out_channels=32), ["PKD"]),
            ["distillers names PKD", "(out_channels of the FPN) have [16,", "[32,"],
        ),
        (
            lambda: DistilledDetector(detector(), detector(box_channels=20), ["HeadKD"]),
            ["distillers names HeadKD", "24 channels (representation_size of the box head)", "20"],
        ),
        (lambda: distilled(["CKD"], "fcos"), ["CKD", "student", "single-stage", "ReviewKD"]),
        (
            lambda: DistilledDetector(detector(), detector("retinanet"), ["CKD"]),
            ["CKD", "teacher", "single-stage"],
        ),
        (
            lambda: DistilledDetector(detector(), detector(num_classes=5), ["CKD"]),
            [f"classes without the background is {NUM_CLASSES}", "5 for the teacher", "CKD"],
        ),
        (
            lambda: DistilledDetector(
                detector(), detector(first_stride=64, levels=2), ["ReviewKD"]
            ),
            ["ReviewKD", "[4, 8, 16, 32]", "[64, 128, 256]", "stride"],
        ),
        (lambda: DistilledDetector(detector("ssd")), ["SSD", "student", "Faster, Mask"]),
        (
            lambda: DistilledDetector(detector(), nn.Linear(2, 2), ["CKD"]),
            ["Linear", "teacher", "RetinaNet or FCOS"],
        ),
        (lambda: DistilledDetector(detector(), None, ["CKD"]), ["CKD", "no teacher"]),
        (lambda: distilled([Recorder()]), ["Recorder", "mask head"]),
        (lambda: distilled([], inherit=["roi_head."]), ["roi_head.", "no part of that name"]),
        (lambda: distilled([], inherit=["roi_heads"]), ["roi_heads", "fc6", "(20, 784)"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(build, words):
    with pytest.raises(ConfigError) as error:
        build()
    message = str(error.value)
    assert all(word in message for word in words), message
    assert not re.search(r"\b(KD|MODEL|SOLVER)\.[A-Z]", message), message
    assert "\n" not in message and ". " not in message.replace("e.g. ", "")


def test_student_and_teacher_must_be_two_models():
    model = detector()
    with pytest.raises(ConfigError, match="same object"):
        DistilledDetector(model, model, ["CKD"])


def test_teacher_with_other_anchors_is_refused_where_anchors_are_compared():
    teacher = detector(levels=4)
    student = fasterrcnn_mobilenet_v3_large_320_fpn(**UNTRAINED)
    recorder = Recorder()
    recorder.requires = frozenset({"objectness"})
    with pytest.raises(
        ConfigError, match="stride32 have sizes .*512.* student, .*anchor generator"
    ):
        DistilledDetector(student, teacher, [recorder])


def test_anchors_of_other_sizes_are_refused_where_anchors_are_compared():
    student, teacher = detector("faster"), detector("faster")
    generator = teacher.rpn.anchor_generator
    generator.sizes = (*generator.sizes[:2], (99,), *generator.sizes[3:])
    with pytest.raises(ConfigError, match=r"stride16 have sizes \(32,\).* \(99,\).* teacher"):
        DistilledDetector(student, teacher, ["RPNKD"])
    DistilledDetector(student, teacher, ["CKD", "PKD"])


def test_masks_of_another_size_are_refused_where_masks_are_compared():
    teacher = detector()
    teacher.roi_heads.mask_roi_pool.output_size = (28, 28)
    with pytest.raises(ConfigError, match="28 pixels per side for the student and 56 for the tea"):
        DistilledDetector(detector(), teacher, ["MaskKD"])


def test_package_does_not_import_detectron2_itself():
    names = [name for name in sys.modules if name.startswith("kd_detectron.torchvision")]
    assert names and not any(
        getattr(value, "__module__", "").startswith("detectron2")
        for name in names
        for value in vars(sys.modules[name]).values()
        if isinstance(value, type)
    )
