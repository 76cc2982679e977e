"""Checks and measurements on one machine: does every part work, and what does it cost?

- :func:`method_checks`: steps of every registered distiller on Faster R-CNN, Mask R-CNN and
  RetinaNet, in each precision that the device has.
- :func:`command_checks`: training, resuming, evaluation and export as commands, each in a process
  of its own, on images that are drawn here.
- :func:`measure_configs`: each config's step against the plain step, with peak memory on CUDA.
- :func:`teacher_variants`: the teacher's backbone compiled, as a CUDA graph, on its own stream.

Weights are random and images are noise or drawn, so that nothing is downloaded. On a CPU everything
runs at a small size, as in the tests. ``tools/gpu_report.py`` is the command, ``docs/gpu.md`` says
how to read its output.
"""

import contextlib
import copy
import functools
import gc
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn
from torch.utils.benchmark import Timer

from kd_detectron.config import get_config
from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.distillers import DISTILLER_REGISTRY
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling.precision import PRECISIONS
from kd_detectron.profiling.benchmark import (
    DISTILLED,
    STUDENT,
    Step,
    autocast_options,
    run_benchmark,
    synthetic_batch,
)

DETECTORS = {
    "Faster R-CNN": "ckd_rcnn_r101_r18.yaml",
    "Mask R-CNN": "ckd_mask_rcnn_r101_r18.yaml",
    "RetinaNet": "reviewkd_retinanet_r101_r50.yaml",
}
PAIRS = ("r101_r18", "r101_r50", "r50_mv2")
TABLE_CONFIGS = tuple(
    f"{methods}_rcnn_{pair}.yaml" for pair in PAIRS for methods in ("ckd", "ckd_reviewkd", "recipe")
)
OK = "ok"
# The modules of tools/train_net.py and tools/export_student.py, run as commands, not imported.
MAIN, EXPORT = "kd_detectron.engine.main", "kd_detectron.checkpoint.export_command"
# The first steps in float16 may be left out until the loss scale fits.
_SCALER_STEPS = 12
_COMMAND_TIMEOUT = 600
_RANDOM_PIXEL_STD = 1e4

Check = dict[str, str | float]


def random_weights(device: str, *, small: bool) -> list:
    """KEY VALUE overrides: no weights are loaded; with ``small``, models for a CPU."""
    # Without normalisation layers that learn, a random ResNet multiplies its input, a ResNet-101
    # by more than float16 holds. Small inputs keep it finite, and cost the same time.
    teacher = ["MODEL.PIXEL_STD", [_RANDOM_PIXEL_STD] * 3]
    opts = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, "KD.TEACHER.WEIGHTS", "none"]
    if small:
        teacher += ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
        teacher += ["MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 64]
        opts += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16]
        opts += ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 50]
    return [*opts, *teacher, "KD.TEACHER.OPTS", teacher]


# ---- does it work: steps ----


def method_checks(
    *, device: str, small: bool, methods: Sequence[str] | None = None
) -> Iterator[Check]:
    """Runs steps of each distiller on each detector.

    Args:
        device: "cuda" or "cpu".
        small: models and images for a CPU.
        methods: distillers; all registered ones by default.

    Yields:
        "check", "result" and "seconds". The result is "ok", "does not apply: ..." where the
        project refuses that distiller on that detector, or "failed: ...".

    Raises:
        ConfigError: a method is not registered.
    """
    registered = [name for name, _ in DISTILLER_REGISTRY]
    names = registered if methods is None else methods
    for name in names:
        if name not in registered:
            raise ConfigError(f"--methods names '{name}'{did_you_mean(name, registered)}")
    size = (96, 128) if small else (480, 640)
    for detector, config in DETECTORS.items():
        teacher_checked = False
        for name in names:
            opts = [*random_weights(device, small=small), "KD.DISTILLERS", [name]]
            try:
                cfg = get_config(config, opts)
                model = build_model(cfg).train()
                batch = synthetic_batch(cfg, images=2, size=size)
            except Exception as error:  # Reported, and the next distiller is tried.
                yield _result(f"{detector}, {name}", error)
                continue
            for precision in device_precisions(device):
                check = f"{detector}, {name}, {precision}"
                yield _run(check, functools.partial(distilled_step, model, batch, precision))
            if not teacher_checked:
                check = f"{detector}, the teacher's autocast"
                yield _run(check, functools.partial(teacher_autocast, model, batch))
                teacher_checked = True
            del model
            _free()


