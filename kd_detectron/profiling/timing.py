"""Times of a distilled step and of the parts that it consists of, for any engine.

In one process, on one fixed batch, interleaved and repeated: the plain student's step (forward and
backward), the teacher's forward part by part, each distiller's forward and backward alone on
recorded tensors, and the distilled step. Each round gives one

    overhead ratio = distilled step / (student step + teacher + distillers)

1 if distillation costs its own arithmetic and nothing else.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from kd_detectron.context import DistillationContext, StudentOutputs

OBJECTS_PER_IMAGE = 8
SEED = 0

STUDENT, DISTILLED = "student step", "distilled step"


class Step(Protocol):
    """Forward and backward of a model on one batch, with the same random state each time."""

    model: nn.Module

    def __call__(self) -> None: ...


def measure(
    student: Step, distilled: Step, *, autocast: Mapping, repeats: int, device: str
) -> dict:
    """Times both steps and what the second one consists of.

    Args:
        student, distilled: the two steps, on the same batch.
        autocast: the arguments of ``torch.autocast`` of a step.
        repeats: measured rounds.
        device: where they run.

    Returns:
        The entries "distillers", "proposals" (sampled, of all images), "repeats", "machine",
        "parts" and "ratios" of a report.
    """
    context = record_context(distilled)
    distillers = distilled.model.distillers
    parts = {
        "student": {STUDENT: student},
        "teacher": teacher_parts(context, autocast),
        "distiller": {n: distiller_alone(d, context, autocast) for n, d in distillers.items()},
        "distilled": {DISTILLED: distilled},
    }
    kinds = {part: kind for kind, named in parts.items() for part in named}
    every = {part: run for named in parts.values() for part, run in named.items()}
    seconds = time_parts(every, repeats=repeats, device=device)
    return {
        "distillers": list(distillers),
        "proposals": sum(len(boxes) for boxes in context.proposal_boxes or ()),
        "repeats": repeats,
        "machine": machine(device),
        "parts": {
            part: {"kind": kinds[part], "seconds": values, **spread(values)}
            for part, values in seconds.items()
        },
        "ratios": ratios(seconds),
    }


def random_boxes(random: np.random.Generator, size: tuple[int, int]) -> list[list[float]]:
    """XYXY boxes of the objects of one image, of a height and width."""
    height, width = size
    extents = random.uniform(0.1, 0.5, (OBJECTS_PER_IMAGE, 2)) * (width, height)
    corners = random.uniform(0, 1, (OBJECTS_PER_IMAGE, 2)) * ((width, height) - extents)
    return np.concatenate([corners, corners + extents], axis=1).tolist()


def record_context(step: Step) -> DistillationContext:
    """Runs one distilled step and returns its context, with what the teacher computed in it.

    Student tensors are leaves that require grad.
    """
    contexts = []
    handles = [
        distiller.register_forward_pre_hook(lambda module, args: contexts.append(args[0]))
        for distiller in step.model.distillers.values()
    ]
    step()
    for handle in handles:
        handle.remove()
    student = tree_map_only(
        torch.Tensor, lambda x: x.detach().clone().requires_grad_(), vars(contexts[0].student)
    )
    return replace(contexts[0], student=StudentOutputs(**student))


def distiller_alone(
    distiller: torch.nn.Module, context: DistillationContext, autocast: Mapping
) -> Callable[[], Sequence[torch.Tensor | None]]:
    """Forward and backward of one distiller; its backward ends at the recorded tensors."""
    recorded = [tensor for tensor in tree_leaves(vars(context.student)) if tensor is not None]

    def run():
        torch.manual_seed(SEED)
        with torch.autocast(**autocast):
            loss = sum(distiller(context).values())
        return torch.autograd.grad(loss, [*recorded, *distiller.parameters()], allow_unused=True)

    return run


def teacher_parts(context: DistillationContext, autocast: Mapping) -> dict[str, Callable]:
    """The parts of the teacher that the distilled step ran, by name."""
    step, computed = context.teacher._step, vars(context.teacher)
    parts = {
        "teacher backbone": ("features", step.features),
        "teacher RPN": ("_rpn", lambda: step.rpn(computed["features"])),
        "teacher box head": ("box_features", lambda: step.box_features(computed["features"])),
        "teacher predictor": (
            "_box_predictions",
            lambda: step.box_predictions(computed["box_features"]),
        ),
        "teacher mask head": ("mask_logits", lambda: step.mask_logits(computed["features"])),
    }
    # The teacher's precision depends on the student's.
    return {
        name: torch.autocast(**autocast)(run)
        for name, (output, run) in parts.items()
        if output in computed
    }


def time_parts(
    parts: Mapping[str, Callable], *, repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each part in each round: one round of warm-up, then ``repeats``, interleaved.

    Every second round runs backwards, so that a machine that gets slower or faster favours no part.
    On the CPU it is the processor time of this process (all of its threads), which other programs
    on the machine do not lengthen.
    """
    on_cuda = device.startswith("cuda")
    wait = partial(torch.cuda.synchronize, device) if on_cuda else lambda: None
    now = time.perf_counter if on_cuda else time.process_time
    seconds = {name: [] for name in parts}
    for number in range(repeats + 1):
        for name in list(parts) if number % 2 == 0 else reversed(parts):
            wait()
            start = now()
            parts[name]()
            wait()
            if number > 0:
                seconds[name].append(now() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "low": low, "high": high}


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """The overhead ratio and the ratio to the plain step, from the seconds of each round."""
    distilled = np.array(seconds[DISTILLED])
    needed = sum(np.array(values) for name, values in seconds.items() if name != DISTILLED)
    return {
        "overhead": spread(distilled / needed),
        "to_plain": spread(distilled / np.array(seconds[STUDENT])),
    }


def machine(device: str) -> dict:
    """Hardware and versions."""
    processor = f"{platform.processor() or platform.machine()} CPU"
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
