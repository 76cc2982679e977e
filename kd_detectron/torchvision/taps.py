"""Taps: read tensors out of the student's own forward pass, so that no student layer runs twice.

Two functions are wrapped as well: ``select_training_samples``, which assigns the classes, and the
RPN's sampler of anchors.

Legend: N images, R sampled proposals over the whole batch, F foreground ones among them, K
foreground classes. Everything here is as torchvision has it, background first.
"""

import torch
from torch import nn

from kd_detectron.taps import Taps

from .anatomy import Anatomy, anchor_generator_of, features_of


class StudentTaps(Taps):
    """Records one training pass of a torchvision detector; use as a context manager.

    Attributes after the pass (None where the detector has no such part):
        images: the transformed batch, an ``ImageList``: normalised, resized, padded.
        targets: the ground truth after the same transform, one dict per image.
        features: the backbone's maps in its order, with graph.
        anchors: (anchors of all levels, 4).
        objectness, anchor_deltas: the RPN head's maps of each level, with graph.
        sampled_anchors: positive and negative masks over all anchors of each image.
        proposal_boxes: N tensors (R_i, 4), those that the logits belong to.
        labels, box_targets: N tensors (R_i,) and (R_i, 4).
        box_features, logits, box_deltas: of the R proposals, with graph.
        mask_boxes: N tensors (F_i, 4); mask_logits: of the F foreground proposals, with graph.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy):
        super().__init__()
        self._model = model
        self._anatomy = anatomy
        self.images = self.targets = None
        self.features: dict[str, torch.Tensor] = {}
        self.anchors: torch.Tensor | None = None
        self.objectness = self.anchor_deltas = self.sampled_anchors = None
        self.proposal_boxes = self.labels = self.box_targets = None
        self.box_features = self.logits = self.box_deltas = None
        self.mask_boxes = self.mask_logits = None

    def __enter__(self) -> "StudentTaps":
        model, keep = self._model, vars(self).update
        self.after(model.transform, lambda out: keep(images=out[0], targets=out[1]))
        self.after(model.backbone, lambda out: keep(features=features_of(out)))
        # The anchors of the first image, which are those of every image of the batch.
        self.after(anchor_generator_of(model), lambda out: keep(anchors=out[0]))
        if self._anatomy.has_boxes:
            heads = model.roi_heads
            self.after(model.rpn.head, lambda out: keep(objectness=out[0], anchor_deltas=out[1]))
            self.wrap(model.rpn, "fg_bg_sampler", lambda out: keep(sampled_anchors=out))
            self.wrap(
                heads,
                "select_training_samples",
                lambda out: keep(labels=out[2], box_targets=out[3]),
            )
            self.before(heads.box_roi_pool, lambda maps, boxes, _: keep(proposal_boxes=boxes))
            self.after(heads.box_head, lambda out: keep(box_features=out.flatten(1)))
            self.after(heads.box_predictor, lambda out: keep(logits=out[0], box_deltas=out[1]))
            if self._anatomy.has_masks:
                self.before(heads.mask_roi_pool, lambda maps, boxes, _: keep(mask_boxes=boxes))
                self.after(heads.mask_predictor, lambda out: keep(mask_logits=out))
        return self
