"""What is measured where masks come once a second and late, and the node follows meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from picopose_ros.demo.evaluate import Recording, names_in_turn
from picopose_ros.demo.world import SEGMENTATION_DELAY
from picopose_ros.estimation.follow_look import EARLY


@dataclass(frozen=True)
class LateFigures:
    """How images were answered whose masks did not come, or came late.

    Attributes:
        speed: seconds of the recording per second of playing. follow_rate: Hz, of the images' clock.
        images: from when the first masks came. allowed: as many of them as ``follow_rate`` lets be answered.
        answered: of the images, those with a pose.
        images_per_second: answered ones per second of playing.
        switches: times that an instance was published under another name than before.
        went_back: transforms that were older than the one before of the same frame.
        longest_wait: s of the recording between two answers in a row, the longest; 0 for fewer than two.
    """

    speed: float
    follow_rate: float
    images: int
    allowed: int
    answered: int
    images_per_second: float
    switches: int
    went_back: int
    longest_wait: float

    @property
    def share(self) -> float:
        """Of the images that are allowed for, how many were answered, 0..1."""
        return min(self.answered / self.allowed, 1.0) if self.allowed else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        return (
            f"late masks: {self.answered} of {self.images} images answered, {self.share:.2f} of the "
            f"{self.allowed} that {self.follow_rate:g} Hz allow; {self.images_per_second:.1f} images per "
            f"second at {self.speed:g} times the recording's speed; at most {self.longest_wait:.1f} s of it "
            f"without an answer; {self.switches} identity switches, {self.went_back} transforms back in time"
        )


def measure_late(
    recording: Recording,
    visible: Sequence[Mapping[str, float]],
    transforms: Sequence[tuple[int, Iterable[str]]],
    answered_at: Mapping[int, float],
    speed: float,
    follow_rate: float,
) -> LateFigures:
    """Figures of a recording that was played with late masks.

    Args:
        recording: truth and answers. visible: per image in stamp order: instance name -> visible share.
        transforms: stamp (ns) and frames of what came on /tf, in the order in which it came.
        answered_at: stamp (ns) of an answered image -> when its first answer came, s of a steady clock.
        speed, follow_rate: as the recording was played, and of the node.
    """
    first = min(recording.truth) + SEGMENTATION_DELAY
    images = [stamp for stamp in sorted(recording.truth) if stamp >= first]
    answered = [stamp for stamp in images if recording.detections.get(stamp)]
    times = sorted(answered_at[stamp] for stamp in answered)
    names = names_in_turn(recording, visible)
    return LateFigures(
        speed,
        follow_rate,
        len(images),
        _allowed(images, follow_rate),
        len(answered),
        (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0,
        sum(a != b for had in names.values() for a, b in zip(had, had[1:])),
        _went_back(transforms),
        max((b - a for a, b in zip(answered, answered[1:])), default=0) * 1e-9,
    )


def answered_part(
    recording: Recording, visible: Sequence[Mapping[str, float]]
) -> tuple[Recording, list[Mapping[str, float]]]:
    """A recording and its visible shares without the images that have no pose."""
    kept = [stamp for stamp in sorted(recording.truth) if recording.detections.get(stamp)]
    shares = dict(zip(sorted(recording.truth), visible, strict=True))
    part = replace(recording, truth={stamp: recording.truth[stamp] for stamp in kept})
    return part, [shares[stamp] for stamp in kept]


def _allowed(stamps: Sequence[int], rate: float) -> int:
    """As many of the stamps (ns, sorted) as are at least a period of a rate (Hz) apart."""
    count, last = 0, None
    for stamp in stamps:
        if last is None or stamp - last >= EARLY * 1e9 / rate:
            count, last = count + 1, stamp
    return count


def _went_back(transforms: Sequence[tuple[int, Iterable[str]]]) -> int:
    newest: dict[str, int] = {}
    count = 0
    for stamp, frames in transforms:
        for frame in frames:
            count += stamp < newest.get(frame, stamp)
            newest[frame] = max(stamp, newest.get(frame, stamp))
    return count