def device_precisions(device: str) -> list[str]:
    """float16 needs loss scaling, which there is on CUDA alone; bfloat16 needs a recent GPU."""
    if device == "cpu":
        return ["fp32", "bf16"]
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["fp32", "fp16", "bf16"] if has_bf16 else ["fp32", "fp16"]


def distilled_step(model: nn.Module, batch: list[dict], precision: str) -> None:
    """Optimizer steps until one changed the weights; more than one only in float16.

    Raises:
        RuntimeError: a loss is not finite, a distiller gives none, or no step is taken.
    """
    device = next(model.parameters()).device.type
    dtype = PRECISIONS.get(precision)  # None for fp32
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    for _ in range(_SCALER_STEPS):
        optimizer.zero_grad()
        with (
            recorded_outputs(model.distillers) as distilled,
            EventStorage(),
            torch.autocast(device, dtype=dtype, enabled=dtype is not None),
        ):
            losses = model(batch)
        values = {name: loss.item() for name, loss in losses.items()}
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        if wrong:
            raise RuntimeError(f"losses are not finite: {wrong}")
        if not any(distilled):
            raise RuntimeError(f"no distillation loss among {sorted(losses)}")
        scale = scaler.get_scale()
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            return
    raise RuntimeError(f"gradients overflow float16 at a loss scale of {scaler.get_scale()}")


