"""Taps on a Detectron2 student: what it computed in one step, without running any layer again.

:class:`StudentTaps` is a context manager around the student's forward pass. Only what the
distillers require is recorded. The recorded logits are the very tensor that feeds ``loss_cls``.

The boxes are taken at the pooler, not from the returned proposals: under
``MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES`` Detectron2 replaces the latter by predicted boxes after
the logits were computed. Masks are of the boxes that the mask head was given.

Legend: N images, R sampled proposals over the whole batch, F foreground ones among them, K
foreground classes, A anchors per location.
"""

from collections.abc import Iterable, Sequence

import torch
from detectron2.structures import Boxes
from torch import nn

from kd_detectron.context import StudentOutputs
from kd_detectron.taps import Taps


def box_head_of(model: nn.Module) -> nn.Module | None:
    """The one box head of a detector's ROI heads; None for Cascade, C4 and single-stage models."""
    head = getattr(getattr(model, "roi_heads", None), "box_head", None)
    return None if head is None or isinstance(head, nn.ModuleList) else head


def mask_head_of(model: nn.Module) -> nn.Module | None:
    """The mask head of a detector, if its logits come from one last layer; else None.

    None too for PointRend, whose logits belong to points, and where the mask head has no pooler.
    """
    heads = getattr(model, "roi_heads", None)
    head = getattr(heads, "mask_head", None)
    has_parts = hasattr(head, "predictor") and hasattr(head, "layers")
    return head if has_parts and getattr(heads, "mask_pooler", None) is not None else None


def rpn_of(model: nn.Module) -> nn.Module | None:
    """The RPN of a detector; None for single-stage models and precomputed proposals."""
    proposal_generator = getattr(model, "proposal_generator", None)
    return proposal_generator if hasattr(proposal_generator, "rpn_head") else None


def anchor_levels_of(model: nn.Module) -> tuple[nn.Module, list[str]] | None:
    """The anchor generator of a detector and the names of the levels it makes anchors for."""
    proposal_generator = getattr(model, "proposal_generator", None)
    if getattr(proposal_generator, "anchor_generator", None) is not None:
        return proposal_generator.anchor_generator, list(proposal_generator.in_features)
    if getattr(model, "anchor_generator", None) is not None:
        return model.anchor_generator, list(model.head_in_features)
    return None


