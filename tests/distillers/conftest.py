"""A small stand-in for what both models computed in a step, with every part a distiller may read.

Two models that differ wherever they may: channels of the maps (C; not for PKD and PCKD, which
compare them as they are) and width of the box head (D; not for HeadKD). All teacher tensors
require grad here, so that a test sees whether a distiller would train them.
"""

from types import SimpleNamespace

import pytest
import torch

from kd_detectron.distillers import ModelSpec, build_distiller

SIZES = {"p2": (8, 8), "p3": (4, 4), "p4": (2, 2)}
STRIDES = {"p2": 4, "p3": 8, "p4": 16}
ANCHORS = 2
WIDTHS = {"student": (4, 6), "teacher": (5, 7)}  # C, D
SAME_C, SAME_D = {"teacher": (4, 7)}, {"teacher": (5, 6)}
MASK_SIZE = 3
BOXES = [[[2.0, 3, 11, 12], [10, 10, 30, 29]], [[5.0, 1, 20, 22]], []]


@pytest.fixture
def widths(request):
    """C and D of both models, for the distiller that the test is of."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    return WIDTHS | {"PKD": SAME_C, "PCKD": SAME_C, "HeadKD": SAME_D}.get(name, {})


def spec(widths: tuple[int, int], num_classes: int) -> ModelSpec:
    channels, width = widths
    return ModelSpec(dict.fromkeys(SIZES, channels), STRIDES, num_classes, width)


def anchors(level: str) -> torch.Tensor:
    """Squares of one and two strides around each location, location-major."""
    (height, width), stride = SIZES[level], STRIDES[level]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = (torch.stack([x, y, x, y], dim=-1) * stride).float()[:, :, None]
    halves = torch.tensor([[-0.5, -0.5, 0.5, 0.5], [-1, -1, 1, 1]]) * stride
    return (centres + halves).reshape(-1, 4)


@pytest.fixture
def make_distiller(widths):
    """``make_distiller(name, num_classes=3)``: a registered distiller with its default options."""

    def make(name, num_classes=3):
        torch.manual_seed(1)
        return build_distiller(
            name, {}, spec(widths["student"], num_classes), spec(widths["teacher"], num_classes)
        ).train()

    return make


@pytest.fixture
def make_context(widths):
    """``make_context(proposals=(4, 3), ...)``: a context with that many proposals of each image.

    ``order`` permutes the images; ``logit_scale`` multiplies all logits; ``student_dtype`` and
    ``teacher_dtype`` are of all tensors that the models computed.
    """

    def make(
        proposals=(4, 3),
        *,
        num_classes=3,
        order=None,
        logit_scale=1.0,
        student_dtype=torch.float32,
        teacher_dtype=torch.float32,
    ):
        generator = torch.Generator().manual_seed(0)
        order = range(len(proposals)) if order is None else order

        def side(model, dtype):
            channels, width = widths[model]

            def leaf(parts, join):
                return join([parts[n] for n in order]).to(dtype).requires_grad_()

            def rows(columns, scale=1.0):
                return leaf(
                    [torch.randn(r, columns, generator=generator) * scale for r in proposals],
                    torch.cat,
                )

            def maps(size):
                return leaf(
                    [torch.randn(channels, *size, generator=generator) for _ in proposals],
                    torch.stack,
                )

            def of_anchors(*shape, scale=1.0):
                return {
                    level: leaf(
                        [
                            torch.randn(len(anchors(level)), *shape, generator=generator) * scale
                            for _ in proposals
                        ],
                        torch.stack,
                    )
                    for level in SIZES
                }

            masks = [
                torch.randn(f, num_classes, MASK_SIZE, MASK_SIZE, generator=generator)
                for f in foreground
            ]
            return SimpleNamespace(
                logits=rows(num_classes + 1, logit_scale),
                box_features=rows(width),
                features={level: maps(size) for level, size in SIZES.items()},
                objectness=of_anchors(scale=logit_scale),
                anchor_deltas=of_anchors(4),
                box_deltas=rows(4 * num_classes),
                mask_logits=leaf([logit_scale * mask for mask in masks], torch.cat),
            )

        targets = [torch.randint(num_classes + 1, (r,), generator=generator) for r in proposals]
        foreground = [int((x < num_classes).sum()) for x in targets]
        student, teacher = side("student", student_dtype), side("teacher", teacher_dtype)
        labels = {
            level: torch.randint(-1, 2, (len(proposals), len(anchors(level))), generator=generator)
            for level in SIZES
        }
        box_targets = [torch.randn(r, 4, generator=generator) for r in proposals]
        classes = [x[x < num_classes] for x in targets]
        return SimpleNamespace(
            student=student,
            teacher=teacher,
            targets=torch.cat([targets[n] for n in order]),
            num_classes=num_classes,
            anchors={level: anchors(level) for level in SIZES},
            anchor_labels={level: x[list(order)] for level, x in labels.items()},
            box_targets=torch.cat([box_targets[n] for n in order]),
            mask_classes=torch.cat([classes[n] for n in order]),
            gt_boxes=[torch.tensor(BOXES[n]).reshape(-1, 4) for n in order],
            proposal_boxes=[torch.zeros(proposals[n], 4) for n in order],
            image_sizes=[(32, 32) for _ in order],
        )

    return make


@pytest.fixture
def embed():
    """``embed(distiller, context, dim)``: both models' box features through its embeddings."""

    def embedded(distiller, context, dim):
        layers = distiller.student_embedding, distiller.teacher_embedding
        assert [tuple(layer.weight.shape) for layer in layers] == [(dim, 6), (dim, 7)]
        return [
            side.box_features @ layer.weight.T + layer.bias
            for side, layer in zip((context.student, context.teacher), layers, strict=True)
        ]

    return embedded
