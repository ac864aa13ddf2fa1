"""Memory that was freed goes back to the system.

The C library keeps freed memory for itself, in pieces that later requests often don't fit into: a node that
follows for ten minutes grew by 11 % though nothing was kept. Giving it back takes some 20 ms, and the next
image some 80 ms longer.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

_SETTLES = 10.0
"""Seconds after memory was given back, until the process has again what its work needs."""
_LEAST_INTERVAL = 30.0
"""Seconds between two times at least."""
_GROWTH = 0.02
"""Share of the settled size by which the process may grow."""


def trim() -> None:
    """Give back freed memory; does nothing where the C library is not glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass


def give_back() -> None:
    """Hand back what network and banks have left behind.

    A node that is cleaned up and configured again would grow each time.
    """
    gc.collect()
    trim()


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Growth:
    """Gives freed memory back when the process has grown.

    Args:
        size: bytes that are resident. give: called when it is time.
    """

    def __init__(self, size: Callable[[], int] = resident, give: Callable[[], None] = trim) -> None:
        self._size, self._give = size, give
        self._given: float | None = None
        self._settled = 0

    def look(self, now: float) -> bool:
        """To be called about once a second; whether memory was given back.

        Args:
            now: monotonic s.
        """
        if self._given is None:
            self._given = now
        since = now - self._given
        if since < _SETTLES:
            return False
        size = self._size()
        if not self._settled:
            self._settled = size
        if since < _LEAST_INTERVAL or size <= (1 + _GROWTH) * self._settled:
            return False
        self._give()
        self._given, self._settled = now, 0
        return True
