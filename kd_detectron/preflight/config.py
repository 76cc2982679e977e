"""Does the config name parts that exist, and a meta-architecture that distils?"""

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling.distilled_rcnn import DistillationMixin

PARTS = (
    "BACKBONE",
    "ANCHOR_GENERATOR",
    "PROPOSAL_GENERATOR",
    "ROI_HEADS",
    "ROI_BOX_HEAD",
    "ROI_MASK_HEAD",
    "ROI_KEYPOINT_HEAD",
)


def check_meta_architecture(cfg: CfgNode) -> None:
    """Refuses ``KD.DISTILLERS`` and ``INHERIT`` on a detector that reads neither; unknown parts."""
    _check_parts(cfg)
    name = cfg.MODEL.META_ARCHITECTURE
    known = {key: cls for key, cls in META_ARCH_REGISTRY if isinstance(cls, type)}
    if name not in META_ARCH_REGISTRY:
        raise ConfigError(f"MODEL.META_ARCHITECTURE is '{name}'{did_you_mean(name, known)}")
    asked = {"KD.DISTILLERS": cfg.KD.DISTILLERS, "KD.TEACHER.INHERIT": cfg.KD.TEACHER.INHERIT}
    key = next((key for key, names in asked.items() if names and cfg.KD.ENABLED), "")
    if key and name in known and not issubclass(known[name], DistillationMixin):
        distilled = [key for key, cls in known.items() if issubclass(cls, DistillationMixin)]
        raise ConfigError(
            f"{key} is {list(asked[key])} but MODEL.META_ARCHITECTURE is '{name}', "
            f"which distils nothing; set it to one of {', '.join(sorted(distilled))}, or "
            "KD.ENABLED False"
        )


def _check_parts(cfg: CfgNode) -> None:
    """Refuses parts of the detector that are not registered."""
    for part in PARTS:
        name, registry = cfg.MODEL[part].NAME, getattr(modeling, f"{part}_REGISTRY")
        if name and name not in registry and name != "PrecomputedProposals":
            near = did_you_mean(name, [key for key, _ in registry])
            raise ConfigError(f"MODEL.{part}.NAME is '{name}'{near}")
