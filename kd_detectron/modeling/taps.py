"""Taps: read tensors out of the student's own forward pass, so that no student layer runs twice.

:class:`StudentTaps` puts forward hooks on a Detectron2 detector for the time of one ``with`` block
and records what the detector itself computes: the backbone's feature maps, the anchors, the boxes
given to the box pooler, the box head's output, the box predictor's logits, and the classes that the
ROI heads assigned to the sampled proposals. The hooks are removed when the block ends, also when it
fails. The recorded logits are the very tensor that feeds ``loss_cls``.

The boxes are taken at the pooler, not from the returned proposals: under
``MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES`` Detectron2 replaces the latter by predicted boxes after
the logits were computed.

Legend: N images, R sampled proposals over the whole batch, K foreground classes.
"""

from collections.abc import Callable

import torch
from torch import nn


def box_head_of(model: nn.Module) -> nn.Module | None:
    """The one box head of a detector's ROI heads; None for Cascade, C4 and single-stage models."""
    head = getattr(getattr(model, "roi_heads", None), "box_head", None)
    return None if head is None or isinstance(head, nn.ModuleList) else head


def box_predictor_of(model: nn.Module) -> nn.Module | None:
    """The one box predictor behind :func:`box_head_of`; None where there is no such head."""
    return None if box_head_of(model) is None else model.roi_heads.box_predictor


def anchor_levels_of(model: nn.Module) -> tuple[nn.Module, list[str]] | None:
    """The anchor generator of a detector and the names of the levels it makes anchors for."""
    proposal_generator = getattr(model, "proposal_generator", None)
    if getattr(proposal_generator, "anchor_generator", None) is not None:
        return proposal_generator.anchor_generator, list(proposal_generator.in_features)
    if getattr(model, "anchor_generator", None) is not None:
        return model.anchor_generator, list(model.head_in_features)
    return None


class StudentTaps:
    """Records one forward pass of a Detectron2 detector; use as a context manager.

    Attributes after the pass (None where the detector has no such part):
        features: dict level name -> (N, C, H, W), with graph.
        anchors: dict level name -> (H*W*A, 4), XYXY in input pixels.
        proposal_boxes: list of N ``Boxes``, those that the logits belong to.
        targets: (R,) long, assigned class of each proposal, K for background.
        box_features: (R, D), with graph.
        logits: (R, K+1), with graph; the tensor that feeds ``loss_cls``.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._handles = []
        self.features: dict[str, torch.Tensor] | None = None
        self.anchors: dict[str, torch.Tensor] | None = None
        self.proposal_boxes: list | None = None
        self.targets: torch.Tensor | None = None
        self.box_features: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None

    def __enter__(self) -> "StudentTaps":
        model = self._model
        self._after(model.backbone, self._record_features)
        if (anchor_levels := anchor_levels_of(model)) is not None:
            self._after(anchor_levels[0], self._record_anchors)
        if box_head_of(model) is not None:
            heads = model.roi_heads
            self._handles.append(heads.box_pooler.register_forward_pre_hook(self._record_boxes))
            self._after(heads.box_head, self._record_box_features)
            self._after(heads.box_predictor, self._record_logits)
            self._after(heads, self._record_targets)
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _after(self, module: nn.Module, record: Callable) -> None:
        self._handles.append(module.register_forward_hook(record))

    def _record_features(self, module, args, output) -> None:
        self.features = dict(output)

    def _record_anchors(self, module, args, output) -> None:
        levels = anchor_levels_of(self._model)[1]
        self.anchors = {level: boxes.tensor for level, boxes in zip(levels, output, strict=True)}

    def _record_boxes(self, module, args) -> None:
        self.proposal_boxes = list(args[1])

    def _record_box_features(self, module, args, output) -> None:
        self.box_features = output.flatten(1)

    def _record_logits(self, module, args, output) -> None:
        self.logits = output[0]

    def _record_targets(self, module, args, output) -> None:
        proposals = output[0]
        self.targets = torch.cat([x.gt_classes for x in proposals])
