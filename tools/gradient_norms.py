#!/usr/bin/env python
"""How hard each distillation loss pulls at the student, against the detection losses.

    tools/gradient_norms.py --config-file ckd_reviewkd_rcnn_r101_r18.yaml
    tools/gradient_norms.py --config-file NAME MODEL.WEIGHTS RUN/model_final.pth

One row a loss: its value with its weight, and for the network below the FPN, the FPN and the heads
the norm of its gradient, the ratio to that of all detection losses, and the cosine between them.
The first command measures the start of training, the second a trained state. Nothing is trained.
"""

import argparse
import sys
from itertools import islice

import torch
from detectron2.utils.events import EventStorage

from kd_detectron.commands import add_import_option, exit_code, import_user_code
from kd_detectron.config import get_config
from kd_detectron.engine.main import check_data
from kd_detectron.engine.trainer import DistillationTrainer
from kd_detectron.preflight.config import check_meta_architecture
from kd_detectron.profiling.gradient_norms import format_gradient_norms, gradient_norms


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="NAME")
    parser.add_argument("--batches", type=int, default=8, help="training batches (%(default)s)")
    add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")
    return parser


def measure(args: argparse.Namespace) -> str:
    for name in args.imports:
        import_user_code(name)
    device = [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"]
    cfg = get_config(args.config_file, [*device, *args.opts])
    check_meta_architecture(cfg)
    check_data(cfg)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.model.train()
    torch.manual_seed(trainer.seed)
    with EventStorage():
        rows = gradient_norms(trainer.model, islice(trainer.data_loader, args.batches))
    return format_gradient_norms(rows)


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    return exit_code(lambda: print(measure(args)))


if __name__ == "__main__":
    sys.exit(main())
