"""The distillation context: what both models computed in one training step.

A :class:`DistillationContext` is born in ``DistilledRCNN.forward`` after the student's own forward
pass and is handed to each distiller. Student tensors come from the taps and carry the graph.
Teacher tensors are lazy: its backbone runs only if a distiller reads ``teacher.features``,
``teacher.box_features`` or ``teacher.logits``, its box head, on the student's sampled proposals,
only for the last two; each runs at most once a step, without gradient.

Legend: N images, R sampled proposals over the whole batch, K foreground classes, C feature
channels, D box-feature channels.
"""

from functools import cached_property

import torch

from kd_detectron.modeling.frozen_teacher import FrozenTeacher
from kd_detectron.modeling.taps import StudentTaps


class StudentOutputs:
    """What the student computed: ``features``, ``box_features`` and ``logits``, with graph."""

    def __init__(self, taps: StudentTaps):
        self.features: dict[str, torch.Tensor] = taps.features
        self.box_features: torch.Tensor | None = taps.box_features
        self.logits: torch.Tensor | None = taps.logits


class TeacherOutputs:
    """What the teacher computes when it is asked, once a step, without gradient."""

    def __init__(self, teacher: FrozenTeacher, batched_inputs, student_format: str, boxes):
        self._teacher = teacher
        self._batched_inputs = batched_inputs
        self._student_format = student_format
        self._boxes = boxes

    @cached_property
    def features(self) -> dict[str, torch.Tensor]:
        """Feature maps by level name, (N, C, H, W)."""
        return self._teacher.features(self._batched_inputs, self._student_format)

    @cached_property
    def box_features(self) -> torch.Tensor:
        """Box-head output (R, D) on the student's sampled proposals."""
        return self._teacher.box_features(self.features, self._boxes)

    @cached_property
    def logits(self) -> torch.Tensor:
        """Class logits (R, K+1) on the student's sampled proposals."""
        return self._teacher.logits(self.box_features)


class DistillationContext:
    """One training step, seen by the distillers.

    Attributes:
        student: :class:`StudentOutputs`.
        teacher: :class:`TeacherOutputs`.
        targets: (R,) long, the class assigned to each sampled proposal, K for background.
        num_classes: K; None for a detector without ROI heads.
        proposal_boxes: list of N tensors (R_i, 4), XYXY in input pixels.
        gt_boxes: list of N tensors (G_i, 4), XYXY in input pixels.
        anchors: dict level name -> (H*W*A, 4), XYXY in input pixels, location-major.
        image_sizes: list of N (height, width) before padding.
    """

    def __init__(
        self,
        taps: StudentTaps,
        teacher: FrozenTeacher,
        batched_inputs: list[dict],
        *,
        student_format: str,
        num_classes: int | None,
    ):
        self.student = StudentOutputs(taps)
        self.teacher = TeacherOutputs(teacher, batched_inputs, student_format, taps.proposal_boxes)
        self.targets = taps.targets
        self.num_classes = num_classes
        self.anchors = taps.anchors
        self.proposal_boxes = (
            None if taps.proposal_boxes is None else [boxes.tensor for boxes in taps.proposal_boxes]
        )
        self._batched_inputs = batched_inputs

    @cached_property
    def gt_boxes(self) -> list[torch.Tensor]:
        device = next(iter(self.student.features.values())).device
        return [x["instances"].gt_boxes.tensor.to(device) for x in self._batched_inputs]

    @cached_property
    def image_sizes(self) -> list[tuple[int, int]]:
        return [tuple(x["image"].shape[-2:]) for x in self._batched_inputs]
