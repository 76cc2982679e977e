"""What would not fail but silently be wrong: found before the first step.

- :func:`check_meta_architecture`: distillers are named, but the meta-architecture has none; a part
  of the detector is missing, or has a name that nothing has.
- :func:`warn_of_pixel_statistics`: images in one channel order, normalised by a mean or a standard
  deviation in the other, as in the release of the papers, or by statistics of images in 0..1; the
  model trains, some points of AP worse.
- :func:`check_class_order`: teacher and student have as many classes, in another order; the logits
  would be compared class by class with the wrong ones.
- :func:`check_same_run`: ``--resume`` into the folder of another run; where the shapes happen to
  fit, one run would go on as a mixture of both.

Called by the training commands before the first step and by ``--check``. Tests:
``tests/engine/test_checks.py``.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.data import MetadataCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    StandardROIHeads,
)
from omegaconf import DictConfig, OmegaConf

from kd_detectron.data.coco_format import resolve_path
from kd_detectron.distillers import DISTILLER_REGISTRY
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling.distilled_rcnn import DistillationMixin
from kd_detectron.modeling.teacher_loading import (
    find_teacher_config,
    read_lazy_config,
    teacher_config,
)
from kd_detectron.preflight.data import DatasetSummary

logger = logging.getLogger(__name__)

IMAGENET_MEAN = {"RGB": (123.675, 116.28, 103.53), "BGR": (103.53, 116.28, 123.675)}
IMAGENET_STD = {"RGB": (58.395, 57.12, 57.375), "BGR": (57.375, 57.12, 58.395)}
# Variants in use (Caffe's, rounded ones) are within 2 of these; the two orders are 20 apart.
MEAN_TOLERANCE = 4.0
# The two orders are 1 apart.
STD_TOLERANCE = 0.25

# Keys whose change makes another run of it; of these, what a resumed run may change.
IDENTITY = ("MODEL.", "KD.", "DATASETS.TRAIN")
MAY_CHANGE = ("MODEL.DEVICE", "MODEL.WEIGHTS", "KD.SCHEDULE.", "KD.TEACHER.AMP")
LAZY_IDENTITY = ("model.", "dataloader.train.dataset")
LAZY_MAY_CHANGE = (
    *("model.vis_period", "model.distillation_weights", "model.teacher.amp"),
    "model.teacher.device",
)


# ---- meta-architecture ----


def check_meta_architecture(cfg: CfgNode) -> None:
    """Refuses ``KD.DISTILLERS`` on a detector that would train without them, and unknown parts.

    Raises:
        ConfigError: naming ``MODEL.META_ARCHITECTURE``, or the part's key, and the fix.
    """
    _check_parts(cfg)
    name = cfg.MODEL.META_ARCHITECTURE
    known = {key: cls for key, cls in META_ARCH_REGISTRY if isinstance(cls, type)}
    if name not in META_ARCH_REGISTRY:
        raise ConfigError(f"MODEL.META_ARCHITECTURE is '{name}'{did_you_mean(name, known)}")
    if not (cfg.KD.ENABLED and cfg.KD.DISTILLERS):
        return
    if name in known and not issubclass(known[name], DistillationMixin):
        distilled = [key for key, cls in known.items() if issubclass(cls, DistillationMixin)]
        raise ConfigError(
            f"KD.DISTILLERS is {list(cfg.KD.DISTILLERS)} but MODEL.META_ARCHITECTURE is '{name}', "
            f"which distils nothing; set it to one of {', '.join(sorted(distilled))}, or "
            "KD.ENABLED False"
        )


def _check_parts(cfg: CfgNode) -> None:
    """Refuses parts of the detector that are not registered, and heads that it needs and lacks."""
    heads = cfg.MODEL.ROI_HEADS.NAME
    standard = ROI_HEADS_REGISTRY.get(heads) if heads in ROI_HEADS_REGISTRY else None
    needed = isinstance(standard, type) and issubclass(standard, StandardROIHeads)
    for node, registry, used in (
        ("BACKBONE", BACKBONE_REGISTRY, True),
        ("ANCHOR_GENERATOR", ANCHOR_GENERATOR_REGISTRY, True),
        ("PROPOSAL_GENERATOR", PROPOSAL_GENERATOR_REGISTRY, False),
        ("ROI_HEADS", ROI_HEADS_REGISTRY, False),
        ("ROI_BOX_HEAD", ROI_BOX_HEAD_REGISTRY, needed),
        ("ROI_MASK_HEAD", ROI_MASK_HEAD_REGISTRY, needed and cfg.MODEL.MASK_ON),
        ("ROI_KEYPOINT_HEAD", ROI_KEYPOINT_HEAD_REGISTRY, needed and cfg.MODEL.KEYPOINT_ON),
    ):
        name, known = cfg.MODEL[node].NAME, [key for key, _ in registry]
        if name in registry or name == "PrecomputedProposals" or not (name or used):
            continue
        what = f"is '{name}'" if name else "is empty, and the detector needs one"
        raise ConfigError(f"MODEL.{node}.NAME {what}{did_you_mean(name, known)}")


# ---- pixel statistics ----


def pixel_statistics_warning(
    who: str,
    input_format: str,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    format_key: str,
    mean_key: str,
    std_key: str,
) -> str | None:
    """Returns a sentence if images are normalised by statistics that cannot be theirs.

    That is, by those of images in 0..1, or by ImageNet's in the other channel order. Own data may
    have any others.

    Args:
        who: whose images these are, "student" or "teacher".
        input_format: "BGR" or "RGB".
        mean, std: what images in 0..255 are normalised by.
        format_key, mean_key, std_key: the config keys of the three.
    """
    shown_mean, shown_std = _rounded(mean), _rounded(std)
    if _of_images_up_to_one(mean, std):
        mean, std = ([value * 255 for value in values] for values in (mean, std))
        fix = f"multiply both by 255, to {_rounded(mean)} and {_rounded(std)}"
        order = _imagenets_order(mean, IMAGENET_MEAN, MEAN_TOLERANCE)
        if order not in (None, input_format):
            fix += f" and, since that is ImageNet's mean in {order} order, reverse them"
        return (
            f"{mean_key} {shown_mean} and {std_key} {shown_std} of the {who} are those of images "
            f"in 0..1, but images are in 0..255 here: {fix}"
        )
    other = {"RGB": "BGR", "BGR": "RGB"}.get(input_format)
    if other is None:
        return None
    mean_order = _imagenets_order(mean, IMAGENET_MEAN, MEAN_TOLERANCE)
    std_order = _imagenets_order(std, IMAGENET_STD, STD_TOLERANCE)
    if mean_order == other:
        std_too = f" and {std_key} to {shown_std[::-1]}" if std_order == other else ""
        return (
            f"{format_key} is {input_format} for the {who}, but {mean_key} {shown_mean} is "
            f"ImageNet's mean in {other} order: each channel is normalised by another one's "
            f"statistics. Set {mean_key} to {list(IMAGENET_MEAN[input_format])}{std_too}, or, if "
            f"the weights were trained on {other} images, set {format_key} to {other}"
        )
    if mean_order == input_format and std_order == other:
        return (
            f"{format_key} is {input_format} for the {who} and {mean_key} is ImageNet's in that "
            f"order, but {std_key} {shown_std} is ImageNet's in {other} order. Set {std_key} to "
            f"{list(IMAGENET_STD[input_format])}, unless the weights were trained as it is"
        )
    return None


def _of_images_up_to_one(mean: Sequence[float], std: Sequence[float]) -> bool:
    # A mean of 0 with a standard deviation of 1 leaves the images as they are.
    small_mean = any(mean) and max(map(abs, mean)) <= 1
    return small_mean or (len(std) > 0 and max(std) < 1)


def _imagenets_order(
    values: Sequence[float], imagenets: Mapping[str, Sequence[float]], tolerance: float
) -> str | None:
    """The channel order in which these are ImageNet's statistics, if they are."""
    for order, expected in imagenets.items():
        if len(values) == 3 and all(
            abs(a - b) <= tolerance for a, b in zip(values, expected, strict=True)
        ):
            return order
    return None


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def warn_of_pixel_statistics(model, wording: Callable[[str], str] = str) -> list[str]:
    """Logs where student or teacher normalise by statistics that cannot be their images'.

    Args:
        model: a detector, distilled or plain, not wrapped in DistributedDataParallel.
        wording: turns a warning into the words of the user's config.

    Returns:
        The warnings.
    """
    found = [
        pixel_statistics_warning(
            "student",
            getattr(model, "input_format", None),
            *_statistics_of(model),
            format_key="INPUT.FORMAT",
            mean_key="MODEL.PIXEL_MEAN",
            std_key="MODEL.PIXEL_STD",
        )
    ]
    teacher = getattr(model, "teacher", None)
    if teacher is not None:
        found.append(
            pixel_statistics_warning(
                "teacher",
                teacher.input_format,
                *_statistics_of(teacher.model),
                format_key="INPUT.FORMAT of KD.TEACHER.CONFIG_FILE",
                mean_key="its MODEL.PIXEL_MEAN (by KD.TEACHER.OPTS)",
                std_key="its MODEL.PIXEL_STD",
            )
        )
    warnings = [wording(warning) for warning in found if warning]
    for warning in warnings:
        logger.warning("%s", warning)
    return warnings


