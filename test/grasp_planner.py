"""A grasp planner, as far as a node sees one: ``python grasp_planner.py BAG [TOPIC]``, until SIGTERM
and until nothing has come for two seconds.

Listens to ``/tf`` and the detections (on ``/detections`` if no topic is named), nothing else, and writes what
it hears into a bag.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import rclpy
from rclpy.signals import SignalHandlerOptions
from tf2_msgs.msg import TFMessage
from vision_msgs.msg import Detection3DArray

from picopose_ros.messages import bags

QUIET_SECONDS = 2.0
"""What was sent before the signal is still on its way."""


def main(path: str, detections: str = "/detections") -> None:
    """Listen until told to stop."""
    stopped: list[Any] = []
    last = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("grasp_planner")
    with bags.BagWriter(Path(path)) as writer:
        for topic, name, kind in (
            ("/tf", bags.TF, TFMessage),
            (detections, bags.DETECTIONS, Detection3DArray),
        ):
            writer.add_topic(topic, name)

            def hear(raw: bytes, topic: str = topic) -> None:
                nonlocal last
                last = time.monotonic()
                writer.write_raw(topic, time.time_ns(), raw)

            node.create_subscription(kind, topic, hear, 100, raw=True)
        while not stopped or time.monotonic() - last < QUIET_SECONDS:
            rclpy.spin_once(node, timeout_sec=0.1)
    node.destroy_node()
    rclpy.try_shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
