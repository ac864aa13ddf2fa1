"""Progress of long work: a bar on a terminal, a line now and then in a log file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_PER_LINE = 10.0
"""How often a line is written where the output is no terminal."""

_CURSOR_UP = "\x1b[A"  # tqdm moves the cursor between bars that are shown at the same time


class _Lines:
    """A text stream for tqdm: what would be drawn over the line before becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.replace(_CURSOR_UP, "").strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    items: Iterable[Any] | None = None,
    total: int | None = None,
    description: str | None = None,
    unit: str = "it",
    initial: int = 0,
    hidden: bool = False,
) -> tqdm:
    """A progress display on stderr, to iterate over or to ``update``; a context manager.

    Args:
        items: what to iterate over, if anything.
        total: number of steps; that of ``items`` by default.
        description: put before the numbers.
        unit: name of one step.
        initial: steps that were done before.
        hidden: show nothing.
    """
    if hidden or sys.stderr.isatty():
        return tqdm(items, total=total, desc=description, unit=unit, initial=initial, disable=hidden)
    return tqdm(
        items,
        total=total,
        desc=description,
        unit=f" {unit}",
        initial=initial,
        file=_Lines(sys.stderr),
        ncols=0,
        mininterval=SECONDS_PER_LINE,
        maxinterval=SECONDS_PER_LINE,
    )
