"""The maths of every method as pure functions of tensors; see ``distillers`` for their use."""

from .bickd import bickd_loss
from .ckd import ckd_loss
from .contrastive import crd_loss, dcd_loss, supcon_loss
from .features import fgfi_loss, fgfi_mask, fitnet_loss, hcl_loss, pckd_loss, pkd_loss
from .heads import box_kd_loss, head_kd_loss, mask_kd_loss, relative_error, rpn_kd_loss
from .logits import dkd_loss, kd_loss

__all__ = [
    "bickd_loss",
    "box_kd_loss",
    "ckd_loss",
    "crd_loss",
    "dcd_loss",
    "dkd_loss",
    "fgfi_loss",
    "fgfi_mask",
    "fitnet_loss",
    "hcl_loss",
    "head_kd_loss",
    "kd_loss",
    "mask_kd_loss",
    "pckd_loss",
    "pkd_loss",
    "relative_error",
    "rpn_kd_loss",
    "supcon_loss",
]
