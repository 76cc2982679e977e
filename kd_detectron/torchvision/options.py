"""The options of a training on torchvision's detectors, and its ``config.yaml``.

The run folder's ``config.yaml`` has the keys of Detectron2's config wherever these exist, so that
``tools/results_table.py`` and ``tools/visualize.py curves`` read both engines' runs.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from kd_detectron.distillers.argument_checks import check_number, check_whole_number
from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.runs.run import torchvision_name

# The plain student's state dict at the end of a training, in its run folder.
FINAL_WEIGHTS = "model_final.pth"
# Lightning's. Torchvision's detectors do not run with weights in half precision ("bf16-true"), and
# a teacher's weights stay in float32, beside which a student's in "64-true" do not work.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
# Numbers whose least value is not 0.
_AT_LEAST = {"iterations": 1, "batch_size": 1, "log_period": 1, "nodes": 1}
_ARCHITECTURES = {"retinanet": "RetinaNet", "fcos": "FCOS", "keypointrcnn": "KeypointRCNN"}


@dataclass(frozen=True)
class TrainingOptions:
    """One training.

    Attributes:
        output: the run folder.
        train, val: annotation file and image folder, in COCO format.
        student: name of the detector (``models.py``); trained alone without ``distillers``.
        student_options, weights, backbone_weights: as in :func:`models.build_detector`.
        teacher: name of the teacher; not needed where ``teacher_run`` is given.
        teacher_options, teacher_weights: its options and its trained weights.
        teacher_run: the run folder of a training of this command; names teacher and weights.
        distillers: weight, or mapping of options, by name.
        inherit: the starts of the names of tensors that the student copies from the teacher.
        inherit_lr_factor: their learning rate, relative to that of the others; 0 freezes them.
        iterations: steps of the whole training.
        batch_size: images of a step, over all processes.
        learning_rate, momentum, weight_decay: of SGD.
        warmup: iterations in which the learning rate rises from a thousandth.
        steps: iterations after which the learning rate is a tenth of the one before.
        clip_gradients: largest norm of the gradients of a step; 0: any.
        eval_period, checkpoint_period: iterations between two of these; 0: only at the end. A
            checkpoint is written before each evaluation too.
        log_period: iterations whose losses are averaged in one line of ``metrics.json``.
        precision: one of ``PRECISIONS``.
        devices, accelerator: Lightning's; devices are a number, indices ("0,1", or "1," for one)
            or "auto".
        nodes: machines; the command is started on each, as Lightning's documentation says.
        workers: processes that read images.
        seed: of weights, order and sampling.
    """

    output: str
    train: tuple[str, str]
    val: tuple[str, str]
    student: str
    student_options: Mapping = field(default_factory=dict)
    weights: str = ""
    backbone_weights: str = ""
    teacher: str = ""
    teacher_options: Mapping = field(default_factory=dict)
    teacher_weights: str = ""
    teacher_run: str = ""
    distillers: Mapping = field(default_factory=dict)
    inherit: tuple[str, ...] = ()
    inherit_lr_factor: float = 1.0
    iterations: int = 1000
    batch_size: int = 8
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: int = 100
    steps: tuple[int, ...] = ()
    clip_gradients: float = 0.0
    eval_period: int = 500
    checkpoint_period: int = 500
    log_period: int = 20
    precision: str = "32-true"
    devices: str = "auto"
    accelerator: str = "auto"
    nodes: int = 1
    workers: int = 2
    seed: int = 0

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type is int:
                check_whole_number(one.name, value, at_least=_AT_LEAST.get(one.name, 0))
            elif one.type is float:
                check_number(one.name, value, at_least=0)
            elif one.type is str and not isinstance(value, str | Path):
                raise ConfigError(f"{one.name} is {value!r}; give text")
            elif one.type is Mapping and not isinstance(value, Mapping):
                raise ConfigError(f"{one.name} is {value!r}; give a mapping of options")
        for step in self.steps:
            check_whole_number("steps", step, at_least=0)
        for name in ("train", "val", "inherit"):
            if not all(isinstance(part, str | Path) for part in getattr(self, name)):
                raise ConfigError(f"{name} is {list(getattr(self, name))}; give text")
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision is '{self.precision}'; choose one of {', '.join(PRECISIONS)}"
            )

    @classmethod
    def from_mapping(cls, values: Mapping) -> "TrainingOptions":
        """Options from a YAML file's mapping.

        One value stands for a list of one, a list of distillers ("CKD" or "CKD=0.1") for their
        default weights, and text for the number that it is: PyYAML reads 1e-3 as text.

        Raises:
            ConfigError: an option is unknown, missing, or of a wrong type or value.
        """
        known = [one.name for one in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"there is no option {key}{did_you_mean(str(key), known)}")
        for key in ("output", "train", "val", "student"):
            if not values.get(key):
                raise ConfigError(f"the option {key} is missing; give {key}")
        options = {
            one.name: _converted(one.name, one.type, values[one.name])
            for one in fields(cls)
            if values.get(one.name) is not None
        }
        for key in ("train", "val"):
            if len(options[key]) != 2:
                pair = list(options[key])
                raise ConfigError(f"{key} is {pair}; give annotation file and image folder")
        return cls(**options)

    def config(self, num_classes: int) -> dict:
        """This training as the run folder's ``config.yaml``."""
        architecture = _ARCHITECTURES.get(self.student.split("_")[0])
        plain, distilled = architecture or "GeneralizedRCNN", architecture or "RCNN"
        weights, teacher_file = self.teacher_weights, self.teacher
        if self.teacher_run:
            weights = weights or f"{self.teacher_run}/{FINAL_WEIGHTS}"
            teacher_file = f"{self.teacher_run}/config.yaml"
        teacher = {
            "CONFIG_FILE": teacher_file,
            "OPTIONS": dict(self.teacher_options),
            "WEIGHTS": weights,
            "INHERIT": list(self.inherit),
            "INHERIT_LR_FACTOR": self.inherit_lr_factor,
        }
        distillers = {
            name.upper(): {
                key.upper(): value
                for key, value in (
                    entry if isinstance(entry, Mapping) else {"weight": entry}
                ).items()
            }
            for name, entry in self.distillers.items()
        }
        return {
            "ENGINE": "torchvision",
            "MODEL": {
                "META_ARCHITECTURE": f"Distilled{distilled}" if self.distillers else plain,
                "BACKBONE": {"NAME": "torchvision"},
                "TORCHVISION": {
                    "NAME": torchvision_name(self.student, self.student_options),
                    "DETECTOR": self.student,
                    "OPTIONS": dict(self.student_options),
                    "BACKBONE_WEIGHTS": self.backbone_weights,
                },
                "MASK_ON": self.student.startswith("maskrcnn"),
                "WEIGHTS": self.weights,
                "ROI_HEADS": {"NUM_CLASSES": num_classes},
            },
            "KD": {
                "ENABLED": bool(self.distillers or self.inherit),
                "DISTILLERS": list(self.distillers),
                "TEACHER": teacher,
                **distillers,
            },
            "DATASETS": {"TRAIN": [Path(self.train[0]).stem], "TEST": [Path(self.val[0]).stem]},
            "SOLVER": {
                "IMS_PER_BATCH": self.batch_size,
                "BASE_LR": self.learning_rate,
                "MOMENTUM": self.momentum,
                "WEIGHT_DECAY": self.weight_decay,
                "WARMUP_ITERS": self.warmup,
                "MAX_ITER": self.iterations,
                "STEPS": list(self.steps),
                "CLIP_VALUE": self.clip_gradients,
                "CHECKPOINT_PERIOD": self.checkpoint_period,
            },
            "TEST": {"EVAL_PERIOD": self.eval_period},
            "PRECISION": self.precision,
            "SEED": self.seed,
            "OUTPUT_DIR": str(self.output),
        }


