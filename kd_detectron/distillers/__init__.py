"""One file per distillation method; importing this package registers them all."""

from .base import (
    CLASS_OUTPUTS,
    DISTILLER_REGISTRY,
    Distiller,
    ModelSpec,
    build_distiller,
    check_classes,
    check_weight,
    find_distiller,
    option_defaults,
)
from .bickd import BicKD
from .boxkd import BoxKD
from .ckd import CKD
from .crd import CRD
from .dcd import DCD
from .dkd import DKD
from .fgfi import FGFI
from .fitnet import FitNet
from .headkd import HeadKD
from .kd import KD
from .maskkd import MaskKD
from .pckd import PCKD
from .pkd import PKD
from .reviewkd import ReviewKD
from .rpnkd import RPNKD
from .step import distillation_losses
from .supcon import SupCon

__all__ = [
    "BicKD",
    "BoxKD",
    "CKD",
    "CLASS_OUTPUTS",
    "CRD",
    "DCD",
    "DISTILLER_REGISTRY",
    "DKD",
    "Distiller",
    "FGFI",
    "FitNet",
    "HeadKD",
    "KD",
    "MaskKD",
    "ModelSpec",
    "PCKD",
    "PKD",
    "RPNKD",
    "ReviewKD",
    "SupCon",
    "build_distiller",
    "check_classes",
    "check_weight",
    "distillation_losses",
    "find_distiller",
    "option_defaults",
]
