"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Hand back what network and banks have left behind.

    The C library keeps freed memory for itself, in an arena per thread, so that a node that is cleaned up and
    configured again would grow each time. Does nothing where the C library is not glibc.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass
