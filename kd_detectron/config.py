"""The ``KD`` config node, and finding and reading configs by bare name.

This file defines all keys that this project adds to Detectron2's config, each with its meaning.
Every registered distiller has a node ``KD.<NAME IN CAPITALS>``: ``WEIGHT`` (by default the class's
``default_weight``) multiplies its losses, every other key is a keyword-only parameter of its
constructor, with the same default. A user's own distiller must be registered before its config is
read, e.g. by ``--import FILE``.

Configs are found as a path, or by bare name among the files of ``configs/``, from any directory and
also when the package is installed.
"""

import copy
import inspect
import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from kd_detectron.backbones.config import add_backbone_config
from kd_detectron.distillers import DISTILLER_REGISTRY, Distiller, option_defaults
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.runs.files import flatten

CN = CfgNode


def add_kd_config(cfg: CfgNode) -> None:
    """Adds this project's keys to a Detectron2 config, in place.

    Raises:
        ConfigError: the node of a registered distiller cannot be made: its name is taken, or an
            option has no default that a config can hold.
    """
    # ---- what is distilled, and from whom ----
    cfg.KD = CN()
    # False: no teacher is built and the model is the plain student.
    cfg.KD.ENABLED = True
    # Names of registered distillers; the losses of all of them add up.
    cfg.KD.DISTILLERS = []

    cfg.KD.TEACHER = CN()
    # Model-zoo name ("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"), a path, or a config of this
    # project by bare name; YAML or a LazyConfig (.py).
    cfg.KD.TEACHER.CONFIG_FILE = ""
    # Empty: the model zoo's checkpoint for that config, or else the one that your config names.
    # "none": random weights (tests, benchmarks).
    cfg.KD.TEACHER.WEIGHTS = ""
    # Parts of the student that start from the teacher's weights, with or without distillers: by the
    # start of their names, e.g. ["proposal_generator", "roi_heads"], or ["auto"] for all that fit
    # behind the backbone's bottom-up network (FPN, RPN, heads). MODEL.WEIGHTS, which is loaded
    # afterwards, should name a backbone alone.
    cfg.KD.TEACHER.INHERIT = []
    # The learning rate of the inherited parts, relative to that of the others; 0 leaves their
    # weights as the teacher's (BatchNorm statistics follow the student's maps). Small where the
    # backbone has yet to learn the teacher's features.
    cfg.KD.TEACHER.INHERIT_LR_FACTOR = 1.0
    # Extra KEY VALUE overrides for the teacher's config, in one flat list.
    cfg.KD.TEACHER.OPTS = []
    # Half-precision teacher on CUDA (bfloat16 where the GPU has it), and on the CPU where the
    # student trains in bf16 (SOLVER.AMP).
    cfg.KD.TEACHER.AMP = True

    # The factor on every distillation weight, over the iterations.
    cfg.KD.SCHEDULE = CN()
    # Linear rise from 0 to 1 over the first WARMUP_ITERS iterations.
    cfg.KD.SCHEDULE.WARMUP_ITERS = 0
    # "none", "linear" or "cosine": fall from 1 to 0 between the end of the warm-up and STOP_ITER
    # (the end of training where STOP_ITER is 0).
    cfg.KD.SCHEDULE.DECAY = "none"
    # Distillation ends at this iteration and the teacher no longer runs; 0: never.
    cfg.KD.SCHEDULE.STOP_ITER = 0

    # ---- one node per distiller ----
    for name, cls in DISTILLER_REGISTRY:
        _add_distiller_node(cfg.KD, name, cls)

    # ---- data ----
    # Your own COCO-format data, no code: [["name", "annotations.json", "image_dir"], ...], paths
    # relative to the environment variable DETECTRON2_DATASETS.
    cfg.DATASETS.COCO_FORMAT = []
    # Unreadable images that a process may skip, from each start, before it stops.
    cfg.DATALOADER.MAX_CORRUPT_IMAGES = 0

    add_backbone_config(cfg)

    # ---- solver ----
    # Batches of IMS_PER_BATCH images whose gradients are averaged before one optimizer step.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # How many periodic checkpoints stay on disk, the newest ones; 0: all. A resume falls back to an
    # older one where the last cannot be read, so keep two at least.
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0
    cfg.SOLVER.EMA = CN()
    # Evaluate, keep as best checkpoint and export an exponential moving average of the student's
    # weights (its BatchNorm statistics are copied).
    cfg.SOLVER.EMA.ENABLED = False
    # Share of the old average in the new one after a step, smaller over the first ones:
    # min(DECAY, (1 + t) / (10 + t)) after t steps.
    cfg.SOLVER.EMA.DECAY = 0.999
    # "fp16" (with loss scaling) or "bf16", where SOLVER.AMP.ENABLED.
    cfg.SOLVER.AMP.PRECISION = "fp16"


