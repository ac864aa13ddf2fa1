"""Batch normalisations as part of the convolutions before them, for inference."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution and the normalisation behind it, if that is one."""
    weight = conv.weight.detach()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
    if isinstance(norm, nn.BatchNorm2d):
        gain = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        bias = (bias - norm.running_mean) * gain + norm.bias.detach()
        weight = weight * gain[:, None, None, None]
    return weight, bias


def fold_norms(module: nn.Module) -> nn.Module:
    """The module in evaluation mode without the batch normalisations that follow a convolution.

    A normalisation counts as following the convolution that its parent holds just before it, as in timm's and
    torchvision's networks. Folded convolutions are channels-last, which CPUs are faster at; all other weights
    are shared with the module. Without such a pair it is the module itself.
    """
    if not any(isinstance(child, nn.BatchNorm2d) for child in module.modules()):
        return module
    kept = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    module = copy.deepcopy(module, kept).eval()
    for parent in list(module.modules()):
        children = list(parent.named_children())
        for (_, conv), (name, norm) in zip(children, children[1:]):
            if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            weight, bias = folded(conv, norm)
            weight = weight.contiguous(memory_format=torch.channels_last)
            conv.weight = nn.Parameter(weight, requires_grad=False)
            conv.bias = nn.Parameter(bias, requires_grad=False)
            # timm's normalisations end in an activation.
            rest = [getattr(norm, part, None) for part in ("drop", "act")]
            setattr(parent, name, nn.Sequential(*(part for part in rest if part is not None)))
    return module
