"""Knowledge distillation for Detectron2 detectors."""

__version__ = "0.1.0"
