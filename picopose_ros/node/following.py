"""The node's part of following: the newest image goes to the follower, what it finds is published."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from picopose_ros.estimation.follow import Followed, Follower, Image, Verdict
from picopose_ros.estimation.follow_look import EARLY
from picopose_ros.estimator import ObjectPose
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.instances import NamedPose
from picopose_ros.messages.frames import Frame, FrameReader, FrameRefused
from picopose_ros.messages.reasons import DropReason
from picopose_ros.node.answers import Answers
from picopose_ros.node.diagnostics import Latencies
from picopose_ros.node.drops import DropLog
from picopose_ros.node.engine import Engine
from picopose_ros.node.listener import Listener
from picopose_ros.node.pairing import Pair, format_stamp
from picopose_ros.node.parameters import NodeParameters

_REMEMBERED = 200
"""Images of which it is known what was published: late masks add what is missing there."""


class Following:
    """Follows the instances of a node on its worker's thread.

    :meth:`open`, then :meth:`take` for what masks gave and :meth:`follow_newest` when images have come.

    Args:
        answers: publishes. listener: has the images. drops, latencies: what happens is recorded there.
    """

    def __init__(self, answers: Answers, listener: Listener, drops: DropLog, latencies: Latencies) -> None:
        self._answers, self._listener = answers, listener
        self._drops, self._latencies = drops, latencies
        self._engine: Engine | None = None
        self._reader: FrameReader | None = None
        self._follower: Follower | None = None
        self._newest = 0  # stamp (ns) of the newest image that was answered
        self._reset_at = 0  # stamp (ns) of the newest image that had come at the last reset
        self._published: dict[int, set[str]] = {}  # by stamp of the latest images, ns: objects
        self._epoch = 0
        # For other threads.
        self._lock = threading.Lock()
        self._report: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._waiting = False
        self._all, self._others = True, set[str]()
        self.frames = 0

    def open(self, engine: Engine, reader: FrameReader) -> None:
        """Begin with a new engine; ``reader`` reads the images."""
        self._engine = engine
        self._reader = FrameReader(
            reader.topics, lambda *_: ([], []), rectified=reader.rectified, depth=reader.depth
        )
        self._follower = Follower(engine.estimator, nearest=self._answers.nearest)
        self.forget()

    def close(self) -> None:
        """Let go of the engine: its network and banks are freed with the last that holds them."""
        self.forget()
        self._engine = self._reader = self._follower = None

    @property
    def report(self) -> dict[str, str]:
        """By the name of an instance, how it fares; for any thread."""
        with self._lock:
            return dict(self._report)

    def forget(self) -> None:
        """Follow nothing any more, and take images of whatever time."""
        self._follow_nothing()
        self._newest, self._reset_at, self._published = 0, 0, {}

    def awaits(self, pair: Pair, p: NodeParameters) -> bool:
        """Whether the masks of an image are to be answered; those that are not are counted.

        Masks of an image that had come before a reset would bring back what was to be forgotten. Where
        ``follow`` was set to false, those of an image up to the newest that was followed would take
        transforms back in time; with the first later one everything that is followed is forgotten.
        """
        said = ""
        if p.follow:
            if pair.epoch < self._epoch:
                said = "from before the images' time started over"
            elif pair.epoch == self._epoch and pair.stamp <= self._reset_at:
                said = "of an image that had come before the reset"
        elif pair.epoch == self._epoch and pair.stamp <= self._newest:
            said = "of an image that was followed before the parameter follow was set to false"
        else:
            self.forget()
        if said:
            self._drops.record(DropReason.CLEARED, f"segmentation {format_stamp(pair.stamp)} is {said}")
        return not said

    def reset(self) -> None:
        """Follow nothing until masks of a later image come; images stay answered in order."""
        self._follow_nothing()
        images = self._listener.images_after(self._newest)
        self._reset_at = images[-1].stamp if images else self._newest

    def _follow_nothing(self) -> None:
        if self._follower is not None:
            self._follower.forget()
        with self._lock:
            self._report, self._names, self._waiting = {}, {}, False
            self._all, self._others = True, set()

    def choose(self, name: str, follow: bool, known: Sequence[str]) -> tuple[bool, str]:
        """Follow an instance from its next mask on, or don't; for any thread.

        Args:
            name: of the instance; empty: all, also those to come. follow: whether. known: names there are.

        Returns:
            Whether that was done, and what to say about it.
        """
        if name and name not in known:
            return False, f"no instance is called '{name}': there are {', '.join(known) or 'none'}"
        with self._lock:
            if not name:
                self._all, self._others = follow, set()
            elif follow == self._all:
                self._others.discard(name)
            else:
                self._others.add(name)
        told = "is followed" if follow else "is published with its masks only"
        return True, f"{name or 'every instance'} {told}"

    def _followed(self, keys: Iterable[str]) -> list[str]:
        """Those of some objects that are to be followed."""
        with self._lock:
            return [key for key in keys if (self._names.get(key) in self._others) != self._all]

    def wanted(self, p: NodeParameters, call: Callable[[Callable[[], None]], object]) -> None:
        """An image has come: have the newest one followed, unless that is about to happen; for any thread.

        Args:
            p: the node's parameters. call: has something done on the worker's thread.
        """
        with self._lock:
            if not p.follow or self._waiting:
                return
            self._waiting = True
        call(lambda: self._follow_guarded(p))

    def _follow_guarded(self, p: NodeParameters) -> None:
        try:
            self.follow_newest(p)
        except Exception as error:  # noqa: BLE001 (the next image may be fine)
            self._drops.record_crash(error)

    def follow_newest(self, p: NodeParameters) -> None:
        """Follow to the newest image, if the rate allows for it."""
        with self._lock:
            self._waiting = False
        if not self._follower:
            return
        self._use_time(self._listener.epoch)
        images = self._listener.images_after(self._newest)
        if not images or images[-1].epoch != self._epoch:
            return
        pair = images[-1]
        if pair.stamp - self._newest < EARLY * 1e9 / p.follow_rate:
            return
        started = time.monotonic()
        self._use_objects()
        keys = self._followed(self._follower.status)
        frame = self._read(pair) if keys else None
        if frame is None:
            return
        T_fixed_cam = self._answers.camera_at(pair)
        found = self._follower.step(frame.rgb, frame.camera, pair.stamp * 1e-9, T_fixed_cam, keys)
        self._latencies.record({"follow": 1e3 * (time.monotonic() - started)})
        self._publish(found, pair, frame, p)

    def only_new(self, frame: Frame, pair: Pair) -> Frame:
        """A frame without the segments that show what was followed where it was followed to.

        Those of an image that wasn't passed yet all stay: its answer is made of them.
        """
        if not self._follower or pair.epoch != self._epoch or pair.stamp > self._newest:
            return frame
        classes = [self._engine.objects.class_of(segment.class_id) or "" for segment in frame.segments]
        masks = [np.zeros_like(s.mask) if s.is_box else s.mask for s in frame.segments]
        keys = self._followed(self._follower.status)
        new = self._follower.unexplained(list(zip(classes, masks)), pair.stamp * 1e-9, frame.camera, keys)
        return replace(frame, segments=[frame.segments[i] for i in new])

    def take(
        self, poses: list[ObjectPose], pair: Pair, frame: Frame, p: NodeParameters, spent: float
    ) -> None:
        """Take the poses that a segmentation gave, and carry them to the newest image.

        They are published for their own image if no later one was answered yet.

        Args:
            poses: of the image, whose masks were awaited (`awaits`). pair, frame: the image.
            spent: seconds that the estimate took.
        """
        self._use_time(pair.epoch)
        self._use_objects()
        self._forget_unseen(pair.stamp * 1e-9 - p.instance_timeout)
        stamp, follower = pair.stamp * 1e-9, self._follower
        late = pair.stamp <= self._newest
        image = frame.rgb, frame.camera
        keys = follower.see_all(poses, stamp, p.instance_distance, self._answers.camera_at(pair), image)
        if not late:
            self._newest = pair.stamp
            self._note(pair.stamp, keys)
            named, retired = self._answers.publish(poses, pair, p, keys, spent)
            self._remember(keys, named)
            self._answers.show(named, retired, frame, pair.image.header)
        else:
            self._publish_late(keys, pair, frame, p)
        keys = self._followed(keys)
        images = self._listener.images_after(pair.stamp)
        if images and keys and images[-1].epoch == self._epoch:
            found = follower.carry([self._image(one) for one in images], keys)
            newest = images[-1]
            if newest.stamp > self._newest:
                others = [key for key in self._followed(follower.status) if key not in keys]
                shown = self._read(newest)
                if shown is not None:
                    found += follower.step(
                        shown.rgb, shown.camera, newest.stamp * 1e-9, self._answers.camera_at(newest), others
                    )
                    self._publish(found, newest, shown, p)
        self._tell()

    def _publish_late(self, keys: Sequence[str], pair: Pair, frame: Frame, p: NodeParameters) -> None:
        """Publish what the answer to the image of late masks, or to a later one, said nothing of: what is not
        followed, and what is new in the newest image."""
        status, said = self._follower.status, set(self._published.get(pair.stamp, ()))
        if pair.stamp < self._newest:
            said |= set(self._followed(keys))
        late = [key for key in keys if key not in said and status[key].stamp == pair.stamp * 1e-9]
        if late:
            poses = [self._follower.pose_of(key) for key in late]
            named, retired = self._answers.publish(poses, pair, p, late)
            self._remember(late, named)
            self._note(pair.stamp, late)
            self._answers.show(named, retired, frame, pair.image.header)

    def _use_time(self, epoch: int) -> None:
        """What is known from before the images' time started over is forgotten."""
        if epoch != self._epoch:
            self.forget()
            self._epoch = epoch

    def _use_objects(self) -> None:
        """Those that are loaded now."""
        self._follower.comparer = self._engine.estimator
        gone = [
            key
            for key in self._follower.status
            if self._follower.class_of(key) not in self._engine.objects.banks
        ]
        self._follower.forget(gone)

    def _forget_unseen(self, stamp: float) -> None:
        """Those that are not followed and that no mask has shown since a stamp (s)."""
        followed = self._followed(self._follower.status)
        self._follower.forget(
            [k for k, one in self._follower.status.items() if k not in followed and one.seen < stamp]
        )

    def _read(self, pair: Pair) -> Frame | None:
        try:
            return self._reader.read(pair.image, pair.camera_info, None)
        except FrameRefused as refused:
            self._drops.record(refused.reason, str(refused))
            return None

    def _image(self, pair: Pair) -> Image:
        def read() -> tuple[np.ndarray, CameraModel]:
            frame = self._reader.read(pair.image, pair.camera_info, None)
            return frame.rgb, frame.camera

        return Image(pair.stamp * 1e-9, read, self._answers.camera_at(pair))

    def _publish(self, found: list[Followed], pair: Pair, frame: Frame, p: NodeParameters) -> None:
        shown = [one for one in found if one.verdict is not Verdict.LOST]
        keys = [one.key for one in shown]
        self._newest = pair.stamp
        self._note(pair.stamp, keys)
        self.frames += 1
        named, retired = self._answers.publish([one.pose for one in shown], pair, p, keys)
        self._remember(keys, named)
        self._answers.show(named, retired, frame, pair.image.header)
        self._tell()

    def _note(self, stamp: int, keys: Iterable[str]) -> None:
        """These are published with an image's stamp (ns): once per image is enough."""
        self._published.setdefault(stamp, set()).update(keys)
        while len(self._published) > _REMEMBERED:
            del self._published[next(iter(self._published))]

    def _remember(self, keys: list[str], named: list[NamedPose]) -> None:
        self._names |= {key: one.name for key, one in zip(keys, named)}

    def _tell(self) -> None:
        """Write down how the objects fare."""
        report, followed = {}, set(self._followed(self._follower.status))
        for key, one in self._follower.status.items():
            kept = one.verdict.value if key in followed else "not followed"
            text = f"{kept} since {one.since:.3f}, last seen by a mask {one.seen:.3f}"
            report[self._names.get(key, key)] = text + (f": {one.reason}" if one.reason else "")
        with self._lock:
            self._report = report
            self._names = {key: name for key, name in self._names.items() if key in self._follower.status}
