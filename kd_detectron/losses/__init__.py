"""The maths of every method as pure functions of tensors; see ``distillers`` for their use."""

from .features import fgfi_loss, fgfi_mask, fitnet_loss, hcl_loss
from .logits import dkd_loss, kd_loss

__all__ = [
    "dkd_loss",
    "fgfi_loss",
    "fgfi_mask",
    "fitnet_loss",
    "hcl_loss",
    "kd_loss",
]
