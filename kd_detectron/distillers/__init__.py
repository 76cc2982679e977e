"""One file a distillation method; importing this package registers them all."""

from .base import DISTILLER_REGISTRY, Distiller, ModelSpec, build_distiller
from .dkd import DKD
from .fgfi import FGFI
from .fitnet import FitNet
from .kd import KD
from .reviewkd import ReviewKD

__all__ = [
    "DISTILLER_REGISTRY",
    "DKD",
    "Distiller",
    "FGFI",
    "FitNet",
    "KD",
    "ModelSpec",
    "ReviewKD",
    "build_distiller",
]
