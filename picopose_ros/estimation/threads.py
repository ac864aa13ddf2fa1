"""How many threads PyTorch uses on a CPU: as many as make a small network fastest, which is often one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import torch

_logger = logging.getLogger(__name__)

_TURNS = 3
_WORTH = 0.85
"""More threads are taken if they need at most this share of the time: others (rendering, solving, the rest of
the machine) want cores as well."""
_LONG = 1.0
"""Seconds of a pass that needs no second turn."""


def choose_threads(run: Callable[[], object], most: int | None = None) -> dict[int, float]:
    """Let PyTorch use as many threads as make ``run`` fastest.

    PyTorch takes a thread per processor. Where two of these share a core, or a pass is short, threads wait
    for each other longer than they compute. To be called by the thread that the network is to run on. Does
    nothing where the environment variable OMP_NUM_THREADS has decided.

    Args:
        run: a pass through the network.
        most: threads; None: as many as PyTorch uses now.

    Returns:
        Seconds per pass by number of threads, as far as it was measured.
    """
    most = torch.get_num_threads() if most is None else most
    if most < 2 or os.environ.get("OMP_NUM_THREADS"):
        return {}
    seconds: dict[int, float] = {}
    best, count = 1, 1
    while True:
        torch.set_num_threads(count)
        seconds[count] = _least(run)
        if seconds[count] <= _WORTH * seconds[best]:
            best = count
        if count == most:
            break
        count = min(2 * count, most)
    torch.set_num_threads(best)
    said = ", ".join(f"{1e3 * one:.0f} ms with {n}" for n, one in seconds.items())
    _logger.info(
        "the network runs in %d threads: a pass takes %s; OMP_NUM_THREADS overrides this", best, said
    )
    return seconds


def _least(run: Callable[[], object]) -> float:
    """Least time of some turns, s; the first one sets things up and doesn't count."""
    run()
    found = float("inf")
    for _ in range(_TURNS):
        started = time.perf_counter()
        run()
        found = min(found, time.perf_counter() - started)
        if found > _LONG:
            break
    return found
