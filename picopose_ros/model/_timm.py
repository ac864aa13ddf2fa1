"""The one place that imports timm."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch


def _import_timm() -> ModuleType:
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
    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    return importlib.import_module("timm")


# Operators stay declared only as long as the library object lives.
_operators = torch.library.Library("torchvision", "FRAGMENT")
timm = _import_timm()
