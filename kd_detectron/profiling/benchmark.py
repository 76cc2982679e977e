"""Measures what a distilled step costs, compared with the parts that it consists of.

In one process, on one fixed synthetic batch, interleaved and repeated: the plain student's step
(forward and backward), the teacher's forward (backbone; box head and predictor on the sampled
proposals), each distiller's forward and backward alone on recorded tensors, and the distilled step.
Weights are random and no optimizer step is taken, so every round does the same arithmetic. Each
round gives one

    overhead ratio = distilled step / (student step + teacher + distillers)

1 if distillation costs its own arithmetic and nothing else. Peak memory is that of a child process
for each part: of CUDA's allocator there, of the process elsewhere, with freed memory given back.

``tools/benchmark.py`` prints the report and writes it as JSON; ``docs/performance.md`` holds the
numbers. Legend: N images, R sampled proposals over the whole batch.
"""

import ctypes
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import detectron2
import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch.utils._pytree import tree_leaves, tree_map_only

from kd_detectron.context import TeacherOutputs
from kd_detectron.errors import ConfigError
from kd_detectron.modeling.fold import channels_last_on_cpu
from kd_detectron.modeling.frozen_teacher import FrozenTeacher, FrozenTeacherStep
from kd_detectron.modeling.precision import PRECISIONS
from kd_detectron.modeling.teacher_loading import load_teacher

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
OBJECTS_PER_IMAGE = 8
_SEED = 0
# Steps in the child process that measures memory: the second one meets the first one's leftovers.
_MEMORY_STEPS = 2
# glibc's number for the option of mallopt that says from which size blocks are mapped separately.
_M_MMAP_THRESHOLD = -3

STUDENT, DISTILLED = "student step", "distilled step"


def synthetic_batch(cfg: CfgNode, *, images: int, size: tuple[int, int]) -> list[dict]:
    """Detectron2 training inputs of noise, the same in every process.

    Args:
        cfg: says the number of classes and whether, and how, masks are given.
        images: N.
        size: height and width of each image in pixels.
    """
    generator = torch.Generator().manual_seed(_SEED)
    height, width = size
    scale = torch.tensor([width, height], dtype=torch.float32)
    batch = []
    for index in range(images):
        extent = (0.1 + 0.4 * torch.rand(OBJECTS_PER_IMAGE, 2, generator=generator)) * scale
        corner = torch.rand(OBJECTS_PER_IMAGE, 2, generator=generator) * (scale - extent)
        boxes = torch.cat([corner, corner + extent], dim=1)
        instances = Instances(size)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.randint(
            cfg.MODEL.ROI_HEADS.NUM_CLASSES, (OBJECTS_PER_IMAGE,), generator=generator
        )
        if cfg.MODEL.MASK_ON:
            polygons = [
                [torch.stack([x0, y0, x1, y0, x1, y1, x0, y1]).double().numpy()]
                for x0, y0, x1, y1 in boxes
            ]
            instances.gt_masks = (
                PolygonMasks(polygons)
                if cfg.INPUT.MASK_FORMAT == "polygon"
                else BitMasks.from_polygon_masks(polygons, height, width)
            )
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
        batch[-1]["file_name"] = f"synthetic_{index}"
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

    def reset(self) -> None:
        self.model.zero_grad()
        torch.manual_seed(_SEED)

    def __call__(self) -> None:
        with EventStorage():
            with torch.autocast(**self._autocast):
                losses = self.model(self._batch)
            sum(losses.values()).backward()


class DistillerAlone:
    """Forward and backward of one distiller on recorded tensors; its backward ends at them."""

    def __init__(self, distiller: torch.nn.Module, context: SimpleNamespace, autocast: dict):
        self._distiller = distiller
        self._context = context
        self._autocast = autocast

    def reset(self) -> None:
        self._distiller.zero_grad()
        for tensor in tree_leaves(vars(self._context.student)):
            if tensor is not None:
                tensor.grad = None
        torch.manual_seed(_SEED)

    def __call__(self) -> None:
        with torch.autocast(**self._autocast):
            losses = self._distiller(self._context)
        sum(losses.values()).backward()


class TeacherPart:
    """One part of the teacher's forward pass, under the autocast of the student's step."""

    def __init__(self, run: Callable, autocast: dict):
        self._run = run
        self._autocast = autocast

    def reset(self) -> None:
        pass

    def __call__(self) -> None:
        with torch.autocast(**self._autocast):
            self._run()


def autocast_options(cfg: CfgNode) -> dict:
    """The arguments of ``torch.autocast`` that ``SOLVER.AMP`` asks for."""
    return {
        "device_type": cfg.MODEL.DEVICE.split(":")[0],
        "dtype": PRECISIONS[cfg.SOLVER.AMP.PRECISION],
        "enabled": cfg.SOLVER.AMP.ENABLED,
    }


