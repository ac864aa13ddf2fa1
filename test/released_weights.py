"""Weights in the released network's form, made up: the fixture's, and full-size ones that cost little."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))
from deterministic_weights import det_array  # noqa: E402

_SMALL = 20_000


def manifest(arch: str) -> dict[str, list[int]]:
    """Key -> shape of every tensor of the released network of that size (`vitl`, `vits`)."""
    return json.loads((DATA / f"state_dict_manifest_{arch}.json").read_text())


@functools.cache
def fixture_state(arch: str, seed: int) -> dict[str, Tensor]:
    """The weights that the parity fixture was made with."""
    return {key: torch.from_numpy(det_array(key, shape, seed)) for key, shape in manifest(arch).items()}


def sparse_state(arch: str) -> dict[str, Tensor]:
    """Weights of the right names and shapes, all different, whose large tensors share few numbers.

    They are views of short vectors in which no two axes have the same stride, so that a file of them is small
    and neither a transposed nor a misplaced tensor is equal.
    """
    state = {}
    for key, shape in manifest(arch).items():
        if int(np.prod(shape)) <= _SMALL:
            state[key] = torch.from_numpy(det_array(key, shape))
            continue
        strides = tuple(range(len(shape), 0, -1))
        length = 1 + sum((n - 1) * step for n, step in zip(shape, strides))
        vector = torch.from_numpy(det_array(f"{key}.sparse.weight", (length, 1)).reshape(-1))
        state[key] = vector.as_strided(shape, strides)
    return state
