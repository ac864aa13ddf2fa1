"""Segments as JSON files: this package's own form, and CNOS's for one image."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from picopose_ros.errors import SegmentError
from picopose_ros.files import read_json
from picopose_ros.segmentation.cnos import ClassNames, segments_from_cnos
from picopose_ros.segmentation.rle import mask_from_entry, rle_encode
from picopose_ros.segmentation.segments import Segment


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
    entries = read_json(path, list, SegmentError, "a JSON list of segments")
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
        segments.append(Segment(str(entry["class_id"]), score, mask_from_entry(entry, where)))
    return segments