def record_context(step: Step) -> SimpleNamespace:
    """Runs one distilled step and returns its context as plain data.

    Student tensors are leaves that require grad; ``teacher`` has those tensors that were asked for.
    """
    contexts = []
    handles = [
        distiller.register_forward_pre_hook(lambda module, args: contexts.append(args[0]))
        for distiller in step.model.distillers.values()
    ]
    step.reset()
    step()
    for handle in handles:
        handle.remove()
    context = contexts[0]
    student = tree_map_only(
        torch.Tensor, lambda x: x.detach().clone().requires_grad_(), vars(context.student)
    )
    computed = vars(context.teacher)
    plain = ("features", "box_features", "mask_logits")
    teacher = {name: computed[name] for name in plain if name in computed}
    if "_rpn" in computed:
        teacher["objectness"], teacher["anchor_deltas"] = computed["_rpn"]
    if "_box_predictions" in computed:
        teacher["logits"], teacher["box_deltas"] = computed["_box_predictions"]
    rest = {k: v for k, v in vars(context).items() if k not in ("student", "teacher")}
    taps = context.teacher._step.taps
    # The boxes that the teacher's heads are given.
    rest["taps"] = SimpleNamespace(proposal_boxes=taps.proposal_boxes, mask_boxes=taps.mask_boxes)
    return SimpleNamespace(
        student=SimpleNamespace(**student), teacher=SimpleNamespace(**teacher), **rest
    )


def teacher_parts(
    teacher: FrozenTeacher, context: SimpleNamespace, batch: list[dict], cfg: CfgNode
) -> dict[str, TeacherPart]:
    """The parts of the teacher that the distilled step ran, by name."""
    recorded = vars(context.teacher)
    step = FrozenTeacherStep(teacher, batch, cfg.INPUT.FORMAT, context.taps)
    parts: dict[str, tuple[str, Callable]] = {
        "teacher backbone": ("features", step.features),
        "teacher RPN": ("objectness", lambda: step.rpn(recorded["features"])),
        "teacher box head": ("box_features", lambda: step.box_features(recorded["features"])),
        "teacher predictor": ("logits", lambda: step.box_predictions(recorded["box_features"])),
        "teacher mask head": ("mask_logits", lambda: step.mask_logits(recorded["features"])),
    }
    return {
        name: TeacherPart(run, autocast_options(cfg))
        for name, (output, run) in parts.items()
        if output in recorded
    }


