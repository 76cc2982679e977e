"""One file a distillation method; importing this package registers them all."""

from .base import DISTILLER_REGISTRY, Distiller, ModelSpec, build_distiller

__all__ = ["DISTILLER_REGISTRY", "Distiller", "ModelSpec", "build_distiller"]
