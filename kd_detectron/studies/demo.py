"""``make demo``: the whole of this project in minutes, on data that it makes itself.

Makes a synthetic COCO-format dataset, trains a teacher, then for the same number of iterations a
small student as a baseline and the same student distilled, evaluates all by COCO AP, prints one
table and writes pictures. With Detectron2 it is the study ``configs/studies/demo.yaml``, with
torchvision's detectors the runs of ``kd_detectron/torchvision/demo.yaml``; stopped at any moment,
the same command continues.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from kd_detectron.data.synthetic import make_synthetic

NUM_TRAIN = 600
NUM_VAL = 100
IMAGE_SIZE = (128, 128)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs or resumes the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description="Distils a small detector on synthetic data.")
    parser.add_argument("--output", help="folder of data, runs and pictures (default output/demo)")
    parser.add_argument(
        "--engine",
        choices=("detectron2", "torchvision"),
        default="detectron2" if find_spec("detectron2") else "torchvision",
        help="whose detectors (default detectron2 where it is installed)",
    )
    parser.add_argument("--train-images", type=int, default=NUM_TRAIN)
    parser.add_argument("--val-images", type=int, default=NUM_VAL)
    parser.add_argument("--iterations", type=int, help="of every run (torchvision only)")
    args = parser.parse_args(argv)
    default = "output/demo" if args.engine == "detectron2" else "output/demo_torchvision"
    output = args.output or default
    data = Path(output) / "data"
    print(f"making {args.train_images} + {args.val_images} synthetic images in {data}", flush=True)
    make_synthetic(data, args.train_images, args.val_images, image_size=IMAGE_SIZE)
    if args.engine == "torchvision":
        from kd_detectron.torchvision.demo import run_demo
        from kd_detectron.torchvision.main import training_exit_code

        return training_exit_code(
            lambda: run_demo(output, data, iterations=args.iterations), "the same command"
        )
    from kd_detectron.studies import study

    os.environ["DETECTRON2_DATASETS"] = str(data.resolve())
    jobs = "2" if (os.cpu_count() or 1) > 1 else "1"
    return study.main(["demo.yaml", "--output", output, "--jobs", jobs])


if __name__ == "__main__":
    sys.exit(main())
