"""What the node knows about itself, as ``diagnostic_msgs/DiagnosticArray``."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import Header

from picopose_ros.node.drops import DropCount, DropReason


class Latencies:
    """The last ``window`` durations of each stage, in milliseconds. Thread-safe."""

    def __init__(self, window: int = 100) -> None:
        self._window = window
        self._lock = threading.Lock()
        self._stages: dict[str, deque[float]] = {}

    def record(self, milliseconds: Mapping[str, float]) -> None:
        """Add one duration per stage."""
        with self._lock:
            for stage, value in milliseconds.items():
                self._stages.setdefault(stage, deque(maxlen=self._window)).append(float(value))

    def summary(self) -> dict[str, tuple[float, float]]:
        """(median, 95th percentile) of each stage, ms."""
        with self._lock:
            stages = {stage: np.array(values) for stage, values in self._stages.items()}
        return {stage: (float(np.median(v)), float(np.percentile(v, 95))) for stage, v in stages.items()}


@dataclass(frozen=True)
class NodeStatus:
    """A snapshot of the node.

    Attributes:
        name: the node's full name.
        state: ``loading``, ``ready`` or ``failed``.
        hardware: what it runs on.
        counts: messages in and out, by what they are.
        drops: see :meth:`~picopose_ros.node.drops.DropLog.snapshot`.
        new_drops: drops since the previous snapshot.
        latencies: see :meth:`Latencies.summary`.
        details: anything else worth knowing.
    """

    name: str
    state: str
    hardware: str
    counts: Mapping[str, int]
    drops: Mapping[DropReason, DropCount]
    new_drops: int
    latencies: Mapping[str, tuple[float, float]]
    details: Mapping[str, str] = field(default_factory=dict)


def diagnostics_message(status: NodeStatus, stamp: Time) -> DiagnosticArray:
    """One status: OK, or WARN while something is being dropped, with every counter and the last reasons."""
    values = {"state": status.state, **status.details}
    values |= {name: str(count) for name, count in status.counts.items()}
    values |= {
        f"latency_{stage}_ms": f"median {median:.1f}, p95 {p95:.1f}"
        for stage, (median, p95) in status.latencies.items()
    }
    for reason, drop in status.drops.items():
        values[f"dropped_{reason.value}"] = str(drop.count)
        values[f"last_{reason.value}"] = f"{drop.age:.1f} s ago: {drop.last_message}"

    level, message = DiagnosticStatus.OK, status.state
    if status.new_drops:
        reason, newest = min(status.drops.items(), key=lambda item: item[1].age)
        level = DiagnosticStatus.WARN
        message = (
            f"{status.new_drops} dropped in the last second, last [{reason.value}] {newest.last_message}"
        )
    return DiagnosticArray(
        header=Header(stamp=stamp),
        status=[
            DiagnosticStatus(
                level=level,
                name=f"{status.name}: pose estimation",
                message=message,
                hardware_id=status.hardware,
                values=[KeyValue(key=key, value=value) for key, value in values.items()],
            )
        ],
    )
