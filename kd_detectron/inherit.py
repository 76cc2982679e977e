"""Starts parts of the student from the teacher's weights, for the detectors of both engines.

As in Kang et al., "Instance-Conditional Knowledge Distillation for Object Detection" (arXiv
2110.12724), where neck and heads are inherited. A student that starts from scratch need not learn
again what a box head is. It happens once, before training, and needs no distiller.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from kd_detectron.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

AUTO = "auto"
Tensors = Mapping[str, torch.Tensor]


def inherit(
    parts: Sequence[str],
    student: Tensors,
    teacher: Tensors,
    *,
    modules: Sequence[str],
    why_not: Callable[[str, Sequence[str]], str],
    key: str,
) -> list[str]:
    """Copies parts of the teacher into the student, in place; returns the names of the tensors.

    Args:
        parts: the starts of the names of tensors; "auto" is each of ``modules`` that fits in whole.
            What the student has under such a name must be in the teacher too, but for modules that
            the teacher lacks altogether.
        student: its tensors by name.
        teacher: its tensors by name.
        modules: names of the student's modules behind the network, in the order of the data.
        why_not: of a module whose tensors fit, and the ones inherited so far, why it means
            something else in the teacher; "" where it does not.
        key: where the parts are named, for messages.

    Raises:
        ConfigError: the teacher has no such part, or the student's is another or means something
            else; for "auto", nothing fits.
    """
    copied: list[str] = []
    for part in parts:
        if part == AUTO:
            copied += _inherit_what_fits(student, teacher, modules, why_not, key)
            continue
        inherited = _of(part, teacher)
        if not inherited:
            names = {".".join(name.split(".")[:depth]) for name in student for depth in (1, 2)}
            raise ConfigError(
                f"{key} has '{part}', but the teacher has no part of that name"
                f"{did_you_mean(part, [AUTO, *names])}"
            )
        lacking = [module for module in modules if not _of(f"{module}.", teacher)]
        lacking = [module for module in lacking if _of(part, _of(f"{module}.", student))]
        if reason := _misfit(part, student, teacher, modules, lacking, why_not):
            raise ConfigError(
                f"{key} has '{part}', but {reason}; name only parts that are built alike, or "
                f"'{AUTO}' for all that fit"
            )
        copied += _copy(inherited, student)
        logger.info("Inherited from the teacher: %s (%d tensors)", part, len(inherited))
        if lacking:
            logger.info("Not in the teacher: %s", ", ".join(lacking))
    return copied


def _misfit(
    part: str,
    student: Tensors,
    teacher: Tensors,
    modules: Sequence[str],
    lacking: Sequence[str],
    why_not: Callable,
) -> str:
    """Why the teacher's part is not the student's; "" where it is."""
    theirs = _of(part, teacher)
    ours = {
        name: tensor
        for name, tensor in _of(part, student).items()
        if not name.startswith(tuple(f"{module}." for module in lacking))
        # A student may have a BatchNorm where the teacher has a frozen one.
        and (name in theirs or not name.endswith("num_batches_tracked"))
    }
    if reason := _difference("", ours, theirs):
        return reason
    for module in modules:
        tensors = _of(f"{module}.", student)
        # A layer of a module means the same wherever the module's outputs do not.
        if tensors and tensors.keys() <= theirs.keys() and (reason := why_not(module, modules)):
            return f"of {module}, {reason}"
    return ""


def _inherit_what_fits(
    student: Tensors, teacher: Tensors, modules: Sequence[str], why_not: Callable, key: str
) -> list[str]:
    copied: list[str] = []
    fitting: list[str] = []
    reasons: list[str] = []
    for module in modules:
        ours, theirs = (_of(f"{module}.", tensors) for tensors in (student, teacher))
        reason = _difference(module, ours, theirs) or why_not(module, fitting)
        if reason:
            reasons.append(f"{module} ({reason})")
        else:
            copied += _copy(theirs, student)
            fitting.append(module)
    if not fitting:
        example = f", e.g. {reasons[0]}" if reasons else ""
        raise ConfigError(
            f"{key} is '{AUTO}', but no part of the student behind the backbone's bottom-up "
            f"network (FPN, RPN, heads) is built as the teacher's{example}; build these alike, or "
            f"leave {key} empty"
        )
    logger.info("Inherited from the teacher: %s", ", ".join(fitting))
    if reasons:
        logger.info("Not inherited from the teacher: %s", "; ".join(reasons))
    return copied


def _of(start: str, tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(start)}


def _difference(module: str, ours: Tensors, theirs: Tensors) -> str:
    if not theirs:
        return "the teacher has none"
    for name in [*ours, *theirs]:
        shapes = [tuple(x[name].shape) if name in x else "absent" for x in (ours, theirs)]
        if shapes[0] != shapes[1]:
            return f"{name.removeprefix(module + '.')} is {shapes[0]}, the teacher's {shapes[1]}"
    return ""


def _copy(tensors: Tensors, student: Tensors) -> list[str]:
    for name, tensor in tensors.items():
        student[name].copy_(tensor)
    return list(tensors)
