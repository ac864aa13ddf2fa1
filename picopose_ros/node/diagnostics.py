"""What the node knows about itself, as ``diagnostic_msgs/DiagnosticArray``."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import Header

from picopose_ros.messages.reasons import DropReason
from picopose_ros.node.drops import DropCount
from picopose_ros.node.memory import resident


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

    def summary(self) -> dict[str, tuple[float, float, float]]:
        """(mean, median, 95th percentile) of each stage, ms."""
        with self._lock:
            stages = {stage: np.array(values) for stage, values in self._stages.items()}
        return {
            stage: (float(np.mean(v)), float(np.median(v)), float(np.percentile(v, 95)))
            for stage, v in stages.items()
        }


class Rates:
    """Events per second over the last ``window`` seconds, from counters that are looked at now and then."""

    def __init__(self, window: float = 5.0) -> None:
        self._window = window
        self._seen: deque[tuple[float, dict[str, int]]] = deque()

    def update(self, now: float, counts: Mapping[str, int]) -> dict[str, float]:
        """Look at the counters (by name) at a time (monotonic s); the rates by the same names, in Hz."""
        self._seen.append((now, dict(counts)))
        while len(self._seen) > 2 and now - self._seen[1][0] >= self._window:
            self._seen.popleft()
        before, old = self._seen[0]
        if now <= before:
            return dict.fromkeys(counts, 0.0)
        return {name: max(count - old.get(name, 0), 0) / (now - before) for name, count in counts.items()}


def memory_use(device: str) -> dict[str, str]:
    """Resident memory of this process, and what PyTorch has of a graphics card's; in MB."""
    use = {"memory_mb": f"{resident() / 1e6:.0f}"}
    if device.startswith("cuda"):
        use["device_name"] = torch.cuda.get_device_name(device)
        use["device_memory_mb"] = f"{torch.cuda.memory_reserved(device) / 1e6:.0f}"
    return use


@dataclass(frozen=True)
class NodeStatus:
    """A snapshot of the node.

    Attributes:
        name: the node's full name.
        state: of its life cycle.
        hardware: what it runs on.
        counts: messages in and out, by what they are.
        rates: of some of them, Hz.
        drops: see :meth:`~picopose_ros.node.drops.DropLog.snapshot`.
        new_drops: drops since the previous snapshot.
        latencies: see :meth:`Latencies.summary`.
        details: anything else worth knowing.
        failure: why the last transition of the life cycle failed; empty if it didn't.
        problems: what keeps topics from being connected.
    """

    name: str
    state: str
    hardware: str
    counts: Mapping[str, int]
    rates: Mapping[str, float]
    drops: Mapping[DropReason, DropCount]
    new_drops: int
    latencies: Mapping[str, tuple[float, float, float]]
    details: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""
    problems: Sequence[str] = ()


def diagnostics_message(status: NodeStatus, stamp: Time, what: str = "pose estimation") -> DiagnosticArray:
    """One status: OK, WARN while something is being dropped or not connected, ERROR after a failure."""
    values = {"state": status.state, "device": status.hardware, **status.details}
    values |= {name: str(count) for name, count in status.counts.items()}
    values |= {f"{name}_hz": f"{rate:.1f}" for name, rate in status.rates.items()}
    values |= {
        f"latency_{stage}_ms": f"mean {mean:.1f}, median {median:.1f}, p95 {p95:.1f}"
        for stage, (mean, median, p95) in status.latencies.items()
    }
    for reason in DropReason:
        drop = status.drops.get(reason)
        values[f"dropped_{reason.value}"] = str(drop.count if drop else 0)
        if drop:
            values[f"last_{reason.value}"] = f"{drop.age:.1f} s ago: {drop.last_message}"
    if status.failure:
        values["failure"] = status.failure
    values |= {f"problem_{number}": problem for number, problem in enumerate(status.problems)}

    level, message = DiagnosticStatus.OK, status.state
    if status.failure:
        level, message = DiagnosticStatus.ERROR, f"{status.state}: {status.failure}"
    elif status.problems:
        level, message = DiagnosticStatus.WARN, f"{status.state}: {status.problems[0]}"
    elif status.new_drops:
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
                name=f"{status.name}: {what}",
                message=message,
                hardware_id=status.hardware,
                values=[KeyValue(key=key, value=value) for key, value in values.items()],
            )
        ],
    )
