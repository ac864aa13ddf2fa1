"""Detections of CNOS (https://github.com/nv-nguyen/cnos): its JSON file, image by image.

The file is one list in the form of the BOP challenge; an entry says of which image it is by ``scene_id`` and
``image_id``, and of which object by ``category_id``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from picopose_ros.errors import SegmentError
from picopose_ros.files import read_json
from picopose_ros.segmentation.rle import mask_from_entry
from picopose_ros.segmentation.segments import Segment

CNOS_LIST = "the JSON list that CNOS writes"

ClassNames = Callable[[int], str] | Mapping[int, str]
"""How the integer category of a CNOS detection becomes a class id."""

NAMED = 5
"""How many problems of a kind are named one by one; the others are counted."""


def bop_class_name(category_id: int) -> str:
    """Class id of a BOP object: the name of its mesh file, ``obj_000005``."""
    return f"obj_{category_id:06d}"


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
        where, detections = str(detections), read_json(detections, list, SegmentError, CNOS_LIST)
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
        segments.append(Segment(name, score, mask_from_entry(mask, here)))
    return segments


class Problems:
    """What could not be used, by kind.

    Attributes:
        entries: (kind, which one it is and what is wrong with it), in the order in which they came up.
    """

    def __init__(self, entries: Iterable[tuple[str, str]] = ()) -> None:
        self.entries: list[tuple[str, str]] = list(entries)

    def __bool__(self) -> bool:
        return bool(self.entries)

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind."""
        return dict(Counter(kind for kind, _ in self.entries))

    def add(self, kind: str, name: str) -> None:
        """Count one; ``name`` says which one it is and what is wrong with it."""
        self.entries.append((kind, name))

    def lines(self) -> list[str]:
        """One line per kind, most frequent first; names the first ones."""
        lines = []
        for kind, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            named = [name for other, name in self.entries if other == kind][:NAMED]
            more = count - len(named)
            lines.append(f"{count} x {kind}: " + "; ".join(named) + f"; and {more} more" * (more > 0))
        return lines


@dataclass(frozen=True, eq=False)
class Detection:
    """An entry of the file; its mask stays run lengths until it is asked for.

    Attributes:
        category_id: which object. score: CNOS's. time: seconds that CNOS took for the image, 0 if not said.
        where: file and entry, for messages.
        segmentation: ``counts`` and ``size``, as in the file.
    """

    category_id: int
    score: float
    time: float
    where: str
    segmentation: Mapping[str, Any]

    def segment(self, class_names: ClassNames | None = None) -> Segment:
        """With its mask.

        Args:
            class_names: category -> class id; by default BOP's mesh names (``obj_000005``).
        Raises:
            SegmentError: the run lengths are broken, or the category has no name.
        """
        entry = {
            "category_id": self.category_id,
            "score": self.score,
            "segmentation": self.segmentation,
        }
        try:
            (segment,) = segments_from_cnos([entry], class_names=class_names)
        except (SegmentError, MemoryError) as error:  # the latter for masks of impossible sizes
            raise SegmentError(_at_home(error, self.where)) from error
        return segment


def read_cnos(
    path: str | Path,
    problems: Problems | None = None,
    class_names: ClassNames | None = None,
    check_masks: bool = True,
) -> dict[tuple[int, int], list[Detection]]:
    """The entries of a CNOS file by (scene, image), in the file's order.

    Each is judged by itself: a bad one takes no other with it.

    Args:
        path: the JSON file. problems: where bad entries are counted.
        class_names: as in :meth:`Detection.segment`; an entry of another category is a bad one.
        check_masks: decode every mask to see whether it can be. Of a whole BOP dataset that takes minutes.
    Raises:
        SegmentError: the file can't be read or is no list.
    """
    path = Path(path)
    found: dict[tuple[int, int], list[Detection]] = {}
    for index, entry in enumerate(read_json(path, list, SegmentError, CNOS_LIST)):
        where = f"{path}, entry {index}"
        try:
            place, detection = _place(entry, where), _detection(entry, where)
            if check_masks:
                detection.segment(class_names)
        except SegmentError as error:
            if problems is not None:
                problems.add("bad entry", str(error))
            continue
        found.setdefault(place, []).append(detection)
    return found


