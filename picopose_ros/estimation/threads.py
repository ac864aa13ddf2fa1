"""How many threads PyTorch uses on a CPU: as many as make a small network fastest, which is often one."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import torch

_logger = logging.getLogger(__name__)

_ALL = torch.get_num_threads()
"""As many as PyTorch would use; later on it says what was set."""
_TURNS = 3
_WORTH = 0.95
"""More threads are taken if they need at most this share of the time: others (rendering, solving, the rest of
the machine) want cores as well."""
_LONG = 1.0
"""Seconds of a pass with all threads from which on they are worth it, and other numbers not measured."""


def choose_threads(run: Callable[[], object]) -> None:
    """Let PyTorch use as many threads as make ``run``, a pass through the network, fastest.

    PyTorch takes a thread per processor. Where two of these share a core, or a pass is short, threads wait
    for each other longer than they compute. To be called by the thread that the network is to run on. Does
    nothing where the environment variable OMP_NUM_THREADS has decided.
    """
    if _ALL < 2 or os.environ.get("OMP_NUM_THREADS"):
        return
    seconds = {_ALL: _least(run, _ALL)}
    if seconds[_ALL] > _LONG:
        return
    counts = [2**k for k in range((_ALL - 1).bit_length())]
    seconds |= {count: _least(run, count) for count in counts}
    best = 1
    for count in [*counts[1:], _ALL]:
        if seconds[count] <= _WORTH * seconds[best]:
            best = count
    torch.set_num_threads(best)
    said = ", ".join(f"{1e3 * seconds[n]:.0f} ms with {n}" for n in sorted(seconds))
    _logger.info("the network runs in %d threads: a pass takes %s (OMP_NUM_THREADS fixes it)", best, said)


def _least(run: Callable[[], object], threads: int) -> float:
    """Least time of some turns with so many threads, s; the first one sets things up and doesn't count."""
    torch.set_num_threads(threads)
    run()
    found = float("inf")
    for _ in range(_TURNS):
        started = time.perf_counter()
        run()
        found = min(found, time.perf_counter() - started)
        if found > _LONG:
            break
    return found
