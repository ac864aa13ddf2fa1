"""Which image a segmentation belongs to: the one with exactly its stamp, found in a buffer of recent images.

No ROS in here. Messages are opaque payloads, stamps are integer nanoseconds, ``now`` is a monotonic clock in
seconds. Everything is aged by its *receipt*, not by its stamp, so that a bag that plays slowly changes
nothing; one that starts over is noticed by its images' stamps.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from picopose_ros.messages.reasons import DropReason

MAX_PENDING = 64
"""Segmentations that may wait for their image at once; more means that no image will come."""

INFO_PATIENCE = 0.3
"""Seconds that a segmentation waits for the camera_info of its image's stamp, where there is reason to."""

JUMP_BACK = 1_000_000_000
"""Nanoseconds that an image must be older than the newest one to mean that time has started over."""

MAX_HALVES = 16
"""Halves of segmentations that may wait for the other one."""

_REMEMBERED_STAMPS = 8192


@dataclass(frozen=True)
class Pair:
    """A segmentation with its image and camera_info.

    Attributes:
        stamp: of the image, ns.
        received: when the segmentation came, or the image where there is none (monotonic s).
        made: when they were put together (monotonic s).
        epoch: how often time had started over before.
    """

    stamp: int
    image: Any
    camera_info: Any
    segmentation: Any
    received: float
    made: float
    epoch: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Larger for what was seen later."""
        return self.epoch, self.stamp


@dataclass(frozen=True)
class _Timed:
    payload: Any
    received: float


@dataclass
class PairingCounts:
    """How many messages came in on each topic, how many pairs went out, how often time started over."""

    images: int = 0
    camera_infos: int = 0
    segmentations: int = 0
    pairs: int = 0
    jumps: int = 0


class StampPairing:
    """Ring buffer of images by exact stamp, and the segmentations that wait for theirs.

    ``camera_info`` is the one with the image's stamp. A driver whose camera_infos never had an image's stamp
    (it publishes them seldom, or once and latched) means the newest; one whose camera_infos did is given
    ``INFO_PATIENCE`` before the newest is taken, because topics overtake each other.

    Args:
        duration: seconds that an image stays in the buffer; longer than the segmenter takes.
        capacity: images that the buffer holds at most, whatever their age (bounds the memory).
        patience: seconds that a segmentation waits for an image or a camera_info that is still on its way.
        report: called with a reason and a message for every segmentation that can't be paired.
        on_jump: called with a message when the images' stamps have jumped back: a recording starts over, or
            the simulation. Everything older is forgotten then, and :attr:`epoch` counts one more.
        counts: to go on with.

    Attributes:
        counts: of what came in and went out.
        epoch: how often time has started over.
    """

    def __init__(
        self,
        duration: float,
        capacity: int,
        report: Callable[[DropReason, str], None],
        patience: float = 1.0,
        on_jump: Callable[[str], None] = lambda message: None,
        counts: PairingCounts | None = None,
    ) -> None:
        self._duration = duration
        self._capacity = capacity
        self._patience = patience
        self._report = report
        self._on_jump = on_jump
        self._newest_stamp: int | None = None
        self._images: OrderedDict[int, _Timed] = OrderedDict()
        self._infos: OrderedDict[int, _Timed] = OrderedDict()
        self._newest_info: Any = None
        self._infos_are_stamped = False
        self._waiting: deque[tuple[int, _Timed]] = deque()
        self._gone: OrderedDict[int, None] = OrderedDict()
        self.counts = counts or PairingCounts()
        self.epoch = 0

    def __len__(self) -> int:
        """Images in the buffer."""
        return len(self._images)

    def add_image(self, stamp: int, image: Any, now: float) -> list[Pair]:
        """Keep an image; returns the pairs that it completes."""
        self.counts.images += 1
        self._notice_jump(stamp, now)
        self._images.pop(stamp, None)
        self._images[stamp] = _Timed(image, now)
        self._gone.pop(stamp, None)
        self._infos_are_stamped |= stamp in self._infos
        self._age(now)
        return self._match(now)

    def add_camera_info(self, stamp: int, info: Any, now: float) -> list[Pair]:
        """Keep a camera_info; returns the pairs that it completes."""
        self.counts.camera_infos += 1
        self._newest_info = info
        self._infos.pop(stamp, None)
        self._infos[stamp] = _Timed(info, now)
        self._infos_are_stamped |= stamp in self._images
        self._age(now)
        return self._match(now)

    def add_segmentation(self, stamp: int, segmentation: Any, now: float) -> list[Pair]:
        """Pair a segmentation, or keep it until its image comes; returns the pairs made."""
        self.counts.segmentations += 1
        self._age(now)
        if stamp in self._gone:
            self._report(
                DropReason.IMAGE_LEFT_BUFFER,
                f"the image of segmentation {format_stamp(stamp)} has left the buffer ({self._duration:g} s, "
                f"{self._capacity} images): the segmenter is slower than that; raise buffer_seconds or "
                "buffer_images",
            )
            return []
        if len(self._waiting) >= MAX_PENDING:
            self._give_up(*self._waiting.popleft())
        self._waiting.append((stamp, _Timed(segmentation, now)))
        return self._match(now)

    def images_after(self, stamp: int, now: float) -> list[Pair]:
        """The images in the buffer that are newer than a stamp, oldest first, without segmentations.

        Of those whose camera_info is still on its way, none.
        """
        found = []
        for own in sorted(one for one in self._images if one > stamp):
            image, info = self._images[own], self._infos.get(own)
            hurried = self._infos_are_stamped and now - image.received < INFO_PATIENCE
            payload = info.payload if info is not None else None if hurried else self._newest_info
            if payload is not None:
                found.append(Pair(own, image.payload, payload, None, image.received, now, self.epoch))
        return found

    def expire(self, now: float) -> list[Pair]:
        """Drop what is too old; called now and then, because silence on a topic is a reason too.

        Returns the pairs that have waited long enough for a camera_info of their own.
        """
        self._age(now)
        pairs = self._match(now)
        # Oldest first, so the ones that are out of patience are at the front.
        while self._waiting and now - self._waiting[0][1].received > self._patience:
            self._give_up(*self._waiting.popleft())
        return pairs

    def clear(self, why: str) -> None:
        """Forget everything but the counts; segmentations that wait are reported with ``why``."""
        for stamp, _ in self._waiting:
            self._report(
                DropReason.CLEARED, f"segmentation {format_stamp(stamp)} waited for its image when {why}"
            )
        for kept in (self._images, self._infos, self._waiting, self._gone):
            kept.clear()
        self._newest_info = self._newest_stamp = None

    def _notice_jump(self, stamp: int, now: float) -> None:
        """Look at an image's stamp. camera_infos may be latched and segmentations late: they tell nothing."""
        newest = self._newest_stamp
        if newest is None or stamp >= newest - JUMP_BACK:
            self._newest_stamp = stamp if newest is None else max(newest, stamp)
            return
        images = len(self._images)

        def fresh(other: int, timed: _Timed) -> bool:
            """Whether this is of the new time already: it may have overtaken its image."""
            return other < newest - JUMP_BACK and now - timed.received < INFO_PATIENCE

        infos = [entry for entry in self._infos.items() if fresh(*entry)]
        waiting = [entry for entry in self._waiting if fresh(*entry)]
        self._waiting = deque(entry for entry in self._waiting if not fresh(*entry))
        latched = None if self._infos_are_stamped else self._newest_info
        self.clear("time started over")
        self._infos.update(infos)
        self._waiting.extend(waiting)
        self._newest_info = infos[-1][1].payload if infos else latched
        self._newest_stamp = stamp
        self.epoch += 1
        self.counts.jumps += 1
        self._on_jump(
            f"time has jumped back from {format_stamp(newest)} to {format_stamp(stamp)}, as when a recording "
            f"starts over: {images} images and all instances are forgotten"
        )

    def _match(self, now: float) -> list[Pair]:
        pairs: list[Pair] = []
        still: deque[tuple[int, _Timed]] = deque()
        for stamp, segmentation in self._waiting:
            image = self._images.get(stamp)
            own_info = self._infos.get(stamp)
            info = own_info.payload if own_info is not None else self._newest_info
            hurried = self._infos_are_stamped and now - segmentation.received < INFO_PATIENCE
            if image is None or info is None or (own_info is None and hurried):
                still.append((stamp, segmentation))
                continue
            received = segmentation.received
            pairs.append(Pair(stamp, image.payload, info, segmentation.payload, received, now, self.epoch))
        self._waiting = still
        self.counts.pairs += len(pairs)
        return pairs

    def _age(self, now: float) -> None:
        while self._images and (
            len(self._images) > self._capacity
            or now - next(iter(self._images.values())).received > self._duration
        ):
            stamp, _ = self._images.popitem(last=False)
            self._gone[stamp] = None
            if len(self._gone) > _REMEMBERED_STAMPS:
                self._gone.popitem(last=False)
        while self._infos and (
            len(self._infos) > self._capacity
            or now - next(iter(self._infos.values())).received > self._duration
        ):
            self._infos.popitem(last=False)

    def _give_up(self, stamp: int, segmentation: _Timed) -> None:
        if stamp in self._images:
            self._report(
                DropReason.NO_CAMERA_INFO,
                f"segmentation {format_stamp(stamp)} has its image, but no camera_info has come: "
                "check the camera_info topic's name and its QoS",
            )
            return
        if self._images:
            nearest = min(self._images, key=lambda other: abs(other - stamp))
            hint = (
                f"the nearest of {len(self._images)} buffered images is {abs(nearest - stamp) / 1e6:.3f} ms "
                "away; "
                "the segmenter must copy the image's header.stamp; if it does, "
                "the image was lost on its way (parameter image_reliability)"
            )
        else:
            hint = "no image at all is in the buffer; check the image topic's name and its QoS"
        self._report(
            DropReason.NO_IMAGE, f"no image has the stamp of segmentation {format_stamp(stamp)}: {hint}"
        )


