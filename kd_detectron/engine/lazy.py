"""What ``tools/lazyconfig_train_net.py`` does: trains or evaluates a student from a LazyConfig.

The file defines what Detectron2's own LazyConfigs define: ``model``, ``dataloader``, ``optimizer``,
``lr_multiplier``, ``train``. Its model is a distilled meta-architecture with ``teacher`` and
``distillers`` as explicit arguments (``configs/lazy/ckd_reviewkd_rcnn_r101_r18.py``); a plain
detector trains as well. An optional ``distillation_schedule`` has the keys of ``KD.SCHEDULE``.

Against ``tools/train_net.py`` there are no dataset checks, no ``result.json``, and a resumed run
draws its batches anew. Test: ``tests/engine/test_lazy.py``.
"""

import logging
import os

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser, default_setup, hooks
from detectron2.engine.defaults import default_writers
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from kd_detectron.checkpoint import DistillationCheckpointer
from kd_detectron.config import find_config
from kd_detectron.errors import ConfigError
from kd_detectron.modeling.build import check_fits
from kd_detectron.modeling.teacher import model_spec

from .hooks import DistillationSchedule, StopOnSignal, TeacherGuard
from .main import start
from .train_loop import DistillationTrainLoop
from .trainer import distribute, unwrap

logger = logging.getLogger("kd_detectron")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = default_argument_parser()
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    return start(parser.parse_args(argv), run)


def run(args) -> None:
    """One process of the command."""
    cfg = LazyConfig.load(find_config(args.config_file))
    LazyConfig.apply_overrides(cfg, args.opts)
    if not torch.cuda.is_available() and cfg.train.device == "cuda":
        cfg.train.device = "cpu"
        print("train.device is 'cuda' but there is no CUDA GPU: running on the CPU", flush=True)
    if args.eval_only:
        plain(cfg.model)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="kd_detectron")
    default_setup(cfg, args)
    model = build(cfg)
    if args.eval_only:
        DistillationCheckpointer(
            model, cfg.train.output_dir, weights_key="train.init_checkpoint"
        ).resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        evaluate(cfg, model)
    else:
        train(cfg, model, resume=args.resume)


def plain(model_cfg: DictConfig) -> None:
    """Takes teacher and distillers out of a LazyConfig model, in place: it is the student alone."""
    for key in ("teacher", "distillers", "distillation_weights"):
        model_cfg.pop(key, None)


def build(cfg: DictConfig) -> nn.Module:
    """Instantiates ``cfg.model`` on ``train.device``.

    Raises:
        ConfigError: a distiller does not fit student and teacher.
    """
    model = instantiate(cfg.model).to(torch.device(cfg.train.device))
    for name, distiller in getattr(model, "distillers", {}).items():
        check_fits(name, distiller.requires, model, model_spec(model), model.teacher)
    return model


def train(cfg: DictConfig, model: nn.Module, *, resume: bool) -> None:
    """Trains a model, evaluates it every ``train.eval_period`` and writes the student alone."""
    output_dir = cfg.train.output_dir
    if cfg.train.amp.enabled and cfg.train.device == "cpu":
        raise ConfigError("train.amp.enabled is True but train.device is 'cpu'; set it to False")
    cfg.optimizer.params.model = model
    trainer = DistillationTrainLoop(
        distribute(model),
        instantiate(cfg.dataloader.train),
        instantiate(cfg.optimizer),
        amp_dtype=torch.float16 if cfg.train.amp.enabled else None,
    )
    checkpointer = DistillationCheckpointer(
        model, output_dir, weights_key="train.init_checkpoint", trainer=trainer
    )
    own = []
    if getattr(model, "teacher", None) is not None:
        own.append(TeacherGuard(model.teacher))
        if "distillation_schedule" in cfg:
            schedule = cfg.distillation_schedule
            own.append(DistillationSchedule(model, schedule, cfg.train.max_iter))
    main_only = [
        hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
        hooks.PeriodicWriter(
            default_writers(output_dir, cfg.train.max_iter), period=cfg.train.log_period
        ),
    ]
    main_only = main_only if comm.is_main_process() else []
    trainer.register_hooks(
        [
            *own,
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            *main_only[:1],
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
            # The writer comes last, to write also what the evaluation found.
            *main_only[1:],
            StopOnSignal(checkpointer),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    first = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(first, cfg.train.max_iter)
    if comm.is_main_process():
        path = os.path.join(output_dir, "student_final.pth")
        state = unwrap(model).state_dict()
        student = {name: x for name, x in state.items() if not name.startswith("distillers.")}
        torch.save({"model": student}, path)
        logger.info("The student alone, for plain Detectron2: %s", path)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict:
    """Evaluates a model with ``dataloader.test`` and ``dataloader.evaluator``, if there are any."""
    if "evaluator" not in cfg.dataloader:
        return {}
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results
