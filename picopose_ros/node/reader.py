"""The thread that receives the stream; rclpy's multi-threaded executor takes several times as long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.context import Context
from rclpy.exceptions import InvalidHandle
from rclpy.guard_condition import GuardCondition
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.subscription import Subscription

_SECOND = 1_000_000_000
_PAUSE = 0.1


class NotForExecutors(CallbackGroup):
    """Keeps subscriptions away from the node's executor."""

    def can_execute(self, entity: Any) -> bool:
        """Never."""
        return False

    def beginning_execution(self, entity: Any) -> bool:
        """Never."""
        return False

    def ending_execution(self, entity: Any) -> None:
        """Nothing that was begun."""


class StreamReader:
    """Waits for the messages of some subscriptions and calls them back, one after the other.

    Args:
        context: of the node.
        subscriptions: gives those to wait for; asked anew before every wait, on the thread. They are in a
            group :class:`NotForExecutors`, and their callbacks take the message and its `MessageInfo`.
        on_crash: called with any error; the thread goes on.
    """

    def __init__(
        self,
        context: Context,
        subscriptions: Callable[[], Sequence[Subscription]],
        on_crash: Callable[[Exception], None],
    ) -> None:
        self._context = context
        self._subscriptions = subscriptions
        self._on_crash = on_crash
        self._stopping = threading.Event()
        self._waker = GuardCondition(None, None, context)
        self._thread = threading.Thread(target=self._run, name="picopose_reader", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """The subscriptions have changed: wait for others."""
        self._waker.trigger()

    def stop(self) -> None:
        """End, after the callback in hand; not to be called from one."""
        self._stopping.set()
        self._waker.trigger()
        if self._thread.ident is not None:
            self._thread.join()
        self._waker.destroy()

    def _run(self) -> None:
        while not self._stopping.is_set() and self._context.ok():
            try:
                for subscription in self._wait():
                    self._take(subscription)
            except InvalidHandle:
                continue  # the context is being shut down
            except Exception as error:  # noqa: BLE001 (a node without this thread would be deaf)
                self._on_crash(error)
                self._stopping.wait(_PAUSE)

    def _wait(self) -> list[Subscription]:
        """The subscriptions that have something; perhaps none."""
        with ExitStack() as in_use:  # what is destroyed meanwhile lives until the wait is over
            there = []
            for subscription in self._subscriptions():
                try:
                    in_use.enter_context(subscription.handle)
                except InvalidHandle:
                    continue
                there.append(subscription)
            in_use.enter_context(self._context.handle)
            in_use.enter_context(self._waker.handle)
            waiting = rclpy_implementation.WaitSet(len(there), 1, 0, 0, 0, 0, self._context.handle)
            in_use.enter_context(waiting)
            waiting.clear_entities()
            for subscription in there:
                waiting.add_subscription(subscription.handle)
            waiting.add_guard_condition(self._waker.handle)
            waiting.wait(_SECOND)
            ready = waiting.get_ready_entities("subscription")
            return [subscription for subscription in there if subscription.handle.pointer in ready]

    @staticmethod
    def _take(subscription: Subscription) -> None:
        try:
            with subscription.handle:
                taken = subscription.handle.take_message(subscription.msg_type, subscription.raw)
        except InvalidHandle:
            return  # it was closed since
        if taken is not None:  # the middleware tells of a publisher that left, and of broken bytes, like this
            subscription.callback(*taken)
