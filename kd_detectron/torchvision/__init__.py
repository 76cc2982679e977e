"""Knowledge distillation for torchvision's detectors: plain PyTorch and torchvision.

:class:`DistilledDetector` puts a frozen teacher and distillers beside a torchvision detector;
``taps.py`` and ``teacher.py`` are its adapter to the distillation context, ``conventions.py``
translates torchvision's conventions. Training on top of it (Lightning, the command
``tools/train_torchvision.py``) is in ``training.py`` and needs Lightning and torchmetrics.
"""

from .detector import DistilledDetector

__all__ = ["DistilledDetector"]
