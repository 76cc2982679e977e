"""The command ``tools/lazyconfig_train_net.py``: trains or evaluates a LazyConfig's student.

The file defines what Detectron2's own LazyConfigs define: ``model``, ``dataloader``, ``optimizer``,
``lr_multiplier``, ``train``. Its model is a distilled meta-architecture with ``teacher`` and
``distillers`` as explicit arguments (``configs/lazy/ckd_reviewkd_rcnn_r101_r18.py``); a plain
detector trains as well. Optional are ``distillation_schedule``, with the keys of ``KD.SCHEDULE``,
``train.seed``, ``train.max_corrupt_images`` and ``train.ema_decay`` (``SEED``,
``DATALOADER.MAX_CORRUPT_IMAGES``, ``SOLVER.EMA.DECAY``).

Checks and trainer are those of ``tools/train_net.py``. They are written for YAML configs, so a
LazyConfig is shown to them as one (:func:`as_yaml`), and errors name YAML's keys. A
``dataloader.train`` that is no call of Detectron2's ``build_detection_train_loader`` is used as it
is; its batches are drawn anew over a resume. Test: ``tests/engine/test_lazy.py``.
"""

import logging
import os

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.engine import default_argument_parser
from detectron2.evaluation import inference_on_dataset, print_csv_format
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kd_detectron.checkpoint import DistillationCheckpointer, atomic_open
from kd_detectron.commands import parse_arguments
from kd_detectron.config import add_kd_config, find_config, merge_opts
from kd_detectron.data import build_lazy_train_loader
from kd_detectron.distillers import option_defaults
from kd_detectron.errors import ConfigError
from kd_detectron.modeling.compatibility import check_fits
from kd_detectron.modeling.frozen_teacher import model_spec
from kd_detectron.modeling.teacher_loading import check_lazy_key, plain_list, run_lazy_file
from kd_detectron.preflight.classes import UNKNOWN_CLASSES
from kd_detectron.preflight.data import check_data
from kd_detectron.preflight.resume import check_same_lazy_run

from .launch import start
from .main import prepare_folder, run_trainer
from .trainer import DistillationTrainer

logger = logging.getLogger("kd_detectron")

PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