def _statistics_of(model) -> tuple[list[float], list[float]]:
    values = (getattr(model, name, None) for name in ("pixel_mean", "pixel_std"))
    mean, std = ([] if value is None else value.flatten().tolist() for value in values)
    return mean, std


# ---- class order ----


def check_class_order(cfg: CfgNode, summaries: Mapping[str, DatasetSummary]) -> None:
    """Refuses to compare logits of a teacher that was trained on other classes, by their names.

    Compared only where the classes of both are known: the student's from its checked datasets, the
    teacher's from the first dataset of its config's ``DATASETS.TRAIN`` if that is registered here
    with class names, or is in its ``DATASETS.COCO_FORMAT`` with its annotation file at hand. Case
    is no difference.

    Args:
        cfg: the student's whole config.
        summaries: what :func:`kd_detectron.preflight.data.check_datasets` returned for it.

    Raises:
        ConfigError: a class has another name; nothing where only the numbers of classes differ,
            which ``check_fits`` refuses with a better sentence.
    """
    names = list(cfg.KD.DISTILLERS) if cfg.KD.ENABLED else []
    comparing = [
        name
        for name in names
        if name in DISTILLER_REGISTRY and "logits" in DISTILLER_REGISTRY.get(name).requires
    ]
    if not comparing or not cfg.DATASETS.TRAIN:
        return
    own_name = cfg.DATASETS.TRAIN[0]
    own = summaries[own_name].classes
    teacher_name, theirs = teacher_classes(cfg, summaries)
    if not own or len(own) != len(theirs):
        return
    for index, (mine, other) in enumerate(zip(own, theirs, strict=True)):
        if mine.strip().lower() != other.strip().lower():
            raise ConfigError(
                f"class {index} is '{mine}' in the student's DATASETS.TRAIN '{own_name}' and "
                f"'{other}' in the teacher's '{teacher_name}' (KD.TEACHER.CONFIG_FILE "
                f"'{cfg.KD.TEACHER.CONFIG_FILE}'), but {comparing} compare their logits class by "
                "class; use a teacher of the same classes in the same order, or feature distillers "
                "alone. If only the names differ, set KD.TEACHER.OPTS to "
                f'["DATASETS.TRAIN", "(\'{own_name}\',)"]'
            )


