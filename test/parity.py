"""Reading of the parity fixture: inputs and intermediates of the released network on a synthetic scene.

The environment variable PICOPOSE_PARITY_FIXTURE names another file of the same kind.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from released_weights import fixture_state

from picopose_ros.model import PicoPose, convert_released, preset
from picopose_ros.model.checkpoint import _fit

DEFAULT_FIXTURE = Path(__file__).parent / "data" / "parity_vits_small.npz"


class Parity:
    """One parity fixture. Tensors are read when asked for.

    Attributes:
        path: the file.
        meta: what produced it (``versions.arch``, ``versions.seed``, ``versions.hyp``) and the table of its
            tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = np.load(path)
        self.meta: dict[str, Any] = json.loads(str(self._file["meta"]))

    @property
    def hypotheses(self) -> int:
        """Number of hypotheses per detection."""
        return int(self.meta["versions"]["hyp"])

    @property
    def detections(self) -> int:
        """Number of detections of the scene."""
        return len(self.tensor("raw/query_mask"))

    def __contains__(self, name: str) -> bool:
        return name in self._file.files

    @functools.lru_cache(maxsize=64)  # noqa: B019 - one fixture lives as long as the process
    def tensor(self, name: str) -> np.ndarray:
        """The stored tensor, sub-sampled where :meth:`stride` says so."""
        return self._file[name]

    def stride(self, name: str) -> tuple[int, int] | None:
        """(axis, step) of a tensor of which only every step-th slice is stored, else None."""
        entry = self.meta["tensors"][name]
        if "stored_stride" not in entry:
            return None
        return int(entry["stored_axis"]), int(entry["stored_stride"])

    def assert_matches(self, name: str, full: Any, rtol: float) -> None:
        """Compare a computed tensor with the stored one.

        Args:
            name: the stored tensor.
            full: what was computed, in full (numpy or torch).
            rtol: allowed difference, relative to the largest magnitude in the stored tensor.
        """
        full = np.asarray(full.detach().cpu() if hasattr(full, "detach") else full)
        shape = tuple(self.meta["tensors"][name]["shape"])
        assert full.shape == shape, f"{name}: shape {full.shape}, the released network has {shape}"
        stored = self.tensor(name)
        scale = np.abs(stored.astype(np.float64)).max()
        if stride := self.stride(name):
            axis, step = stride
            entry = self.meta["tensors"][name]
            for statistic, value in (("mean", full.mean()), ("std", full.std())):
                off = abs(float(value) - entry[statistic])
                assert off <= rtol * scale, f"{name}: {statistic} of the full tensor is off by {off:.3g}"
            full = np.take(full, np.arange(0, full.shape[axis], step), axis)
        difference = np.abs(full.astype(np.float64) - stored.astype(np.float64)).max()
        assert difference <= rtol * scale, f"{name}: off by {difference:.3g}, allowed {rtol:g} of {scale:.3g}"


@functools.cache
def load_parity() -> Parity:
    """The fixture named by PICOPOSE_PARITY_FIXTURE, or the one beside the tests."""
    return Parity(Path(os.environ.get("PICOPOSE_PARITY_FIXTURE", DEFAULT_FIXTURE)))


def assert_matches(name: str, full_tensor: Any, rtol: float) -> None:
    """:meth:`Parity.assert_matches` on the fixture of this run."""
    load_parity().assert_matches(name, full_tensor, rtol)


@functools.cache
def parity_model() -> PicoPose:
    """The network of the fixture of this run, filled with the weights that produced it."""
    versions = load_parity().meta["versions"]
    network = PicoPose(preset(versions["arch"]))
    _fit(network, convert_released(fixture_state(versions["arch"], versions["seed"])), Path("fixture"))
    return network.eval()
