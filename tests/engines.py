"""One face for both engines, so that one suite of properties runs over Detectron2 and torchvision.

An engine builds a small distilled Mask R-CNN, runs one training step of it, and says which modules
are the student's and the teacher's. Where Detectron2 is not installed, torchvision is the only one.
"""

import copy
from importlib.util import find_spec

import tiny_torchvision
import torch
from torch import nn

from kd_detectron.distillers import DISTILLER_REGISTRY, Distiller
from kd_detectron.torchvision import DistilledDetector

ALL = sorted(name for name, cls in DISTILLER_REGISTRY if cls.__module__.startswith("kd_detectron."))
SIZES = ((64, 96), (48, 64))
OUTPUTS = ("features", "objectness", "anchor_deltas", "box_features", "logits", "box_deltas",
           "mask_logits")  # fmt: skip


class Recorder(Distiller):
    """Keeps the context of the last step and reads what it is told to read of the teacher."""

    requires = frozenset(
        {"features", "objectness", "box_features", "logits", "box_deltas", "mask_logits", "anchors"}
    )

    def __init__(self, reads=()):
        super().__init__()
        self.reads = reads

    def forward(self, context):
        self.context = context
        for part in self.reads:
            getattr(context.teacher, part)
        return {"loss_recorder": sum(x.sum() for x in context.student.features.values()) * 0}


class Torchvision:
    """Torchvision's Mask R-CNN inside ``DistilledDetector``."""

    # The parts of a two-stage detector in this engine's names.
    parts = {
        "backbone": "backbone",
        "rpn": "rpn.head",
        "box_head": "roi_heads.box_head",
        "box_predictor": "roi_heads.box_predictor",
        "mask_predictor": "roi_heads.mask_predictor",
    }

    def __init__(self, folder):
        self.folder = folder

    def build(self, distillers, *, same_weights: bool = False) -> nn.Module:
        """A model in training mode; ``same_weights``: the teacher is a copy of the student."""
        student = tiny_torchvision.detector("mask", seed=1)
        width = {} if "HeadKD" in distillers else {"box_channels": 20}
        teacher = tiny_torchvision.detector("mask", seed=2, width=12, **width)
        if same_weights:
            teacher = copy.deepcopy(student)
        torch.manual_seed(5)
        return DistilledDetector(student, teacher, distillers).train()

    def plain(self) -> nn.Module:
        """The student alone, with the same weights, in training mode."""
        return tiny_torchvision.detector("mask", seed=1).train()

    def student(self, model: nn.Module) -> nn.Module:
        return model.student

    def batch(self, boxes_per_image=(2, 1), sizes=SIZES):
        return tiny_torchvision.batch(sizes, boxes_per_image)

    def losses(self, model: nn.Module, batch) -> dict[str, torch.Tensor]:
        return model(*batch)

    def inference(self, model: nn.Module, batch) -> list[dict[str, torch.Tensor]]:
        """Boxes and scores of each image."""
        with torch.no_grad():
            return [{key: found[key] for key in ("boxes", "scores")} for found in model(batch[0])]


class Detectron2:
    """Detectron2's Mask R-CNN as ``DistilledRCNN``."""

    parts = {
        "backbone": "backbone",
        "rpn": "proposal_generator.rpn_head",
        "box_head": "roi_heads.box_head",
        "box_predictor": "roi_heads.box_predictor",
        "mask_predictor": "roi_heads.mask_head.predictor",
    }

    def __init__(self, folder):
        from tiny import distilled_cfg

        self.folder = folder
        self._cfg = distilled_cfg(folder, opts=["MODEL.MASK_ON", True])
        # PKD and PCKD compare the maps as they are.
        self._cfg.KD.TEACHER.OPTS = ["MODEL.MASK_ON", True, "MODEL.FPN.OUT_CHANNELS", 32]

    def build(self, distillers, *, same_weights: bool = False) -> nn.Module:
        from detectron2.modeling import GeneralizedRCNN

        from kd_detectron.distillers import build_distiller
        from kd_detectron.modeling import DistilledRCNN, FrozenTeacher
        from kd_detectron.modeling.frozen_teacher import model_spec

        cfg = self._cfg.clone()
        # HeadKD compares box features as they are.
        if "HeadKD" in distillers:
            cfg.KD.TEACHER.OPTS += ["MODEL.ROI_BOX_HEAD.FC_DIM", cfg.MODEL.ROI_BOX_HEAD.FC_DIM]
        torch.manual_seed(2)
        teacher = FrozenTeacher.from_config(cfg)
        student = self._parts_of_student()
        if same_weights:
            plain = copy.deepcopy(GeneralizedRCNN(**student))
            teacher = FrozenTeacher(plain, self._cfg.INPUT.FORMAT)
        torch.manual_seed(5)
        spec = model_spec(DistilledRCNN(**student))
        built = {
            one if isinstance(one, str) else type(one).__name__: build_distiller(
                one, {}, spec, teacher.spec
            )
            if isinstance(one, str)
            else one
            for one in distillers
        }
        return DistilledRCNN(teacher=teacher, distillers=built, **student).train()

    def _parts_of_student(self):
        from detectron2.modeling import GeneralizedRCNN

        torch.manual_seed(1)
        return GeneralizedRCNN.from_config(self._cfg)

    def plain(self) -> nn.Module:
        from detectron2.modeling import GeneralizedRCNN

        return GeneralizedRCNN(**self._parts_of_student()).train()

    def student(self, model: nn.Module) -> nn.Module:
        return model

    def batch(self, boxes_per_image=(2, 1), sizes=SIZES):
        from tiny import tiny_batch

        return tiny_batch(sizes, boxes_per_image)

    def losses(self, model: nn.Module, batch) -> dict[str, torch.Tensor]:
        from detectron2.utils.events import EventStorage

        with EventStorage():
            return model(batch)

    def inference(self, model: nn.Module, batch) -> list[dict[str, torch.Tensor]]:
        with torch.no_grad():
            found = [x["instances"] for x in model(batch)]
        return [{"boxes": x.pred_boxes.tensor, "scores": x.scores} for x in found]


ENGINES = {"torchvision": Torchvision}
if find_spec("detectron2") is not None:
    ENGINES["detectron2"] = Detectron2