def teacher_classes(
    cfg: CfgNode, summaries: Mapping[str, DatasetSummary]
) -> tuple[str, tuple[str, ...]]:
    """Returns name and class names of the dataset that the teacher's config trains on.

    The class names are empty where they cannot be known here.
    """
    path = find_teacher_config(cfg.KD.TEACHER.CONFIG_FILE)
    files: dict[str, str] = {}
    own_files = {entry[0]: entry[1] for entry in cfg.DATASETS.COCO_FORMAT}
    if path.endswith(".py"):
        lazy_cfg = read_lazy_config(path, list(cfg.KD.TEACHER.OPTS))
        trained_on = OmegaConf.select(lazy_cfg, "dataloader.train.dataset.names") or ()
        trained_on = [trained_on] if isinstance(trained_on, str) else list(trained_on)
    else:
        teacher_cfg = teacher_config(cfg)
        trained_on = list(teacher_cfg.DATASETS.TRAIN)
        files = {entry[0]: entry[1] for entry in teacher_cfg.DATASETS.COCO_FORMAT}
    if not trained_on:
        return "", ()
    name = trained_on[0]
    if name in files and files[name] != own_files.get(name):
        return name, _classes_in(resolve_path(files[name]))
    if name in summaries:
        return name, summaries[name].classes
    if name in MetadataCatalog and MetadataCatalog.get(name).get("thing_classes"):
        return name, tuple(MetadataCatalog.get(name).thing_classes)
    return name, ()


