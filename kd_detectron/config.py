"""The ``KD`` config node, and finding and reading configs by bare name.

Everything that a distilled training needs beyond Detectron2's own config stands here, with the
meaning of each key beside it. A distiller's node is ``KD.<NAME IN CAPITALS>``: ``WEIGHT``
multiplies its losses, every other key is a keyword argument of its constructor, with the same
default (``tests/test_config.py`` compares them).

Configs are found as a path, or by bare name among the files of ``configs/``, from any directory and
also when the package is installed.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg

from kd_detectron.backbones.config import add_backbone_config
from kd_detectron.errors import ConfigError, did_you_mean

CN = CfgNode


def add_kd_config(cfg: CfgNode) -> None:
    """Adds this project's keys to a Detectron2 config, in place."""
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
    # Parts of the student that start from the teacher's weights, by the start of their names, e.g.
    # ["proposal_generator", "roi_heads"]; for students from scratch (MODEL.WEIGHTS goes before).
    cfg.KD.TEACHER.INHERIT = []
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

    # ---- one node a distiller ----
    # CKD, contrastive distillation of the box head's logits (arXiv 2404.14109).
    cfg.KD.CKD = CN()
    cfg.KD.CKD.WEIGHT = 0.1
    # Divides the cosine similarities.
    cfg.KD.CKD.TEMPERATURE = 1.0
    # Anchor, positive, negatives: "tss" (the method), "sts" or "stt".
    cfg.KD.CKD.TRIPLE = "tss"
    # Contrast inside random groups of this many proposals; 0: all proposals of the step together.
    cfg.KD.CKD.GROUP_SIZE = 0
    # Rows of the similarity matrix computed at a time; 0: chosen by size.
    cfg.KD.CKD.CHUNK_SIZE = 0

    # ReviewKD, fused FPN features against the teacher's (CVPR 2021).
    cfg.KD.REVIEWKD = CN()
    cfg.KD.REVIEWKD.WEIGHT = 1.0
    # Channels of the running feature inside the fusion.
    cfg.KD.REVIEWKD.MID_CHANNELS = 256
    # Compute most of the fusion's inner maps again in backward: less memory, a little more time,
    # same gradients.
    cfg.KD.REVIEWKD.USE_ACT_CHECKPOINT = True

    # KD, Kullback-Leibler divergence of softened logits (Hinton et al.).
    cfg.KD.KD = CN()
    cfg.KD.KD.WEIGHT = 1.0
    # Divides the logits before the softmax; the loss is multiplied by its square.
    cfg.KD.KD.TEMPERATURE = 1.0

    # DKD, target and non-target divergence weighted apart (CVPR 2022).
    cfg.KD.DKD = CN()
    cfg.KD.DKD.WEIGHT = 1.0
    # Factor on the divergence of (target class, rest).
    cfg.KD.DKD.ALPHA = 1.0
    # Factor on the divergence among the other classes.
    cfg.KD.DKD.BETA = 0.25
    # Divides the logits before the softmax; the loss is multiplied by its square.
    cfg.KD.DKD.TEMPERATURE = 1.0

    # FitNet, mean squared error of adapted FPN features.
    cfg.KD.FITNET = CN()
    cfg.KD.FITNET.WEIGHT = 1.0

    # FGFI, feature imitation near objects (CVPR 2019).
    cfg.KD.FGFI = CN()
    cfg.KD.FGFI.WEIGHT = 0.01
    # Anchors above PSI times a box's best IoU are imitated.
    cfg.KD.FGFI.PSI = 0.5

    # DCD, contrastive and consistency loss on box-head embeddings (arXiv 2407.11802).
    cfg.KD.DCD = CN()
    cfg.KD.DCD.WEIGHT = 1.0
    # Width of the two embeddings.
    cfg.KD.DCD.EMBED_DIM = 128
    # Factor on the consistency term, against the contrastive one.
    cfg.KD.DCD.CONSISTENCY_WEIGHT = 0.5

    # BicKD, bilateral contrast of predicted probabilities (arXiv 2602.01265, this project's
    # reading of the abstract).
    cfg.KD.BICKD = CN()
    cfg.KD.BICKD.WEIGHT = 1.0
    # Divides the logits before the softmax.
    cfg.KD.BICKD.TEMPERATURE = 1.0
    # Divides the similarities of the class-wise and sample-wise contrast.
    cfg.KD.BICKD.CONTRAST_TEMPERATURE = 0.1
    # Factor on both contrasts, against the KD term.
    cfg.KD.BICKD.CONTRAST_WEIGHT = 1.0
    # "contrastive" (cross entropy) or "orthogonal" (diagonal to 1, the rest to 0, squared).
    cfg.KD.BICKD.FORM = "contrastive"

    # SupCon, supervised contrast of student box-head embeddings (no memory bank).
    cfg.KD.SUPCON = CN()
    cfg.KD.SUPCON.WEIGHT = 1.0
    # Divides the cosine similarities.
    cfg.KD.SUPCON.TEMPERATURE = 0.1
    # Width of the embedding.
    cfg.KD.SUPCON.EMBED_DIM = 128

    # CRD, teacher-anchored contrast with negatives of other classes (no memory bank).
    cfg.KD.CRD = CN()
    cfg.KD.CRD.WEIGHT = 1.0
    # Divides the cosine similarities.
    cfg.KD.CRD.TEMPERATURE = 0.1
    # Width of the two embeddings.
    cfg.KD.CRD.EMBED_DIM = 128

    # Options of distillers from elsewhere, by registered name: {"CosineKD": {"WEIGHT": 2.0}}.
    cfg.KD.OPTIONS = CN(new_allowed=True)

    # ---- data ----
    # Your own COCO-format data, no code: [["name", "annotations.json", "image_dir"], ...], paths
    # relative to the environment variable DETECTRON2_DATASETS.
    cfg.DATASETS.COCO_FORMAT = []
    # Unreadable images that a run may skip before it stops.
    cfg.DATALOADER.MAX_CORRUPT_IMAGES = 0

    add_backbone_config(cfg)

    # ---- solver ----
    # Batches of IMS_PER_BATCH images whose gradients are averaged before one optimizer step.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # How many periodic checkpoints stay on disk, the newest ones; 0: all. A resume falls back to an
    # older one where the last cannot be read, so keep two at least.
    cfg.SOLVER.CHECKPOINT_MAX_TO_KEEP = 0
    # Averaged weights: an exponential moving average of the student's weights (its BatchNorm
    # statistics are copied) is what is evaluated, kept as best checkpoint and exported.
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False
    # Share of the old average in the new one after a step, smaller over the first ones:
    # min(DECAY, (1 + t) / (10 + t)) after t steps.
    cfg.SOLVER.EMA.DECAY = 0.999
    # "fp16" (with loss scaling) or "bf16", where SOLVER.AMP.ENABLED.
    cfg.SOLVER.AMP.PRECISION = "fp16"


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
        if path.parent.name not in ("_base_", "studies")
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
    return cfg


