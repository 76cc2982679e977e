"""What a distilled step costs on torchvision's detectors: the parts and ratios of ``profiling``.

Weights are random and no optimizer step is taken, so that every round does the same arithmetic.
``tools/benchmark_torchvision.py`` prints the report; ``docs/torchvision.md`` holds the numbers.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kd_detectron.commands import exit_code
from kd_detectron.errors import ConfigError
from kd_detectron.profiling.report import format_report, save_report
from kd_detectron.profiling.timing import SEED, measure, random_boxes

from .detector import DistilledDetector
from .main import build_parser, read_options
from .models import build_detector
from .options import TrainingOptions

# Lightning's names of precisions in which a step is measured.
_HALF = {
    "bf16-mixed": torch.bfloat16,
    "bf16": torch.bfloat16,
    "16-mixed": torch.float16,
    "16": torch.float16,
}


class Step:
    """Forward and backward of a model on one batch, with the same random state each time."""

    def __init__(self, model: torch.nn.Module, batch: tuple, autocast: dict):
        self.model = model.train()
        self._batch = batch
        self._autocast = autocast

    def __call__(self) -> None:
        self.model.zero_grad()
        torch.manual_seed(SEED)
        with torch.autocast(**self._autocast):
            losses = self.model(*self._batch)
        sum(losses.values()).backward()


def synthetic_batch(
    num_classes: int, *, images: int, size: tuple[int, int], device: str, masks: bool = False
) -> tuple[list[torch.Tensor], list[dict]]:
    """N images of noise of a height and width, with boxes, or masks too; the same each time."""
    random = np.random.default_rng(SEED)
    pixels, targets = [], []
    for _ in range(images):
        boxes = torch.tensor(random_boxes(random, size), device=device)
        labels = torch.from_numpy(random.integers(1, num_classes + 1, len(boxes))).to(device)
        noise = random.random((3, *size), dtype=np.float32)
        pixels.append(torch.from_numpy(noise).to(device))
        targets.append({"boxes": boxes, "labels": labels})
        if masks:  # of the boxes' form
            mask = torch.zeros(len(boxes), *size, dtype=torch.uint8, device=device)
            for one, (x0, y0, x1, y1) in zip(mask, boxes.int().tolist(), strict=True):
                one[y0:y1, x0:x1] = 1
            targets[-1]["masks"] = mask
    return pixels, targets


def run_benchmark(
    options: TrainingOptions,
    *,
    num_classes: int = 80,
    images: int = 2,
    size: tuple[int, int] = (480, 640),
    repeats: int = 5,
) -> dict:
    """Measures the student, teacher and distillers of a training, with random weights.

    Args:
        options: names student, teacher, distillers and precision.
        num_classes: K, without the background.
        images, size, repeats: N, their height and width in pixels, measured rounds.

    Returns:
        A report as of ``tools/benchmark.py``.

    Raises:
        ConfigError: no teacher or no distiller is named, or one of them does not fit, or the
            student is a Keypoint R-CNN.
    """
    if not (options.teacher and options.distillers):
        raise ConfigError(
            f"teacher is '{options.teacher}' and distillers are {list(options.distillers)}; name "
            "both, there is nothing to compare otherwise"
        )
    if options.student.startswith("keypointrcnn"):
        raise ConfigError(
            f"student is {options.student}, but there are no synthetic keypoints; choose a Faster "
            "or Mask R-CNN, RetinaNet or FCOS"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = _HALF.get(options.precision)
    autocast = {"device_type": device, "dtype": dtype, "enabled": dtype is not None}
    masks = options.student.startswith("maskrcnn")
    batch = synthetic_batch(num_classes, images=images, size=size, device=device, masks=masks)
    steps = []
    for distillers in ({}, options.distillers):
        torch.manual_seed(SEED)
        student, teacher = (
            build_detector(name, num_classes, options=own).to(device)
            for name, own in (
                (options.student, options.student_options),
                (options.teacher, options.teacher_options or options.student_options),
            )
        )
        steps.append(Step(DistilledDetector(student, teacher, distillers), batch, autocast))
    measured = measure(*steps, autocast=autocast, repeats=repeats, device=device)
    return measured | {
        "name": f"{options.student}, teacher {options.teacher}",
        "batch": {
            "images": images,
            "height": size[0],
            "width": size[1],
            "proposals": measured.pop("proposals"),
        },
        "amp": "" if dtype is None else options.precision,
        "memory": {},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="What a distilled step on torchvision's detectors costs against its parts. "
        "Random weights; on the GPU if there is one. Unknown options are those of "
        "tools/train_torchvision.py, such as --config, --teacher, --distillers."
    )
    parser.add_argument("--images", type=int, default=2, help="images per batch (%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"))
    parser.add_argument("--classes", type=int, default=80, help="without background (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the report here")
    args, others = parser.parse_known_args(argv)

    def work() -> None:
        report = run_benchmark(
            read_options(build_parser().parse_args(others)),
            num_classes=args.classes,
            images=args.images,
            size=tuple(args.size),
            repeats=args.repeats,
        )
        if args.json:
            save_report(report, args.json)
        print(format_report(report))

    return exit_code(work)
