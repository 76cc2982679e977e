"""The frozen teacher: a torchvision detector that is run beside the student, never trained.

:class:`FrozenTeacher` is a plain object that holds a model, not an ``nn.Module``: so the teacher is
absent from the student's ``parameters()``, ``state_dict()`` and ``train()``, from the optimizer and
from DistributedDataParallel, by construction.

It sees the very pixels and the geometry of the student's transform (resizing, random sizes,
padding), normalised by its own mean and std. It runs in eval mode, under ``no_grad`` rather than
``inference_mode``, since losses save its tensors for backward.
"""

import contextlib

import torch
from torch import nn

from kd_detectron.errors import ConfigError
from kd_detectron.precision import teacher_precision

from .anatomy import Anatomy, features_of, read_anatomy
from .conventions import background_last, renormalize, rows_of_anchors, without_background
from .taps import StudentTaps


class FrozenTeacher:
    """A torchvision detector, run in eval mode and without gradient.

    Args:
        model: the trained detector; it is frozen in place.
        amp: run it in half precision on CUDA, and on the CPU where the student is run so.
    """

    def __init__(self, model: nn.Module, *, amp: bool = True):
        self.anatomy: Anatomy = read_anatomy(model, "teacher")
        self.model = model.eval().requires_grad_(False)
        self.amp = amp

    def __deepcopy__(self, memo) -> "FrozenTeacher":
        return self  # A copy of the student, such as an average of its weights, has this teacher.

    @contextlib.contextmanager
    def running(self, device: torch.device):
        """No gradient, eval mode, and the teacher's precision, on the device of the images."""
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        if self.model.training:
            self.model.eval()
        with teacher_precision(device, amp=self.amp):
            yield self.model


class TeacherRun:
    """The teacher on one step: a :class:`~kd_detectron.context.TeacherStep` for torchvision.

    Args:
        teacher: the frozen teacher.
        taps: what the student computed in this step.
        student: the student, for its normalisation and box coding.
        levels: names of the levels that both models have.
        sizes: height and width of the student's map of each of these levels.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        taps: StudentTaps,
        student: nn.Module,
        levels: list[str],
        sizes: dict[str, tuple[int, int]],
    ):
        self._teacher = teacher
        self._taps = taps
        self._student = student
        self._levels = levels
        self._sizes = sizes
        self._maps: dict[str, torch.Tensor] = {}

    def features(self) -> dict[str, torch.Tensor]:
        pixels = renormalize(
            self._taps.images.tensors,
            self._taps.images.image_sizes,
            self._student.transform.image_mean,
            self._student.transform.image_std,
            self._teacher.model.transform.image_mean,
            self._teacher.model.transform.image_std,
        )
        with self._running() as model:
            self._maps = features_of(model.backbone(pixels))
        shared = self._named(list(self._maps.values()))
        for level, size in self._sizes.items():
            if tuple(shared[level].shape[-2:]) != size:
                raise ConfigError(
                    f"the maps of {level} are {size} for the student and "
                    f"{tuple(shared[level].shape[-2:])} for the teacher on images padded to "
                    f"{tuple(pixels.shape[-2:])}; pad to a larger multiple: "
                    "student.transform.size_divisible"
                )
        return shared

    def rpn(self, features):
        with self._running() as model:
            objectness, deltas = model.rpn.head(list(self._maps.values()))
        return (
            self._named([rows_of_anchors(maps, 1).flatten(1) for maps in objectness]),
            self._named([rows_of_anchors(maps, 4) for maps in deltas]),
        )

    def box_features(self, features) -> torch.Tensor:
        with self._running() as model:
            heads = model.roi_heads
            pooled = self._pooled(heads.box_roi_pool, self._taps.proposal_boxes)
            return heads.box_head(pooled).flatten(1)

    def box_predictions(self, box_features) -> tuple[torch.Tensor, torch.Tensor]:
        with self._running() as model:
            logits, deltas = model.roi_heads.box_predictor(box_features)
        deltas = without_background(deltas, logits.shape[1] - 1)
        own, others = (m.roi_heads.box_coder.weights for m in (self._student, model))
        if tuple(own) != tuple(others):
            scale = deltas.new_tensor(own) / deltas.new_tensor(others)
            deltas = deltas * scale.repeat(deltas.shape[1] // 4)
        return background_last(logits), deltas

    def mask_logits(self, features) -> torch.Tensor:
        with self._running() as model:
            heads = model.roi_heads
            pooled = self._pooled(heads.mask_roi_pool, self._taps.mask_boxes)
            logits = heads.mask_predictor(heads.mask_head(pooled))
        return without_background(logits, self._teacher.anatomy.spec.num_classes)

    def _running(self):
        return self._teacher.running(self._taps.images.tensors.device)

    def _pooled(self, pool: nn.Module, boxes: list[torch.Tensor]) -> torch.Tensor:
        return pool(self._maps, boxes, self._taps.images.image_sizes)

    def _named(self, levels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values of all levels in the teacher's order to a dict of the shared levels."""
        named = dict(zip(self._teacher.anatomy.levels, levels, strict=True))
        return {level: named[level] for level in self._levels}
