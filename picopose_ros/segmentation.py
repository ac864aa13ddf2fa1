"""Segments: instance masks with a class and a score, and the forms they arrive in.

Masks travel as COCO run lengths: the mask is read column by column and the counts alternate between runs of
zeros and runs of ones, starting with zeros (a count of 0 when the first pixel is set).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from picopose_ros.errors import SegmentError

ClassNames = Callable[[int], str] | Mapping[int, str]
"""How the integer category of a CNOS detection becomes a class id."""


@dataclass(frozen=True)
class Segment:
    """One instance in an image.

    Attributes:
        class_id: name of the object's class: what the bank of that object is called, or an alias of it.
        score: the segmenter's confidence, 0..1.
        mask: (H, W) bool, True on the visible pixels of the instance; the size of the image it was made from.
    """

    class_id: str
    score: float
    mask: np.ndarray

    def __post_init__(self) -> None:
        mask = np.asarray(self.mask)
        if mask.ndim != 2:
            raise SegmentError(
                f"segment {self.class_id!r}: the mask has shape {mask.shape}, give it as (height, width)"
            )
        if not np.isfinite(self.score):
            raise SegmentError(f"segment {self.class_id!r}: the score is {self.score}, give a number in 0..1")
        object.__setattr__(self, "mask", mask if mask.dtype == bool else mask != 0)


def rle_encode(mask: np.ndarray) -> list[int]:
    """Mask (H, W) -> COCO run lengths (column-major, zeros first)."""
    flat = np.asarray(mask, bool).ravel(order="F")
    if flat.size == 0:
        return []
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def rle_decode(counts: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
    """COCO run lengths -> mask (height, width) bool.

    Raises:
        SegmentError: a count is negative or no integer, or the counts don't add up to height * width.
    """
    runs = np.asarray(counts)
    if runs.size == 0:
        runs = runs.astype(np.int64)
    if runs.ndim != 1 or not np.issubdtype(runs.dtype, np.integer) or (runs.size and int(runs.min()) < 0):
        raise SegmentError("the run lengths of a mask must be non-negative whole numbers")
    runs = runs.astype(np.int64)
    total = int(runs.sum())
    if height <= 0 or width <= 0 or total != height * width:
        raise SegmentError(
            f"the run lengths add up to {total} pixels, but a mask of {width}x{height} has {height * width}: "
            "they belong to another image size or were cut"
        )
    values = np.arange(runs.size) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, runs).reshape(height, width, order="F"))


def rle_decode_compressed(counts: str | bytes, height: int, width: int) -> np.ndarray:
    """COCO's compressed run-length string -> mask (height, width) bool.

    The string holds 5 bits per character from the low end, bit 5 saying that more follow; from the third
    count on each is the difference to the count two before it.

    Raises:
        SegmentError: as :func:`rle_decode`, and when the string is cut or holds other characters.
    """
    data = counts.encode("ascii", "replace") if isinstance(counts, str) else bytes(counts)
    runs: list[int] = []
    position = 0
    while position < len(data):
        value, shift, more = 0, 0, True
        while more:
            if position == len(data) or not 48 <= data[position] < 112:
                raise SegmentError(f"the compressed run lengths of a mask are broken at character {position}")
            code = data[position] - 48
            position += 1
            value |= (code & 0x1F) << shift
            shift += 5
            more = bool(code & 0x20)
            if not more and code & 0x10:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return rle_decode(runs, height, width)


def mask_roi(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Tight box ``(x, y, w, h)`` in pixels around the set pixels of ``mask`` (H, W); None if it is empty."""
    rows, cols = np.flatnonzero(np.any(mask, 1)), np.flatnonzero(np.any(mask, 0))
    if rows.size == 0:
        return None
    x, y = int(cols[0]), int(rows[0])
    return x, y, int(cols[-1]) - x + 1, int(rows[-1]) - y + 1


