"""Taps: read tensors out of the student's own forward pass, so that no student layer runs twice.

Inside a ``with`` block, :class:`StudentTaps` has hooks on a torchvision detector and records what
the detector computes. Two functions are wrapped as well: ``select_training_samples``, which assigns
the classes, and the RPN's sampler of anchors. Hooks and wrappers are removed when the block ends,
also after an error.

Legend: N images, R sampled proposals over the whole batch, F foreground ones among them, K
foreground classes. Everything here is as torchvision has it, background first.
"""

from collections.abc import Callable

import torch
from torch import nn

from .anatomy import Anatomy, anchor_generator_of, features_of


class StudentTaps:
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
        self._model = model
        self._anatomy = anatomy
        self._undo: list[Callable[[], None]] = []
        self.images = self.targets = None
        self.features: dict[str, torch.Tensor] = {}
        self.anchors: torch.Tensor | None = None
        self.objectness = self.anchor_deltas = self.sampled_anchors = None
        self.proposal_boxes = self.labels = self.box_targets = None
        self.box_features = self.logits = self.box_deltas = None
        self.mask_boxes = self.mask_logits = None

    def __enter__(self) -> "StudentTaps":
        model, keep = self._model, vars(self).update
        self._after(model.transform, lambda out: keep(images=out[0], targets=out[1]))
        self._after(model.backbone, lambda out: keep(features=features_of(out)))
        # The anchors of the first image, which are those of every image of the batch.
        self._after(anchor_generator_of(model), lambda out: keep(anchors=out[0]))
        if self._anatomy.has_boxes:
            heads = model.roi_heads
            self._after(model.rpn.head, lambda out: keep(objectness=out[0], anchor_deltas=out[1]))
            self._wrap(model.rpn, "fg_bg_sampler", lambda out: keep(sampled_anchors=out))
            self._wrap(
                heads,
                "select_training_samples",
                lambda out: keep(labels=out[2], box_targets=out[3]),
            )
            self._before(heads.box_roi_pool, lambda maps, boxes, _: keep(proposal_boxes=boxes))
            self._after(heads.box_head, lambda out: keep(box_features=out.flatten(1)))
            self._after(heads.box_predictor, lambda out: keep(logits=out[0], box_deltas=out[1]))
            if self._anatomy.has_masks:
                self._before(heads.mask_roi_pool, lambda maps, boxes, _: keep(mask_boxes=boxes))
                self._after(heads.mask_predictor, lambda out: keep(mask_logits=out))
        return self

    def __exit__(self, *exception) -> None:
        while self._undo:
            self._undo.pop()()

    def _after(self, module: nn.Module, record: Callable) -> None:
        hook = module.register_forward_hook(lambda module, args, output: record(output))
        self._undo.append(hook.remove)

    def _before(self, module: nn.Module, record: Callable) -> None:
        hook = module.register_forward_pre_hook(lambda module, args: record(*args))
        self._undo.append(hook.remove)

    def _wrap(self, owner: nn.Module, name: str, record: Callable) -> None:
        original, own = getattr(owner, name), name in vars(owner)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            record(result)
            return result

        setattr(owner, name, wrapped)
        undo = (lambda: setattr(owner, name, original)) if own else (lambda: delattr(owner, name))
        self._undo.append(undo)
