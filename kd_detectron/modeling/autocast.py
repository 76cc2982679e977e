"""A detector under autocast: what Detectron2 leaves to do for half precision."""

from detectron2.modeling.poolers import ROIPooler
from torch import nn

from .fold import channels_last_on_cpu


def prepare_for_autocast(model: nn.Module) -> None:
    """Makes a Detectron2 detector, in place, one that autocast runs precisely and fast."""
    pool_in_float32(model)
    channels_last_on_cpu(model.backbone)


def pool_in_float32(model: nn.Module) -> None:
    """Has all ROI poolers, in place, take half-precision maps as float32.

    Detectron2 rounds the boxes to the type of the maps: in bfloat16 to a multiple of 2 pixels from
    256 on, of 4 from 512 on. Autocast computes the pooling itself in float32 in any case.
    """
    for module in model.modules():
        if isinstance(module, ROIPooler):
            module.register_forward_pre_hook(_maps_in_float32)


def _maps_in_float32(pooler: ROIPooler, args: tuple) -> tuple:
    maps, *others = args
    return [one.float() for one in maps], *others