def segments_from_label_image(labels: np.ndarray, classes: Mapping[int, tuple[str, float]]) -> list[Segment]:
    """A label image and what its values mean -> segments, in the order of ``classes``.

    Args:
        labels: (H, W) integers; 0 is background.
        classes: label value -> (class id, score). A value that the image doesn't hold gives an empty mask, so
            that nothing is lost silently.

    Raises:
        SegmentError: the image isn't 2-D or not of integers, or a class is given for the background.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise SegmentError(
            f"a label image must be (height, width) of integers, got {labels.shape} {labels.dtype}"
        )
    if 0 in classes:
        raise SegmentError(
            f"label 0 is the background, but {classes[0][0]!r} claims it: number instances from 1"
        )
    return [Segment(name, float(score), labels == value) for value, (name, score) in classes.items()]


def bop_class_name(category_id: int) -> str:
    """Class id of a BOP object: the name of its mesh file, ``obj_000005``."""
    return f"obj_{category_id:06d}"


def _mask_from_entry(entry: Mapping[str, Any], where: str) -> np.ndarray:
    try:
        height, width = (int(side) for side in entry["size"])
        counts = entry["counts"]
    except (KeyError, TypeError, ValueError) as error:
        raise SegmentError(f"{where}: needs 'size' [height, width] and 'counts' (run lengths)") from error
    try:
        if isinstance(counts, str | bytes):
            return rle_decode_compressed(counts, height, width)
        return rle_decode(counts, height, width)
    except (SegmentError, ValueError, TypeError) as error:
        raise SegmentError(f"{where}: {error}") from error


def segments_from_cnos(
    detections: Iterable[Mapping[str, Any]] | Path | str,
    scene_id: int | None = None,
    image_id: int | None = None,
    class_names: ClassNames | None = None,
) -> list[Segment]:
    """CNOS detections -> segments, in the order of the file.

    Args:
        detections: the entries, or the JSON file that holds them. Both uncompressed counts (what CNOS writes)
            and COCO's compressed string are understood.
        scene_id, image_id: keep only this scene's or image's entries.
        class_names: integer category -> class id; by default BOP's mesh names (``obj_000005``).

    Raises:
        SegmentError: the file can't be read, or an entry lacks something or has broken run lengths.
    """
    where = "CNOS detections"
    if isinstance(detections, Path | str):
        where, detections = str(detections), _read_json_list(Path(detections))
    lookup = class_names or bop_class_name
    segments = []
    for index, entry in enumerate(detections):
        here = f"{where}, entry {index}"
        if not isinstance(entry, Mapping):
            raise SegmentError(f"{here}: is a {type(entry).__name__}, expected an object")
        if scene_id is not None and entry.get("scene_id") != scene_id:
            continue
        if image_id is not None and entry.get("image_id") != image_id:
            continue
        try:
            category, score, mask = int(entry["category_id"]), float(entry["score"]), entry["segmentation"]
            name = lookup[category] if isinstance(lookup, Mapping) else lookup(category)
        except KeyError as error:
            raise SegmentError(f"{here}: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise SegmentError(f"{here}: category_id or score is no number") from error
        segments.append(Segment(name, score, _mask_from_entry(mask, here)))
    return segments


def segments_to_json(segments: Iterable[Segment], path: Path | str) -> None:
    """Write segments as the file ``picopose estimate --segments`` reads."""
    entries = [
        {
            "class_id": segment.class_id,
            "score": float(segment.score),
            "size": list(segment.mask.shape),
            "counts": rle_encode(segment.mask),
        }
        for segment in segments
    ]
    Path(path).write_text(json.dumps(entries))


def segments_from_json(path: Path | str, class_names: ClassNames | None = None) -> list[Segment]:
    """Read segments from a file of this package (:func:`segments_to_json`) or of CNOS.

    Raises:
        SegmentError: the file can't be read, is neither of the two, or an entry is broken; names file and
            entry.
    """
    entries = _read_json_list(Path(path))
    if entries and all(isinstance(entry, dict) and "segmentation" in entry for entry in entries):
        images = {(entry.get("scene_id"), entry.get("image_id")) for entry in entries}
        if len(images) > 1:
            raise SegmentError(
                f"{path}: holds detections of {len(images)} images; give a file with those of one image"
            )
        try:
            return segments_from_cnos(entries, class_names=class_names)
        except SegmentError as error:
            raise SegmentError(f"{path}: {error}") from error
    segments = []
    for index, entry in enumerate(entries):
        where = f"{path}, entry {index}"
        if not isinstance(entry, dict) or "class_id" not in entry:
            raise SegmentError(f"{where}: needs class_id, score, size and counts (or be a CNOS detection)")
        try:
            score = float(entry.get("score", 1.0))
        except (TypeError, ValueError) as error:
            raise SegmentError(f"{where}: score is no number") from error
        segments.append(Segment(str(entry["class_id"]), score, _mask_from_entry(entry, where)))
    return segments


def _read_json_list(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise SegmentError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise SegmentError(f"{path}: is no JSON file ({error})") from error
    if not isinstance(entries, list):
        raise SegmentError(f"{path}: expected a JSON list of segments, got {type(entries).__name__}")
    return entries
