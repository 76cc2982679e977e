"""Does the config name parts that exist, and a meta-architecture that distils?"""

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, StandardROIHeads

from kd_detectron.errors import ConfigError, did_you_mean
from kd_detectron.modeling.distilled_rcnn import DistillationMixin


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
    """Refuses parts of the detector that are not registered, and heads that it needs and lacks."""
    heads = cfg.MODEL.ROI_HEADS.NAME
    standard = ROI_HEADS_REGISTRY.get(heads) if heads in ROI_HEADS_REGISTRY else None
    needed = isinstance(standard, type) and issubclass(standard, StandardROIHeads)
    for node, used in (
        ("BACKBONE", True),
        ("ANCHOR_GENERATOR", True),
        ("PROPOSAL_GENERATOR", False),
        ("ROI_HEADS", False),
        ("ROI_BOX_HEAD", needed),
        ("ROI_MASK_HEAD", needed and cfg.MODEL.MASK_ON),
        ("ROI_KEYPOINT_HEAD", needed and cfg.MODEL.KEYPOINT_ON),
    ):
        registry = getattr(modeling, f"{node}_REGISTRY")
        name, known = cfg.MODEL[node].NAME, [key for key, _ in registry]
        if name in registry or name == "PrecomputedProposals" or not (name or used):
            continue
        what = f"is '{name}'" if name else "is empty, and the detector needs one"
        raise ConfigError(f"MODEL.{node}.NAME {what}{did_you_mean(name, known)}")
