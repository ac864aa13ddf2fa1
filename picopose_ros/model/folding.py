"""Batch normalisations as part of the convolutions before them, for inference."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from picopose_ros.model._timm import timm
from picopose_ros.model.packed import Activation, PackedConv, can_pack


def folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution and the normalisation behind it, if that is one."""
    weight = conv.weight.detach()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach()
    if isinstance(norm, nn.BatchNorm2d):
        gain = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        bias = (bias - norm.running_mean) * gain + norm.bias.detach()
        weight = weight * gain[:, None, None, None]
    return weight, bias


def fold_norms(module: nn.Module, packed: bool = False) -> nn.Module:
    """The module in evaluation mode without the batch normalisations that follow a convolution.

    A normalisation counts as following the convolution that its parent holds just before it, as in timm's and
    torchvision's networks. Folded convolutions are channels-last, which CPUs are faster at; all other weights
    are shared with the module. Without such a pair it is the module itself.

    Args:
        packed: make them `PackedConv` with the activation, where that is possible.
    """
    if not any(isinstance(child, nn.BatchNorm2d) for child in module.modules()):
        return module
    kept = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    module = copy.deepcopy(module, kept).eval()
    for parent in list(module.modules()):
        children = list(parent.named_children())
        for (first, conv), (name, norm) in zip(children, children[1:]):
            if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                continue
            weight, bias = folded(conv, norm)
            activation = _activation(norm)
            if packed and can_pack(weight) and activation is not None and conv.dilation == (1, 1):
                setattr(parent, first, _packed(conv, weight, bias, activation))
                setattr(parent, name, nn.Identity())
                continue
            weight = weight.contiguous(memory_format=torch.channels_last)
            conv.weight = nn.Parameter(weight, requires_grad=False)
            conv.bias = nn.Parameter(bias, requires_grad=False)
            # timm's normalisations end in an activation.
            rest = [getattr(norm, part, None) for part in ("drop", "act")]
            setattr(parent, name, nn.Sequential(*(part for part in rest if part is not None)))
    return module


def _activation(norm: nn.Module) -> Activation | None:
    """What timm's normalisation ends in; None: something that isn't known here."""
    act = getattr(norm, "act", None)
    if act is None or isinstance(act, nn.Identity):
        return "none"
    return {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(act))


def _packed(conv: nn.Conv2d, weight: Tensor, bias: Tensor, activation: Activation) -> nn.Module:
    same = isinstance(conv, timm.layers.Conv2dSame)
    padding = (0, 0) if same else conv.padding
    made = PackedConv(weight, bias, conv.stride, padding, conv.groups, activation)
    return nn.Sequential(_PadSame(conv.kernel_size, conv.stride), made) if same else made


class _PadSame(nn.Module):
    """TensorFlow's padding, as of timm's `Conv2dSame`."""

    def __init__(self, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self._kernel, self._stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return timm.layers.pad_same(x, self._kernel, self._stride)
