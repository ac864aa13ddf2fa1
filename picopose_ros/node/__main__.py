"""The executables: ``python -m picopose_ros.node [NODE ...] --ros-args -p mesh_dir:=...``.

``NODE`` is ``picopose_node``, which is meant where none is named, or ``segmenter_node``; two run in one
process.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING

from picopose_ros.libraries import importing, settle_threads

if TYPE_CHECKING:
    from picopose_ros.node.lifecycle import ManagedNode

STOP_SECONDS = 15.0
"""How long a transition and the worker may take to finish what they have in hand."""

THREADS = 9
"""For the topics, a transition, the questions about it, services, what TF brings, and two goals of
find_object."""


class StopRequest:
    """Remembers that SIGINT or SIGTERM came. A second one changes nothing, so it can't break the clean-up."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Take over both signals."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True


NODES = {
    "picopose_node": "picopose_ros.node.node:PicoPoseNode",
    "segmenter_node": "picopose_ros.node.segmenter:SegmenterNode",
}
"""The nodes of this package by name: module and class."""


def main(args: Sequence[str] | None = None, names: Sequence[str] = ("picopose_node",)) -> int:
    """Run nodes until the process is told to stop.

    Args:
        args: command line without the program's name; None takes the process's own.
        names: of the nodes, see `NODES`.

    Returns:
        0 after SIGINT or SIGTERM, 1 if there is a parameter that the node can't have.
    """
    stop = StopRequest()
    stop.install()
    settle_threads()
    # Broken images are told once, by this package; OpenCV would tell of every one.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    # Below, because these take seconds and a signal that comes meanwhile should be a clean stop too.
    with importing():
        import rclpy
        from rclpy.exceptions import InvalidHandle
        from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor
        from rclpy.logging import get_logger
        from rclpy.signals import SignalHandlerOptions

    from picopose_ros.errors import PicoPoseError

    try:
        rclpy.init(
            args=None if args is None else [names[0], *args],
            signal_handler_options=SignalHandlerOptions.NO,
        )
    except Exception as error:  # noqa: BLE001 (rcl's own types; e.g. no such parameter file)
        print(f"{names[0]}: the command line can't be used: {error}", file=sys.stderr)
        return 1
    try:
        nodes = [_make(name) for name in names]
    except PicoPoseError as error:
        get_logger(names[0]).fatal(str(error))
        rclpy.shutdown()
        return 1

    executor = MultiThreadedExecutor(THREADS * len(nodes))
    for node in nodes:
        executor.add_node(node)
    while rclpy.ok() and not stop.requested:
        try:
            executor.spin_once(timeout_sec=0.2)
        except ExternalShutdownException:
            break
        except InvalidHandle:
            pass  # of a topic that a transition closed while something came in on it
        except Exception as error:  # noqa: BLE001 (of rclpy's own callbacks; ours don't raise)
            nodes[0].get_logger().error("".join(traceback.format_exception(error)))
    finished = [node.close(STOP_SECONDS) for node in nodes]
    if not all(finished):
        # The worker is deep in native code; tearing the interpreter down under it would crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    executor.shutdown()
    for node in nodes:
        node.destroy_node()
    rclpy.try_shutdown()
    return 0


def _make(name: str) -> ManagedNode:
    module, _, kind = NODES[name].partition(":")
    with importing():
        loaded = importlib.import_module(module)
    return getattr(loaded, kind)()


if __name__ == "__main__":
    words = sys.argv[1:]
    count = next((k for k, word in enumerate(words) if word not in NODES), len(words))
    sys.exit(main(words[count:], words[:count] or ["picopose_node"]))
