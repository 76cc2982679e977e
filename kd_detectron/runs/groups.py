"""Which runs are one experiment: grouped over their seeds, named, and set against a baseline.

Runs that differ in their seed alone are one group. Runs of one method that differ in anything else
stay apart, and their names say in what, so that an ablation is never averaged away. Tables and
pictures take their names from here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_detectron.distillers import DISTILLER_REGISTRY, option_defaults
from kd_detectron.runs.files import flatten
from kd_detectron.runs.run import Run, detector_name, distiller_names, has_teacher

TEACHER = "teacher"
MISSING = "-"

# What may differ between two runs of one experiment: it changes nothing that a row is about.
NOT_THE_EXPERIMENT = frozenset(
    {
        "CUDNN_BENCHMARK",
        "DATALOADER.MAX_CORRUPT_IMAGES",
        "DATALOADER.NUM_WORKERS",
        "DATASETS.TRAIN_CLASSES",
        "MODEL.DEVICE",
        "OUTPUT_DIR",
        "SEED",
        "SOLVER.CHECKPOINT_MAX_TO_KEEP",
        "SOLVER.CHECKPOINT_PERIOD",
        "TEST.EVAL_PERIOD",
        "VERSION",
        "VIS_PERIOD",
    }
)
# Keys that version 0.1.0 did not have, without those of distillers, and what it did by them.
LATER_KEYS = {
    "KD.TEACHER.INHERIT": [],
    "KD.TEACHER.INHERIT_LR_FACTOR": 1.0,
    "SOLVER.EMA.ENABLED": False,
    "SOLVER.EMA.DECAY": 0.999,
}
_ARCHITECTURE = "MODEL.META_ARCHITECTURE"
_SHARED_KD_NODES = frozenset({"TEACHER", "SCHEDULE"})
# Nodes that a backbone's builder reads, and the part of its name that tells it.
_BACKBONE_NODES = {
    "RESNETS": "resnet",
    "MOBILENETV2": "mobilenetv2",
    "TIMM": "timm",
    "TORCHVISION": "torchvision",
}


def group_runs(runs: Sequence[Run]) -> list[list[Run]]:
    """Groups runs that differ in their seed alone, in the order in which they were given."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        key = (run.finished or run.iterations, *sorted(experiment(run.config).items()))
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def experiment(config: Mapping) -> dict[str, str]:
    """Returns a config by dotted key, without what does not distinguish two experiments.

    Without the seed too, and without the nodes of distillers and backbones that are not in use. A
    key that the config lacks has its default.
    """
    config = dict(config)
    names = distiller_names(config)
    taught = has_teacher(config)
    kd = dict(config.pop("KD", None) or {})
    model = dict(config["MODEL"])
    if taught:
        used = {name.upper() for name in names} | _SHARED_KD_NODES
        config["KD"] = {
            key: value for key, value in kd.items() if key in used or not isinstance(value, Mapping)
        }
        config["KD"]["DISTILLERS"] = sorted(names)
    else:
        # A baseline is the same model under both meta-architectures.
        model["META_ARCHITECTURE"] = detector_name(config)
    config["MODEL"] = model
    builder = model.get("BACKBONE", {}).get("NAME", "")
    return {
        key: str(value)
        for key, value in (_defaults(names) | flatten(config)).items()
        if key not in NOT_THE_EXPERIMENT and _is_read(key, builder)
    }


def _defaults(names: Sequence[str]) -> dict[str, object]:
    """What a run with these distillers did by keys that its config may lack.

    It may be older than a key, and a torchvision run's config has only the options that were given.
    """
    defaults = dict(LATER_KEYS)
    for name in names:
        if name in DISTILLER_REGISTRY:
            cls = DISTILLER_REGISTRY.get(name)
            options = {"weight": float(cls.default_weight)} | option_defaults(cls)
            defaults |= {f"KD.{name}.{key}".upper(): value for key, value in options.items()}
    return defaults


def _is_read(key: str, builder: str) -> bool:
    """Whether a backbone of this builder may read a key: it is no other backbone's."""
    part = _BACKBONE_NODES.get(key.removeprefix("MODEL.").split(".")[0])
    known = any(own in builder for own in _BACKBONE_NODES.values())
    # Our own backbones read RESNETS.NORM too.
    return part is None or part in builder or not known or key == "MODEL.RESNETS.NORM"


def group_names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Names each group by its method, and by what sets it apart from its namesakes.

    The run that taught others of the groups is "teacher".
    """
    teachers = teacher_folders([run for group in groups for run in group])
    names = []
    for group in groups:
        run = group[0]
        if run.path.resolve() in teachers:
            names.append(TEACHER)
            continue
        own = experiment(run.config)
        namesakes = [
            experiment(other[0].config)
            for other in groups
            if (other[0].method, other[0].pair, other[0].detector)
            == (run.method, run.pair, run.detector)
        ]
        keys = sorted({key for other in namesakes for key in other})
        keys = [key for key in keys if len({other.get(key) for other in namesakes}) > 1]
        parts = [
            f"{key.removeprefix('KD.').removeprefix('MODEL.')} {_short(own.get(key))}"
            for key in keys
        ]
        parts = _first_three(parts)
        if not run.finished:
            parts.append(f"unfinished, {run.iterations or 0} iterations")
        names.append(run.method + (f" ({', '.join(parts)})" if parts else ""))
    return names


def named_groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups runs by the names that pictures give them: method, and the pair if there are several.

    A teacher's own run is "teacher R50".
    """
    groups = group_runs(runs)
    names = group_names(groups)
    students = [group[0] for group, name in zip(groups, names, strict=True) if name != TEACHER]
    taught = {run.teacher for run in students if run.teacher}
    several = len({run.student for run in students}) > 1 or len(taught) > 1
    named: dict[str, list[Run]] = {}
    for group, name in zip(groups, names, strict=True):
        if name == TEACHER:
            name = f"{TEACHER} {group[0].student}"
        elif several:
            name = f"{name}, {group[0].pair}"
        named.setdefault(name, []).extend(group)
    return named


def teacher_folders(runs: Sequence[Run]) -> set[Path]:
    """The run folders that the distilled ones among the runs have their teachers from."""
    return {run.teacher_folder.resolve() for run in runs if run.teacher_folder}


def confounders(name: str, run: Run, baseline: Run) -> list[str]:
    """Notes what else differs between a run and its baseline than the distillation."""
    own, base = experiment(run.config), experiment(baseline.config)
    if run.iterations and baseline.iterations:
        own["iterations trained"], base["iterations trained"] = run.iterations, baseline.iterations
    keys = [key for key in sorted({*own, *base}) if not key.startswith("KD.")]
    keys = [key for key in keys if own.get(key) != base.get(key) and key != _ARCHITECTURE]
    if not keys:
        return []
    shown = [f"{key} ({_short(own.get(key))}, baseline {_short(base.get(key))})" for key in keys]
    return [
        f"{name} differs from its baseline in {', '.join(_first_three(shown))}: the gain is not "
        "the method's alone."
    ]


def _first_three(parts: list[str]) -> list[str]:
    return parts if len(parts) <= 3 else [*parts[:3], f"and {len(parts) - 3} more"]


def _short(value: object, limit: int = 30) -> str:
    """A config value as text that fits into a row's name."""
    text = MISSING if value is None else str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