@contextlib.contextmanager
def recorded_outputs(modules: Mapping[str, nn.Module]) -> Iterator[list]:
    """Gives a list to which each of the modules, when it is called, adds what it returns."""
    outputs: list = []
    handles = [
        module.register_forward_hook(lambda *call: outputs.append(call[-1]))
        for module in modules.values()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def teacher_autocast(model: nn.Module, batch: list[dict]) -> None:
    """``KD.TEACHER.AMP`` runs the teacher of a float32 student in half precision on CUDA only."""
    backbone = model.teacher.model.backbone
    convolution = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    before = model.teacher.amp
    with recorded_outputs({"convolution": convolution}) as outputs:
        try:
            for amp in (True, False):
                model.teacher.amp = amp
                with EventStorage(), torch.no_grad():
                    model(batch)
        finally:
            model.teacher.amp = before
    dtypes = [output.dtype for output in outputs]
    on_cuda = next(model.parameters()).is_cuda
    if not dtypes or (dtypes[0] is not torch.float32) != on_cuda or dtypes[-1] is not torch.float32:
        raise RuntimeError(f"KD.TEACHER.AMP True, then False, gave {dtypes}")


# ---- does it work: commands ----


def command_checks(
    folder: str, *, device: str, small: bool, run: Callable | None = None
) -> Iterator[Check]:
    """Runs the documented commands on drawn images, each in a process of its own.

    Args:
        folder: an empty folder for data and runs.
        device: "cuda" or "cpu".
        small: models for a CPU.
        run: runs a module's ``main(arguments)``; :func:`run_command` by default.

    Yields:
        As :func:`method_checks`; "skipped: ..." where the machine lacks something.
    """
    run = run or run_command
    os.makedirs(folder, exist_ok=True)
    config = write_command_config(folder, device=device, small=small)
    half = "fp16" if device == "cuda" else "bf16"
    amp = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION"]
    whole, resumed = os.path.join(folder, "whole"), os.path.join(folder, "resumed")
    final = os.path.join(whole, "model_final.pth")

    def train(name: str, *opts: str, flags: Sequence[str] = ()) -> None:
        out = ["OUTPUT_DIR", os.path.join(folder, name)]
        run(MAIN, ["--config-file", config, *flags, *out, *opts])

    def resume() -> None:
        os.makedirs(resumed)
        middle = "model_0000001.pth"
        shutil.copy(os.path.join(whole, middle), resumed)
        Path(resumed, "last_checkpoint").write_text(middle, encoding="utf-8")
        train("resumed", *amp, half, flags=["--resume"])
        compare_checkpoints(final, os.path.join(resumed, "model_final.pth"))

    def export(form: str, *arguments: str) -> None:
        out = os.path.join(folder, "exported", form)
        run(EXPORT, [whole, out, "--format", form, *arguments])

    def evaluate(flag: str) -> None:
        train("evaluated", "MODEL.WEIGHTS", final, flags=[flag])

    yield _run("--check", lambda: train("checked", flags=["--check"]))
    yield _run(f"training, {half}", lambda: train("whole", *amp, half))
    yield _run(f"resume with the loss scaler's state, {half}", resume)
    yield _run("training, fp32", lambda: train("fp32"))
    if device == "cuda" and "bf16" in device_precisions(device):
        yield _run("training, bf16", lambda: train("bf16", *amp, "bf16"))
    yield _run("--eval-only", lambda: evaluate("--eval-only"))
    yield _run("--eval-teacher", lambda: evaluate("--eval-teacher"))
    yield _run("export, detectron2", lambda: export("detectron2"))
    image = str(next(Path(folder, "data", "val").iterdir()))
    yield _run("export, torchscript", lambda: export("torchscript", "--image", image))
    check, gpus = "training, two processes", torch.cuda.device_count()
    if gpus < 2:
        result = f"skipped: this machine has {gpus} CUDA GPUs"
        yield {"check": check, "result": result, "seconds": 0.0}
    else:
        two = ["--num-gpus", "2", "--dist-url", "auto"]
        yield _run(check, lambda: train("two", *amp, half, flags=two))


def write_command_config(folder: str, *, device: str, small: bool) -> str:
    """Draws images and writes a config that trains on them for four iterations."""
    data = make_synthetic(os.path.join(folder, "data"), 8, 2, image_size=(96, 128))
    opts = random_weights(device, small=small)
    cfg = get_config("ckd_reviewkd_rcnn_r101_r18.yaml", opts)
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)]
    size = 96 if small else 480
    entries = [
        [f"gpu_report_{part}", str(data.resolve() / f"{part}.json"), str(data.resolve() / part)]
        for part in ("train", "val")
    ]
    cfg.merge_from_list(
        [
            *classes,
            *("KD.TEACHER.OPTS", [*cfg.KD.TEACHER.OPTS, *classes]),
            *("DATASETS.COCO_FORMAT", entries),
            *("DATASETS.TRAIN", ("gpu_report_train",)),
            *("DATASETS.TEST", ("gpu_report_val",)),
            *("DATALOADER.NUM_WORKERS", 0),
            *("INPUT.MIN_SIZE_TRAIN", (size,)),
            *("INPUT.MIN_SIZE_TEST", size),
            # An untrained student's detections are kept for the exports to be compared on.
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
            *("SOLVER.IMS_PER_BATCH", 2),
            *("SOLVER.BASE_LR", 1e-5),
            *("SOLVER.STEPS", ()),
            *("SOLVER.MAX_ITER", 4),
            *("SOLVER.CHECKPOINT_PERIOD", 2),
            *("TEST.EVAL_PERIOD", 0),
            *("SEED", 1),
        ]
    )
    path = os.path.join(folder, "run.yaml")
    Path(path).write_text(cfg.dump(), encoding="utf-8")
    return path


def run_command(module: str, arguments: Sequence[str]) -> None:
    """Runs ``module.main(arguments)`` in a new process.

    Raises:
        RuntimeError: it ended with another exit code than 0; with the last line that it said.
    """
    code = f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT,
    )
    if done.returncode != 0:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"exit code {done.returncode}: {said[-1] if said else 'no output'}")


