"""Training: the trainer, its hooks, and what ``tools/train_net.py`` runs."""

from .trainer import DistillationTrainer

__all__ = ["DistillationTrainer"]