def load_run_config(path: str | os.PathLike) -> CfgNode:
    """Reads the ``config.yaml`` that a training wrote into its output folder.

    Args:
        path: the output folder, or the file itself.
    """
    path = Path(path)
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"'{path}' is not the folder of a run: there is no config.yaml in it")
    return get_config(str(file))


def merge_file(cfg: CfgNode, path: str) -> None:
    """``cfg.merge_from_file`` whose errors name the key, the file and the near keys."""
    try:
        cfg.merge_from_file(path)
    except FileNotFoundError as error:
        known = config_dir() / os.path.basename(error.filename)
        raise ConfigError(
            f"{path} or a file below it has the _BASE_ '{error.filename}', which does not exist; a "
            "_BASE_ is a path, relative to the file that names it"
            + (f": write '{known}'" if known.is_file() else "")
        ) from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        line = f" (line {where.line + 1}: {what})" if where else f" ({what})"
        raise ConfigError(f"{path} is not readable YAML{line}; correct the file") from error
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"{path} is no Detectron2 config ({error}); it should hold KEY: VALUE, such as "
            "MODEL: {MASK_ON: True}"
        ) from error
    except (KeyError, ValueError, AssertionError) as error:
        raise _readable(cfg, error, path) from error


def merge_opts(cfg: CfgNode, opts: list, *, source: str) -> None:
    """``cfg.merge_from_list`` whose errors name the key, where it was written and the near keys."""
    if len(opts) % 2:
        raise ConfigError(f"{source} gives {opts}: overrides come in pairs of KEY VALUE")
    try:
        cfg.merge_from_list(opts)
    except (KeyError, ValueError, AssertionError, TypeError) as error:
        raise _readable(cfg, error, source) from error


def _readable(cfg: CfgNode, error: Exception, source: str) -> ConfigError:
    text = str(error.args[0]) if error.args else str(error)
    if "Non-existent" in text:
        key = text.rsplit(":", 1)[-1].strip()
        return ConfigError(f"{source} sets {key}, which is no config key{_near_keys(cfg, key)}")
    return ConfigError(f"{source}: {text}")


def _near_keys(cfg: CfgNode, key: str) -> str:
    keys = list(_all_keys(cfg))
    # yacs names the full key, or only its last part when the fault lies in an override.
    same_leaf = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
    if same_leaf:
        return did_you_mean(key, same_leaf)
    node = key.rsplit(".", 1)[0]
    siblings = [known for known in keys if known.rsplit(".", 1)[0] == node]
    return did_you_mean(key, siblings or keys)


def _all_keys(node: CfgNode, prefix: str = ""):
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _all_keys(value, f"{prefix}{key}.")