def compare_checkpoints(whole: str, resumed: str) -> None:
    """Refuses a resumed run that does not end as the uninterrupted one.

    The loss scaler's state must be equal. Weights may differ by what CUDA's kernels, which add in
    no fixed order, make of four small steps.
    """
    first, second = (torch.load(path, map_location="cpu") for path in (whole, resumed))
    scalers = [checkpoint["trainer"]["_trainer"]["grad_scaler"] for checkpoint in (first, second)]
    if scalers[0] != scalers[1]:
        raise RuntimeError(f"the loss scaler ends as {scalers[1]}, uninterrupted as {scalers[0]}")
    for name, tensor in first["model"].items():
        if not torch.allclose(tensor.float(), second["model"][name].float(), rtol=1e-2, atol=1e-3):
            raise RuntimeError(f"the weights '{name}' differ from those of the uninterrupted run")


# ---- what it costs ----


def measure_configs(
    configs: Sequence[str],
    *,
    device: str,
    small: bool,
    images: Sequence[int] = (2, 8),
    size: tuple[int, int] = (800, 1333),
    repeats: int = 5,
) -> Iterator[dict]:
    """Benchmarks each config with mixed precision, for each number of images.

    Args:
        configs: distilled configs by name or path.
        device: "cuda" or "cpu".
        small: models for a CPU.
        images: images of a batch.
        size: height and width of an image in pixels.
        repeats: measured rounds.

    Yields:
        "name", "images", "report" of :func:`run_benchmark` and "peak_memory" of
        :func:`peak_memory` (empty without CUDA); or "name", "images" and "failed".
    """
    for config in configs:
        for count in images:
            row = {"name": Path(config).stem, "images": count}
            try:
                cfg = mixed_precision_config(config, device=device, small=small)
                report = run_benchmark(
                    cfg, name=row["name"], images=count, size=size, repeats=repeats, memory=False
                )
                _free()
                memory = peak_memory(cfg, images=count, size=size) if device == "cuda" else {}
                yield row | {"report": report, "peak_memory": memory}
            except (ConfigError, RuntimeError) as error:  # Out of memory is a RuntimeError.
                yield row | {"failed": _first_line(error)}
            _free()


def mixed_precision_config(config: str, *, device: str, small: bool) -> CfgNode:
    """A config with random weights, in fp16 on CUDA and bf16 on the CPU."""
    precision = "fp16" if device == "cuda" else "bf16"
    opts = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision]
    return get_config(config, [*random_weights(device, small=small), *opts])


def peak_memory(cfg: CfgNode, *, images: int, size: tuple[int, int]) -> dict[str, int]:
    """Peak bytes that tensors take on the GPU in the student's and in the distilled step."""
    batch = synthetic_batch(cfg, images=images, size=size)
    peaks = {}
    for name in (STUDENT, DISTILLED):
        step = Step(cfg, batch, distilled=name == DISTILLED)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step.reset()
            step()
        peaks[name] = torch.cuda.max_memory_allocated()
        del step
        _free()
    return peaks


def teacher_variants(
    config: str,
    *,
    device: str,
    small: bool,
    images: int = 2,
    size: tuple[int, int] = (800, 1333),
    repeats: int = 10,
) -> Iterator[dict]:
    """Times ways to run the teacher's backbone, alone and beside the plain student's step.

    Args:
        config: a distilled config by name or path.
        device, small, images, size, repeats: as for :func:`measure_configs`.

    Yields:
        "variant" and "seconds" (the median), or "variant" and "failed".
    """
    cfg = mixed_precision_config(config, device=device, small=small)
    batch = synthetic_batch(cfg, images=images, size=size)
    teacher = build_model(cfg).teacher
    pixels = teacher.preprocess(batch, cfg.INPUT.FORMAT).tensor
    autocast = autocast_options(cfg)

    def forward(backbone: nn.Module, pixels: torch.Tensor):
        # Without the cache of casted weights, which a CUDA graph cannot hold.
        with torch.no_grad(), torch.autocast(**autocast, cache_enabled=False):
            return backbone(pixels)

    backbone = teacher.model.backbone
    step = Step(cfg, batch, distilled=False)

    def student() -> None:
        step.reset()
        step()

    def channels_last() -> Callable:
        moved = copy.deepcopy(backbone).to(memory_format=torch.channels_last)
        ordered = pixels.contiguous(memory_format=torch.channels_last)
        return lambda: forward(moved, ordered)

    def half_weights() -> Callable:
        moved = copy.deepcopy(backbone).to(autocast["dtype"])
        return lambda: forward(moved, pixels.to(autocast["dtype"]))

    def compiled() -> Callable:
        module = torch.compile(copy.deepcopy(backbone))
        return lambda: forward(module, pixels)

    def one_after_the_other() -> None:
        forward(backbone, pixels)
        student()

    variants: dict[str, Callable[[], Callable]] = {
        "backbone": lambda: lambda: forward(backbone, pixels),
        "backbone, channels last": channels_last,
        "backbone, weights in half precision": half_weights,
    }
    if device == "cuda":
        variants |= {
            "backbone, torch.compile": compiled,
            "backbone, CUDA graph": lambda: cuda_graph(lambda: forward(backbone, pixels)),
        }
    variants |= {
        "student step": lambda: student,
        "student step after the backbone": lambda: one_after_the_other,
    }
    if device == "cuda":
        variants["student step beside the backbone on its own stream"] = lambda: on_own_stream(
            lambda: forward(backbone, pixels), student
        )
    for name, build in variants.items():
        try:
            yield {"variant": name, "seconds": median_seconds(build(), repeats)}
        except Exception as error:  # Compilers fail in many ways.
            yield {"variant": name, "failed": _first_line(error)}