def rpn_outputs_by_level(
    rpn: nn.Module, outputs: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What an RPN's head returns, by level name and in the order of the anchors.

    Args:
        rpn: Detectron2's RPN.
        outputs: of each level (N, A, H, W) objectness and (N, A*4, H, W) deltas.

    Returns:
        Objectness (N, H*W*A) and deltas (N, H*W*A, 4) by level.
    """
    objectness = [x.permute(0, 2, 3, 1).flatten(1) for x in outputs[0]]
    box_dim = rpn.anchor_generator.box_dim
    deltas = [x.permute(0, 2, 3, 1).reshape(len(x), -1, box_dim) for x in outputs[1]]
    levels = rpn.in_features
    return dict(zip(levels, objectness, strict=True)), dict(zip(levels, deltas, strict=True))


class StudentTaps(Taps):
    """Records one forward pass of a Detectron2 detector; use as a context manager.

    Args:
        model: the student.
        requires: what to record, the union of the distillers' ``requires``; features and
            proposal boxes, which cost nothing, always are.

    Attributes after the pass, as in ``DistillationContext``; None where not recorded:
        outputs: the student's tensors, with graph.
        anchors, anchor_labels: by level name.
        proposal_boxes: list of N ``Boxes``, those that the logits belong to.
        targets, box_targets: of the R proposals.
        mask_boxes: list of N ``Boxes``, those that the mask logits belong to.
        mask_classes: of the F foreground proposals.
    """

    def __init__(self, model: nn.Module, requires: Iterable[str]):
        super().__init__()
        self._model = model
        self._requires = frozenset(requires)
        self.outputs = StudentOutputs(features={})
        self.anchors: dict[str, torch.Tensor] | None = None
        self.anchor_labels: dict[str, torch.Tensor] | None = None
        self.proposal_boxes: list[Boxes] | None = None
        self.targets: torch.Tensor | None = None
        self.box_targets: torch.Tensor | None = None
        self.mask_boxes: list[Boxes] | None = None
        self.mask_classes: torch.Tensor | None = None

    def __enter__(self) -> "StudentTaps":
        model, requires = self._model, self._requires
        self.after(model.backbone, self._record_features)
        if "anchors" in requires and anchor_levels_of(model) is not None:
            self.after(anchor_levels_of(model)[0], self._record_anchors)
        if "objectness" in requires:
            self.after(rpn_of(model).rpn_head, self._record_rpn)
            # These labels are in no module's output.
            self.wrap(rpn_of(model), "label_and_sample_anchors", self._record_anchor_labels)
        if box_head_of(model) is not None:
            self.before(model.roi_heads.box_pooler, self._record_boxes)
        if requires & {"box_features", "logits", "box_deltas"} and box_head_of(model) is not None:
            heads = model.roi_heads
            self.after(heads.box_head, self._record_box_features)
            self.after(heads.box_predictor, self._record_box_predictions)
            self.after(heads, self._record_targets)
        if "mask_logits" in requires:
            head = mask_head_of(model)
            self.before(head, self._record_mask_proposals)
            self.after(head.predictor, self._record_mask_logits)
        return self

    def _record_features(self, output) -> None:
        self.outputs.features = dict(output)

    def _record_anchors(self, output) -> None:
        levels = anchor_levels_of(self._model)[1]
        self.anchors = {level: boxes.tensor for level, boxes in zip(levels, output, strict=True)}

    def _record_rpn(self, output) -> None:
        by_level = rpn_outputs_by_level(rpn_of(self._model), output)
        self.outputs.objectness, self.outputs.anchor_deltas = by_level

    def _record_anchor_labels(self, result) -> None:
        # One tensor per image, the levels one after the other.
        anchors = {level: x.shape[1] for level, x in self.outputs.objectness.items()}
        labels = torch.stack(result[0]).split(list(anchors.values()), dim=1)
        self.anchor_labels = dict(zip(anchors, labels, strict=True))

    def _record_boxes(self, features, boxes) -> None:
        self.proposal_boxes = list(boxes)

    def _record_box_features(self, output) -> None:
        self.outputs.box_features = output.flatten(1)

    def _record_box_predictions(self, output) -> None:
        self.outputs.logits, self.outputs.box_deltas = output

    def _record_targets(self, output) -> None:
        proposals = output[0]
        self.targets = torch.cat([x.gt_classes for x in proposals])
        if "box_deltas" in self._requires:
            self.box_targets = self._box_targets(proposals)

    def _box_targets(self, proposals) -> torch.Tensor:
        heads = self._model.roi_heads
        boxes = torch.cat([x.tensor for x in self.proposal_boxes])
        # Images without objects have proposals without ground truth, all of them background.
        gt_boxes = [
            (x.gt_boxes if x.has("gt_boxes") else own).tensor
            for x, own in zip(proposals, self.proposal_boxes, strict=True)
        ]
        deltas = torch.zeros_like(boxes)
        foreground = self.targets < heads.num_classes
        deltas[foreground] = heads.box_predictor.box2box_transform.get_deltas(
            boxes[foreground], torch.cat(gt_boxes)[foreground]
        )
        return deltas

    def _record_mask_proposals(self, features, proposals) -> None:
        self.mask_boxes = [x.proposal_boxes for x in proposals]
        self.mask_classes = torch.cat([x.gt_classes for x in proposals])

    def _record_mask_logits(self, output) -> None:
        self.outputs.mask_logits = output
