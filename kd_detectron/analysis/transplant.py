"""How much of the teacher is in a student's features, and how much is lost in front of its heads.

ReviewKD compares the teacher's features with what its fusion makes of the student's. The fusion is
dropped on export, so a student may have learnt the teacher's features and detect no better for it.
:class:`TeacherHeadsOnFusedFeatures` puts the *teacher's* RPN and heads on the fused maps: its AP,
against the student's own, says where the knowledge is.
"""

import torch
from torch import nn

from kd_detectron.errors import ConfigError


class TeacherHeadsOnFusedFeatures(nn.Module):
    """A detector of the student's backbone, ReviewKD's fusion, and the teacher's RPN and heads.

    Args:
        student: a distilled student with ``ReviewKD`` among its distillers.
        teacher: the whole teacher, a ``GeneralizedRCNN``.

    Raises:
        ConfigError: the student has no ReviewKD.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__()
        if "ReviewKD" not in getattr(student, "distillers", {}):
            raise ConfigError(
                "KD.DISTILLERS of this run has no ReviewKD, so there are no fused features; name a "
                "run distilled by ReviewKD"
            )
        self.student = student.eval()
        self.teacher = teacher.eval()

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detects as Detectron2's models do: a dict with "instances" for each image."""
        images = self.student.preprocess_image(batched_inputs)
        features = self.student.backbone(images.tensor)
        fused = self.student.distillers["ReviewKD"].fuse(list(features.values()))
        features = dict(zip(features, fused, strict=True))
        proposals, _ = self.teacher.proposal_generator(images, features)
        instances, _ = self.teacher.roi_heads(images, features, proposals)
        return self.teacher._postprocess(instances, batched_inputs, images.image_sizes)
