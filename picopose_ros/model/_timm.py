"""The one place that imports timm."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def _import_timm() -> ModuleType:
    try:
        with _compiler_later():
            return _import_with_operators()
    except (ImportError, AttributeError):  # other versions, which want more of the compiler
        _forget("torchvision", "timm")
        return _import_with_operators()


def _import_with_operators() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        # A CPU-only torch beside PyPI's CUDA-linked torchvision: its C++ operators are missing, so
        # registering their fake implementations fails at import. None of them is used here; declaring
        # the operators is enough.
        if "torchvision::" not in str(error):
            raise
    for name in ("nms", "qnms"):
        _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _forget("torchvision", "timm")
    return importlib.import_module("timm")


@contextlib.contextmanager
def _compiler_later() -> Iterator[None]:
    """torchvision, which timm imports, and timm take a function each of torch's compiler, whose import takes
    longer than everything else here: it is imported when these functions are called."""
    if _COMPILER[0] in sys.modules:
        yield
        return
    package, utils = standins = [ModuleType(name) for name in _COMPILER]
    package.__path__ = []
    package.disable, utils.is_compile_supported = _disable, _is_compile_supported
    sys.modules.update(zip(_COMPILER, standins))
    try:
        yield
    finally:
        for name, standin in zip(_COMPILER, standins):
            if sys.modules.get(name) is standin:
                del sys.modules[name]
        if vars(torch).get("_dynamo") is package:
            del torch._dynamo


def _disable(function: Any = None, *args: Any, **options: Any) -> Any:
    """As the compiler's decorator, which leaves a function out of what is compiled."""
    if function is None:
        return functools.partial(_disable, **options)

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        compiler = importlib.import_module(_COMPILER[0])
        return compiler.disable(function, *args, **options)(*given, **named)

    return call


def _is_compile_supported(device_type: Any) -> Any:
    return importlib.import_module(_COMPILER[1]).is_compile_supported(device_type)


def _forget(*packages: str) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] in packages]:
        del sys.modules[name]


# Operators stay declared only as long as the library object lives.
_operators = torch.library.Library("torchvision", "FRAGMENT")
timm = _import_timm()
