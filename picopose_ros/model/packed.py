"""Convolutions on a CPU with their weights laid out once and the activation in the same pass (oneDNN).

PyTorch's own convolution lays its weights out with every call, casts them with every call where products are
computed in half precision, and reads and writes the map once more for the activation. The functions used here
are those that PyTorch's compiler calls; the results are the same.
"""

from __future__ import annotations

import platform
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "relu", "relu6"]

_ATTRIBUTES: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}


def can_pack(weight: Tensor) -> bool:
    """Whether convolutions with a weight can be computed so on this machine."""
    return (
        weight.device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    )


class PackedConv(nn.Module):
    """A convolution and its activation, for inference; where oneDNN can't, PyTorch's own functions."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        groups: int = 1,
        activation: Activation = "none",
        packed: bool = True,
    ) -> None:
        """Keep weight (O, C / groups, k, k) and bias (O,); ``packed``: lay them out, where possible."""
        super().__init__()
        self._weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self._bias = None if bias is None else bias.detach()
        self._stride, self._padding, self._groups = list(stride), list(padding), groups
        self._activation = activation
        self._made: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}
        self._types: set[torch.dtype] = set()
        if packed and can_pack(weight):
            self._types.add(torch.float32)
            if torch.ops.mkldnn._is_mkldnn_bf16_supported():
                self._types.add(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H', W')."""
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if kind not in self._types or torch.compiler.is_compiling() or x.requires_grad or x.numel() == 0:
            return self._plain(x)
        weight, bias = self._made.get(kind) or self._make(kind, x)
        how = self._padding, self._stride, [1, 1], self._groups, *_ATTRIBUTES[self._activation], ""
        return torch.ops.mkldnn._convolution_pointwise(x.to(kind), weight, bias, *how)

    def _make(self, kind: torch.dtype, x: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = torch.ops.mkldnn._reorder_convolution_weight(
            self._weight.to(kind), self._padding, self._stride, [1, 1], self._groups, list(x.shape)
        )
        self._made[kind] = weight, None if self._bias is None else self._bias.to(kind)
        return self._made[kind]

    def _plain(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self._weight, self._bias, self._stride, self._padding, 1, self._groups)
        if self._activation == "none":
            return x
        return F.relu_(x) if self._activation == "relu" else F.relu6(x, inplace=True)
