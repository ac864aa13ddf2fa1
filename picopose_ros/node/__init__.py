"""The ROS 2 node: the only place that imports rclpy.

``node.py`` puts the node together from three parts: ``lifecycle.py``, the transitions of a managed node;
``listener.py``, its inputs; ``answers.py``, its outputs. ``parameters.py`` declares what can be set,
``subscriptions.py`` makes topics whose QoS can be overridden, ``pairing.py`` finds the image of a
segmentation (`picopose_ros.messages` reads both), ``worker.py`` keeps the slow work off the executor,
``engine.py`` does it with the objects of ``objects.py``. ``conversions.py`` and ``markers.py`` are pure
functions between messages and NumPy, ``services.py`` answers who asks, ``transforms.py`` asks TF, and
``drops.py`` and ``diagnostics.py`` say why something is missing. ``segmenter.py`` is a managed
node of its own, which makes the masks; ``segments.py`` publishes another program's.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run ``picopose_node``; see :func:`picopose_ros.node.__main__.main`."""
    # Imported here: most of this package needs no rclpy, and importing that takes a while.
    from picopose_ros.node.__main__ import main as run

    return run(args)


def segmenter_main(args: Sequence[str] | None = None) -> int:
    """Run ``segmenter_node``."""
    from picopose_ros.node.__main__ import main as run

    return run(args, ["segmenter_node"])


def both_main(args: Sequence[str] | None = None) -> int:
    """Run ``picopose_node`` and ``segmenter_node`` in one process."""
    from picopose_ros.node.__main__ import main as run

    return run(args, ["picopose_node", "segmenter_node"])
