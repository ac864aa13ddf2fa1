"""How times are taken: candidates in turn in one process, the device waited for, median and spread."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    """What a part is asked to do.

    Attributes:
        device: torch device. folder: for what parts keep between runs. quick: too little to mean anything,
            only to see that it runs.
    """

    device: str
    folder: Path
    quick: bool = False

    @property
    def large(self) -> str:
        """The preset that stands for the published network."""
        return "vits" if self.quick else "vitl"

    def rounds(self, count: int) -> int:
        """So many rounds, or one where it is quick."""
        return 1 if self.quick else count


@dataclass(frozen=True)
class Times:
    """Milliseconds of the rounds of a candidate, in their order."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        if len(self.rounds) == 1:
            return f"{self.median:.0f}"
        digits = 0 if self.median >= 100 else 1
        return f"{self.median:.{digits}f} ({min(self.rounds):.{digits}f}-{max(self.rounds):.{digits}f})"


def wait_for(device: str) -> None:
    """Wait for what was queued on a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int, device: str, warmup: int = 1
) -> dict[str, Times]:
    """Time candidates in turn (A B A B), so that whatever else the machine does meets them all.

    Args:
        candidates: by name. rounds: of each that count, after ``warmup`` that don't.
        device: that is waited for before and after each.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(-warmup, rounds):
        for name, run in candidates.items():
            wait_for(device)
            begin = time.perf_counter()
            run()
            wait_for(device)
            if index >= 0:
                taken[name].append(1000.0 * (time.perf_counter() - begin))
    return {name: Times(tuple(times)) for name, times in taken.items()}


def ratio(slow: Times, fast: Times) -> float:
    """How many times faster, the median over the rounds, each of which had both."""
    return statistics.median(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))


def matrix_peak(device: str, dtype: torch.dtype, size: int = 2048) -> Callable[[], object]:
    """A product of two square matrices: what a machine computes at best. 2 size^3 operations."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out)


@dataclass(frozen=True)
class Table:
    """A table of the document. ``note`` stands above it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """A line of a plot: points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """A plot of the document.

    Attributes:
        name: of the picture's file. title, x, y: what is written. logarithmic: both axes.
    """

    name: str
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    logarithmic: bool = True


@dataclass(frozen=True)
class Found:
    """What a part measured. ``targets``: by the key of the target."""

    targets: Mapping[str, float]
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()

    def plain(self) -> dict[str, Any]:
        """In types that JSON knows."""
        return asdict(self)


def commit() -> str:
    """The last commit that changed what is measured, where git is there to tell; "-dirty" if it isn't all."""
    measured = ("picopose_ros", "scripts", "requirements")
    try:
        hashed, changed = (
            subprocess.run(["git", "-C", str(ROOT), *words, "--", *measured], capture_output=True, text=True)
            for words in (("log", "-1", "--format=%h"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except OSError:
        return "unknown"
    return (hashed.stdout.strip() or "unknown") + ("-dirty" if changed.stdout.strip() else "")


def about(part: str, options: Options, seconds: float) -> dict[str, Any]:
    """Under which circumstances a part was measured."""
    sys.path.append(str(ROOT / "scripts" / "soak"))
    from report import machine

    on_gpu = torch.device(options.device).type == "cuda"
    return {
        "part": part,
        "command": f"python scripts/bench --part {part} --device {options.device}"
        + (" --quick" if options.quick else ""),
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "cpu",
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": round(seconds, 1),
        "quick": options.quick,
    }
