"""The csv of the BOP Challenge: one estimated pose per line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from picopose_ros.errors import DatasetError
from picopose_ros.evaluation.report import write_atomically

HEADER = "scene_id,im_id,obj_id,score,R,t,time"
"""First line of the file. The BOP toolkit writes it, and reads files with and without it; so does this."""


@dataclass(frozen=True, eq=False)
class BopRow:
    """One estimate.

    Attributes:
        scene_id, im_id, obj_id: what it is an estimate of.
        score: higher is better.
        R: (3, 3) rotation model -> camera.
        t_mm: (3,) translation model -> camera, millimetres.
        time: seconds for all estimates of the image, the same in each of its rows; -1 where it is unknown.
    """

    scene_id: int
    im_id: int
    obj_id: int
    score: float
    R: np.ndarray
    t_mm: np.ndarray
    time: float = -1.0

    @property
    def T_cam_obj(self) -> np.ndarray:
        """(4, 4) model -> camera, metres."""
        T = np.eye(4)
        T[:3, :3], T[:3, 3] = self.R, self.t_mm / 1000.0
        return T

    @classmethod
    def of_pose(
        cls, scene_id: int, im_id: int, obj_id: int, score: float, T_cam_obj: np.ndarray, time: float
    ) -> BopRow:
        """The row of a pose ``T_cam_obj`` (4, 4) in metres."""
        T = np.asarray(T_cam_obj, np.float64)
        return cls(scene_id, im_id, obj_id, float(score), T[:3, :3], 1000.0 * T[:3, 3], float(time))

    def line(self) -> str:
        """The row as in the file, without the line's end; numbers keep all their digits."""
        R, t = (" ".join(repr(float(value)) for value in part.ravel()) for part in (self.R, self.t_mm))
        return f"{self.scene_id},{self.im_id},{self.obj_id},{self.score!r},{R},{t},{self.time!r}"


def parse_row(line: str, where: str) -> BopRow:
    """A line of the file.

    Args:
        line: with or without its end. where: file and line number, for the message.
    Raises:
        DatasetError: it is no row.
    """
    fields = line.strip().split(",")
    try:
        if len(fields) != 7:
            raise ValueError(f"{len(fields)} fields instead of 7")
        R, t = (np.array([float(value) for value in text.split()]) for text in fields[4:6])
        if R.size != 9 or t.size != 3:
            raise ValueError(f"R has {R.size} numbers instead of 9, t {t.size} instead of 3")
        row = BopRow(
            *(int(field) for field in fields[:3]), float(fields[3]), R.reshape(3, 3), t, float(fields[6])
        )
        if not (np.isfinite(R).all() and np.isfinite(t).all() and np.isfinite([row.score, row.time]).all()):
            raise ValueError("a number is not finite")
    except ValueError as error:
        raise DatasetError(f"{where}: is no row of {HEADER} ({error}): {line.strip()[:80]!r}") from error
    return row


def read_results(path: str | Path) -> list[BopRow]:
    """The rows of a csv of the BOP Challenge, in its order, with or without the header line.

    Raises:
        DatasetError: the file can't be read or a line is no row; names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"results file {path} can't be read ({error})") from error
    first = 1 if lines and lines[0].replace(" ", "") == HEADER else 0
    return [
        parse_row(line, f"{path}, line {number}")
        for number, line in enumerate(lines[first:], first + 1)
        if line.strip()
    ]


def write_results(path: str | Path, rows: Iterable[BopRow]) -> None:
    """Write the csv, header line first, in one step.

    Raises:
        ConfigError: the file can't be written.
    """
    write_atomically(Path(path), "\n".join([HEADER, *(row.line() for row in rows)]) + "\n")
