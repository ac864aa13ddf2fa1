"""A stand-in for a GPU: CPU tensors that count as the device's, and refuse what a GPU's tensors refuse.

``cpu:0`` plays the device. What is sent there is the device's, and so is what is computed of it; it must not
meet tensors of ``cpu`` nor become a NumPy array before it was brought back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

DEVICE = torch.device("cpu:0")

# PyTorch copies between devices here, and takes the host's indices for a device's tensor.
_MAY_MIX = {Tensor.copy_, Tensor.__getitem__}
_TO_HOST = {Tensor.numpy, Tensor.__array__}


class DeviceStandIn(TorchFunctionMode):
    """Context in which ``cpu:0`` is another device than ``cpu``. Holds for the thread that enters it."""

    def __init__(self) -> None:
        super().__init__()
        self._own: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.taken = 0
        """Tensors that came to be the device's."""

    def take(self, tensors: Iterable[Tensor]) -> None:
        """These are the device's from now on: parameters, whose object stays the same when they move."""
        for tensor in tensors:
            self._own[tensor] = True
            self.taken += 1

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor is the device's."""
        return tensor in self._own

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        own = [tensor for tensor in tensors if self.owns(tensor)]
        if func == Tensor.device.__get__:  # a new object each time
            return DEVICE if own else func(*args, **kwargs)
        target = _target(func, args, kwargs)
        if own and func in _TO_HOST:
            raise TypeError("a tensor of the device can't become a NumPy array: bring it to the host first")
        host = [tensor for tensor in tensors if not self.owns(tensor) and tensor.ndim > 0]
        if own and host and target is None and func not in _MAY_MIX:
            name = getattr(func, "__name__", str(func))
            raise RuntimeError(f"{name}: tensors of the device and of the host, all must be on one device")
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        if target is None:
            if own:
                self.take(tensor for tensor in made if not self.owns(tensor))
        elif target == DEVICE:
            # A tensor that is moved is another one; here `to` may give the same, which stays the host's.
            fresh = [tensor.clone() if any(tensor is t for t in tensors) else tensor for tensor in made]
            self.take(fresh)
            return fresh[0] if isinstance(result, Tensor) else result
        elif isinstance(result, Tensor) and any(result is tensor for tensor in own):
            return result.clone()
        return result


def _target(func: Callable[..., Any], args: tuple, kwargs: dict) -> torch.device | None:
    """The device that a call moves to or makes a tensor on; None where it names none."""
    if func is Tensor.cpu:
        return torch.device("cpu")
    named = kwargs.get("device")
    if func is Tensor.to and named is None:
        named = next((arg for arg in args[1:] if isinstance(arg, (str, torch.device))), None)
    return None if named is None else torch.device(named)
