"""Tensors out of a file that `torch.save` wrote, without running anything that the file says.

Such a file is a zip archive: a pickle of the structure, and one record of bytes per storage. The pickle may
name any function of the machine, and a plain unpickler would call it; `torch.load(weights_only=True)` refuses
the whole file instead, which is what it does with the checkpoints of a training framework (callbacks,
hyper-parameters of classes of their own). Here what has to do with tensors is understood, and everything
else becomes an object that does nothing. Bytes are read for the tensors that are asked for, so that the state
of an optimizer, two thirds of a checkpoint, costs nothing.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Inert:
    """Stands for whatever isn't understood: takes every argument, item and state, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


@dataclass(frozen=True)
class _Storage:
    """A record of the archive: elements of one type, not read yet."""

    key: str
    dtype: torch.dtype


@dataclass(frozen=True)
class _Lazy:
    """A tensor whose bytes are not read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any) -> _Lazy:
    return _Lazy(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        return _KNOWN.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            return _Inert()
        return _Storage(str(key), dtype)


class TorchFile:
    """An open archive of `torch.save`.

    Attributes:
        content: what was saved, its tensors unread: see :meth:`tensors`.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive, but not one that torch.save wrote")
        self._folder = pickles[0].removesuffix("data.pkl")
        if f"{self._folder}byteorder" in names and archive.read(f"{self._folder}byteorder") != b"little":
            raise ValueError("its bytes are in big-endian order")
        self.content = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
        self._last: tuple[str, Tensor] | None = None

    def tensors(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Read the tensors of a dict that `content` holds.

        Raises:
            ValueError: an entry is no tensor, or lies outside its storage. KeyError: a storage is missing.
        """
        return {str(key): self._read(str(key), value) for key, value in state.items()}

    def _read(self, key: str, lazy: Any) -> Tensor:
        if not isinstance(lazy, _Lazy) or not isinstance(lazy.storage, _Storage):
            raise ValueError(f"'{key}' is no tensor")
        storage = self._storage(lazy.storage)
        if len(lazy.size) != len(lazy.stride) or min((lazy.offset, *lazy.size, *lazy.stride)) < 0:
            raise ValueError(f"'{key}' has an impossible shape")
        last = lazy.offset + sum((n - 1) * step for n, step in zip(lazy.size, lazy.stride))
        if math.prod(lazy.size) and last >= len(storage):
            raise ValueError(f"'{key}' lies outside its storage")
        return storage.as_strided(lazy.size, lazy.stride, lazy.offset)

    def _storage(self, storage: _Storage) -> Tensor:
        if self._last is None or self._last[0] != storage.key:  # parts of one are saved one after the other
            data = bytearray(self._archive.read(f"{self._folder}data/{storage.key}"))
            tensor = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            self._last = storage.key, tensor
        return self._last[1].view(storage.dtype)


@contextlib.contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open a file of `torch.save`.

    Raises:
        ValueError: it is none, is cut short or damaged. OSError: it can't be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield TorchFile(archive)
    except (zipfile.BadZipFile, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"it is cut short or damaged: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"it is damaged: {type(error).__name__}: {error}") from error
