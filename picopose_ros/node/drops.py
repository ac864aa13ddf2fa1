"""What was not published and why: counted by reason, and logged without flooding."""

from __future__ import annotations

import functools
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from picopose_ros.messages.reasons import DropReason, Problem


@dataclass(frozen=True)
class DropCount:
    """What is known of one reason: how often it happened, the last message, how long ago (s)."""

    count: int
    last_message: str
    age: float


@dataclass
class _Entry:
    count: int = 0
    unlogged: int = 0
    last_message: str = ""
    last_time: float = 0.0
    last_logged: float | None = None


class DropLog:
    """Counts drops by reason; logs the first at once, later ones at most every ``interval`` seconds.

    Thread-safe: the executor and the worker both record.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._interval = interval
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[DropReason, _Entry] = {}

    def record(self, reason: DropReason, message: str) -> None:
        """Count one drop; ``message`` says what, where and what to do about it."""
        now = self._clock()
        with self._lock:
            entry = self._entries.setdefault(reason, _Entry())
            entry.count += 1
            entry.last_message = message
            entry.last_time = now
            due = entry.last_logged is None or now - entry.last_logged >= self._interval
            earlier = entry.unlogged
            if due:
                entry.last_logged = now
                entry.unlogged = 0
            else:
                entry.unlogged += 1
        if due:
            more = f" ({earlier} more like it since the last line)" if earlier else ""
            self._log(f"[{reason.value}] {message}{more}")

    def report(self, *problems: Problem) -> None:
        """Count problems."""
        for problem in problems:
            self.record(problem.reason, problem.message)

    def record_crash(self, error: Exception) -> None:
        """Count an error that nobody expected."""
        trace = "".join(traceback.format_exception(error))
        self.record(DropReason.INTERNAL_ERROR, f"unexpected error, please report it: {trace}")

    def guard(self, callback: Callable[..., None]) -> Callable[..., None]:
        """``callback``, with whatever it raises recorded instead of ending the node."""

        @functools.wraps(callback)
        def guarded(*args: Any) -> None:
            try:
                callback(*args)
            except Exception as error:  # noqa: BLE001 (one bad message must not end the node)
                self.record_crash(error)

        return guarded

    def snapshot(self) -> dict[DropReason, DropCount]:
        """The counters now, in the order of :class:`DropReason`; reasons that never happened are absent."""
        now = self._clock()
        with self._lock:
            return {
                reason: DropCount(entry.count, entry.last_message, now - entry.last_time)
                for reason in DropReason
                if (entry := self._entries.get(reason)) is not None
            }

    def total(self) -> int:
        """How many drops there were of any reason."""
        with self._lock:
            return sum(entry.count for entry in self._entries.values())
