"""Whatever the detector hands over: no distiller crashes, no loss and no gradient is not finite.

Hypothesis draws what may differ from step to step and from user to user: proposals of each image
(none included), assigned classes, ground-truth boxes (down to a pixel, far outside, a thousand),
class counts, sizes and numbers of levels, widths, options, loss weights, and the scale of values.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from effort import effort
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd_detectron.distillers import DISTILLER_REGISTRY, ModelSpec, build_distiller

NAMES = sorted(
    name for name, cls in DISTILLER_REGISTRY if cls.__module__.startswith("kd_detectron.")
)
TEMPERATURES = st.sampled_from([0.05, 0.5, 1.0, 4.0, 100.0])
EMBEDDING = {"embed_dim": st.integers(1, 9)}
OPTIONS = {
    "CKD": {
        "temperature": TEMPERATURES,
        "triple": st.sampled_from(["tss", "sts", "stt"]),
        "group_size": st.integers(0, 9),
        "chunk_size": st.integers(0, 9),
    },
    "ReviewKD": {"mid_channels": st.integers(1, 6)},
    "KD": {"temperature": TEMPERATURES},
    "DKD": {
        "temperature": TEMPERATURES,
        "alpha": st.floats(0, 10),
        "beta": st.floats(0, 10),
    },
    "FitNet": {},
    "FGFI": {"psi": st.floats(0, 0.99)},
    "DCD": EMBEDDING | {"consistency_weight": st.floats(0, 10)},
    "BicKD": {
        "temperature": TEMPERATURES,
        "contrast_temperature": TEMPERATURES,
        "contrast_weight": st.floats(0, 10),
        "form": st.sampled_from(["contrastive", "orthogonal"]),
    },
    "PKD": {"max_stride": st.sampled_from([4, 16, 1000])},
    "PCKD": {"max_stride": st.sampled_from([4, 16, 1000]), "floor": st.floats(1e-6, 10)},
    "RPNKD": {"anchors": st.sampled_from(["sampled", "all"]), "delta_weight": st.floats(0, 10)},
    "BoxKD": {"form": st.sampled_from(["teacher", "bounded"]), "margin": st.floats(0, 10)},
    "HeadKD": {},
    "MaskKD": {"form": st.sampled_from(["cross_entropy", "relative"])},
    "SupCon": EMBEDDING | {"temperature": TEMPERATURES},
    "CRD": EMBEDDING | {"temperature": TEMPERATURES},
}


@st.composite
def steps(draw, same_channels=False):
    """One training step of two random detectors: specs of both, and the context."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    proposals = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    num_classes = draw(st.sampled_from([1, 2, 3, 20, 80]))
    scale = draw(st.sampled_from([0.0, 1e-4, 1.0, 30.0]))
    # The coarsest level may be a single pixel; images need not be square.
    num_levels, height, width = draw(st.tuples(*[st.integers(1, high) for high in (5, 3, 5)]))
    sizes = [(height << k, width << k) for k in reversed(range(num_levels))]
    levels = [f"p{2 + k}" for k in range(num_levels)]
    strides = [4 << k for k in range(num_levels)]
    num_anchors = draw(st.integers(1, 3))
    image_size = (sizes[0][0] * 4, sizes[0][1] * 4)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * scale

    student_channels, student_width = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    foreground = draw(st.booleans())
    targets = torch.randint(num_classes + 1, (sum(proposals),), generator=generator)
    targets = targets if foreground else torch.full_like(targets, num_classes)
    mask_classes = targets[targets < num_classes]

    def side(channels, box_channels):
        rows = sum(proposals)
        by_class = draw(st.sampled_from([1, num_classes]))
        counts = [height * width * num_anchors for height, width in sizes]
        outputs = {
            "features": [normal(len(proposals), channels, *size) for size in sizes],
            "objectness": [normal(len(proposals), count) for count in counts],
            "anchor_deltas": [normal(len(proposals), count, 4) for count in counts],
            "logits": normal(rows, num_classes + 1),
            "box_features": normal(rows, box_channels),
            "box_deltas": normal(rows, 4 * by_class),
            "mask_logits": normal(len(mask_classes), by_class, 2, 2),
        }
        tensors = [t for x in outputs.values() for t in (x if isinstance(x, list) else [x])]
        for tensor in tensors:
            tensor.requires_grad_()
        spec = ModelSpec(
            dict.fromkeys(levels, channels),
            dict(zip(levels, strides, strict=True)),
            num_classes,
            box_channels,
        )
        outputs = {
            name: dict(zip(levels, x, strict=True)) if isinstance(x, list) else x
            for name, x in outputs.items()
        }
        return spec, SimpleNamespace(**outputs, tensors=tensors)

    def boxes(count):
        corners = torch.rand(count, 2, generator=generator) * max(image_size) * 1.5
        extents = torch.rand(count, 2, generator=generator) * max(image_size)
        pixel = draw(st.booleans())
        return torch.cat([corners, corners + (1 if pixel else extents)], dim=1)

    def anchors(size, stride):
        y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        centres = (torch.stack([x, y, x, y], dim=-1) * stride).float()[:, :, None]
        reach = stride * torch.arange(1, num_anchors + 1)[:, None]
        return (centres + reach * torch.tensor([-1, -1, 1, 1])).reshape(-1, 4)

    student_spec, student = side(student_channels, student_width)
    teacher_spec, teacher = side(
        student_channels if same_channels else draw(st.integers(1, 6)),
        student_width if same_channels else draw(st.integers(1, 9)),
    )
    counts = [draw(st.sampled_from([0, 1, 3, 1000])) for _ in proposals]
    return (student_spec, teacher_spec), SimpleNamespace(
        student=student,
        teacher=teacher,
        targets=targets,
        box_targets=normal(len(targets), 4),
        mask_classes=mask_classes,
        anchor_labels={
            level: torch.randint(-1, 2, x.shape, generator=generator)
            for level, x in student.objectness.items()
        },
        num_classes=num_classes,
        anchors={
            level: anchors(size, stride)
            for level, size, stride in zip(levels, sizes, strides, strict=True)
        },
        gt_boxes=[boxes(count) for count in counts],
        proposal_boxes=[boxes(count) for count in proposals],
        image_sizes=[image_size for _ in proposals],
    )


@pytest.mark.filterwarnings("ignore:.*NCKD")
@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=effort(8, 30),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_loss_and_gradients_are_finite_whatever_the_step(name, data):
    specs, context = data.draw(steps(same_channels=name in ("PKD", "PCKD", "HeadKD")))
    options = {key: data.draw(values, label=key) for key, values in OPTIONS[name].items()}
    weight = data.draw(st.floats(0, 100), label="weight")
    torch.manual_seed(0)  # Hypothesis does not seed the distiller's weights.
    distiller = build_distiller(name, options, *specs).train()
    (loss,) = distiller(context).values()
    assert loss.shape == () and math.isfinite(loss.item())
    (weight * loss).backward()
    assert all(tensor.grad is None for tensor in context.teacher.tensors)
    for parameter in distiller.parameters():
        assert parameter.grad is not None
    for tensor in [*context.student.tensors, *distiller.parameters()]:
        assert tensor.grad is None or tensor.grad.isfinite().all()


def test_options_of_every_distiller_are_drawn():
    assert sorted(OPTIONS) == NAMES