class LazyTrainer(DistillationTrainer):
    """Trains a LazyConfig's model with the file's optimizer, data and evaluation.

    Args:
        lazy_cfg: the LazyConfig.
        cfg: the same as a YAML config.
        model: built from it.
    """

    def __init__(self, lazy_cfg: DictConfig, cfg: CfgNode, model: nn.Module):
        self._lazy_cfg = lazy_cfg
        self._lazy_model = model
        self.ddp_options = lazy_cfg.train.get("ddp", self.ddp_options)
        self.log_period = lazy_cfg.train.log_period
        super().__init__(cfg)
        self.checkpointer.weights_key = "train.init_checkpoint"

    def build_model(self, cfg: CfgNode) -> nn.Module:
        return self._lazy_model

    def build_optimizer(self, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        self._lazy_cfg.optimizer.params.model = model
        return instantiate(self._lazy_cfg.optimizer)

    def build_lr_scheduler(self, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return instantiate(self._lazy_cfg.lr_multiplier)

    def build_train_loader(self, cfg: CfgNode):
        data = self._lazy_cfg.dataloader.train
        limit = cfg.DATALOADER.MAX_CORRUPT_IMAGES
        loader = build_lazy_train_loader(data, seed=self.seed, max_corrupt_images=limit)
        return instantiate(data) if loader is None else loader

    def test(self, cfg: CfgNode, model: nn.Module) -> dict:
        return evaluate(self._lazy_cfg, model)

    def load_state_dict(self, state_dict: dict) -> None:
        if "_trainer" not in state_dict:  # of version 0.1.0, whose train loop was the whole trainer
            state_dict = {**state_dict, "_trainer": state_dict | {"hooks": {}}}
        super().load_state_dict(state_dict)

    def export(self) -> None:
        path = os.path.join(self.cfg.OUTPUT_DIR, "student_final.pth")
        checkpoint = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth")
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
        student = {name: x for name, x in state.items() if not name.startswith("distillers.")}
        with atomic_open(path) as file:
            torch.save({"model": student}, file)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = default_argument_parser()
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors")
    return start(parse_arguments(parser, argv), run)


def run(args) -> None:
    """One process of the command."""
    cfg = read_config(args.config_file, args.opts)
    if not torch.cuda.is_available() and cfg.train.device == "cuda":
        cfg.train.device = "cpu"
        print("train.device is 'cuda' but there is no CUDA GPU: running on the CPU", flush=True)
    training = not args.eval_only
    if not training:
        plain(cfg.model)
    yaml_view = as_yaml(cfg)
    write_config = prepare_folder(
        args, cfg, yaml_view, training=training, check_same=check_same_lazy_run
    )
    model = build(cfg)
    describe_model(yaml_view, model)
    if yaml_view.DATASETS.TRAIN if training else yaml_view.DATASETS.TEST:
        check_data(yaml_view, train=training)
    else:
        logger.warning("no dataset is named in dataloader: its files are not checked")
    if training:
        trainer = LazyTrainer(cfg, yaml_view, model)
        run_trainer(trainer, resume=args.resume, write_config=write_config)
    else:
        DistillationCheckpointer(
            model, cfg.train.output_dir, weights_key="train.init_checkpoint"
        ).resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        evaluate(cfg, model)


def read_config(name: str, opts: list[str]) -> DictConfig:
    """Reads a LazyConfig by path or bare name, with ``key=value`` overrides.

    Raises:
        ConfigError: it is not found, cannot be run, lacks a part, or an override fits nothing in
            it.
    """
    path = find_config(name)
    if not path.endswith(".py"):
        # As YAML it could run code by its tags.
        raise ConfigError(
            f"--config-file '{path}' is no LazyConfig, which is a .py file; YAML configs are for "
            "tools/train_net.py"
        )
    cfg = run_lazy_file(path, key="--config-file")
    missing = [part for part in PARTS if part not in cfg]
    if missing:
        raise ConfigError(
            f"--config-file '{path}' defines no '{missing[0]}'; a LazyConfig defines "
            f"{', '.join(PARTS)}"
        )
    for opt in opts:
        key, equals, _ = opt.lstrip("+").partition("=")  # hydra's sign of a new key
        if not equals:
            raise ConfigError(f"the command line gives '{opt}'; overrides are written key=value")
        check_lazy_key(cfg, key, source="the command line")
    return LazyConfig.apply_overrides(cfg, opts)


def plain(model_cfg: DictConfig) -> None:
    """Takes teacher and distillers out of a LazyConfig model, in place."""
    for key in ("teacher", "distillers", "distillation_weights"):
        model_cfg.pop(key, None)


def build(cfg: DictConfig) -> nn.Module:
    """Instantiates ``cfg.model`` on ``train.device``.

    Raises:
        ConfigError: it cannot be built, a distiller does not fit student and teacher, or the images
            are read in another channel order than the model takes.
    """
    try:
        model = instantiate(cfg.model).to(torch.device(cfg.train.device))
    except ConfigError:
        raise
    except Exception as error:  # Any Python error of any constructor.
        raise ConfigError(
            f"'model' of --config-file cannot be built ({type(error).__name__}: {error}); check "
            "the arguments that the file gives"
        ) from error
    for name, distiller in getattr(model, "distillers", {}).items():
        check_fits(name, distiller.requires, model, model_spec(model), model.teacher)
    check_layers(cfg.model, model)
    order = getattr(model, "input_format", None)
    for part in ("train", "test"):
        read = OmegaConf.select(cfg, f"dataloader.{part}.mapper.image_format")
        if order is not None and read not in (None, order):
            raise ConfigError(
                f"dataloader.{part}.mapper.image_format is {read} but model.input_format is "
                f"{order}; set both to the order of model.pixel_mean"
            )
    return model


def check_layers(model_cfg: DictConfig, model: nn.Module) -> None:
    """Refuses distillers whose layers are of other sizes than student and teacher need.

    A YAML config's distillers are sized by ``Distiller.from_specs``, a LazyConfig's by its author:
    they are compared with those that ``from_specs`` makes.
    """
    distillers = getattr(model, "distillers", {})
    entries = model_cfg.get("distillers", ())
    entries = entries.values() if OmegaConf.is_dict(entries) else entries
    for (name, distiller), entry in zip(distillers.items(), entries, strict=True):
        options = {key: entry[key] for key in option_defaults(type(distiller)) if key in entry}
        student, teacher = model_spec(model), model.teacher.spec
        with torch.device("meta"):
            needed = type(distiller).from_specs(student, teacher, **options).state_dict()
        own = distiller.state_dict()
        for key in sorted(own.keys() | needed.keys()):
            shapes = [tuple(x[key].shape) if key in x else "absent" for x in (own, needed)]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"model.distillers: '{key}' of {name} is {shapes[0]} where the models need "
                    f"{shapes[1]}; the student's levels have {list(student.channels.values())} "
                    f"channels and its box head {student.box_channels}, the teacher's "
                    f"{list(teacher.channels.values())} and {teacher.box_channels}: set the "
                    f"arguments of {name} to these"
                )


def as_yaml(cfg: DictConfig) -> CfgNode:
    """A YAML config that says of training, data and teacher what a LazyConfig says.

    :func:`describe_model` adds what is asked of the model.
    """
    yaml_view = get_cfg()
    add_kd_config(yaml_view)
    train = cfg.train
    yaml_view.OUTPUT_DIR = train.output_dir
    yaml_view.SEED = train.get("seed", -1)
    yaml_view.MODEL.DEVICE = train.device
    yaml_view.MODEL.WEIGHTS = train.init_checkpoint
    yaml_view.SOLVER.MAX_ITER = train.max_iter
    yaml_view.SOLVER.CHECKPOINT_PERIOD = train.checkpointer.period
    yaml_view.SOLVER.CHECKPOINT_MAX_TO_KEEP = train.checkpointer.get("max_to_keep") or 0
    yaml_view.SOLVER.AMP.ENABLED = train.amp.enabled
    yaml_view.SOLVER.EMA.ENABLED = "ema_decay" in train
    yaml_view.SOLVER.EMA.DECAY = train.get("ema_decay", yaml_view.SOLVER.EMA.DECAY)
    yaml_view.TEST.EVAL_PERIOD = train.eval_period
    yaml_view.DATASETS.TRAIN = _dataset_names(cfg, "train")
    yaml_view.DATASETS.TEST = _dataset_names(cfg, "test")
    yaml_view.DATALOADER.MAX_CORRUPT_IMAGES = train.get("max_corrupt_images", 0)
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper") or {}
    yaml_view.INPUT.MASK_FORMAT = mapper.get("instance_mask_format", "polygon")
    keypoints = OmegaConf.select(cfg, "model.roi_heads.keypoint_head.num_keypoints")
    yaml_view.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = keypoints or 17
    sigmas = OmegaConf.select(cfg, "dataloader.evaluator.kpt_oks_sigmas")
    yaml_view.TEST.KEYPOINT_OKS_SIGMAS = list(sigmas or ())
    teacher = cfg.model.get("teacher") or {}
    yaml_view.KD.TEACHER.CONFIG_FILE = teacher.get("config_file", "")
    yaml_view.KD.TEACHER.WEIGHTS = teacher.get("weights", "")
    yaml_view.KD.TEACHER.OPTS = plain_list(teacher.get("opts", ()))
    for key, value in cfg.get("distillation_schedule", {}).items():
        merge_opts(yaml_view, [f"KD.SCHEDULE.{key}", value], source="distillation_schedule")
    return yaml_view


def _dataset_names(cfg: DictConfig, part: str) -> tuple[str, ...]:
    names = OmegaConf.select(cfg, f"dataloader.{part}.dataset.names") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def describe_model(yaml_view: CfgNode, model: nn.Module) -> None:
    """Adds to :func:`as_yaml` what a built model is, in place."""
    heads = getattr(model, "roi_heads", None)
    yaml_view.MODEL.META_ARCHITECTURE = type(model).__name__
    yaml_view.MODEL.MASK_ON = getattr(heads, "mask_head", None) is not None
    yaml_view.MODEL.KEYPOINT_ON = getattr(heads, "keypoint_head", None) is not None
    num_classes = getattr(heads or model, "num_classes", UNKNOWN_CLASSES)
    yaml_view.MODEL.ROI_HEADS.NUM_CLASSES = yaml_view.MODEL.RETINANET.NUM_CLASSES = num_classes
    # Without its config's name a teacher's classes are not known.
    if yaml_view.KD.TEACHER.CONFIG_FILE:
        yaml_view.KD.DISTILLERS = list(getattr(model, "distillers", {}))


def evaluate(cfg: DictConfig, model: nn.Module) -> dict:
    """Evaluates a model with ``dataloader.test`` and ``dataloader.evaluator``, if there are any."""
    if "evaluator" not in cfg.dataloader:
        return {}
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    print_csv_format(results)
    return results
