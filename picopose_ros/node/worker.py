"""One thread that does the slow work on the newest item, so that the executor never waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class NewestWorker(Generic[Item]):
    """A thread with a mailbox of one: ``setup`` first, then ``handle`` for the newest item each time.

    Set-up runs on the same thread as the work because offscreen renderers and some device contexts belong to
    the thread that made them.

    Args:
        setup: run once; what it raises ends the thread and is kept in :attr:`failure`.
        handle: run per item; must deal with its own errors.
        on_crash: called with what ``handle`` raises in spite of that; the thread goes on.
        name: the thread's name.
    """

    def __init__(
        self,
        setup: Callable[[], None],
        handle: Callable[[Item], None],
        on_crash: Callable[[Exception], None],
        name: str = "picopose_worker",
    ) -> None:
        self._setup = setup
        self._handle = handle
        self._on_crash = on_crash
        self._condition = threading.Condition()
        self._item: Item | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.ready = threading.Event()
        self.failure: Exception | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def closing(self) -> bool:
        """True once :meth:`close` was called; a long set-up looks at this to stop early."""
        return self._closing.is_set()

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    def submit(self, item: Item) -> Item | None:
        """Hand over an item; returns the one it replaces, which will never be handled."""
        with self._condition:
            replaced, self._item = self._item, item
            self._condition.notify()
        return replaced

    def close(self, timeout: float) -> bool:
        """Drop what waits and end after the item in hand; False if that takes over ``timeout`` seconds."""
        with self._condition:
            self._closing.set()
            self._item = None
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._setup()
        except Exception as error:  # noqa: BLE001 (the owner decides what it means)
            self.failure = error
            return
        self.ready.set()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._item is not None or self.closing)
                if self.closing:
                    return
                item, self._item = self._item, None
            try:
                self._handle(item)  # type: ignore[arg-type]
            except Exception as error:  # noqa: BLE001 (the next item may be fine)
                self._on_crash(error)
            # An idle worker must not keep the last image alive.
            item = None
