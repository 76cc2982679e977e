"""The maths of every method as pure functions of tensors; see ``distillers`` for their use."""

from .logits import dkd_loss, kd_loss

__all__ = ["dkd_loss", "kd_loss"]
