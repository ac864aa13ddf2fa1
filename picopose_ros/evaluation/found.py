"""How well segments agree with the truth: found, missed and false instances, and COCO's average precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from picopose_ros.segmentation import Segment

ASKED_VISIBLE = 0.4
"""An instance that is less visible need not be found; finding it is not false."""

FOUND_IOU = 0.5
"""Overlap (intersection over union) from which on an instance counts as found."""

COCO_IOUS = np.arange(10) * 0.05 + 0.5
"""Overlaps that COCO averages over."""

COCO_IGNORED = 0.1
"""The BOP toolkit's annotations ignore instances that are less visible."""

_RECALLS = np.linspace(0, 1, 101)
_MOST_PER_IMAGE = 100


@dataclass(frozen=True)
class TrueInstance:
    """An instance: its class, visible pixels (H, W) bool, and visible share of its silhouette."""

    class_id: str
    mask: np.ndarray
    visible: float


@dataclass(frozen=True)
class FoundCounts:
    """Instances of one or more images.

    Attributes:
        images: looked at. asked: instances that are visible enough to be asked for.
        found: of them, by a segment of their class with enough overlap. false: segments of no instance.
    """

    images: int = 0
    asked: int = 0
    found: int = 0
    false: int = 0

    def __add__(self, other: FoundCounts) -> FoundCounts:
        return FoundCounts(
            self.images + other.images,
            self.asked + other.asked,
            self.found + other.found,
            self.false + other.false,
        )

    @property
    def missed(self) -> int:
        """Instances that were asked for and not found."""
        return self.asked - self.found

    @property
    def recall(self) -> float:
        """Share of the instances that were found."""
        return self.found / max(self.asked, 1)

    @property
    def false_per_image(self) -> float:
        """False segments per image."""
        return self.false / max(self.images, 1)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shares = {"recall": round(self.recall, 4), "false_per_image": round(self.false_per_image, 4)}
        return {**asdict(self), "missed": self.missed, **shares}


def overlaps(segments: Sequence[Segment], truth: Sequence[TrueInstance]) -> np.ndarray:
    """(segments, instances) intersection over union of the masks, 0 where the classes differ."""
    found = np.zeros((len(segments), len(truth)))
    for i, segment in enumerate(segments):
        for j, instance in enumerate(truth):
            if segment.class_id == instance.class_id:
                common = np.count_nonzero(segment.mask & instance.mask)
                found[i, j] = common / max(np.count_nonzero(segment.mask | instance.mask), 1)
    return found


def count_found(
    segments: Sequence[Segment], truth: Sequence[TrueInstance], iou: float = FOUND_IOU
) -> tuple[FoundCounts, dict[int, int]]:
    """Compare the segments of one image with the truth.

    Returns:
        The counts, and by segment the instance that it found.
    """
    overlap = overlaps(segments, truth)
    overlap[overlap < iou] = 0
    pairs = {i: j for i, j in zip(*linear_sum_assignment(-overlap)) if overlap[i, j] > 0}
    asked = [instance.visible >= ASKED_VISIBLE for instance in truth]
    found = sum(asked[j] for j in pairs.values())
    return FoundCounts(1, sum(asked), found, len(segments) - len(pairs)), pairs


@dataclass
class _ClassRecord:
    """Of one class: per segment its score, per overlap whether it is right and whether it is ignored."""

    scores: list[float]
    right: list[np.ndarray]
    ignored: list[np.ndarray]
    positives: int = 0


class CocoPrecision:
    """Average precision as COCO's evaluation has it, with the BOP toolkit's ignored instances.

    Per class and overlap (0.5 to 0.95 in steps of 0.05) the precision at 101 recalls, averaged over all
    (Lin et al. 2014; the toolkit runs pycocotools). Instances that are less than a tenth visible are ignored,
    and so are segments that fit no other instance but them. At most 100 segments of an image count.
    """

    def __init__(self) -> None:
        self._classes: dict[str, _ClassRecord] = {}

    def add(self, segments: Sequence[Segment], truth: Sequence[TrueInstance]) -> None:
        """Take in the segments and the truth of an image."""
        # Per class, as pycocotools counts them.
        for class_id in {s.class_id for s in segments} | {t.class_id for t in truth}:
            record = self._classes.setdefault(class_id, _ClassRecord([], [], []))
            own = sorted((s for s in segments if s.class_id == class_id), key=lambda s: -s.score)
            own = own[:_MOST_PER_IMAGE]
            true = [t for t in truth if t.class_id == class_id]
            true.sort(key=lambda t: t.visible < COCO_IGNORED)  # those that count first; stable
            ignore = np.array([t.visible < COCO_IGNORED for t in true], bool)
            record.positives += int((~ignore).sum())
            overlap = overlaps(own, true)
            right = np.zeros((len(own), len(COCO_IOUS)), bool)
            ignored = np.zeros_like(right)
            for t, least in enumerate(COCO_IOUS):
                taken = np.zeros(len(true), bool)
                for d in range(len(own)):
                    best, value = -1, min(least, 1 - 1e-10)
                    for g in range(len(true)):
                        if taken[g]:
                            continue
                        if best >= 0 and not ignore[best] and ignore[g]:
                            break  # it has one that counts
                        if overlap[d, g] >= value:
                            best, value = g, overlap[d, g]
                    if best >= 0:
                        taken[best] = True
                        right[d, t], ignored[d, t] = not ignore[best], ignore[best]
            record.scores += [s.score for s in own]
            record.right += list(right)
            record.ignored += list(ignored)

    def by_class(self) -> dict[str, np.ndarray]:
        """(10,) average precision at each overlap, of the classes that the truth holds."""
        return {name: _precision(one) for name, one in sorted(self._classes.items()) if one.positives}

    def as_dict(self) -> dict[str, float]:
        """``AP``, ``AP50`` and ``AP75`` as the toolkit reports them; -1 without any instance."""
        classes = list(self.by_class().values())
        if not classes:
            return {"AP": -1.0, "AP50": -1.0, "AP75": -1.0}
        mean = np.mean(classes, axis=0)
        return {"AP": float(mean.mean()), "AP50": float(mean[0]), "AP75": float(mean[5])}


def _precision(record: _ClassRecord) -> np.ndarray:
    if not record.scores:
        return np.zeros(len(COCO_IOUS))
    order = np.argsort(-np.array(record.scores), kind="mergesort")
    right, ignored = np.array(record.right)[order], np.array(record.ignored)[order]
    found = []
    for t in range(len(COCO_IOUS)):
        counts = right[~ignored[:, t], t]
        hits, misses = np.cumsum(counts), np.cumsum(~counts)
        recall = hits / record.positives
        precision = hits / np.maximum(hits + misses, np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(recall, _RECALLS, side="left")
        found.append(np.append(precision, 0.0)[np.minimum(at, len(precision))].mean())
    return np.array(found)