def time_parts(
    parts: dict[str, Callable], *, repeats: int, device: str, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each part in each round: one round of warm-up, then ``repeats``, interleaved.

    Every second round runs backwards, so that a machine that gets slower or faster favours no part.

    Args:
        parts: callables with a ``reset()`` that is not timed, by name.
        repeats: rounds.
        device: where they run.
        clock: "wall", or on the CPU "process" for the processor time of this process (all of its
            threads), which other programs on the machine do not lengthen.
    """
    seconds = {name: [] for name in parts}
    for number in range(repeats + 1):
        names = list(parts) if number % 2 == 0 else list(parts)[::-1]
        for name in names:
            parts[name].reset()
            elapsed = _time_once(parts[name], device, clock)
            if number > 0:
                seconds[name].append(elapsed)
    return seconds


def _time_once(part: Callable, device: str, clock: str) -> float:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    start = CLOCKS[clock]()
    part()
    if cuda:
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def run_benchmark(
    cfg: CfgNode,
    *,
    name: str,
    images: int = 2,
    size: tuple[int, int] = (480, 640),
    repeats: int = 5,
    clock: str = "wall",
    memory: bool = True,
    unfolded: bool = False,
    imports: Sequence[str] = (),
) -> dict:
    """Measures one config.

    Args:
        cfg: a distilled config; its weights are not loaded.
        name: what to call it in the report.
        images: N.
        size: height and width in pixels.
        repeats: measured rounds.
        clock: see :func:`time_parts`.
        memory: also measure peak memory, one child process per part.
        unfolded: also time the teacher's backbone with its BatchNorm not folded.
        imports: modules and files that the child processes import first.

    Returns:
        The report, plain data, as it is written to JSON.
    """
    if not (cfg.KD.ENABLED and cfg.KD.DISTILLERS):
        raise ConfigError(
            f"KD.DISTILLERS of '{name}' is {list(cfg.KD.DISTILLERS)} and KD.ENABLED is "
            f"{cfg.KD.ENABLED}: nothing is distilled, so there is nothing to compare"
        )
    if cfg.MODEL.DEVICE.startswith("cuda"):
        clock = "wall"
    batch = synthetic_batch(cfg, images=images, size=size)
    distilled = Step(cfg, batch, distilled=True)
    context = record_context(distilled)
    model, autocast = distilled.model, autocast_options(cfg)
    teacher = teacher_parts(model.teacher, context, batch, cfg)
    distillers = {
        distiller_name: DistillerAlone(distiller, context, autocast)
        for distiller_name, distiller in model.distillers.items()
    }
    reference = {}
    if unfolded:
        plain = FrozenTeacher(*load_teacher(cfg), amp=cfg.KD.TEACHER.AMP)
        reference["teacher backbone, BatchNorm not folded"] = TeacherPart(
            lambda: plain.features(batch, cfg.INPUT.FORMAT), autocast
        )
    parts = {
        STUDENT: Step(cfg, batch, distilled=False),
        **teacher,
        **distillers,
        DISTILLED: distilled,
        **reference,
    }
    kinds = {STUDENT: "student", DISTILLED: "distilled"}
    kinds |= dict.fromkeys(teacher, "teacher") | dict.fromkeys(distillers, "distiller")
    kinds |= dict.fromkeys(reference, "reference")
    seconds = time_parts(parts, repeats=repeats, device=cfg.MODEL.DEVICE, clock=clock)
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
        "clock": clock,
        "amp": cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "",
        "machine": machine(cfg.MODEL.DEVICE),
        "parts": {
            part: {"kind": kinds[part], "seconds": values, **spread(values)}
            for part, values in seconds.items()
        },
        "ratios": ratios(seconds, kinds),
        "memory": {},
    }
    if memory:
        sizes = _sizes(model, context)
        del parts, distilled, model, teacher, reference
        report["memory"] = measure_memory(cfg, batch, context, distillers, imports) | sizes
        report["ratios"]["memory"] = memory_ratio(report["memory"])
    return report


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "low": low, "high": high}


def ratios(seconds: dict[str, list[float]], kinds: dict[str, str]) -> dict[str, dict]:
    """The overhead ratio and the ratio to the plain step over the rounds, as median and spread.

    Args:
        seconds: seconds of each part in each round.
        kinds: "student", "teacher", "distiller", "distilled" or "reference", by part.
    """
    needed = [name for name, kind in kinds.items() if kind in ("student", "teacher", "distiller")]
    overhead, to_plain = [], []
    for number, distilled in enumerate(seconds[DISTILLED]):
        overhead.append(distilled / sum(seconds[name][number] for name in needed))
        to_plain.append(distilled / seconds[STUDENT][number])
    return {"overhead": spread(overhead), "to_plain": spread(to_plain)}


def machine(device: str) -> dict:
    """Hardware and versions."""
    processor = f"{platform.processor() or platform.machine()} CPU"
    facts = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
    }
    return facts | ({"cuda": torch.version.cuda} if device.startswith("cuda") else {})


# ---- memory ----


def measure_memory(
    cfg: CfgNode,
    batch: list[dict],
    context: SimpleNamespace,
    distillers: dict[str, DistillerAlone],
    imports: Sequence[str] = (),
) -> dict[str, int]:
    """Peak memory in bytes of each part, alone in a process of its own, and of an idle one."""
    peaks = {}
    # Forked from a server that has imported everything and run nothing, so that they start fast.
    processes = get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "part.pt")
        for name in ("idle", STUDENT, "teacher", *distillers, DISTILLED):
            torch.save((cfg, batch, context, distillers.get(name)), path)
            with ProcessPoolExecutor(1, mp_context=processes) as pool:
                peaks[name] = pool.submit(_peak_of, name, path, tuple(imports)).result()
    return peaks


def _peak_of(name: str, path: str, imports: Sequence[str]) -> int:
    """Runs in the child process."""
    from kd_detectron.commands import import_user_code

    _give_freed_memory_back()
    for module in imports:
        import_user_code(module)
    if name != "idle":
        cfg, batch, context, distiller = torch.load(path, weights_only=False)
        part = _memory_part(name, cfg, batch, context, distiller)
        del context, distiller
        for _ in range(_MEMORY_STEPS):
            part.reset()
            part()
        if cfg.MODEL.DEVICE.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_part(name, cfg, batch, context, distiller):
    if name in (STUDENT, DISTILLED):
        return Step(cfg, batch, distilled=name == DISTILLED)
    if distiller is not None:
        return distiller
    teacher = FrozenTeacher.from_config(cfg)
    asked = list(vars(context.teacher))
    teacher.drop_unused_heads(asked)
    step = FrozenTeacherStep(teacher, batch, cfg.INPUT.FORMAT, context.taps)

    def run():
        outputs = TeacherOutputs(step)
        for name in asked:
            getattr(outputs, name)

    return TeacherPart(run, autocast_options(cfg))


def _give_freed_memory_back() -> None:
    # Otherwise glibc keeps part of what is freed, and how much differs from run to run, so that the
    # peak would not be that of the tensors. Other C libraries stay as they are.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def _sizes(model: torch.nn.Module, context: SimpleNamespace) -> dict[str, int]:
    state = model.teacher.model.state_dict().values()
    features = getattr(context.teacher, "features", {}).values()
    fuses = any(hasattr(distiller, "fuse") for distiller in model.distillers.values())
    return {
        "teacher weights": sum(tensor.nbytes for tensor in state),
        "teacher features": sum(tensor.nbytes for tensor in features),
        # As many float32 maps as the teacher's.
        "fused features": sum(4 * tensor.numel() for tensor in features) if fuses else 0,
    }


def memory_ratio(memory: dict[str, int]) -> float:
    """Peak of the distilled step over what it needs, both above an idle process.

    Needed: the student's step, the teacher's weights, its features and the fused features.
    """
    idle = memory["idle"]
    needed = sum(memory[key] for key in ("teacher weights", "teacher features", "fused features"))
    return (memory[DISTILLED] - idle) / (memory[STUDENT] - idle + needed)