class HalfJoin:
    """Puts segmentations together that come as two messages of one stamp, like boxes and a label image.

    Args:
        names: of the two halves, for the messages.
        report: called with a reason and a message for every half that stays alone.
        patience: seconds that a half waits for the other.
    """

    def __init__(
        self, names: tuple[str, str], report: Callable[[DropReason, str], None], patience: float = 1.0
    ) -> None:
        self._names = names
        self._report = report
        self._patience = patience
        self._waiting: tuple[OrderedDict[int, _Timed], OrderedDict[int, _Timed]] = (
            OrderedDict(),
            OrderedDict(),
        )

    def add(self, half: int, stamp: int, message: Any, now: float) -> tuple[Any, Any] | None:
        """Keep one half (0 or 1); returns both once they are there."""
        other = self._waiting[1 - half].pop(stamp, None)
        if other is not None:
            return (message, other.payload) if half == 0 else (other.payload, message)
        own = self._waiting[half]
        own.pop(stamp, None)
        own[stamp] = _Timed(message, now)
        if len(own) > MAX_HALVES:
            self._give_up(half)
        return None

    def expire(self, now: float) -> None:
        """Give up the halves that have waited too long."""
        for half, waiting in enumerate(self._waiting):
            while waiting and now - next(iter(waiting.values())).received > self._patience:
                self._give_up(half)

    def clear(self) -> None:
        """Forget the halves that wait, which are reported."""
        for half, waiting in enumerate(self._waiting):
            while waiting:
                self._give_up(half)

    def _give_up(self, half: int) -> None:
        stamp, _ = self._waiting[half].popitem(last=False)
        mine, other = self._names[half], self._names[1 - half]
        self._report(
            DropReason.INCOMPLETE_SEGMENTATION,
            f"{mine} has a message with stamp {format_stamp(stamp)}, but {other} has none: publish both with "
            "the stamp of the image they were made from",
        )


def format_stamp(stamp: int) -> str:
    """``12.345678901`` for nanoseconds, the way ROS prints a stamp."""
    return f"{stamp // 1_000_000_000}.{stamp % 1_000_000_000:09d}"
