"""Which detections stand for the instances that the benchmark asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from picopose_ros.errors import SegmentError
from picopose_ros.evaluation.bop.dataset import Target
from picopose_ros.segmentation import Detection, Problems, Segment, bop_class_name, read_cnos

NOTHING_DETECTED = "image without detections"
NO_SCORE = "detection without a score"


@dataclass
class Selection:
    """The segments to estimate in one image.

    Attributes:
        segments: named by their object (``obj_000005``). obj_ids: of each.
        time: seconds that the detector took for the image; 0 where nothing was detected or it isn't said.
        problems: detections that couldn't be used, and whether there were none.
    """

    segments: list[Segment] = field(default_factory=list)
    obj_ids: list[int] = field(default_factory=list)
    time: float = 0.0
    problems: Problems = field(default_factory=Problems)


class BopDetections:
    """The detections of a dataset, in a file as CNOS writes it.

    Args:
        path: the JSON file.

    Attributes:
        problems: entries that can't be used.

    Raises:
        SegmentError: the file can't be read, is no list, or has no usable entry.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.problems = Problems()
        self._images = read_cnos(self.path, self.problems, check_masks=False)
        if not self._images:
            details = "".join(f"\n{line}" for line in self.problems.lines())
            raise SegmentError(
                f"{self.path}: holds no usable entry; is it the JSON file that CNOS wrote?{details}"
            )

    @property
    def images(self) -> set[tuple[int, int]]:
        """(scene, image) that the file has entries of."""
        return set(self._images)

    def select(self, targets: Sequence[Target], size: tuple[int, int], cap: int | None = None) -> Selection:
        """The released code's choice: as many detections of an object as are asked for, best score first.

        An object of whose class nothing was detected in the image gets all detections of the image, as if
        they were of its class. A detection whose score is not positive is not used, as one whose mask is of
        another size than the image, or empty, or broken; each is counted. Where nothing was detected at all,
        nothing is selected, and the image is counted.

        Args:
            targets: of one image. size: its height and width.
            cap: at most so many detections per object, however many are asked for.
        """
        found = Selection()
        if not targets:
            return found
        scene, image = targets[0].scene_id, targets[0].image_id
        detections = self._images.get((scene, image), [])
        if not detections:
            found.problems.add(NOTHING_DETECTED, f"scene {scene} image {image}")
            return found
        found.time = max(detection.time for detection in detections)
        decoded: dict[str, Segment | None] = {}
        for target in targets:
            own = [one for one in detections if one.category_id == target.obj_id]
            # Sorting is stable: of equals the first in the file.
            chosen = sorted(own or detections, key=lambda one: -one.score)
            count = target.inst_count if cap is None else min(target.inst_count, cap)
            for detection in chosen[:count]:
                if detection.where not in decoded:
                    decoded[detection.where] = _segment(detection, size, found.problems)
                segment = decoded[detection.where]
                if segment is not None:
                    name = bop_class_name(target.obj_id)
                    found.segments.append(Segment(name, segment.score, segment.mask))
                    found.obj_ids.append(target.obj_id)
        return found


def _segment(detection: Detection, size: tuple[int, int], problems: Problems) -> Segment | None:
    """With its mask; None for one that can't be used, which is counted."""
    if not detection.score > 0:
        problems.add(NO_SCORE, f"{detection.where} has {detection.score}")
        return None
    try:
        segment = detection.segment()
    except SegmentError as error:
        problems.add("broken mask", str(error))
        return None
    height, width = segment.mask.shape
    if (height, width) != tuple(size):
        problems.add(
            "mask of another size",
            f"{detection.where} has a mask of {width}x{height}, its image {size[1]}x{size[0]} pixels",
        )
        return None
    return segment
