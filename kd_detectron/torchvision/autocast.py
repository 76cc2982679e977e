"""A torchvision detector under autocast: what torchvision leaves to do for half precision."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .anatomy import anchor_generator_of


@contextlib.contextmanager
def boxes_in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes anchors, proposals and targets in float32, also under autocast.

    Torchvision makes the anchors in the type of the maps and rounds proposals and ground truth to
    that of the predicted deltas: in bfloat16 to a multiple of 2 pixels from 256 on, of 4 from 512
    on.

    Args:
        model: a torchvision Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS.
    """
    head = model.rpn.head if hasattr(model, "rpn") else model.head
    hooks = [
        anchor_generator_of(model).register_forward_pre_hook(_shapes_in_float32),
        head.register_forward_hook(_output_in_float32),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shapes_in_float32(generator: nn.Module, args: tuple) -> tuple:
    """For the maps, of which the generator reads shape, type and device, float32 stand-ins."""
    images, maps = args
    return images, [one.new_empty((), dtype=torch.float32).expand(one.shape) for one in maps]


def _output_in_float32(head: nn.Module, args: tuple, output):
    return tree_map_only(torch.Tensor, torch.Tensor.float, output)