def _add_distiller_node(kd: CfgNode, name: str, cls: type[Distiller]) -> None:
    key = name.upper()
    if key in kd:
        same = [other for other, _ in DISTILLER_REGISTRY if other != name and other.upper() == key]
        raise ConfigError(
            f"the distiller '{name}' cannot be registered: the config node KD.{key} already "
            f"belongs to {same[0] if same else 'the project itself'}; rename the distiller"
        )
    kd[key] = CN({"WEIGHT": float(cls.default_weight)})
    for option, default in option_defaults(cls).items():
        if option.upper() in kd[key]:
            raise ConfigError(
                f"the distiller '{name}' has an option '{option}', but KD.{key}.{option.upper()} "
                "is taken; rename the option"
            )
        try:
            setattr(kd[key], option.upper(), copy.deepcopy(default))
        except AssertionError:
            what = "no default" if default is inspect.Parameter.empty else f"default {default!r}"
            raise ConfigError(
                f"the option '{option}' of the distiller '{name}' has {what}; options are config "
                "keys: give it a number, a string, True, False, None, a list or a tuple"
            ) from None


def config_dir() -> Path:
    """The folder of this project's configs: inside the installed package, or beside it."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def list_configs() -> list[str]:
    """Bare names of all configs of this project, sorted."""
    return sorted(path.name for path in config_dir().glob("*.yaml"))


def find_config(name: str) -> str:
    """Returns the path of a config given as a path or by bare name.

    Raises:
        ConfigError: there is no such file; the nearest known names are listed.
    """
    if not name:
        raise ConfigError(f"--config-file is empty; name one of: {', '.join(list_configs())}")
    if os.path.isfile(name):
        return name
    for candidate in (name, f"{name}.yaml"):
        found = config_dir() / candidate
        if found.is_file():
            return str(found)
    known = [
        path.relative_to(config_dir()).as_posix()
        for path in config_dir().rglob("*.yaml")
        if path.parent.name not in ("_base_", "studies", "torchvision")
    ]
    near = did_you_mean(os.path.basename(name) if os.path.isabs(name) else name, known)
    raise ConfigError(f"--config-file '{name}' is neither a file nor a known config{near}")


def get_config(name: str, opts: Sequence = ()) -> CfgNode:
    """Reads a whole config by path or bare name.

    Args:
        name: a path, or the bare name of a file in ``configs/``.
        opts: KEY VALUE overrides in one flat list, as on the command line.

    Returns:
        Detectron2's defaults, the KD node, the file and the overrides; not frozen.

    Raises:
        ConfigError: no such config, an unknown key, or a value of the wrong type.
    """
    path = find_config(name)
    cfg = get_cfg()
    add_kd_config(cfg)
    merge_file(cfg, path)
    merge_opts(cfg, list(opts), source="the command line")
    check_resnet(cfg)
    return cfg


def check_resnet(cfg: CfgNode) -> None:
    """Refuses keys of ``MODEL.RESNETS`` for which Detectron2 builds no ResNet."""
    resnets = cfg.MODEL.RESNETS
    if "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return
    if resnets.DEPTH not in (18, 34, 50, 101, 152):
        raise ConfigError(
            f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; give one of 18, 34, 50, 101, 152"
        )
    needed = {"RES2_OUT_CHANNELS": 64, "RES5_DILATION": 1, "NUM_GROUPS": 1}
    for key, value in needed.items() if resnets.DEPTH < 50 else ():
        if resnets[key] != value:
            raise ConfigError(
                f"MODEL.RESNETS.DEPTH is {resnets.DEPTH} and MODEL.RESNETS.{key} is "
                f"{resnets[key]}; ResNet-18 and ResNet-34 need MODEL.RESNETS.{key} {value}"
            )


def load_run_config(path: str | os.PathLike) -> CfgNode:
    """Reads the ``config.yaml`` that a training wrote into its output folder.

    Args:
        path: the output folder, or the file itself.

    Returns:
        The run's config. It may hold nodes of distillers that are not registered here: a run can be
        looked at without the file that its distiller is in.
    """
    path = Path(path)
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"'{path}' is not the folder of a run: there is no config.yaml in it")
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.KD.set_new_allowed(True)
    merge_file(cfg, str(file))
    cfg.KD.set_new_allowed(False)
    return cfg


def merge_file(cfg: CfgNode, path: str) -> None:
    """``cfg.merge_from_file`` without Python tags, whose errors name file, key and near keys.

    An integer is taken for a float.

    Raises:
        ConfigError: the file or a ``_BASE_`` of it is missing or unreadable, has an unknown key, a
            value of the wrong type, or a tag that can run code.
    """
    try:
        given = flatten(_WithoutPythonTags.load_yaml_with_base(path))
        floats = {key: _as_float(cfg, key, value) for key, value in given.items()}
        floats = {key: value for key, value in floats.items() if value is not given[key]}
        # In place of None Detectron2 takes a value of any type.
        cfg.merge_from_list([x for key in floats for x in (key, None)])
        cfg.merge_from_file(path)
        cfg.merge_from_list([x for key in floats for x in (key, None, key, floats[key])])
    except FileNotFoundError as error:
        known = config_dir() / os.path.basename(error.filename)
        raise ConfigError(
            f"{path}, or a _BASE_ that it includes, names the _BASE_ '{error.filename}', which "
            "does not exist; a _BASE_ is a path, relative to the file that names it"
            + (f": write '{known}'" if known.is_file() else "")
        ) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path} is not readable YAML ({reason}); write plain YAML values, without tags that "
            "can run code"
        ) from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} is no Detectron2 config ({error}); it should hold KEY: VALUE, such as "
            "MODEL: {MASK_ON: True}"
        ) from error
    except (KeyError, ValueError, AssertionError) as error:
        raise _readable(cfg, error, path) from error


class _WithoutPythonTags(CfgNode):
    """Reads a file and its ``_BASE_`` files safely; trusts those of the model zoo, some have tags.

    ``CfgNode.merge_from_file`` falls back to ``yaml.unsafe_load`` for all of them.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict:
        zoo = Path(model_zoo.__file__).with_name("configs").resolve()
        if Path(filename).resolve().is_relative_to(zoo):
            return {}
        return super().load_yaml_with_base(filename, allow_unsafe=False)


