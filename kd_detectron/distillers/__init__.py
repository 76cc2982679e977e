"""One file per distillation method; importing this package registers them all."""

from .base import (
    DISTILLER_REGISTRY,
    Distiller,
    ModelSpec,
    build_distiller,
    find_distiller,
    option_defaults,
)
from .bickd import BicKD
from .ckd import CKD
from .crd import CRD
from .dcd import DCD
from .dkd import DKD
from .fgfi import FGFI
from .fitnet import FitNet
from .kd import KD
from .reviewkd import ReviewKD
from .supcon import SupCon

__all__ = [
    "BicKD",
    "CKD",
    "CRD",
    "DCD",
    "DISTILLER_REGISTRY",
    "DKD",
    "Distiller",
    "FGFI",
    "FitNet",
    "KD",
    "ModelSpec",
    "ReviewKD",
    "SupCon",
    "build_distiller",
    "find_distiller",
    "option_defaults",
]
