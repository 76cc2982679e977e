"""Pictures while training: every ``VIS_PERIOD`` iterations into the event storage (TensorBoard).

The pictures of ``tools/visualize.py`` for the student as it stands, on the same test images
throughout: detections of ground truth, teacher and student side by side, and the student's feature
difference to the teacher by FPN level. They come beside Detectron2's own pictures of
``VIS_PERIOD``, the proposals and masks of the training batch.

Training is not affected: every module's mode and all random states are restored. The whole teacher
(the one beside the student has no RPN) is loaded before the first step, run once on the images, and
dropped again, since its outputs do not change. Only the main process draws.
"""

import contextlib
import logging
import random
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from kd_detectron.errors import ConfigError
from kd_detectron.visualize.features import compare_features, draw_feature_differences
from kd_detectron.visualize.figures import figure_pixels
from kd_detectron.visualize.models import (
    CachedOutputs,
    LoadedModel,
    check_classes,
    choose_records,
    dataset_records,
    load_configured_teacher,
    match_test_size,
)
from kd_detectron.visualize.predictions import draw_predictions

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions"
FEATURES = "feature difference to the teacher"
_IMAGES = 3


class TrainingPictures(HookBase):
    """Puts the pictures into the storage every ``cfg.VIS_PERIOD`` iterations.

    Args:
        cfg: the run's config; the images are three of its first ``DATASETS.TEST``, or of
            ``DATASETS.TRAIN`` where it has none: those that ``tools/visualize.py --count 3`` draws.
        model: the student, not wrapped.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module):
        self._cfg = cfg
        self._student = LoadedModel("student", model, cfg)

    def before_train(self) -> None:
        name = (*self._cfg.DATASETS.TEST, *self._cfg.DATASETS.TRAIN)[0]
        records, self._class_names = dataset_records(self._cfg, name)
        self._records = choose_records(records, _IMAGES) or records[:_IMAGES]
        self._teacher_outputs = self._shown_models = None
        with eval_without_side_effects(self._student.model):
            check_classes(self._student, self._class_names)
            self._shown_models = [self._student]
            if getattr(self._student.model, "teacher", None) is not None:
                self._ask_teacher()

    def _ask_teacher(self) -> None:
        teacher = load_configured_teacher(self._cfg)
        match_test_size(teacher, self._cfg)
        outputs = CachedOutputs.of(teacher, self._records)
        try:
            check_classes(teacher, self._class_names)
            self._shown_models = [outputs, self._student]
        except ConfigError as error:
            logger.warning("VIS_PERIOD: the teacher's detections are not drawn: %s", error)
        try:
            compare_features(self._student, outputs, self._records[:1])
            self._teacher_outputs = outputs
        except ConfigError as error:
            logger.warning("VIS_PERIOD: no feature difference is drawn: %s", error)

    def after_step(self) -> None:
        # The iterations at which Detectron2 shows its own.
        if self.trainer.iter % self._cfg.VIS_PERIOD == 0:
            with eval_without_side_effects(self._student.model):
                self._draw()

    def _draw(self) -> None:
        figures = {
            PREDICTIONS: draw_predictions(self._shown_models, self._records, self._class_names)
        }
        if self._teacher_outputs is not None:
            figures[FEATURES] = draw_feature_differences(
                self._teacher_outputs, [self._student], self._records
            )
        for name, figure in figures.items():
            self.trainer.storage.put_image(name, figure_pixels(figure).transpose(2, 0, 1))


@contextlib.contextmanager
def eval_without_side_effects(model: nn.Module) -> Iterator[None]:
    """Puts a model in training into eval mode; afterwards modes and random states are as before."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield model.eval()
        finally:
            # From the top down, and by train(), which some modules override.
            for module, mode in modes.items():
                if module.training != mode:
                    module.train(mode)
            random.setstate(states[0])
            np.random.set_state(states[1])
