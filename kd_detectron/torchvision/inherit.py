"""Starts parts of the student from the teacher's weights: the inheriting strategy.

As in Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection" (arXiv
2110.12724), where neck and heads are inherited. It happens once, before training, and needs no
distiller.
"""

import logging
from collections.abc import Sequence

from torch import nn

from kd_detectron.errors import ConfigError

from .anatomy import anchor_generator_of, read_anatomy

logger = logging.getLogger(__name__)

AUTO = "auto"
# With "auto", each of these is inherited as a whole where it fits, and each child of the ROI heads.
_PARTS = ("backbone.fpn", "rpn.head", "head")


def inherit_parts(parts: Sequence[str], student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copies parts of the teacher into the student; returns the names of the tensors.

    Args:
        parts: the starts of the names of tensors, such as "rpn" and "roi_heads"; "auto" is the FPN,
            the RPN's or the dense head, and each part of the ROI heads, where they fit in whole.
        student: the detector that they are copied into.
        teacher: the detector that they are copied from.

    Raises:
        ConfigError: the teacher has no such part, or the student's is another; for "auto", nothing
            fits.
    """
    copied: list[str] = []
    for part in parts:
        if part == AUTO:
            copied += _inherit_what_fits(student, teacher)
            continue
        theirs, wrong = _tensors(part, student, teacher)
        if not theirs or wrong:
            example = f", e.g. {wrong[0]}" if wrong else ""
            raise ConfigError(
                f"inherit has '{part}', of which the teacher has {len(theirs)} tensors; the "
                f"student lacks {len(wrong)} of them or has them in another shape{example}; name "
                "only parts that are built alike (backbone.fpn, rpn, roi_heads), or 'auto' for all "
                "that fit"
            )
        copied += _copy(theirs, student)
    return copied


def _inherit_what_fits(student: nn.Module, teacher: nn.Module) -> list[str]:
    copied: list[str] = []
    levels = [read_anatomy(student, "student").levels, read_anatomy(teacher, "teacher").levels]
    generators = [anchor_generator_of(model) for model in (student, teacher)]
    same_levels = levels[0] == levels[1]
    same_anchors = same_levels and all(
        [list(map(tuple, one.sizes)), list(map(tuple, one.aspect_ratios))]
        == [list(map(tuple, generators[0].sizes)), list(map(tuple, generators[0].aspect_ratios))]
        for one in generators
    )
    heads = getattr(student, "roi_heads", nn.Module())
    fitting: list[str] = []
    for part in [*_PARTS, *(f"roi_heads.{name}" for name, _ in heads.named_children())]:
        theirs, wrong = _tensors(f"{part}.", student, teacher)
        own = [key for key in student.state_dict() if key.startswith(f"{part}.")]
        fits = bool(theirs) and not wrong and set(own) == set(theirs)
        if part == "backbone.fpn":
            fits = fits and same_levels
        elif part in ("rpn.head", "head"):
            fits = fits and same_anchors
        elif part.endswith("_predictor"):
            # A predictor reads its head's output, and the box predictor's deltas have a coding.
            fits = fits and part.replace("_predictor", "_head") in fitting
            weights = [m.roi_heads.box_coder.weights for m in (student, teacher) if fits]
            fits = fits and tuple(weights[0]) == tuple(weights[1])
        if fits:
            copied += _copy(theirs, student)
            fitting.append(part)
    if not fitting:
        raise ConfigError(
            "inherit is 'auto', but no part of the student behind its network (FPN, RPN, heads) is "
            "built as the teacher's; give both the same out_channels, anchors or heads, or leave "
            "inherit out"
        )
    logger.info("Inherited from the teacher: %s", ", ".join(fitting))
    return copied


def _tensors(start: str, student: nn.Module, teacher: nn.Module) -> tuple[dict, list[str]]:
    """The teacher's tensors whose names start so, and those that the student has not alike."""
    own = student.state_dict()
    theirs = {key: t for key, t in teacher.state_dict().items() if key.startswith(start)}
    wrong = [key for key, t in theirs.items() if key not in own or own[key].shape != t.shape]
    return theirs, wrong


def _copy(tensors: dict, student: nn.Module) -> list[str]:
    own = student.state_dict()
    for key, tensor in tensors.items():
        own[key].copy_(tensor)
    return list(tensors)
