"""Checks datasets before training: those of a config, or one annotation file with its images.

    python datasets/check.py --config-file ckd_rcnn_r101_r18.yaml [KEY VALUE ...]
    python datasets/check.py --json cells/train.json --images cells/images [--masks polygon]

Paths of ``--json`` and ``--images`` are relative to the working directory or, where there is no
such file, to ``DETECTRON2_DATASETS``, as in ``DATASETS.COCO_FORMAT``. Prints one line per dataset;
on a fault, one sentence, and exit code 2.
"""

import argparse
import logging
import os
import sys

from kd_detectron import get_config
from kd_detectron.commands import exit_code
from kd_detectron.data.coco_format import resolve_path
from kd_detectron.preflight.annotations import check_coco_files
from kd_detectron.preflight.data import check_datasets


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config-file", help="a config by path or bare name")
    source.add_argument("--json", help="a COCO-format annotation file")
    parser.add_argument("--images", help="the folder of its images")
    parser.add_argument("--masks", choices=("polygon", "bitmask"), help="INPUT.MASK_FORMAT to use")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    options = parser.parse_args(arguments)
    if options.json and not options.images:
        parser.error("--json needs --images")
    logging.basicConfig(format="%(levelname)s: %(message)s")

    def work() -> None:
        if options.config_file:
            summaries = check_datasets(get_config(options.config_file, options.opts)).values()
        else:
            paths = (
                path if os.path.exists(path) else resolve_path(path)
                for path in (options.json, options.images)
            )
            summaries = [check_coco_files(*paths, name="--json", mask_format=options.masks)]
        for summary in summaries:
            print(summary)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
