"""The options of a training on torchvision's detectors, and its ``config.yaml``.

The run folder's ``config.yaml`` has the keys of Detectron2's config wherever these exist, so that
``tools/results_table.py`` and ``tools/visualize.py curves`` read both engines' runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from kd_detectron.errors import ConfigError, did_you_mean

from .models import short_name

# The plain student's state dict at the end of a training, in its run folder.
FINAL_WEIGHTS = "model_final.pth"
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
        eval_period, checkpoint_period, log_period: iterations between two of these.
        precision: Lightning's, such as "32-true", "bf16-mixed", "16-mixed".
        devices, accelerator: Lightning's.
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
    workers: int = 2
    seed: int = 0

    @classmethod
    def from_mapping(cls, values: Mapping) -> "TrainingOptions":
        """Options from a YAML file's mapping."""
        known = [one.name for one in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"there is no option {key}{did_you_mean(key, known)}")
        for key in ("output", "train", "val", "student"):
            if not values.get(key):
                raise ConfigError(f"the option {key} is missing; give {key}")
        pairs = {key: tuple(values[key]) for key in ("train", "val")}
        for key, pair in pairs.items():
            if len(pair) != 2:
                raise ConfigError(f"{key} is {list(pair)}; give annotation file and image folder")
        options = {key: value for key, value in values.items() if value is not None}
        tuples = {key: tuple(options[key]) for key in ("steps", "inherit") if key in options}
        return cls(**options | pairs | tuples)

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
                    "NAME": short_name(self.student, self.student_options),
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
