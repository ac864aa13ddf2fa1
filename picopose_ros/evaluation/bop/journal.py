"""The images estimated so far, on disk: an image that has a line is not estimated again.

Every process appends to a file of its own, one JSON line per image, synced before the next image is begun.
A process that is killed leaves at worst half a line, which the next run cuts off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from picopose_ros.errors import ConfigError, DatasetError
from picopose_ros.evaluation.bop.results import BopRow, parse_row

_FORMAT = 1


@dataclass
class ImageRecord:
    """The result of one image.

    Attributes:
        scene_id, image_id: which one.
        lines: its rows, as in the csv.
        timings: milliseconds by stage.
        problems: (kind, what), as in :class:`picopose_ros.segmentation.Problems`.
        failed: nothing could be estimated because of the image; it is tried again when the run goes on.
        extra: what else a run keeps of the image, in plain types.
    """

    scene_id: int
    image_id: int
    lines: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    failed: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[BopRow]:
        """The estimates."""
        where = f"journal, scene {self.scene_id} image {self.image_id}"
        return [parse_row(line, where) for line in self.lines]


class Journal:
    """The journals of a run's processes, in one folder.

    Args:
        folder: of the run; made if needed.
        settings: everything that decides what is estimated, in plain types.
        rank: of this process.

    Raises:
        ConfigError: the folder can't be written, holds a run with other settings, or another process writes
            this rank's journal.
        DatasetError: a journal is damaged before its last line.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.folder = Path(folder)
        self._settings = json.loads(json.dumps(settings))
        self._path = self.folder / f"journal-{rank}.jsonl"
        self.read()  # before anything is written: the settings of all journals must be these
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._file.close()
                raise ConfigError(
                    f"another process writes {self._path}: wait for it, or name another folder with --out"
                ) from error
            whole = _whole(self._path.read_bytes())
            self._file.truncate(len(whole))
            if not whole:
                self._append({"format": _FORMAT, "settings": self._settings})
        except OSError as error:
            raise self._unwritable(error) from error

    def add(self, record: ImageRecord) -> None:
        """Keep what became of an image; it is on the disk when this returns.

        Raises:
            ConfigError: it can't be written.
        """
        try:
            self._append(asdict(record))
        except OSError as error:
            raise self._unwritable(error) from error

    def read(self) -> dict[tuple[int, int], ImageRecord]:
        """What all processes have so far, by (scene, image).

        Raises:
            ConfigError, DatasetError: as the constructor.
        """
        found: dict[tuple[int, int], ImageRecord] = {}
        for path in sorted(self.folder.glob("journal-*.jsonl")):
            try:
                lines = _whole(path.read_bytes()).decode().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DatasetError(f"journal {path} can't be read ({error})") from error
            for number, line in enumerate(lines, 1):
                try:
                    content = json.loads(line)
                    if number == 1:
                        self._check(path, content)
                        continue
                    record = ImageRecord(**content)
                except (ValueError, TypeError, KeyError) as error:
                    raise DatasetError(
                        f"journal {path}, line {number}: is damaged ({error}); remove the line, or the file "
                        "to estimate its images again"
                    ) from error
                key = record.scene_id, record.image_id
                # A failed one that was tried again: whichever journal has it, what was estimated counts.
                if key not in found or found[key].failed:
                    found[key] = record
        return found

    def close(self) -> None:
        """Close this process's journal."""
        self._file.close()

    @contextlib.contextmanager
    def merging(self) -> Iterator[None]:
        """One process at a time reads all journals and writes the result.

        The last process to enter sees everything that the others have written.
        """
        try:
            with (self.folder / ".merge.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise self._unwritable(error) from error

    def _check(self, path: Path, head: Mapping[str, Any]) -> None:
        if head["format"] != _FORMAT:
            raise ConfigError(
                f"journal {path} is of another version (format {head['format']}, this one writes {_FORMAT}): "
                "name another folder with --out"
            )
        there = head["settings"]
        names = [name for name in {**there, **self._settings} if there.get(name) != self._settings.get(name)]
        if names:
            what = "; ".join(f"{n}: {there.get(n)} there, {self._settings.get(n)} now" for n in names)
            raise ConfigError(
                f"{self.folder} holds a run with other settings ({what}): name another folder with --out, or "
                "remove its journals to begin again"
            )

    def _append(self, content: Mapping[str, Any]) -> None:
        _write_line(self._file, (json.dumps(content) + "\n").encode())

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{self._path} can't be written ({error.strerror or error}); what was estimated before is kept: "
            "free disk space or mend the folder and run the same command again"
        )


def _whole(data: bytes) -> bytes:
    """Without the half line that a killed process leaves."""
    return data[: data.rfind(b"\n") + 1]


def _write_line(file: IO[bytes], line: bytes) -> None:
    file.write(line)
    file.flush()
    os.fsync(file.fileno())
