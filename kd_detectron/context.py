"""The distillation context: what both models computed in one training step.

A :class:`DistillationContext` is handed to each distiller. It knows no engine: its parts are plain
tensors, filled by an adapter (``modeling/`` for Detectron2, ``torchvision/`` for torchvision).
Student tensors carry the graph. Teacher tensors are lazy: a part of the teacher runs only if a
distiller reads what it computes, at most once per step, without gradient.

Legend: N images, R sampled proposals over the whole batch, F foreground ones among them, K
foreground classes (logits have the background in their last column), C feature channels, D
box-feature channels, M mask pixels per side, A anchors per location. Boxes are XYXY, input pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch


@dataclass
class StudentOutputs:
    """What the student computed, with graph; None for what it lacks or no distiller requires.

    Attributes:
        features: level name -> (N, C, H, W).
        objectness: level name -> (N, H*W*A) logits, location-major, as ``anchors``.
        anchor_deltas: level name -> (N, H*W*A, 4), in the same order.
        box_features: (R, D), the box head's output.
        logits: (R, K+1), the tensor that feeds the classification loss.
        box_deltas: (R, 4) or (R, 4K).
        mask_logits: (F, 1, M, M) or (F, K, M, M), of the foreground proposals.
    """

    features: Mapping[str, torch.Tensor]
    objectness: Mapping[str, torch.Tensor] | None = None
    anchor_deltas: Mapping[str, torch.Tensor] | None = None
    box_features: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    box_deltas: torch.Tensor | None = None
    mask_logits: torch.Tensor | None = None


class TeacherStep(Protocol):
    """The teacher on one step's images and the student's proposals; an engine's adapter has these.

    Each method runs one part, without gradient; shapes as in :class:`StudentOutputs`.
    """

    def features(self) -> Mapping[str, torch.Tensor]:
        """Runs the backbone."""

    def rpn(self, features) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        """Runs the RPN's head: objectness and anchor deltas by level."""

    def box_features(self, features) -> torch.Tensor:
        """Runs pooler and box head on the student's R proposals."""

    def box_predictions(self, box_features) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the box predictor: logits and box deltas."""

    def mask_logits(self, features) -> torch.Tensor:
        """Runs the mask head on the student's F foreground proposals."""


class TeacherOutputs:
    """What the teacher computes when a distiller reads it; shapes as in :class:`StudentOutputs`."""

    def __init__(self, step: TeacherStep):
        self._step = step

    @cached_property
    def features(self) -> Mapping[str, torch.Tensor]:
        return self._step.features()

    @cached_property
    def _rpn(self) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        return self._step.rpn(self.features)

    @property
    def objectness(self) -> Mapping[str, torch.Tensor]:
        return self._rpn[0]

    @property
    def anchor_deltas(self) -> Mapping[str, torch.Tensor]:
        return self._rpn[1]

    @cached_property
    def box_features(self) -> torch.Tensor:
        return self._step.box_features(self.features)

    @cached_property
    def _box_predictions(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._step.box_predictions(self.box_features)

    @property
    def logits(self) -> torch.Tensor:
        return self._box_predictions[0]

    @property
    def box_deltas(self) -> torch.Tensor:
        return self._box_predictions[1]

    @cached_property
    def mask_logits(self) -> torch.Tensor:
        return self._step.mask_logits(self.features)


@dataclass
class DistillationContext:
    """One training step; None for what the detector does not have or no distiller requires.

    Attributes:
        student: what the student computed.
        teacher: what the teacher computes when it is read.
        num_classes: K; None for a detector without ROI heads.
        image_sizes: N pairs (height, width) before padding.
        gt_boxes: N tensors (G_i, 4).
        anchors: level name -> (H*W*A, 4), location-major.
        anchor_labels: level name -> (N, H*W*A), 1 for anchors sampled as positive by the student's
            RPN loss, 0 for those sampled as negative, -1 for the others.
        proposal_boxes: N tensors (R_i, 4), those that the logits belong to.
        targets: (R,) long, the class assigned to each proposal, K for background.
        box_targets: (R, 4), deltas from each proposal to its ground-truth box in the student's box
            coding; only rows of foreground proposals mean something.
        mask_classes: (F,) long, the class of each foreground proposal of ``mask_logits``.
    """

    student: StudentOutputs
    teacher: TeacherOutputs
    num_classes: int | None
    image_sizes: list[tuple[int, int]]
    gt_boxes: list[torch.Tensor]
    anchors: Mapping[str, torch.Tensor] | None = None
    anchor_labels: Mapping[str, torch.Tensor] | None = None
    proposal_boxes: list[torch.Tensor] | None = None
    targets: torch.Tensor | None = None
    box_targets: torch.Tensor | None = None
    mask_classes: torch.Tensor | None = None
