"""A frozen model made cheaper to run: BatchNorm folded into convolutions, channels-last weights.

A BatchNorm that no longer learns is a scale and a shift of each channel, and so is part of the
convolution before it: ``weight * scale`` and ``bias * scale + shift``. The teacher gets both once,
after its checkpoint was checked key by key; ``--eval-teacher`` runs the model as it was trained.

Outputs stay within 1e-4 relative of the plain model's (``tests/modeling/test_fold.py``);
``docs/performance_log.md`` says what it saves.
"""

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_batch_norm(model: nn.Module) -> int:
    """Folds, in place, each BatchNorm that is the ``norm`` of one of Detectron2's convolutions.

    The folded layers leave ``state_dict()``: load checkpoints before.

    Args:
        model: in eval mode.

    Returns:
        How many layers were folded.
    """
    folded = 0
    for convolution in model.modules():
        # Not subclasses: they may do something between weight and norm.
        if type(convolution) is not Conv2d or not _has_fixed_statistics(convolution.norm):
            continue
        norm = convolution.norm
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        convolution.weight = weight.requires_grad_(False)
        convolution.bias = bias.requires_grad_(False)
        convolution.norm = None
        folded += 1
    return folded


def _has_fixed_statistics(norm: nn.Module | None) -> bool:
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return not norm.training and norm.running_mean is not None
    return isinstance(norm, FrozenBatchNorm2d)


def channels_last_on_cpu(model: nn.Module) -> None:
    """Stores convolution weights channels-last, in place, on the CPU, where it was measured to pay.

    A convolution follows its weight's format, whatever its input's, so the maps inside the model
    are channels-last too.
    """
    if next(model.parameters()).device.type == "cpu":
        model.to(memory_format=torch.channels_last)
