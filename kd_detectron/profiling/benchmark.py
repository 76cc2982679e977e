"""Measures what a distilled step costs, compared with the parts that it consists of.

In one process, on one fixed synthetic batch, interleaved and repeated: the plain student's step
(forward and backward), the teacher's forward (backbone; box head and predictor on the sampled
proposals), each distiller's forward and backward alone on recorded tensors, and the distilled step.
Weights are random and no optimizer step is taken, so every round does the same arithmetic. Each
round gives one

    overhead ratio = distilled step / (student step + teacher + distillers)

1 if distillation costs its own arithmetic and nothing else. On a GPU, peak memory of both steps is
measured as well.

``tools/benchmark.py`` prints the report and writes it as JSON; ``docs/performance.md`` holds the
numbers. Legend: N images.
"""

import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from torch.utils._pytree import tree_leaves, tree_map_only

from kd_detectron.context import DistillationContext, StudentOutputs
from kd_detectron.errors import ConfigError
from kd_detectron.modeling.fold import channels_last_on_cpu
from kd_detectron.modeling.precision import PRECISIONS

OBJECTS_PER_IMAGE = 8
_SEED = 0

STUDENT, DISTILLED = "student step", "distilled step"


def synthetic_batch(cfg: CfgNode, *, images: int, size: tuple[int, int]) -> list[dict]:
    """N Detectron2 training inputs of noise, of a height and width; the same each time."""
    random = np.random.default_rng(_SEED)
    height, width = size
    batch = []
    for index in range(images):
        annotations = []
        for _ in range(OBJECTS_PER_IMAGE):
            extent = random.uniform(0.1, 0.5, 2) * (width, height)
            corner = random.uniform(0, 1, 2) * ((width, height) - extent)
            x0, y0, x1, y1 = np.concatenate([corner, corner + extent]).tolist()
            category = int(random.integers(cfg.MODEL.ROI_HEADS.NUM_CLASSES))
            annotations.append(
                {"bbox": [x0, y0, x1, y1], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category}
            )
            if cfg.MODEL.MASK_ON:
                annotations[-1]["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        image = random.integers(256, size=(3, height, width), dtype=np.uint8)
        batch.append(
            {
                "file_name": f"synthetic_{index}",
                "image": torch.from_numpy(image),
                "instances": annotations_to_instances(annotations, size, cfg.INPUT.MASK_FORMAT),
                "height": height,
                "width": width,
            }
        )
    return batch


class Step:
    """Forward and backward of a model on one batch, as the trainer runs them.

    The sampled proposals are the same each time, since the random state is.
    """

    def __init__(self, cfg: CfgNode, batch: list[dict], *, distilled: bool):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.KD.ENABLED = distilled
        torch.manual_seed(_SEED)
        self.model = build_model(cfg).train()
        if cfg.SOLVER.AMP.ENABLED:  # As the trainer does.
            channels_last_on_cpu(self.model.backbone)
        self._batch = batch
        self._autocast = autocast_options(cfg)

    def __call__(self) -> None:
        self.model.zero_grad()
        torch.manual_seed(_SEED)
        with EventStorage(), torch.autocast(**self._autocast):
            losses = self.model(self._batch)
        sum(losses.values()).backward()


def autocast_options(cfg: CfgNode) -> dict:
    """The arguments of ``torch.autocast`` that ``SOLVER.AMP`` asks for."""
    return {
        "device_type": cfg.MODEL.DEVICE.split(":")[0],
        "dtype": PRECISIONS[cfg.SOLVER.AMP.PRECISION],
        "enabled": cfg.SOLVER.AMP.ENABLED,
    }


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
        torch.manual_seed(_SEED)
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
    wait = torch.cuda.synchronize if on_cuda else lambda: None
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


def run_benchmark(
    cfg: CfgNode,
    *,
    name: str,
    images: int = 2,
    size: tuple[int, int] = (480, 640),
    repeats: int = 5,
) -> dict:
    """Measures one distilled config on N images of a height and width; loads no weights.

    Returns:
        The report, plain data, as it is written to JSON.
    """
    if not (cfg.KD.ENABLED and cfg.KD.DISTILLERS):
        raise ConfigError(
            f"KD.DISTILLERS of '{name}' is {list(cfg.KD.DISTILLERS)} and KD.ENABLED is "
            f"{cfg.KD.ENABLED}: nothing is distilled, so there is nothing to compare"
        )
    batch = synthetic_batch(cfg, images=images, size=size)
    distilled, autocast = Step(cfg, batch, distilled=True), autocast_options(cfg)
    context = record_context(distilled)
    distillers = distilled.model.distillers
    parts = {
        "student": {STUDENT: Step(cfg, batch, distilled=False)},
        "teacher": teacher_parts(context, autocast),
        "distiller": {n: distiller_alone(d, context, autocast) for n, d in distillers.items()},
        "distilled": {DISTILLED: distilled},
    }
    kinds = {part: kind for kind, named in parts.items() for part in named}
    every = {part: run for named in parts.values() for part, run in named.items()}
    seconds = time_parts(every, repeats=repeats, device=cfg.MODEL.DEVICE)
    report = {
        "name": name,
        "distillers": list(distillers),
        "batch": {
            "images": images,
            "height": size[0],
            "width": size[1],
            "proposals": sum(len(boxes) for boxes in context.proposal_boxes or ()),
        },
        "repeats": repeats,
        "amp": cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "",
        "machine": machine(cfg.MODEL.DEVICE),
        "parts": {
            part: {"kind": kinds[part], "seconds": values, **spread(values)}
            for part, values in seconds.items()
        },
        "ratios": ratios(seconds),
        "memory": {},
    }
    if cfg.MODEL.DEVICE.startswith("cuda"):
        del parts, every, distilled, distillers, context
        free_memory()
        report["memory"] = peak_memory(cfg, batch)
    return report


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
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
    }


def free_memory() -> None:
    """Frees what nothing refers to any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_memory(cfg: CfgNode, batch: list[dict]) -> dict[str, int]:
    """Peak bytes that tensors take on the GPU in the student's and in the distilled step."""
    peaks = {}
    for name in (STUDENT, DISTILLED):
        step = Step(cfg, batch, distilled=name == DISTILLED)
        torch.cuda.reset_peak_memory_stats()
        # The second step meets the first one's gradients.
        step()
        step()
        peaks[name] = torch.cuda.max_memory_allocated()
        del step
        free_memory()
    return peaks
