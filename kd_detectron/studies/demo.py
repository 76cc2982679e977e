"""``make demo``: the whole of this project in minutes, on data that it makes itself.

Makes a synthetic COCO-format dataset, trains a teacher, then for the same number of iterations a
small student twice: without a teacher (the baseline) and distilled by CKD + ReviewKD. Evaluates all
three by COCO AP, prints one table and writes pictures. It is the study
``configs/studies/demo.yaml``; stopped at any moment, the same command goes on from there.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_detectron.data.synthetic import make_synthetic

from . import study

NUM_TRAIN = 800
NUM_VAL = 100
IMAGE_SIZE = (128, 128)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs or resumes the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description="Distils a small detector on synthetic data.")
    parser.add_argument("--output", default="output/demo", help="folder of data, runs and pictures")
    args = parser.parse_args(argv)
    data = Path(args.output) / "data"
    print(f"making {NUM_TRAIN} + {NUM_VAL} synthetic images in {data}", flush=True)
    make_synthetic(data, NUM_TRAIN, NUM_VAL, image_size=IMAGE_SIZE)
    os.environ["DETECTRON2_DATASETS"] = str(data.resolve())
    return study.main(["demo.yaml", "--output", args.output])


if __name__ == "__main__":
    sys.exit(main())
