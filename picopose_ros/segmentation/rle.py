"""Masks as COCO run lengths.

The mask is read column by column and the counts alternate between runs of zeros and runs of ones, starting
with zeros (a count of 0 when the first pixel is set).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from picopose_ros.errors import SegmentError


def rle_encode(mask: np.ndarray) -> list[int]:
    """Mask (H, W) -> COCO run lengths (column-major, zeros first)."""
    flat = np.asarray(mask, bool).ravel(order="F")
    if flat.size == 0:
        return []
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def rle_decode(counts: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
    """COCO run lengths -> mask (height, width) bool.

    Raises:
        SegmentError: a count is negative or no integer, or the counts don't add up to height * width.
    """
    runs = np.asarray(counts)
    if runs.size == 0:
        runs = runs.astype(np.int64)
    if runs.ndim != 1 or not np.issubdtype(runs.dtype, np.integer) or (runs.size and int(runs.min()) < 0):
        raise SegmentError("the run lengths of a mask must be non-negative whole numbers")
    runs = runs.astype(np.int64)
    total = int(runs.sum())
    if height <= 0 or width <= 0 or total != height * width:
        raise SegmentError(
            f"the run lengths add up to {total} pixels, but a mask of {width}x{height} has {height * width}: "
            "they belong to another image size or were cut"
        )
    values = np.arange(runs.size) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(height, width, order="F"))


def rle_decode_compressed(counts: str | bytes, height: int, width: int) -> np.ndarray:
    """COCO's compressed run-length string -> mask (height, width) bool.

    The string holds 5 bits per character from the low end, bit 5 saying that more follow; from the third
    count on each is the difference to the count two before it.

    Raises:
        SegmentError: as :func:`rle_decode`, and when the string is cut or holds other characters.
    """
    data = counts.encode("ascii", "replace") if isinstance(counts, str) else bytes(counts)
    runs: list[int] = []
    position = 0
    while position < len(data):
        value, shift, more = 0, 0, True
        while more:
            if position == len(data) or not 48 <= data[position] < 112:
                raise SegmentError(f"the compressed run lengths of a mask are broken at character {position}")
            code = data[position] - 48
            position += 1
            value |= (code & 0x1F) << shift
            shift += 5
            more = bool(code & 0x20)
            if not more and code & 0x10:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return rle_decode(runs, height, width)


def mask_from_entry(entry: Mapping[str, Any], where: str) -> np.ndarray:
    """The mask (H, W) bool of a JSON entry with ``size`` and ``counts``, plain or compressed.

    Raises:
        SegmentError: one of them is missing or broken; the message starts with ``where``.
    """
    try:
        height, width = (int(side) for side in entry["size"])
        counts = entry["counts"]
    except (KeyError, TypeError, ValueError) as error:
        raise SegmentError(f"{where}: needs 'size' [height, width] and 'counts' (run lengths)") from error
    try:
        if isinstance(counts, str | bytes):
            return rle_decode_compressed(counts, height, width)
        return rle_decode(counts, height, width)
    except (SegmentError, ValueError, TypeError) as error:
        raise SegmentError(f"{where}: {error}") from error
