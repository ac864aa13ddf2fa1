"""One thread that does the slow work on the newest item, so that the executor never waits for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class NewestWorker(Generic[Item]):
    """A thread with a mailbox of one: ``setup`` first, then ``handle`` for the newest item each time.

    Set-up runs on the same thread as the work because offscreen renderers and some device contexts belong to
    the thread that made them. Other threads can have something done on it with :meth:`call`; calls and items
    take turns, so neither starves.

    Args:
        setup: run once; what it raises ends the thread and is kept in :attr:`failure`.
        handle: run per item; must deal with its own errors.
        on_crash: called with what ``handle`` raises in spite of that; the thread goes on.
        order: which of two items is the newer one, the larger value; by default the one that came later.
        teardown: run once at the end, if ``setup`` was run.
        name: the thread's name.

    Attributes:
        settled: set once ``setup`` is done, for good or ill.
        ready: set once ``setup`` has succeeded.
        failure: what ``setup`` raised.
    """

    def __init__(
        self,
        setup: Callable[[], None],
        handle: Callable[[Item], None],
        on_crash: Callable[[Exception], None],
        order: Callable[[Item], Any] | None = None,
        teardown: Callable[[], None] | None = None,
        name: str = "picopose_worker",
    ) -> None:
        self._setup = setup
        self._handle = handle
        self._on_crash = on_crash
        self._order = order
        self._teardown = teardown
        self._condition = threading.Condition()
        self._item: Item | None = None
        self._handling = False
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.settled = threading.Event()
        self.ready = threading.Event()
        self.failure: Exception | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def closing(self) -> bool:
        """True once :meth:`close` or :meth:`interrupt` was called; a long set-up looks at this to stop."""
        return self._closing.is_set()

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """True while no item is at work or waits."""
        with self._condition:
            return self._item is None and not self._handling

    def submit(self, item: Item) -> Item | None:
        """Hand over an item; returns the one that will never be handled because of it, if any.

        That is the older of two that wait, which may be ``item`` itself.
        """
        with self._condition:
            waiting = self._item
            if waiting is not None and self._order is not None and self._order(waiting) > self._order(item):
                return item
            self._item = item
            self._condition.notify_all()
        return waiting

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Have ``function`` run on the thread; its future is cancelled if the worker is closed before."""
        future: Future[Result] = Future()
        with self._condition:
            if self.closing:
                future.cancel()
            else:
                self._calls.append((function, future))
                self._condition.notify_all()
        return future

    def drain(self, timeout: float) -> tuple[Item | None, bool]:
        """Drop the item that waits and let the one in hand end; calls are none of this.

        Returns:
            The item that was dropped, and whether no item is at work any more (False: ``timeout`` passed).
        """
        with self._condition:
            dropped, self._item = self._item, None
            idle = self._condition.wait_for(lambda: not self._handling, timeout)
        return dropped, idle

    def interrupt(self) -> None:
        """Ask the thread to end as soon as it can, without waiting for that."""
        with self._condition:
            self._closing.set()
            self._item = None
            for _, future in self._calls:
                future.cancel()
            self._calls.clear()
            self._condition.notify_all()

    def close(self, timeout: float) -> bool:
        """Drop what waits and end after the work in hand; False if that takes over ``timeout`` seconds."""
        self.interrupt()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            try:
                self._setup()
            except Exception as error:  # noqa: BLE001 (the owner decides what it means)
                self.failure = error
                return
            self.ready.set()
            self.settled.set()
            self._work()
        finally:
            if self._teardown is not None:
                self._teardown()
            self.settled.set()

    def _work(self) -> None:
        calls_turn = True
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._item is not None or self._calls or self.closing)
                if self.closing:
                    return
                call = self._calls.popleft() if self._calls and (calls_turn or self._item is None) else None
                item = None
                if call is None:
                    item, self._item = self._item, None
                    self._handling = True
            calls_turn = call is None
            if call is not None:
                self._answer(*call)
            else:
                try:
                    self._handle(item)  # type: ignore[arg-type]
                except Exception as error:  # noqa: BLE001 (the next item may be fine)
                    self._on_crash(error)
                with self._condition:
                    self._handling = False
                    self._condition.notify_all()
            # An idle worker must not keep the last image alive.
            item = call = None

    @staticmethod
    def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 (it belongs to whoever called)
            future.set_exception(error)
