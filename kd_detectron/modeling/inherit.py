"""Starts parts of the student from the teacher's weights: ``KD.TEACHER.INHERIT``.

As in Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection" (arXiv
2110.12724), where neck and heads are inherited. A student that starts from scratch need not learn
again what a box head is. It happens once, before training, and needs no distiller.
"""

import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import nn

from kd_detectron.errors import ConfigError, did_you_mean

from .compatibility import box_coding, same_anchors
from .taps import box_head_of

logger = logging.getLogger(__name__)

AUTO = "auto"


def inherit(parts: Sequence[str], student: Mapping, teacher: nn.Module) -> list[str]:
    """Copies parts of the teacher into the student; returns the names of the tensors.

    Args:
        parts: the starts of the names, ``KD.TEACHER.INHERIT``; "auto" is every module behind the
            backbone's bottom-up network (FPN convolutions, RPN, heads) that fits in whole.
        student: the student's parts by constructor name.
        teacher: the whole detector, as ``load_teacher`` returns it.

    Raises:
        ConfigError: the teacher has no such part, or the student's is another; for "auto", nothing
            fits.
    """
    own = {
        f"{name}.{key}": tensor
        for name, part in student.items()
        if isinstance(part, nn.Module)
        for key, tensor in part.state_dict().items()
    }
    copied: list[str] = []
    for part in parts:
        if part == AUTO:
            copied += _inherit_what_fits(own, student, teacher)
            continue
        inherited = {key: t for key, t in teacher.state_dict().items() if key.startswith(part)}
        wrong = [k for k, t in inherited.items() if k not in own or own[k].shape != t.shape]
        if not inherited:
            modules = sorted({".".join(key.split(".")[:depth]) for key in own for depth in (1, 2)})
            raise ConfigError(
                f"KD.TEACHER.INHERIT has '{part}', but the teacher has no part of that name"
                f"{did_you_mean(part, [AUTO, *modules])}"
            )
        if wrong:
            raise ConfigError(
                f"KD.TEACHER.INHERIT has '{part}', of which the teacher has {len(inherited)} "
                f"tensors; the student lacks {len(wrong)} of them or has them in another shape, "
                f"e.g. {wrong[0]}; name only parts that are built alike (MODEL.FPN, .RPN, .ROI_*), "
                "or 'auto' for all that fit"
            )
        copied += _copy(inherited, own)
        logger.info("Inherited from the teacher: %s (%d tensors)", part, len(inherited))
    return copied


def _inherit_what_fits(
    own: Mapping[str, torch.Tensor], student: Mapping, teacher: nn.Module
) -> list[str]:
    state, copied = teacher.state_dict(), []
    fitting: list[str] = []
    reasons: dict[str, str] = {}
    for module in _modules(student):
        theirs = {key: t for key, t in state.items() if key.startswith(f"{module}.")}
        ours = {key: t for key, t in own.items() if key.startswith(f"{module}.")}
        reason = _why_not(module, ours, theirs, fitting, SimpleNamespace(**student), teacher)
        if reason:
            reasons[module] = reason
        else:
            copied += _copy(theirs, own)
            fitting.append(module)
    refused = "; ".join(f"{module} ({reason})" for module, reason in reasons.items())
    if not fitting:
        example = f", e.g. {refused.partition('; ')[0]}" if refused else ""
        raise ConfigError(
            "KD.TEACHER.INHERIT is ['auto'], but no part of the student behind the backbone's "
            f"bottom-up network is built as the teacher's{example}; give both the same MODEL.FPN, "
            ".RPN or .ROI_*, or leave INHERIT empty"
        )
    logger.info("Inherited from the teacher: %s", ", ".join(fitting))
    if refused:
        logger.info("Not inherited from the teacher: %s", refused)
    return copied


def _modules(student: Mapping) -> list[str]:
    """Names of the modules with weights behind the bottom-up network, in the order of the data."""
    owners = {"backbone": student["backbone"]} if hasattr(student["backbone"], "bottom_up") else {}
    owners |= {
        name: part
        for name, part in student.items()
        if isinstance(part, nn.Module) and name != "backbone"
    }
    names = []
    for owner, part in owners.items():
        # A dense head is one module: RetinaNet's, or the semantic one.
        children = part.named_children() if owner in ("backbone", "roi_heads") else [("", part)]
        for child, module in children:
            if child != "bottom_up" and module.state_dict():
                names.append(f"{owner}.{child}".rstrip("."))
    return names


def _why_not(module, ours, theirs, fitting, student_model, teacher) -> str:
    """Why a module is not inherited; empty where it is."""
    if not theirs:
        return "the teacher has none"
    for key in [*ours, *theirs]:
        shapes = [tuple(state[key].shape) if key in state else None for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            return f"{key.removeprefix(module + '.')} is {shapes[0]}, the teacher's {shapes[1]}"
    if module in ("proposal_generator", "head") and not same_anchors(student_model, teacher):
        return "its anchors are others"
    if module == "roi_heads.box_predictor" and box_head_of(student_model) is not None:
        if "roi_heads.box_head" not in fitting:
            return "it reads a box head that is not inherited"
        if box_coding(student_model) != box_coding(teacher):
            return "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS are others"
    return ""


def _copy(tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    for key, tensor in tensors.items():
        own[key].copy_(tensor)
    return list(tensors)
