"""Checks and measurements on one machine: does every part work, and what does it cost?

Weights are random and images are noise or drawn, so that nothing is downloaded. On a CPU everything
runs at a small size, as in the tests. ``tools/gpu_report.py`` is the command, ``docs/gpu.md`` says
how to read its output.
"""

import functools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from kd_detectron.config import get_config
from kd_detectron.data.synthetic import SYNTHETIC_CLASSES, make_synthetic
from kd_detectron.distillers import DISTILLER_REGISTRY
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling.autocast import prepare_for_autocast
from kd_detectron.modeling.frozen_teacher import FrozenTeacherStep
from kd_detectron.precision import PRECISIONS, half_precision
from kd_detectron.profiling.benchmark import (
    Step,
    autocast_options,
    free_memory,
    run_benchmark,
    synthetic_batch,
)
from kd_detectron.profiling.timing import spread, time_parts

DETECTORS = {
    "Faster R-CNN": "ckd_rcnn_r101_r18.yaml",
    "Mask R-CNN": "ckd_mask_rcnn_r101_r18.yaml",
    "RetinaNet": "reviewkd_retinanet_r101_r50.yaml",
}
PAIRS = ("r101_r18", "r101_r50", "r50_mv2")
TABLE_CONFIGS = tuple(
    f"{methods}_rcnn_{pair}.yaml" for pair in PAIRS for methods in ("ckd", "ckd_reviewkd", "recipe")
)
# The modules of tools/train_net.py and tools/export_student.py, run as commands, not imported.
MAIN, EXPORT = "kd_detectron.engine.main", "kd_detectron.checkpoint.export_command"
DETECTION_LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
# The first steps in float16 may be left out until the loss scale fits.
_SCALER_STEPS = 12
_COMMAND_TIMEOUT = 600
_RANDOM_PIXEL_STD = 1e4

Check = dict[str, str]


def random_weights(device: str, *, small: bool) -> list:
    """KEY VALUE overrides: no weights on "cuda" or "cpu"; with ``small``, models for a CPU."""
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
    """Runs steps of each distiller (all registered ones by default) on each detector.

    Yields:
        "check" and "result". The result is "ok", "does not apply: ..." where the project refuses
        that distiller on that detector, or "failed: ...".

    Raises:
        ConfigError: a method is not registered.
    """
    registered = [name for name, _ in DISTILLER_REGISTRY]
    for name in methods or ():
        if name not in registered:
            raise ConfigError(f"--methods names '{name}'{did_you_mean(name, registered)}")
    size = (96, 128) if small else (480, 640)
    for detector, config in DETECTORS.items():
        for name in methods or registered:
            opts = [*random_weights(device, small=small), "KD.DISTILLERS", [name]]
            try:
                cfg = get_config(config, opts)
                model = build_model(cfg).train()
                prepare_for_autocast(model)  # as the trainer does
            except Exception as error:  # Reported, and the next distiller is tried.
                yield {"check": f"{detector}, {name}", "result": _reason(error)}
                continue
            batch = synthetic_batch(cfg, images=2, size=size)
            for precision in device_precisions(device):
                step = functools.partial(distilled_step, model, batch, precision)
                yield _check(f"{detector}, {name}, {precision}", step)
            autocast = functools.partial(teacher_autocast, model, batch)
            yield _check(f"{detector}, {name}, the teacher's autocast", autocast)
            del model, step, autocast
            free_memory()


def device_precisions(device: str) -> list[str]:
    """float16 needs loss scaling, which there is on CUDA alone; bfloat16 needs a recent GPU."""
    if device == "cpu":
        return ["fp32", "bf16"]
    has_bf16 = half_precision(torch.device(device)) is torch.bfloat16
    return ["fp32", "fp16", "bf16"] if has_bf16 else ["fp32", "fp16"]


def distilled_step(model: nn.Module, batch: list[dict], precision: str) -> None:
    """Optimizer steps until one changed the weights; more than one only in float16.

    Raises:
        RuntimeError: a loss is not finite, a distiller gives none, or no step is taken.
    """
    device = next(model.parameters()).device.type
    dtype = PRECISIONS.get(precision)  # None for fp32
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6)
    for _ in range(_SCALER_STEPS):
        optimizer.zero_grad()
        with EventStorage(), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            losses = model(batch)
        wrong = {k: x.item() for k, x in losses.items() if not math.isfinite(x.item())}
        if wrong:
            raise RuntimeError(f"losses are not finite: {wrong}")
        if losses.keys() <= DETECTION_LOSSES:
            raise RuntimeError(f"no distillation loss among {sorted(losses)}")
        scale = scaler.get_scale()
        before = [weights.detach().clone() for weights in trained]
        scaler.scale(sum(losses.values())).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            continue
        if all(map(torch.equal, before, trained)):
            raise RuntimeError("the step changes no weight")
        return
    raise RuntimeError(f"gradients overflow float16 at a loss scale of {scaler.get_scale()}")


def teacher_autocast(model: nn.Module, batch: list[dict]) -> None:
    """``KD.TEACHER.AMP`` runs the teacher of a float32 student in half precision on CUDA only."""
    teacher, dtypes = model.teacher, []
    for teacher.amp in (True, False):
        features = FrozenTeacherStep(teacher, batch, teacher.input_format).features()
        dtypes.append(next(iter(features.values())).dtype)
    half = teacher.model.pixel_mean.is_cuda
    if (dtypes[0] is not torch.float32) != half or dtypes[1] is not torch.float32:
        raise RuntimeError(f"KD.TEACHER.AMP True, then False, gave {dtypes}")