def merge_opts(cfg: CfgNode, opts: list, *, source: str) -> None:
    """``cfg.merge_from_list`` whose errors name the key, where it was written and the near keys.

    An integer is taken for a float.
    """
    if len(opts) % 2:
        raise ConfigError(f"{source} gives {opts}: overrides come in pairs of KEY VALUE")
    pairs = list(zip(opts[::2], opts[1::2], strict=True))
    try:
        cfg.merge_from_list([x for key, value in pairs for x in (key, _as_float(cfg, key, value))])
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise _readable(cfg, error, source) from error


def _as_float(cfg: CfgNode, key: str, value: object) -> object:
    """An integer as a float where the config has one; any other value as it is."""
    present = cfg
    for part in key.split("."):
        present = present.get(part) if isinstance(present, CfgNode) else None
    integer = cfg._decode_cfg_value(value)
    return float(integer) if type(integer) is int and isinstance(present, float) else value


def _readable(cfg: CfgNode, error: Exception, source: str) -> ConfigError:
    text = str(error.args[0]) if error.args else str(error)
    if "Non-existent" in text:
        key = text.rsplit(":", 1)[-1].strip()
        if key.startswith("KD.") and key.split(".")[1] not in cfg.KD:
            return ConfigError(
                f"{source} sets {key}, but there is no node KD.{key.split('.')[1]}"
                f"{_near_keys(cfg, key)} (a distiller of your own has one once its file is "
                "imported: --import FILE.py)"
            )
        return ConfigError(f"{source} sets {key}, which is no config key{_near_keys(cfg, key)}")
    return ConfigError(f"{source}: {text}")


def _near_keys(cfg: CfgNode, key: str) -> str:
    keys = list(flatten(cfg))
    # yacs names the full key, or only its last part when the fault lies in an override.
    node, _, leaf = key.rpartition(".")
    same_leaf = [known for known in keys if known.rpartition(".")[2] == leaf]
    siblings = [known for known in keys if known.rpartition(".")[0] == node]
    return did_you_mean(key, same_leaf or siblings or keys)
