"""The frozen teacher: a Detectron2 detector named in one config line, run but never trained.

:class:`FrozenTeacher` is a plain object that holds a model, not an ``nn.Module``: so the teacher is
absent from the student's ``parameters()``, ``state_dict()`` and ``train()``, from the optimizer and
from DistributedDataParallel, by construction (``tests/modeling/test_distilled_rcnn.py``).

The teacher sees each image as it was trained to: channel order first (flipped where the student's
``INPUT.FORMAT`` differs), then its own mean and std. The papers' release normalises RGB images with
BGR statistics; this project does not (``test_teacher_sees_the_image_as_it_was_trained_to``).

It always runs in eval mode, so BatchNorm statistics never move, and under ``no_grad`` rather than
``inference_mode``, since losses save its tensors for backward. Its RPN, mask, keypoint and
dense heads are dropped after the checkpoint was checked, and its BatchNorm folded (``fold.py``).
``roi_heads(...)`` is never called whole: that would resample boxes and write to the event
storage.

Legend: N images, R sampled proposals over the whole batch, K foreground classes.
"""

import contextlib
import hashlib
import logging
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, ImageList
from torch import nn

from kd_detectron.config import add_kd_config
from kd_detectron.distillers.base import ModelSpec
from kd_detectron.errors import ConfigError

from .fold import fold_batch_norm, use_fastest_memory_format
from .taps import box_head_of, box_predictor_of
from .teacher_loading import load_teacher

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
        self.model = model.eval().requires_grad_(False)
        self.input_format = input_format
        self.amp = amp
        self.name = name or type(model).__name__
        self.num_parameters = sum(p.numel() for p in model.parameters())

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "FrozenTeacher":
        """Builds and loads the teacher that ``cfg.KD.TEACHER`` names, on ``cfg.MODEL.DEVICE``.

        Raises:
            ConfigError: its config or checkpoint is not found, unreadable, or does not fit.
        """
        return cls.from_model(*load_teacher(cfg), cfg)

    @classmethod
    def from_model(cls, model: nn.Module, input_format: str, cfg: CfgNode) -> "FrozenTeacher":
        """Freezes what :func:`load_teacher` returned, without the parts that are never run."""
        name = cfg.KD.TEACHER.CONFIG_FILE
        teacher = cls(model, input_format, amp=cfg.KD.TEACHER.AMP, name=name)
        teacher.drop_unused_heads()
        fold_batch_norm(model)
        use_fastest_memory_format(model.backbone)
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
        cfg.KD.TEACHER.OPTS = list(opts)
        cfg.KD.TEACHER.AMP = amp
        return cls.from_config(cfg)

    @property
    def spec(self) -> ModelSpec:
        """What distillers may know of the teacher to size their layers."""
        return model_spec(self.model)

    def drop_unused_heads(self) -> None:
        """Frees the parts that distillation never runs: RPN, mask, keypoint and dense heads."""
        for owner, names in (
            (self.model, ("proposal_generator", "sem_seg_head", "head")),
            (
                getattr(self.model, "roi_heads", None),
                ("mask_head", "mask_pooler", "keypoint_head", "keypoint_pooler"),
            ),
        ):
            for name in names:
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

    def features(self, batched_inputs: list[dict], student_format: str) -> dict[str, torch.Tensor]:
        """Runs the backbone: level name -> (N, C, H, W)."""
        with self._running():
            features = self.model.backbone(self.preprocess(batched_inputs, student_format).tensor)
        # Losses and pooler meet them beside the student's maps, in the student's format.
        return {level: feature.contiguous() for level, feature in features.items()}

    def box_features(self, features: dict[str, torch.Tensor], boxes: list[Boxes]) -> torch.Tensor:
        """Runs pooler and box head on given boxes: (R, D)."""
        heads = self.model.roi_heads
        with self._running():
            pooled = heads.box_pooler([features[level] for level in heads.box_in_features], boxes)
            return heads.box_head(pooled).flatten(1)

    def logits(self, box_features: torch.Tensor) -> torch.Tensor:
        """Runs the box predictor: (R, K+1)."""
        with self._running():
            return self.model.roi_heads.box_predictor(box_features)[0]

    def fingerprint(self) -> str:
        """A hash of all weights and buffers; a frozen teacher's never changes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @contextlib.contextmanager
    def _running(self):
        device = self.model.pixel_mean.device
        dtype = torch.bfloat16 if _has_bfloat16(device) else torch.float16
        # On the CPU few machines have bfloat16: there the teacher follows the student's choice. A
        # teacher in full precision must not inherit the student's autocast.
        enabled = self.amp and (device.type == "cuda" or torch.is_autocast_enabled(device.type))
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=enabled):
            yield


def _has_bfloat16(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported()


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


def has_logits(model: nn.Module) -> bool:
    """Whether the detector has one box predictor whose logits can be distilled."""
    return box_predictor_of(model) is not None
