"""Writes the synthetic dataset: ``python datasets/make_synthetic.py datasets/synthetic``."""

import argparse
import sys

from kd_detectron.commands import exit_code
from kd_detectron.data.synthetic import make_synthetic


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", help="the folder to make; left alone if it is finished")
    parser.add_argument("--num-train", type=int, default=400)
    parser.add_argument("--num-val", type=int, default=100)
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=(160, 160), metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def work() -> None:
        size = tuple(options.image_size)
        folder = make_synthetic(
            options.out_dir, options.num_train, options.num_val, image_size=size, seed=options.seed
        )
        print(f"{folder}: {options.num_train} training and {options.num_val} validation images")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
