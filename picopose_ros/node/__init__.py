"""The ROS 2 node: the only place that imports rclpy.

``node.py`` wires rclpy to the rest; ``parameters.py`` declares what can be set; ``pairing.py`` finds the
image of a segmentation; ``worker.py`` keeps inference off the executor; ``images.py`` and ``conversions.py``
are pure functions between messages and NumPy; ``instances.py`` names what was found; ``drops.py`` and
``diagnostics.py`` say why nothing was.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run ``picopose_node``; see :func:`picopose_ros.node.__main__.main`."""
    # Imported here: most of this package needs no rclpy, and importing that takes a while.
    from picopose_ros.node.__main__ import main as run

    return run(args)
