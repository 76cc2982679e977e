"""The command ``tools/train_net.py``: :func:`run` reads the config and does one of four things.

- :func:`train` (the default), ``--resume`` included: the trainer is ``trainer.py``, its step
  ``train_loop.py``;
- ``--eval-only``, :func:`evaluate_student`: no teacher is built;
- ``--eval-teacher``, :func:`evaluate_teacher`: with the same evaluator and the same data;
- ``--check`` (``check.py``): validate everything in seconds and run one step on one batch.

Processes and exit codes are those of ``launch.py``.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from kd_detectron.atomic_files import atomic_open
from kd_detectron.checkpoint import DistillationCheckpointer
from kd_detectron.commands import add_import_option, import_user_code, parse_arguments
from kd_detectron.config import find_config, get_config
from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.modeling.teacher_loading import load_teacher
from kd_detectron.preflight.classes import check_teacher_to_evaluate
from kd_detectron.preflight.config import check_meta_architecture
from kd_detectron.preflight.data import check_data
from kd_detectron.preflight.evaluation import check_evaluation
from kd_detectron.preflight.pixel_statistics import warn_of_pixel_statistics
from kd_detectron.preflight.resume import check_output_dir, check_same_run

from .check import check
from .launch import start
from .trainer import DistillationTrainer, describe, unwrap

logger = logging.getLogger("kd_detectron")


def argument_parser():
    """Detectron2's own arguments, and this project's."""
    parser = default_argument_parser()
    parser.add_argument(
        "--check",
        action="store_true",
        help="validate config, data, teacher and student, run one step, and stop",
    )
    parser.add_argument(
        "--eval-teacher",
        action="store_true",
        help="evaluate the teacher of KD.TEACHER on DATASETS.TEST and stop",
    )
    add_import_option(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return start(parse_arguments(argument_parser(), argv), run)


def run(args) -> None:
    """One process of the command: set-up and checks, then what was asked for."""
    for name in args.imports:
        import_user_code(name)
    args.config_file = find_config(args.config_file)
    cfg = get_config(args.config_file, args.opts)
    evaluating = args.eval_only or args.eval_teacher
    if evaluating:
        cfg.KD.ENABLED = cfg.KD.ENABLED and args.eval_teacher
    if not torch.cuda.is_available() and cfg.MODEL.DEVICE == "cuda":
        cfg.MODEL.DEVICE = "cpu"
        print("MODEL.DEVICE is 'cuda' but there is no CUDA GPU: running on the CPU", flush=True)
    check_meta_architecture(cfg)
    cfg.freeze()
    register_coco_format(cfg)
    check_evaluation(cfg)
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            cfg.defrost()
            cfg.OUTPUT_DIR = folder
            check(cfg)
        return
    write_config = prepare_folder(
        args, cfg, cfg, training=not evaluating, check_same=check_same_run
    )
    if args.eval_teacher:
        evaluate_teacher(cfg)
    elif args.eval_only:
        evaluate_student(cfg, resume=args.resume)
    else:
        train(cfg, resume=args.resume, write_config=write_config)


def prepare_folder(
    args, cfg: CfgNode | DictConfig, yaml_view: CfgNode, *, training: bool, check_same: Callable
) -> Callable[[], None]:
    """Checks the output folder, starts the logs in it, and writes ``config.yaml``.

    One that is there already stays: it says what the run was trained with until now.

    Args:
        args: the command line.
        cfg: the run's config.
        yaml_view: the same as a YAML config.
        training: whether it is a training.
        check_same: compares ``cfg`` with the run that ``--resume`` continues.

    Returns:
        What replaces it by ``cfg``, to be called when the training goes on.
    """
    folder = Path(yaml_view.OUTPUT_DIR)
    check_output_dir(yaml_view, resume=args.resume, training=training)
    setup_logger(str(folder), distributed_rank=comm.get_rank(), name="kd_detectron")
    if args.resume and training and comm.is_main_process():
        check_same(cfg)
    config = folder / "config.yaml"
    before = config.read_bytes() if config.is_file() else None
    default_setup(cfg, args)
    if before is None or not comm.is_main_process():
        return lambda: None
    now = config.read_bytes()
    _write(config, before)
    return partial(_write, config, now)


def _write(path: Path, content: bytes) -> None:
    with atomic_open(path) as file:
        file.write(content)


def train(cfg: CfgNode, *, resume: bool, write_config: Callable[[], None]) -> None:
    """Trains, evaluates and exports the student of a config."""
    check_data(cfg)
    run_trainer(DistillationTrainer(cfg), resume=resume, write_config=write_config)


def run_trainer(
    trainer: DistillationTrainer, *, resume: bool, write_config: Callable[[], None]
) -> None:
    """Trains to the end, from the start or from the last checkpoint.

    ``write_config``, from :func:`prepare_folder`, is called unless the run is finished or refused.
    """
    trainer.resume_or_load(resume=resume)
    if trainer.finished:
        logger.info(
            "The run in %s is finished after %d iterations: nothing to do. Raise SOLVER.MAX_ITER "
            "to extend it, or give --eval-only to evaluate it again",
            trainer.cfg.OUTPUT_DIR,
            trainer.start_iter,
        )
        return
    write_config()
    model = unwrap(trainer.model)
    warn_of_pixel_statistics(model)
    logger.info("Random seed: %d\n%s", trainer.seed, describe(model))
    trainer.train()


def evaluate_student(cfg: CfgNode, *, resume: bool) -> dict:
    """Evaluates ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint of ``OUTPUT_DIR``."""
    check_data(cfg, train=False)
    model = DistillationTrainer.build_model(cfg)
    DistillationCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = DistillationTrainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(DistillationTrainer.test_with_augmentation(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def evaluate_teacher(cfg: CfgNode) -> dict:
    """The teacher's AP on the student's test data, with the student's evaluator and image sizes."""
    summaries = check_data(cfg, train=False)
    model, input_format = load_teacher(cfg)
    check_teacher_to_evaluate(cfg, summaries, model)
    teacher_cfg = cfg.clone()
    teacher_cfg.defrost()
    teacher_cfg.INPUT.FORMAT = input_format
    teacher_cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "teacher")
    return DistillationTrainer.test(teacher_cfg, model)


if __name__ == "__main__":
    sys.exit(main())