def _converted(name: str, kind: type, value):
    """A value of a YAML file in its option's type, where it can be meant as one."""
    if name == "distillers":
        return _weights_or_options(value)
    if kind in (int, float):
        return _number(value, kind)
    if kind is Mapping:
        return _with_numbers(value)
    if kind is str:
        if name == "devices" and isinstance(value, list):
            # Lightning reads "1," as a list, "1" as a number of devices.
            return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return str(value) if is_number else value  # such as "devices: 2"
    several = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(_number(one, int) for one in several) if name == "steps" else several


def _number(value, kind: type):
    """A number as ``int`` or ``float``; what is none, or not a whole one, stays as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return float(value) if kind is float and type(value) is int else value


def _with_numbers(options):
    """A mapping whose values that are numbers written as text are numbers."""
    if not isinstance(options, Mapping):
        return options
    return {
        key: _number(value, float) if isinstance(value, str) else value
        for key, value in options.items()
    }


def _weights_or_options(distillers) -> dict[str, float | dict]:
    """Weight or options of each distiller by its name."""
    if isinstance(distillers, str):
        distillers = [distillers]
    if isinstance(distillers, Mapping):
        entries = {name: {} if x is None else x for name, x in _with_numbers(distillers).items()}
    elif isinstance(distillers, list | tuple) and all(isinstance(x, str) for x in distillers):
        entries = dict(map(_name_and_weight, distillers))
    else:
        raise ConfigError(f"distillers is {distillers!r}; give names, or a weight by name")
    for name, entry in entries.items():
        if not isinstance(entry, int | float | Mapping) or isinstance(entry, bool):
            raise ConfigError(
                f"distillers has {name}: {entry!r}; give a weight or a mapping of options"
            )
    return {name: _with_numbers(entry) for name, entry in entries.items()}


def _name_and_weight(text: str) -> tuple[str, dict]:
    name, _, weight = text.partition("=")
    try:
        return name, {"weight": float(weight)} if weight else {}
    except ValueError as error:
        raise ConfigError(f"distillers has '{text}'; write NAME or NAME=WEIGHT") from error
