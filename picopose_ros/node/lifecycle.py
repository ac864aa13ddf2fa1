"""The life cycle of a managed node: transitions that report failures, start by itself, end in order."""

from __future__ import annotations

import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from lifecycle_msgs.msg import State
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup, ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import LifecycleNodeMixin, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.timer import Timer

from picopose_ros.errors import PicoPoseError


class LoadingInterrupted(Exception):
    """The node was asked to stop while it was loading."""


class ManagedNode(LifecycleNodeMixin, Node):
    """A lifecycle node whose transitions raise when they fail, and that tells why.

    A failed *configure* or *activate* is undone and leaves the node where it was; any other failure leaves it
    unconfigured, with everything released. Transitions run on a thread of their own, one at a time, so the
    node needs a multi-threaded executor. Subclasses say what the transitions do (the abstract methods).

    Attributes:
        steady: a clock that runs on while simulated time stands still; for timers.
        stopping: set once the node is told to end.
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        Node.__init__(self, name, **kwargs)
        self.steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.stopping = threading.Event()
        self._failure = ""
        self._autostart: Timer | None = None

    def start_life_cycle(self, autostart: bool) -> None:
        """Offer the transitions; to be called once the parameters are declared and read.

        Args:
            autostart: configure and activate without being told to.
        """
        # A transition may last; meanwhile its progress is asked for.
        LifecycleNodeMixin.__init__(self, callback_group=ReentrantCallbackGroup())
        if autostart:
            group = MutuallyExclusiveCallbackGroup()
            self._autostart = self.create_timer(0.01, self._start, group, clock=self.steady)
        else:
            name = self.get_fully_qualified_name()
            self.get_logger().info(f"autostart is false: waiting for `ros2 lifecycle set {name} configure`")

    @property
    def failure(self) -> str:
        """Why the last transition failed; empty if it did not."""
        return self._failure

    @property
    def state(self) -> str:
        """Label of the life cycle's state."""
        return self._state_machine.current_state[1]

    @abstractmethod
    def configure(self) -> None:
        """Load what the node needs."""

    @abstractmethod
    def activate(self) -> None:
        """Begin to listen; publishers work already."""

    @abstractmethod
    def stop_listening(self) -> None:
        """Listen no more; also undoes an :meth:`activate` that failed halfway."""

    @abstractmethod
    def deactivate(self) -> None:
        """Listen no more and finish what is at work; publishers still work."""

    @abstractmethod
    def release(self) -> None:
        """Let go of all that :meth:`configure` made, from whatever state."""

    @abstractmethod
    def interrupt(self) -> None:
        """Have a transition that is under way end soon."""

    @abstractmethod
    def at_work(self) -> bool:
        """Whether something is still at work after :meth:`release`."""

    def close(self, timeout: float) -> bool:
        """End from whatever state; False if something is still at work after ``timeout`` seconds.

        To be called when the executor spins no more. A transition on one of its threads is interrupted.
        """
        deadline = time.monotonic() + timeout
        self.stopping.set()
        while self.state not in ("unconfigured", "inactive", "active", "finalized"):
            self.interrupt()
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        if self.state != "finalized":
            self.trigger_shutdown()
        while (busy := self.at_work()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return not busy

    # What rclpy calls.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load, make the publishers."""
        return self._transition("configure", state, self.configure, self.release)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to listen and to publish."""

        def activate() -> None:
            self.stop_if_told()
            LifecycleNodeMixin.on_activate(self, state)
            self.activate()

        return self._transition("activate", state, activate, self._undo_activate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Listen and publish no more; what is at work is finished and published before."""

        def deactivate() -> None:
            self.deactivate()
            LifecycleNodeMixin.on_deactivate(self, state)
            self.get_logger().info(f"{self.get_name()} deactivated: it listens and publishes no more")

        return self._transition("deactivate", state, deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of all that was loaded, and of the publishers."""

        def cleanup() -> None:
            LifecycleNodeMixin.on_cleanup(self, state)
            self.release()
            self.get_logger().info(f"{self.get_name()} cleaned up: what it had loaded is gone from memory")

        return self._transition("cleanup", state, cleanup)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Let go of everything, for good."""

        def shutdown() -> None:
            if self._autostart is not None:
                self._autostart.cancel()
            LifecycleNodeMixin.on_shutdown(self, state)
            self.release()

        return self._transition("shutdown", state, shutdown)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """After a transition that went wrong halfway: let go of everything, be unconfigured."""
        self.release()
        return TransitionCallbackReturn.SUCCESS

    def stop_if_told(self) -> None:
        """End a transition if the node is told to end.

        Raises:
            LoadingInterrupted: it is.
        """
        if self.stopping.is_set():
            raise LoadingInterrupted

    def _start(self) -> None:
        self._autostart.cancel()
        if self.stopping.is_set() or self.state != "unconfigured":
            return
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS and not self.stopping.is_set():
            self.trigger_activate()

    def _undo_activate(self) -> None:
        self.stop_listening()
        LifecycleNodeMixin.on_deactivate(self, LifecycleState("inactive", State.PRIMARY_STATE_INACTIVE))

    def _transition(
        self,
        name: str,
        state: LifecycleState,
        action: Callable[[], None],
        undo: Callable[[], None] | None = None,
    ) -> TransitionCallbackReturn:
        """Do what a transition is for; a failure is reported, and leaves the node in the state it was in."""
        try:
            action()
        except LoadingInterrupted:
            self.get_logger().info("stopped while it was loading")
        except Exception as error:  # noqa: BLE001 (rclpy would swallow it)
            expected = isinstance(error, PicoPoseError)
            reason = str(error) if expected else "".join(traceback.format_exception(error))
            self._failure = f"{name} failed: {reason}"
            stays = state.label if undo is not None else "unconfigured"
            self.get_logger().error(
                f"{self._failure}\n{self.get_name()} stays {stays}; once that is mended: "
                f"ros2 lifecycle set {self.get_fully_qualified_name()} {name if undo else 'configure'}"
            )
        else:
            self._failure = ""
            return TransitionCallbackReturn.SUCCESS
        if undo is None:
            return TransitionCallbackReturn.ERROR
        undo()
        return TransitionCallbackReturn.FAILURE
