"""The frozen teacher: a Detectron2 detector named in one config line, run but never trained.

:class:`FrozenTeacher` is a plain object that holds a model, not an ``nn.Module``: so the teacher is
absent from the student's ``parameters()``, ``state_dict()`` and ``train()``, from the optimizer and
from DistributedDataParallel, by construction (``tests/modeling/test_distilled_rcnn.py``).

The teacher sees each image as it was trained to: channel order first (flipped where the student's
``INPUT.FORMAT`` differs), then its own mean and std. The papers' release normalises RGB images with
BGR statistics; this project does not (``test_teacher_sees_the_image_as_it_was_trained_to``).

It always runs in eval mode, so BatchNorm statistics never move, and under ``no_grad`` rather than
``inference_mode``, since losses save its tensors for backward. After the checkpoint was checked,
the heads that no distiller requires are dropped and BatchNorm is folded (``fold.py``).
``roi_heads(...)`` is never called whole: that would resample boxes and write to the event storage.

Legend: N images, R sampled proposals over the whole batch, F foreground ones among them, K
foreground classes.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import ImageList
from torch import nn

from kd_detectron.config import add_kd_config
from kd_detectron.distillers.base import ModelSpec
from kd_detectron.errors import ConfigError
from kd_detectron.precision import teacher_precision

from .autocast import prepare_for_autocast
from .fold import fold_batch_norm
from .taps import StudentTaps, box_head_of, rpn_outputs_by_level
from .teacher_loading import load_teacher, plain_list

logger = logging.getLogger(__name__)


class FrozenTeacher:
    """A detector that is run beside the student, in eval mode and without gradient.

    Args:
        model: a Detectron2 detector with ``backbone`` and, for logits, ``roi_heads``.
        input_format: the channel order it was trained with, "BGR" or "RGB".
        amp: run it in half precision on CUDA, and on the CPU where the student is run so.
        name: what it is called in logs and errors.
    """

    def __init__(self, model: nn.Module, input_format: str, *, amp: bool = True, name: str = ""):
        if input_format not in ("BGR", "RGB"):
            raise ConfigError(
                f"INPUT.FORMAT of KD.TEACHER.CONFIG_FILE is {input_format!r}, but a teacher can be "
                "shown 'BGR' and 'RGB' images only; choose a teacher that was trained on those"
            )
        self.model = model.eval().requires_grad_(False)
        self.input_format = input_format
        self.amp = amp
        self.name = name or type(model).__name__
        self.num_parameters = sum(p.numel() for p in model.parameters())

    def __deepcopy__(self, memo) -> "FrozenTeacher":
        # It never changes, so a copy of the student may share it.
        return self

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "FrozenTeacher":
        """Builds and loads the teacher that ``cfg.KD.TEACHER`` names, on ``cfg.MODEL.DEVICE``.

        Raises:
            ConfigError: its config or checkpoint is not found, unreadable, or does not fit.
        """
        return cls.from_model(*load_teacher(cfg), cfg)

    @classmethod
    def from_model(cls, model: nn.Module, input_format: str, cfg: CfgNode) -> "FrozenTeacher":
        """Freezes what :func:`load_teacher` returned."""
        name = cfg.KD.TEACHER.CONFIG_FILE
        teacher = cls(model, input_format, amp=cfg.KD.TEACHER.AMP, name=name)
        fold_batch_norm(model)
        prepare_for_autocast(model)
        return teacher

    @classmethod
    def from_name(
        cls,
        config_file: str,
        *,
        weights: str = "",
        opts: Sequence = (),
        amp: bool = True,
        device: str = "cuda",
    ) -> "FrozenTeacher":
        """As :meth:`from_config`, from arguments that mean what the keys of ``KD.TEACHER`` mean.

        LazyConfig users build their teacher with this (``configs/lazy/``).
        """
        cfg = get_cfg()
        add_kd_config(cfg)
        cfg.MODEL.DEVICE = device
        cfg.KD.TEACHER.CONFIG_FILE = config_file
        cfg.KD.TEACHER.WEIGHTS = weights
        cfg.KD.TEACHER.OPTS = plain_list(opts)
        cfg.KD.TEACHER.AMP = amp
        return cls.from_config(cfg)

    @property
    def spec(self) -> ModelSpec:
        """What distillers may know of the teacher to size their layers."""
        return model_spec(self.model)

    def drop_unused_heads(self, requires: Iterable[str]) -> None:
        """Frees the heads that compute nothing of ``requires``, the distillers' together."""
        requires = frozenset(requires)
        unused = ["sem_seg_head", "head", "roi_heads.keypoint_head", "roi_heads.keypoint_pooler"]
        if "objectness" not in requires:
            unused += ["proposal_generator"]
        if not requires & {"box_features", "logits", "box_deltas"}:
            unused += ["roi_heads.box_head", "roi_heads.box_predictor", "roi_heads.box_pooler"]
        if "mask_logits" not in requires:
            unused += ["roi_heads.mask_head", "roi_heads.mask_pooler"]
        for path in unused:
            owner, _, name = path.rpartition(".")
            owner = getattr(self.model, owner, None) if owner else self.model
            if getattr(owner, name, None) is not None:
                setattr(owner, name, None)

    def preprocess(self, batched_inputs: list[dict], student_format: str) -> ImageList:
        """Normalises and batches the student's images as the teacher was trained to see them.

        Args:
            batched_inputs: Detectron2's inputs; "image" is (3, H, W) in ``student_format``.
            student_format: the student's ``INPUT.FORMAT``, "BGR" or "RGB".

        Raises:
            ConfigError: an image is larger than the square that the teacher pads to (ViTDet).
        """
        images = [x["image"] for x in batched_inputs]
        square = self.model.backbone.padding_constraints.get("square_size", 0)
        largest = max(max(image.shape[-2:]) for image in images)
        if square and largest > square:
            raise ConfigError(
                f"an image is {largest} pixels long, but the teacher {self.name} pads to a square "
                f"of {square} and would cut it; set INPUT.MAX_SIZE_TRAIN to {square}"
            )
        if student_format != self.input_format:
            images = [image.flip(0) for image in images]
        return self.model.preprocess_image([{"image": image} for image in images])

    def fingerprint(self) -> str:
        """A hash of all weights and buffers; a frozen teacher's never changes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def running(self):
        """The context that it is run in: no gradient, and a precision of its own."""
        return teacher_precision(self.model.pixel_mean.device, amp=self.amp)


def model_spec(model: nn.Module) -> ModelSpec:
    """Reads levels, strides, class count and box-head width off a Detectron2 detector."""
    shapes = model.backbone.output_shape()
    head = box_head_of(model)
    box_channels = None
    if head is not None:
        shape = head.output_shape
        box_channels = shape.channels * (shape.height or 1) * (shape.width or 1)
    heads = getattr(model, "roi_heads", model)
    return ModelSpec(
        channels={level: shape.channels for level, shape in shapes.items()},
        strides={level: shape.stride for level, shape in shapes.items()},
        num_classes=getattr(heads, "num_classes", None),
        box_channels=box_channels,
    )


@dataclass
class FrozenTeacherStep:
    """The teacher on one step, as ``kd_detectron.context.TeacherStep`` describes it.

    Args:
        teacher: what runs.
        batched_inputs: the student's images.
        student_format: the student's ``INPUT.FORMAT``.
        taps: the boxes that the student's heads were given; None where no head is run.
    """

    teacher: FrozenTeacher
    batched_inputs: list[dict]
    student_format: str
    taps: StudentTaps | None = None

    def features(self) -> dict[str, torch.Tensor]:
        teacher = self.teacher
        with teacher.running():
            images = teacher.preprocess(self.batched_inputs, self.student_format)
            features = teacher.model.backbone(images.tensor)
        # Losses and pooler meet them beside the student's maps, in the student's format.
        return {level: feature.contiguous() for level, feature in features.items()}

    def rpn(self, features) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        rpn = self.teacher.model.proposal_generator
        with self.teacher.running():
            outputs = rpn.rpn_head([features[level] for level in rpn.in_features])
            return rpn_outputs_by_level(rpn, outputs)

    def box_features(self, features) -> torch.Tensor:
        heads = self.teacher.model.roi_heads
        maps = [features[level] for level in heads.box_in_features]
        with self.teacher.running():
            return heads.box_head(heads.box_pooler(maps, self.taps.proposal_boxes)).flatten(1)

    def box_predictions(self, box_features) -> tuple[torch.Tensor, torch.Tensor]:
        with self.teacher.running():
            return self.teacher.model.roi_heads.box_predictor(box_features)

    def mask_logits(self, features) -> torch.Tensor:
        heads = self.teacher.model.roi_heads
        maps = [features[level] for level in heads.mask_in_features]
        with self.teacher.running():
            return heads.mask_head.layers(heads.mask_pooler(maps, self.taps.mask_boxes))
