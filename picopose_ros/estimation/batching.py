"""What keeps the network's passes fast: a cache of template features, compiled functions, batch sizes."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Set
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from picopose_ros.model.fast import Prepared, Refining

_log = logging.getLogger(__name__)

T = TypeVar("T")


class TemplateCache(Generic[T]):
    """Values by (class, template); the least recently used is dropped first when memory is full.

    Attributes:
        bytes: that the values take.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[str, int], tuple[T, int]] = OrderedDict()
        self.bytes = 0

    def get(self, key: tuple[str, int]) -> T | None:
        """The value, which now counts as the most recently used."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: tuple[str, int], value: T, size: int) -> None:
        """Keep a new value of ``size`` bytes, at least until :meth:`trim`."""
        self._entries[key] = value, size
        self.bytes += size

    def only(self, classes: Set[str]) -> TemplateCache[T]:
        """A copy with the entries of these classes alone."""
        other = TemplateCache[T](self._limit)
        for key, (value, size) in self._entries.items():
            if key[0] in classes:
                other.put(key, value, size)
        return other

    def trim(self) -> None:
        """Drop what exceeds the limit."""
        while self.bytes > self._limit:
            _, (_, size) = self._entries.popitem(last=False)
            self.bytes -= size


class Compiled:
    """A function by `torch.compile`, one version per shape; with a warning uncompiled where that fails."""

    def __init__(self, function: Callable[..., Any], backend: str) -> None:
        self._function = function
        self._backend = backend
        self._compiled: Callable[..., Any] | None = torch.compile(function, backend=backend, dynamic=False)

    def __call__(self, *args: Any) -> Any:
        if self._compiled is not None:
            try:
                # Copies: a backend that replays graphs overwrites its results at the next call.
                return _copied(self._compiled(*args))
            except torch._dynamo.exc.TorchDynamoException as error:
                self._compiled = None
                reason = str(error).strip().splitlines()[0]
                _log.warning(
                    "the network can't be compiled by '%s' (%s): it runs uncompiled; a CPU needs a C++ "
                    "compiler (g++), CUDA needs Triton",
                    self._backend,
                    reason,
                )
        return self._function(*args)


def _copied(result: Prepared | Refining | tuple[Tensor, ...]) -> Any:
    if isinstance(result, tuple):
        return tuple(tensor.clone() for tensor in result)
    return result.each(torch.clone)


def compiled_sizes(most: int) -> list[int]:
    """Batch sizes that are compiled for: powers of two, and the largest."""
    return [*(2**k for k in range(most.bit_length()) if 2**k < most), most]


def filled(count: int, most: int) -> list[int]:
    """Rows of a batch of ``count``, the last one repeated up to the next size that is compiled for."""
    size = next(size for size in compiled_sizes(most) if size >= count)
    return [*range(count), *[count - 1] * (size - count)]
