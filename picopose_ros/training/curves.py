"""What a run has measured: `curves.csv` always, and TensorBoard's files where its package is installed."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from picopose_ros.errors import PicoPoseError


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, then put it there in one step.

    A reader sees the old content or the new one, also when the power goes.

    Raises:
        PicoPoseError: it cannot be written, mostly because the disk is full; the old file is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors wrap what the system says
        partial.unlink(missing_ok=True)
        raise PicoPoseError(
            f"{path} cannot be written ({error}); make room and start again: what was there before still is"
        ) from error


def _rows(path: Path) -> Iterator[dict[str, float]]:
    """The whole rows of a CSV file of numbers; an empty field is absent from its row."""
    with path.open(newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            with contextlib.suppress(AttributeError, TypeError, ValueError):  # a line that was cut short
                yield {k: int(v) if v.isdecimal() else float(v) for k, v in row.items() if v != ""}


class Curves:
    """One row of figures per evaluation; a run that goes on drops the rows that it will measure again.

    Args:
        folder: the run's; gets `curves.csv` and `tensorboard/`.
        step: where the run goes on; later rows are dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._path = folder / "curves.csv"
        self.rows: list[dict[str, float]] = []
        """Figures by name, a row per evaluation; a figure that was not measured yet then is absent."""
        if self._path.exists():
            self.rows = [row for row in _rows(self._path) if row.get("step", step + 1) <= step]
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("TensorBoard is not installed (pip install tensorboard): curves go to curves.csv alone")
        else:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, max_queue=100)

    def best(self, name: str) -> float:
        """The smallest value of a figure so far; infinite where it was never measured."""
        return min((row[name] for row in self.rows if np.isfinite(row.get(name, np.nan))), default=np.inf)

    def add(self, row: Mapping[str, float]) -> None:
        """Add the figures of an evaluation; `step` is one of them. The CSV file is replaced in one step."""
        self.rows.append(dict(row))
        names = list(dict.fromkeys(name for r in self.rows for name in r))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        replace_file(self._path, lambda path: path.write_text(text.getvalue()))
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))
            self._board.flush()

    def add_picture(self, name: str, rgb: np.ndarray, step: int) -> None:
        """Show a picture (h, w, 3) uint8 RGB in TensorBoard, if it is there."""
        if self._board is not None:
            self._board.add_image(name, rgb, step, dataformats="HWC")
            self._board.flush()

    def close(self) -> None:
        """Write what is still to be written."""
        if self._board is not None:
            self._board.close()