def _classes_in(json_file: str) -> tuple[str, ...]:
    # The teacher's data need not be here, nor be sound: then there is nothing to compare with.
    try:
        with open(json_file, encoding="utf-8") as file:
            categories = json.load(file)["categories"]
        return tuple(x["name"] for x in sorted(categories, key=lambda x: x["id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return ()


# ---- resume ----


def check_same_run(cfg: CfgNode) -> list[str]:
    """Compares the config with that of the run in ``OUTPUT_DIR`` which ``--resume`` goes on with.

    What may change over a resume: everything but model, distillation and training data; and of
    these the device, ``MODEL.WEIGHTS`` (not read by a resumed run), ``KD.SCHEDULE`` and the weights
    of distillers. Keys that only one of the two has come from another version and are left out.

    Returns:
        The keys that changed and may, each as one phrase; they are logged.

    Raises:
        ConfigError: a key differs that makes it another run.
    """
    before = _config_of_run(cfg.OUTPUT_DIR)
    now = dict(_leaves(yaml.safe_load(cfg.dump())))
    changed = {key for key in before.keys() & now.keys() if before[key] != now[key]}
    return _judge(cfg.OUTPUT_DIR, before, now, changed, _makes_another_run)


def check_same_lazy_run(cfg: DictConfig) -> list[str]:
    """As :func:`check_same_run`, for a run from a LazyConfig in ``train.output_dir``.

    What may not change is ``model`` and ``dataloader.train.dataset``; of these may the weights of
    distillers, and where and in which precision the teacher runs. Here a key that only one of the
    two has is a change: a LazyConfig has no keys but its own.
    """
    before = _config_of_run(cfg.train.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        LazyConfig.save(cfg, os.path.join(folder, "config.yaml"))
        now = _config_of_run(folder)
    keys = before.keys() | now.keys() if before else set()
    changed = {key for key in keys if before.get(key, ABSENT) != now.get(key, ABSENT)}
    return _judge(cfg.train.output_dir, before, now, changed, _makes_another_lazy_run)


def _config_of_run(output_dir: str) -> dict[str, object]:
    """The values in ``config.yaml`` by their keys; nothing where it is missing or cut short."""
    path = os.path.join(output_dir, "config.yaml")
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        config = dict(_leaves(yaml.load(text, _PlainLoader)))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
        text = ""
    if not text.endswith("\n"):  # Detectron2 was killed while it wrote the file.
        logger.warning("%s cannot be read; nothing to compare this config with", path)
        return {}
    return config


class _PlainLoader(yaml.SafeLoader):
    """Reads the Python objects in a saved LazyConfig as the text that they are written as."""


def _as_text(loader: yaml.Loader, tag: str, node: yaml.Node) -> list:
    return [tag, yaml.serialize(node)]


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _as_text)


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def _judge(
    output_dir: str,
    before: Mapping[str, object],
    now: Mapping[str, object],
    changed: Iterable[str],
    makes_another_run: Callable[[str], bool],
) -> list[str]:
    """Refuses changes that make another run; logs and returns the others."""
    path = os.path.join(output_dir, "config.yaml")
    if before and not before.keys() & now.keys():
        raise ConfigError(
            f"--resume: OUTPUT_DIR '{output_dir}' holds a run of the other kind of config, YAML or "
            "LazyConfig; resume it with the command and the config that it was started with"
        )
    refused, allowed = [], []
    for key in sorted(changed):
        was, value = before.get(key, ABSENT), now.get(key, ABSENT)
        phrase = f"{key} was {was!r} and is {value!r}"
        (refused if makes_another_run(key) else allowed).append(phrase)
    if refused:
        raise ConfigError(
            f"--resume: OUTPUT_DIR '{output_dir}' holds another run: {'; '.join(refused)}. Set "
            "them back to go on with it, or give another OUTPUT_DIR (and MODEL.WEIGHTS its "
            f"checkpoint, to start from its weights); if the change is meant, remove {path}"
        )
    if allowed:
        logger.warning("--resume goes on with changed keys: %s", "; ".join(allowed))
    return allowed


def _makes_another_run(key: str) -> bool:
    if key.startswith(MAY_CHANGE) or (key.startswith("KD.") and key.endswith(".WEIGHT")):
        return False
    return key.startswith(IDENTITY)


def _makes_another_lazy_run(key: str) -> bool:
    return key.startswith(LAZY_IDENTITY) and not key.startswith(LAZY_MAY_CHANGE)


def _leaves(node: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
