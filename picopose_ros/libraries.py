"""How the libraries of a process are loaded, and how the numerical ones use its processors."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

_FEW = 4
"""Processors up to which a thread of OpenMP that has nothing to do had better sleep."""


def settle_threads() -> None:
    """Let no idle thread of a numerical library keep a processor busy; to be called before NumPy is loaded.

    OpenBLAS, which NumPy and SciPy use, and OpenMP, which PyTorch uses, have threads that wait for the next
    piece of work in a loop. Where there are few processors they take the time of rendering, of decoding and
    of the executor: with two, one followed object took at least 1.7 times as long. NumPy's matrices are small
    here, so one thread is enough for them. The environment variables OPENBLAS_NUM_THREADS and
    OMP_WAIT_POLICY, where they are set, are left as they are.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if (os.cpu_count() or 1) <= _FEW:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import large libraries without Python's garbage collection, and spare it what they made.

    What modules define stays. Looking through it again and again takes a quarter of the time that PyTorch,
    timm and trimesh need to be imported, and in a node that runs, .1 to .2 s whenever all is looked through.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
