"""What ``tools/train_net.py`` does: arguments, set-up, and the four things it can be asked for.

- train (the default), ``--resume`` included;
- ``--eval-only``: evaluate the student; no teacher is built;
- ``--eval-teacher``: the teacher's AP with the same evaluator and the same data;
- ``--check``: validate everything in seconds, run one step on one batch, and say what it costs.

Processes are started by Detectron2's ``launch`` or by ``torchrun``. A mistake of the user ends in
one sentence and exit code 2; ``--debug`` shows the traceback.
"""

import contextlib
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from kd_detectron.checkpoint import CheckpointWriteError, DistillationCheckpointer
from kd_detectron.commands import (
    FAILED_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    add_import_option,
    import_user_code,
    parse_arguments,
)
from kd_detectron.config import find_config, get_config
from kd_detectron.data.coco_format import register_coco_format
from kd_detectron.errors import ConfigError, CorruptImageError, NonFiniteLossError
from kd_detectron.modeling.teacher_loading import load_teacher
from kd_detectron.preflight.classes import check_teacher_to_evaluate
from kd_detectron.preflight.config import check_meta_architecture
from kd_detectron.preflight.data import check_data
from kd_detectron.preflight.evaluation import check_evaluation
from kd_detectron.preflight.pixel_statistics import warn_of_pixel_statistics
from kd_detectron.preflight.resume import check_output_dir, check_same_run

from .hooks import Interrupted
from .trainer import DistillationTrainer, unwrap

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


def start(args, run: Callable) -> int:
    """Runs ``run(args)`` in each process that the arguments ask for; returns the exit code."""
    try:
        if "LOCAL_WORLD_SIZE" in os.environ:
            join_torchrun()
            run_process(args, run)
        else:
            launch(
                run_process,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args, run),
            )
    except ProcessExitedException as error:
        if error.signal_name is None:  # It has said itself what it ended of.
            return error.exit_code
        print(
            f"error: process {error.error_index} was ended by {error.signal_name}, and the others "
            "with it; the last checkpoint is intact, --resume goes on",
            file=sys.stderr,
        )
        return FAILED_EXIT_CODE
    except SystemExit as stop:
        return stop.code
    return 0


def run_process(args, run: Callable) -> None:
    """``run(args)``, whose foreseen ends are one sentence and an exit code."""
    try:
        run(args)
    except ConfigError as error:
        _leave(args, error, USER_ERROR_EXIT_CODE, everywhere=False)
    except (NonFiniteLossError, CorruptImageError, CheckpointWriteError) as error:
        _leave(args, error, FAILED_EXIT_CODE, everywhere=True)
    except Interrupted as stop:
        if comm.is_main_process():
            print(stop.message, file=sys.stderr)
        raise


def _leave(args, error: Exception, code: int, *, everywhere: bool) -> None:
    if args.debug:
        raise error
    if everywhere or comm.is_main_process():
        print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(code) from None


def join_torchrun() -> None:
    """Joins the process group of a ``torchrun`` start, as Detectron2's ``launch`` would."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def run(args) -> None:
    """One process of the command."""
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
    check_output_dir(cfg, resume=args.resume, training=not evaluating)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_detectron")
    if args.resume and not evaluating and comm.is_main_process():
        check_same_run(cfg)
    with keep_run_config(cfg) if evaluating else contextlib.nullcontext():
        default_setup(cfg, args)
    if args.eval_teacher:
        evaluate_teacher(cfg)
    elif args.eval_only:
        evaluate_student(cfg, resume=args.resume)
    else:
        train(cfg, resume=args.resume)


@contextlib.contextmanager
def keep_run_config(cfg: CfgNode):
    """Puts a run's ``config.yaml`` back after Detectron2 wrote that of an evaluation over it."""
    path = Path(cfg.OUTPUT_DIR, "config.yaml")
    before = path.read_bytes() if path.is_file() else None
    yield
    if before is not None and comm.is_main_process():
        path.write_bytes(before)


def train(cfg: CfgNode, *, resume: bool) -> None:
    """Trains, evaluates and exports the student of a config."""
    check_data(cfg)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    if trainer.finished:
        logger.info(
            "The run in %s is finished after %d iterations: nothing to do. Raise SOLVER.MAX_ITER "
            "to extend it, or give --eval-only to evaluate it again",
            cfg.OUTPUT_DIR,
            trainer.start_iter,
        )
        return
    log_start(trainer)
    trainer.train()


def log_start(trainer: DistillationTrainer) -> None:
    """Says who learns what from whom."""
    model = unwrap(trainer.model)
    warn_of_pixel_statistics(model)
    logger.info("Random seed: %d", trainer.seed)
    distillers = getattr(model, "distillers", {})
    logger.info("Student: %.1f M parameters", student_parameters(model) / 1e6)
    if not distillers:
        logger.info("No distillation: plain %s", type(model).__name__)
        return
    teacher = model.teacher
    logger.info(
        "Teacher: %s, %.1f M parameters, frozen", teacher.name, teacher.num_parameters / 1e6
    )
    for name, distiller in distillers.items():
        parameters = sum(p.numel() for p in distiller.parameters())
        logger.info(
            "Distiller: %s, weight %g%s",
            name,
            model.distillation_weights[name],
            f", {parameters / 1e6:.2f} M parameters of its own" if parameters else "",
        )


def student_parameters(model) -> int:
    """Number of the student's parameters, without the distillers' own."""
    return sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("distillers.")
    )


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


def check(cfg: CfgNode) -> None:
    """Validates a config in seconds: data, teacher, student, one step; prints what it found.

    Raises:
        ConfigError: the first thing that would stop the training.
    """
    for summary in check_data(cfg).values():
        print(f"data     {summary}")
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    model = unwrap(trainer.model)
    warn_of_pixel_statistics(model)
    if getattr(model, "teacher", None) is not None:
        print(
            f"teacher  {model.teacher.name}: {model.teacher.num_parameters / 1e6:.1f} M parameters"
        )
        for name, weight in model.distillation_weights.items():
            print(f"distil   {name}, weight {weight:g}")
    print(f"student  {student_parameters(model) / 1e6:.1f} M parameters")
    with EventStorage(0) as trainer._trainer.storage:
        start = time.perf_counter()
        trainer._trainer.iter = 0
        trainer._trainer.run_step()
        seconds = time.perf_counter() - start
        losses = {
            name: value
            for name, (value, _) in trainer._trainer.storage.latest().items()
            if "loss" in name
        }
    print("losses   " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items()))
    print(f"step     {seconds:.2f} s for {cfg.SOLVER.IMS_PER_BATCH} images, {peak_memory(cfg)}")
    print("ok       this config is ready to train")


def peak_memory(cfg: CfgNode) -> str:
    """Peak memory so far, as text: of the GPU, or of this process on the CPU."""
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory"


if __name__ == "__main__":
    sys.exit(main())