# ---- does it work: commands ----


def command_checks(
    folder: str, *, device: str, small: bool, run: Callable | None = None
) -> Iterator[Check]:
    """Runs the documented commands on drawn images, by default each in a process of its own.

    Args:
        folder: a folder for data and runs.
        device, small: as in :func:`random_weights`.
        run: runs a module's ``main(arguments)``; :func:`run_command` by default.

    Yields:
        As :func:`method_checks`; "skipped: ..." where the machine lacks something.
    """
    run = run or run_command
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

    yield _check("--check", lambda: train("checked", flags=["--check"]))
    yield _check(f"training, {half}", lambda: train("whole", *amp, half))
    yield _check(f"resume with the loss scaler's state, {half}", resume)
    yield _check("training, fp32", lambda: train("fp32"))
    if device == "cuda" and "bf16" in device_precisions(device):
        yield _check("training, bf16", lambda: train("bf16", *amp, "bf16"))
    yield _check("--eval-only", lambda: evaluate("--eval-only"))
    yield _check("--eval-teacher", lambda: evaluate("--eval-teacher"))
    yield _check("export, detectron2", lambda: export("detectron2"))
    image = str(next(Path(folder, "data", "val").iterdir()))
    yield _check("export, torchscript", lambda: export("torchscript", "--image", image))
    check, gpus = "training, two processes", torch.cuda.device_count()
    if gpus < 2:
        yield {"check": check, "result": f"skipped: this machine has {gpus} CUDA GPUs"}
    else:
        two = ["--num-gpus", "2", "--dist-url", "auto"]
        yield _check(check, lambda: train("two", *amp, half, flags=two))


def write_command_config(folder: str, *, device: str, small: bool) -> str:
    """Draws images and writes a config that trains on them for four iterations."""
    data = make_synthetic(os.path.join(folder, "data"), 8, 2, image_size=(96, 128)).resolve()
    cfg = get_config("ckd_reviewkd_rcnn_r101_r18.yaml", random_weights(device, small=small))
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", len(SYNTHETIC_CLASSES)]
    size = 96 if small else 480
    splits = ("train", "val")
    entries = [[f"gpu_report_{x}", str(data / f"{x}.json"), str(data / x)] for x in splits]
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
        said = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise RuntimeError(f"exit code {done.returncode}: {said[-1]}")


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
    images: Sequence[int],
    size: tuple[int, int],
    repeats: int,
) -> Iterator[dict]:
    """Benchmarks each config with mixed precision, for each number of images of a batch.

    Yields:
        "name", "images" and the "report" of :func:`run_benchmark`, with peak memory on CUDA; or
        "failed" in place of it.
    """
    for config in configs:
        for count in images:
            row = {"name": Path(config).stem, "images": count}
            try:
                cfg = mixed_precision_config(config, device=device, small=small)
                shape = {"images": count, "size": size, "repeats": repeats}
                yield row | {"report": run_benchmark(cfg, name=row["name"], **shape)}
            except Exception as error:  # Reported, and the next one is tried.
                yield row | {"failed": _reason(error)}
            free_memory()


def mixed_precision_config(config: str, *, device: str, small: bool) -> CfgNode:
    """A config with random weights, in fp16 on CUDA and bf16 on the CPU."""
    precision = "fp16" if device == "cuda" else "bf16"
    opts = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision]
    return get_config(config, [*random_weights(device, small=small), *opts])


def teacher_variants(
    config: str, *, device: str, small: bool, images: int, size: tuple[int, int], repeats: int
) -> Iterator[dict]:
    """Times ways to run the teacher's backbone, alone and beside the plain student's step.

    Yields:
        "variant" and "seconds" (the median), or "variant" and "failed".
    """
    cfg = mixed_precision_config(config, device=device, small=small)
    batch = synthetic_batch(cfg, images=images, size=size)
    teacher = build_model(cfg).teacher
    backbone, pixels = teacher.model.backbone, teacher.preprocess(batch, cfg.INPUT.FORMAT).tensor
    student = Step(cfg, batch, distilled=False)

    def runs(module: Callable) -> Callable:
        # Without the cache of casted weights, which a CUDA graph cannot hold.
        autocast = torch.autocast(**autocast_options(cfg), cache_enabled=False)
        return torch.no_grad()(autocast(lambda: module(pixels)))

    def one_after_the_other() -> None:
        runs(backbone)()
        student()

    def at_once() -> None:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            runs(backbone)()
        student()
        current.wait_stream(stream)

    variants = {
        "backbone": runs(backbone),
        "student step": student,
        "student step after the backbone": one_after_the_other,
    }
    if device == "cuda":
        variants |= {
            "student step beside the backbone on its own stream": at_once,
            "backbone, torch.compile": runs(torch.compile(backbone)),
            "backbone, CUDA graph": runs(torch.compile(backbone, backend="cudagraphs")),
        }
    for name, run in variants.items():
        try:
            seconds = time_parts({name: run}, repeats=repeats, device=device)[name]
            yield {"variant": name, "seconds": spread(seconds)["median"]}
        except Exception as error:  # Compilers fail in many ways.
            yield {"variant": name, "failed": _reason(error)}


def _check(name: str, work: Callable[[], None]) -> Check:
    try:
        work()
    except Exception as error:  # A check reports whatever goes wrong, and the next one runs.
        return {"check": name, "result": _reason(error)}
    return {"check": name, "result": "ok"}


def _reason(error: Exception) -> str:
    if isinstance(error, ConfigError):
        return f"does not apply: {error}"
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
