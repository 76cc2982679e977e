#!/usr/bin/env python
"""AP of the teacher's RPN and heads on the features that ReviewKD's fusion makes of the student's.

    tools/teacher_heads.py RUN    # the folder of a run distilled by ReviewKD, with its config.yaml

Against the student's own AP it says whether the student's features or its heads are behind.
"""

import argparse
import sys
from pathlib import Path

from detectron2.evaluation import print_csv_format
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from kd_detectron.analysis.transplant import TeacherHeadsOnFusedFeatures
from kd_detectron.checkpoint import DistillationCheckpointer
from kd_detectron.commands import exit_code
from kd_detectron.config import get_config
from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.engine.trainer import DistillationTrainer
from kd_detectron.modeling.teacher import load_teacher


def evaluate(run: Path) -> dict:
    cfg = get_config(str(run / "config.yaml"))
    register_coco_format(cfg)
    student = build_model(cfg)
    DistillationCheckpointer(student).load(str(run / "model_final.pth"))
    model = TeacherHeadsOnFusedFeatures(student, load_teacher(cfg)[0])
    folder = str(run / "inference_teacher_heads")
    evaluators = [DistillationTrainer.build_evaluator(cfg, n, folder) for n in cfg.DATASETS.TEST]
    return DistillationTrainer.test(cfg, model, evaluators)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    args = parser.parse_args(arguments)
    setup_logger()
    setup_logger(name="kd_detectron")
    return exit_code(lambda: print_csv_format(evaluate(args.run)))


if __name__ == "__main__":
    sys.exit(main())