def cuda_graph(run: Callable) -> Callable:
    """Captures a call of fixed shapes as a CUDA graph; returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def on_own_stream(teacher: Callable, student: Callable) -> Callable:
    """Both at once: the teacher on a stream of its own, then one waits for the other."""
    stream = torch.cuda.Stream()

    def both() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = teacher()
        student()
        torch.cuda.current_stream().wait_stream(stream)
        del outputs

    return both


def median_seconds(run: Callable, repeats: int) -> float:
    """Median time of a call; the timer warms up and waits for the GPU."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return statistics.median(timer.timeit(1).mean for _ in range(repeats))


# ---- reports ----


def format_checks(checks: Sequence[Check]) -> str:
    """How many checks went well, and those that did not."""
    failed = [check for check in checks if str(check["result"]).startswith("failed")]
    passed = sum(check["result"] == OK for check in checks)
    lines = [f"{passed} of {len(checks)} checks ok, {len(failed)} failed"]
    return "\n".join([*lines, *(f"  {check['check']}: {check['result']}" for check in failed)])


def format_memory(rows: Sequence[dict]) -> str:
    """Peak memory of plain and distilled steps, and the configs that could not be measured."""
    table = [
        [
            row["name"],
            row["images"],
            *(f"{row['peak_memory'][step] / 2**30:.2f}" for step in (STUDENT, DISTILLED)),
        ]
        for row in rows
        if row.get("peak_memory")
    ]
    headers = ["config", "images", f"{STUDENT}, peak GiB", f"{DISTILLED}, peak GiB"]
    lines = [tabulate(table, headers=headers, disable_numparse=True)] if table else []
    lines += [
        f"{row['name']}, {row['images']} images: failed: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    return "\n".join(lines)


def format_variants(rows: Sequence[dict]) -> str:
    """Times of the teacher's variants."""
    table = [[row["variant"], row.get("failed") or f"{1000 * row['seconds']:.4g}"] for row in rows]
    return tabulate(table, headers=["teacher", "ms"], disable_numparse=True)


def _run(name: str, work: Callable[[], None]) -> Check:
    start = time.perf_counter()
    try:
        work()
    except Exception as error:  # A check reports whatever goes wrong, and the next one runs.
        return _result(name, error, time.perf_counter() - start)
    return _result(name, None, time.perf_counter() - start)


def _result(name: str, error: Exception | None, seconds: float = 0.0) -> Check:
    result = OK
    if isinstance(error, ConfigError):
        result = f"does not apply: {_first_line(error)}"
    elif error is not None:
        result = f"failed: {_first_line(error)}"
    return {"check": name, "result": result, "seconds": round(seconds, 3)}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, ConfigError) else f"{type(error).__name__}: {lines[0]}"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