class CnosDetections:
    """The entries of a CNOS file for the images of one scene.

    Args:
        path: the JSON file.
        scene_id: which scene is meant; needed only where the file has several.
        class_names: category -> class id; by default BOP's mesh names (``obj_000005``).
        min_score: entries with a lower score are left out.
        problems: where bad entries are counted.

    Raises:
        SegmentError: the file can't be read or is no list, has several scenes and none was named, or has no
            usable entry of that scene.
    """

    def __init__(
        self,
        path: str | Path,
        scene_id: int | None = None,
        class_names: ClassNames | None = None,
        min_score: float = 0.0,
        problems: Problems | None = None,
    ) -> None:
        self.path = Path(path)
        self.problems = Problems() if problems is None else problems
        self._class_names = class_names
        found = read_cnos(self.path, self.problems, class_names)
        scenes = sorted({scene for scene, _ in found})
        if scene_id is None and len(scenes) > 1:
            known = ", ".join(map(str, scenes))
            raise SegmentError(f"{self.path}: holds scenes {known}: name one with --scene-id")
        # Also an image of which nothing is left was looked at: nothing was seen in it.
        self._images = {
            image: [one for one in detections if one.score >= min_score]
            for (scene, image), detections in found.items()
            if scene_id is None or scene == scene_id
        }
        if not self._images:
            found = "no usable entry" if scene_id is None else f"no usable entry of scene {scene_id}"
            details = "".join(f"\n{line}" for line in self.problems.lines())
            raise SegmentError(f"{self.path}: holds {found}; is it the JSON file that CNOS wrote?{details}")

    @property
    def image_ids(self) -> list[int]:
        """The images that the file speaks of, in order."""
        return sorted(self._images)

    def __len__(self) -> int:
        """Entries that can be used."""
        return sum(map(len, self._images.values()))

    def segments(self, image_id: int, size: tuple[int, int] | None = None) -> list[Segment]:
        """The segments of an image, in the file's order; none for an image that the file does not speak of.

        Args:
            image_id: of the scene.
            size: height and width of the image where they are known; masks of another size are counted and
                left out. Unknown, it is that of the first mask.
        """
        segments = []
        for detection in self._images.get(image_id, ()):
            segment = detection.segment(self._class_names)
            size = segment.mask.shape if size is None else size
            if segment.mask.shape == tuple(size):
                segments.append(segment)
                continue
            height, width = segment.mask.shape
            self.problems.add(
                "mask of another size",
                f"{detection.where} has a mask of {width}x{height}, but its image has {size[1]}x{size[0]} "
                "pixels: run CNOS on images of the size that the camera publishes",
            )
        return segments


def _place(entry: Any, where: str) -> tuple[int, int]:
    """Scene and image of an entry."""
    if not isinstance(entry, dict):
        raise SegmentError(f"{where}: is a {type(entry).__name__}, expected an object")
    place = [entry.get(name) for name in ("scene_id", "image_id")]
    if any(not isinstance(value, int) or isinstance(value, bool) for value in place):
        raise SegmentError(f"{where}: scene_id and image_id must be whole numbers, got {place}")
    return place[0], place[1]


def _detection(entry: Mapping[str, Any], where: str) -> Detection:
    try:
        category, score = int(entry["category_id"]), float(entry["score"])
        time, mask = float(entry.get("time") or 0.0), entry["segmentation"]
        counts, size = mask["counts"], mask["size"]
        if not np.isfinite([score, time]).all():
            raise ValueError(f"the score is {score}, the time {time}")
        if not isinstance(counts, str):
            # A tenth of the memory; what doesn't fit is judged when the mask is decoded.
            counts = np.array(counts)
            if counts.dtype.kind in "iu" and counts.size and 0 <= counts.min() and counts.max() < 2**32:
                counts = counts.astype(np.uint32)
    except KeyError as error:
        raise SegmentError(f"{where}: {error} is missing") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise SegmentError(
            f"{where}: needs category_id, score and segmentation with 'size' and 'counts' ({error})"
        ) from error
    return Detection(category, score, time, where, {"counts": counts, "size": size})


def _at_home(error: Exception, where: str) -> str:
    """The error's message with the entry's place in the file instead of that in a list of one."""
    return f"{where}: {str(error).removeprefix('CNOS detections, entry 0: ') or type(error).__name__}"
