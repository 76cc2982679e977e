"""DistilledRCNN: Detectron2's ``GeneralizedRCNN`` with a frozen teacher and a list of distillers.

One training step, all of it in :meth:`DistillationMixin.forward`:

1. the student's own forward pass, once, with taps on it;
2. a context of what both models computed, the teacher's part lazily;
3. each distiller's losses, times its weight, merged into the detector's losses.

In eval mode it *is* the student. With no distillers it is ``GeneralizedRCNN``, bit for bit
(``test_empty_distillers_is_generalized_rcnn``), and no teacher is built.

Legend: N images, R sampled proposals over the whole batch, K foreground classes.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from torch import nn

from kd_detectron.context import DistillationContext, TeacherOutputs
from kd_detectron.distillers import Distiller, distillation_losses
from kd_detectron.errors import ConfigError

from .build import build_distillation, check_weights
from .frozen_teacher import FrozenTeacher, FrozenTeacherStep
from .taps import StudentTaps

logger = logging.getLogger(__name__)

_UNDECLARED = frozenset({"features", "anchors", "box_features", "logits"})


class DistillationMixin:
    """Adds a teacher and distillers to a Detectron2 detector; put it before the detector class.

    Attributes:
        teacher: the :class:`FrozenTeacher`, or None. A plain object, so never in ``state_dict()``.
        distillers: ``nn.ModuleDict`` by name; parameters under ``distillers.`` in ``state_dict()``.
        distillation_weights: loss weight by distiller name.
        requires: all outputs that the distillers read; nothing else is recorded or computed.
        distillation_factor: what the schedule multiplies all weights by; at 0 the teacher does not
            run.
        inherited: names of the student's tensors that started from the teacher's.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher: FrozenTeacher | None = None,
        distillers: Mapping[str, Distiller] | Sequence[Distiller] = (),
        distillation_weights: dict[str, float] | None = None,
        inherited: Iterable[str] = (),
        **student,
    ):
        """
        Args:
            teacher: the frozen teacher; None with no distillers.
            distillers: distillers by name, or a list of them, each called as its class.
            distillation_weights: loss weight by distiller name, its ``default_weight`` where
                absent.
            inherited: names of the student's tensors that were copied from the teacher.
            student: the arguments of the detector class.
        """
        super().__init__(**student)
        if not isinstance(distillers, Mapping):
            listed = list(distillers)
            distillers = {type(distiller).__name__: distiller for distiller in listed}
            if len(distillers) < len(listed):
                raise ConfigError(
                    f"distillers has two of one class among {[type(x).__name__ for x in listed]}; "
                    "give each a name of its own, in a mapping of distillers by name"
                )
        if distillers and teacher is None:
            raise ConfigError("distillers are given but no teacher; name one in KD.TEACHER")
        if distillers and self.input_format not in ("BGR", "RGB"):
            raise ConfigError(
                f"INPUT.FORMAT of the student is {self.input_format}, from which the teacher's "
                "images cannot be made; set it to 'BGR' or 'RGB'"
            )
        self.teacher = teacher
        self.distillers = nn.ModuleDict(distillers)
        self.distillation_weights = check_weights(distillation_weights or {}, distillers)
        self.distillation_factor = 1.0
        self.inherited = frozenset(inherited)
        # A distiller that declares nothing may read what costs nothing to record.
        self.requires = frozenset().union(
            *(distiller.requires or _UNDECLARED for distiller in distillers.values())
        )
        if teacher is not None:
            teacher.drop_unused_heads(self.requires)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        student = super().from_config(cfg)
        return student | build_distillation(cfg, student)

    def forward(self, batched_inputs: list[dict]):
        if not self.training or not self.distillers:
            return super().forward(batched_inputs)

        # To the GPU once, for student and teacher.
        batched_inputs = [x | {"image": x["image"].to(self.device)} for x in batched_inputs]
        requires = self.requires if self.distillation_factor else frozenset()
        with StudentTaps(self, requires) as taps:
            losses = super().forward(batched_inputs)
        # The teacher runs where a distiller reads what it computes.
        return losses | self.distillation_losses(self._context(taps, batched_inputs), losses)

    def _context(self, taps: StudentTaps, batched_inputs: list[dict]) -> DistillationContext:
        teacher = FrozenTeacherStep(self.teacher, batched_inputs, self.input_format, taps)
        boxes = taps.proposal_boxes
        return DistillationContext(
            student=taps.outputs,
            teacher=TeacherOutputs(teacher),
            num_classes=getattr(getattr(self, "roi_heads", self), "num_classes", None),
            image_sizes=[tuple(x["image"].shape[-2:]) for x in batched_inputs],
            gt_boxes=[x["instances"].gt_boxes.tensor.to(self.device) for x in batched_inputs],
            anchors=taps.anchors,
            anchor_labels=taps.anchor_labels,
            proposal_boxes=boxes and [x.tensor for x in boxes],
            targets=taps.targets,
            box_targets=taps.box_targets,
            mask_classes=taps.mask_classes,
        )

    def distillation_losses(
        self, context: DistillationContext, detector_losses: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Each distiller's losses times its weight and the schedule's factor."""
        weights, factor = self.distillation_weights, self.distillation_factor
        return distillation_losses(self.distillers, weights, factor, context, detector_losses)


@META_ARCH_REGISTRY.register()
class DistilledRCNN(DistillationMixin, GeneralizedRCNN):
    """``GeneralizedRCNN`` as a distilled student: Faster, Mask, Keypoint and Cascade R-CNN."""
