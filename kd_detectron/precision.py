"""Half precision: the names in configs, what a device computes in, and the teacher's precision."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What SOLVER.AMP.PRECISION names.
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}

# As torch names the instruction sets of an x86 CPU, those below AVX-512.
_WITHOUT_BFLOAT16 = ("DEFAULT", "AVX", "AVX2")


def half_precision(device: torch.device) -> torch.dtype:
    """The half precision that a device computes in: bfloat16, or float16 where it is emulated.

    GPUs older than Ampere emulate bfloat16, slower than float32.
    """
    emulated = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if emulated else torch.bfloat16


def slow_bfloat16(setting: str, fix: str) -> str | None:
    """Says that bfloat16 is slower than float32 on this machine's CPU; None where it is not.

    torch computes bfloat16 on x86 CPUs with AVX-512; below it, its convolutions take many times as
    long as in float32 (docs/scaling.md).

    Args:
        setting: the setting that asks for bfloat16, with its value.
        fix: what to set instead.
    """
    instructions = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64") or instructions not in _WITHOUT_BFLOAT16:
        return None
    return (
        f"{setting}, but this CPU ({instructions}, without AVX-512) is many times slower in "
        f"bfloat16 than in float32; set {fix}"
    )


def emulated_bfloat16(setting: str, fix: str) -> str | None:
    """Says that this machine's GPU only emulates bfloat16; None where it does not.

    Args:
        setting, fix: as those of :func:`slow_bfloat16`.
    """
    if half_precision(torch.device("cuda")) is torch.bfloat16:
        return None
    return (
        f"{setting}, which this GPU ({torch.cuda.get_device_name()}, older than Ampere) emulates, "
        f"slower than float32; set {fix}"
    )


def slow_precision(cfg) -> str | None:
    """Says that the ``SOLVER.AMP`` of a Detectron2 config is slow on its ``MODEL.DEVICE``, or None.

    See :func:`slow_bfloat16` and :func:`emulated_bfloat16`.
    """
    if not (cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "bf16"):
        return None
    setting = "SOLVER.AMP.PRECISION is 'bf16'"
    if cfg.MODEL.DEVICE == "cpu" or not torch.cuda.is_available():
        return slow_bfloat16(setting, "SOLVER.AMP.ENABLED False")
    return emulated_bfloat16(setting, "SOLVER.AMP.PRECISION fp16")


@contextmanager
def teacher_precision(device: torch.device, *, amp: bool) -> Iterator[None]:
    """How a frozen teacher is run: without gradient, and in a precision of its own.

    Args:
        device: where it runs.
        amp: half precision on CUDA; on the CPU, where few machines have it, as the student.
    """
    # A teacher in full precision must not inherit the student's autocast.
    enabled = amp and (device.type == "cuda" or torch.is_autocast_enabled(device.type))
    with torch.no_grad(), torch.autocast(device.type, half_precision(device), enabled=enabled):
        yield
