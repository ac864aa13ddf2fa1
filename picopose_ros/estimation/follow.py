"""Following: poses from image to image, without masks and without retrieval.

An object's next pose is predicted by a constant velocity, and by the camera's own motion where that is
known. The object is rendered there, its silhouette is the mask, and one step of refinement compares it with
the image. The score of that step says what came of it: an object is *followed*, *uncertain*, or *lost*.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from picopose_ros.estimation.follow_look import (
    HISTORY,
    Comparer,
    FollowSettings,
    Outcome,
    Target,
    Try,
    Verdict,
    centre_of,
    look,
)
from picopose_ros.estimation.results import ObjectPose
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.covariance import pose_error
from picopose_ros.geometry.least_squares import moved
from picopose_ros.geometry.poses import invert_transform, rotation_angle_deg
from picopose_ros.geometry.rectify import straighten
from picopose_ros.templates.posed import PosedView

__all__ = ["Comparer", "FollowSettings", "Followed", "Follower", "Image", "Nearest", "Status", "Verdict"]

_VELOCITY_GAIN = 0.5
"""What the last motion counts in the velocity, against what was known before."""

_LONGEST_PREDICTION = 0.5
"""Seconds for which a velocity is believed."""

_DISAGREE = 16.8
"""Squared Mahalanobis distance of two poses that happens once in a hundred times (6 degrees of freedom)."""

_EXPLAINED = 0.75
"""Overlap (IoU) of a mask with the silhouette of a followed object, from which on it says nothing new."""


@dataclass(frozen=True)
class Followed:
    """An object in an image.

    Attributes:
        key: of the object. verdict: what it is. pose: to be published, unless it is lost.
        reason: why it isn't simply followed; else empty.
    """

    key: str
    verdict: Verdict
    pose: ObjectPose
    reason: str = ""


@dataclass(frozen=True)
class Status:
    """How an object fares, for those who ask.

    Attributes:
        verdict, reason: of the newest image. since: stamp (s) from which on that is so.
        seen: stamp of the newest image in which a mask showed it. stamp: of its last pose.
    """

    verdict: Verdict
    reason: str
    since: float
    seen: float
    stamp: float


@dataclass(frozen=True)
class Image:
    """An image that an object may be carried to.

    Attributes:
        stamp: seconds. read: gives rgb (H, W, 3) uint8 and the camera.
        T_fixed_cam: (4, 4) camera -> a frame that stands still, where that is known.
    """

    stamp: float
    read: Callable[[], tuple[np.ndarray, CameraModel]]
    T_fixed_cam: np.ndarray | None = None


Nearest = Callable[[str, np.ndarray, np.ndarray], np.ndarray]
"""Class, pose (4, 4) and rotation (3, 3) -> the equivalent pose (4, 4) that is nearest to the rotation."""


class Follower:
    """The objects that are followed. For one thread.

    Args:
        comparer: the estimator's part; may be replaced when the objects change.
        settings: the measured ones if None.
        nearest: makes poses of symmetric objects comparable.

    Attributes:
        comparer, settings, nearest: see above.
    """

    def __init__(
        self,
        comparer: Comparer,
        settings: FollowSettings | None = None,
        nearest: Nearest = lambda class_id, T, R: T,
    ) -> None:
        self.comparer = comparer
        self.settings = settings or FollowSettings()
        self.nearest = nearest
        self._objects: dict[str, Target] = {}
        self._numbers = count()

    def __len__(self) -> int:
        """Objects that are followed or looked for."""
        return len(self._objects)

    @property
    def status(self) -> dict[str, Status]:
        """Of every object, by its key."""
        return {
            key: Status(one.verdict, one.reason, one.since, one.seen, one.stamp)
            for key, one in self._objects.items()
        }

    def class_of(self, key: str) -> str:
        """Class id of an object."""
        return self._objects[key].pose.class_id

    def pose_of(self, key: str) -> ObjectPose:
        """The last pose of an object that was believed."""
        return self._objects[key].pose

    def forget(self, keys: Iterable[str] | None = None) -> None:
        """Follow these no more; None: none at all."""
        for key in list(self._objects if keys is None else keys):
            self._objects.pop(key, None)

    def see_all(
        self,
        poses: Sequence[ObjectPose],
        stamp: float,
        farthest: float,
        T_fixed_cam: np.ndarray | None = None,
        image: tuple[np.ndarray, CameraModel] | None = None,
    ) -> list[str]:
        """Take the poses that the masks of an image gave, see `match` and `see`; returns their keys.

        Args:
            image: rgb (H, W, 3) uint8 and the camera; helps to find the objects in the next image.
        """
        rgb = None if image is None else straighten([image[0]], image[1])[0]
        known = self.match(poses, stamp, farthest)
        keys = [key or f"{pose.class_id}#{next(self._numbers)}" for key, pose in zip(known, poses)]
        for key, pose in zip(keys, poses):
            if self.see(key, pose, stamp, T_fixed_cam) and self._objects[key].stamp == stamp:
                self._objects[key].image = rgb
        return keys

    def unexplained(
        self,
        segments: Sequence[tuple[str, np.ndarray]],
        stamp: float,
        camera: CameraModel,
        keys: Iterable[str] | None = None,
    ) -> list[int]:
        """Which masks of an image that was passed are worth a pose.

        A mask that shows an object where it was followed to then says nothing new. Of the objects that all
        the masks agree with, the one that was estimated longest ago is estimated again all the same.

        Args:
            segments: class id of a bank and mask (H, W) bool, as the camera saw it. stamp: of the image, s.
            camera: of the image. keys: of the objects that count; None: all.

        Returns:
            Indices of the segments that are to be estimated, in order.
        """
        masks = straighten([mask for _, mask in segments], camera)
        known = [self._objects[key] for key in (self._objects if keys is None else keys)]
        known = [one for one in known if one.verdict is Verdict.FOLLOWED]
        then = {one.key: before[0] for one in known if (before := self.pose_at(one.key, stamp))}
        known = [one for one in known if one.key in then]
        views = self.comparer.render([(one.pose.class_id, then[one.key]) for one in known]) if known else []
        options = []
        for one, view in zip(known, views):
            if isinstance(view, PosedView):
                whole = view.silhouette(camera.K, camera.height, camera.width)
                for i, (class_id, _) in enumerate(segments):
                    if class_id == one.pose.class_id:
                        others = [mask for k, mask in enumerate(masks) if k != i]
                        free = whole & ~np.any(others, 0) if others else whole
                        overlap = (free & masks[i]).sum() / max((free | masks[i]).sum(), 1)
                        options.append((overlap, i, one))
        explained: dict[int, Target] = {}
        for overlap, i, one in sorted(options, key=lambda option: -option[0]):
            if overlap >= _EXPLAINED and i not in explained and one not in explained.values():
                explained[i] = one
        if explained:
            del explained[min(explained, key=lambda i: explained[i].estimated)]
        for one in explained.values():
            one.seen = max(one.seen, stamp)
        return [i for i in range(len(segments)) if i not in explained]

    def see(self, key: str, pose: ObjectPose, stamp: float, T_fixed_cam: np.ndarray | None = None) -> bool:
        """Take the pose that a mask gave; a new key begins to be followed.

        Of an object that was followed meanwhile to a later image, the pose corrects where it is now if the
        two disagree beyond both their uncertainties: it is moved by as much, in its own frame.

        Args:
            key: of the object. pose: in the image of ``stamp`` (s).
            T_fixed_cam: (4, 4) camera -> a frame that stands still, then.

        Returns:
            Whether the pose is a new one or corrects the one that was followed.
        """
        one = self._objects.get(key)
        if one is None or one.verdict is Verdict.LOST:
            self._objects[key] = self._begun(key, pose, stamp, T_fixed_cam)
            return True
        one.seen, one.estimated = max(one.seen, stamp), max(one.estimated, stamp)
        before = self.pose_at(key, stamp)
        if before is None:
            if stamp > one.stamp:
                self._renew(one, pose, stamp, T_fixed_cam)
            return stamp >= one.stamp
        T_then, covariance = before
        T_mask = self.nearest(pose.class_id, pose.T_cam_obj, T_then[:3, :3])
        off = pose_error(T_then, T_mask)
        spread = covariance + pose.covariance
        agree = off @ np.linalg.solve(spread, off) < _DISAGREE
        # An uncertain one is what masks are waited for.
        if agree and one.verdict is Verdict.FOLLOWED:
            return False
        correction = invert_transform(T_then) @ T_mask
        T_now = one.pose.T_cam_obj @ correction
        one.pose = replace(one.pose, T_cam_obj=T_now, covariance=pose.covariance)
        one.history = deque(((s, T @ correction, C) for s, T, C in one.history), maxlen=HISTORY)
        one.view, one.sure, one.image = None, one.stamp, None
        self._judge(one, Verdict.FOLLOWED, "", one.stamp)
        return True

    def pose_at(self, key: str, stamp: float) -> tuple[np.ndarray, np.ndarray] | None:
        """Pose (4, 4) and covariance (6, 6) that an object had at a stamp.

        Between two images the motion is taken as steady. None where it wasn't followed then.
        """
        one = self._objects.get(key)
        if one is None or not one.history or not one.history[0][0] <= stamp <= one.history[-1][0]:
            return None
        rows = list(one.history)
        after = next(i for i, row in enumerate(rows) if row[0] >= stamp)
        (t1, T1, C1) = rows[after]
        if t1 == stamp or after == 0:
            return T1, C1
        (t0, T0, _) = rows[after - 1]
        return moved(T0, pose_error(T0, T1) * (stamp - t0) / (t1 - t0)), C1

    def match(self, poses: Sequence[ObjectPose], stamp: float, farthest: float) -> list[str | None]:
        """Which objects the poses of a mask's image are: those that were near them then.

        Pairs are taken nearest first, at most ``farthest`` metres apart (three times as far along the ray).
        """
        options = []
        for i, pose in enumerate(poses):
            centre = centre_of(pose, pose.T_cam_obj)
            for key, one in self._objects.items():
                if one.pose.class_id != pose.class_id:
                    continue
                then = self.pose_at(key, stamp)
                T = one.pose.T_cam_obj if then is None else then[0]
                apart = centre_of(one.pose, T) - centre
                ray = centre / np.linalg.norm(centre)
                along = apart @ ray
                distance = float(np.hypot(np.linalg.norm(apart - along * ray), along / 3))
                if distance <= farthest:
                    turn = rotation_angle_deg(
                        self.nearest(pose.class_id, pose.T_cam_obj, T[:3, :3])[:3, :3], T[:3, :3]
                    )
                    options.append((distance + farthest * min(turn, 90.0) / 900.0, i, key))
        found: list[str | None] = [None] * len(poses)
        for _, i, key in sorted(options):
            if found[i] is None and key not in found:
                found[i] = key
        return found

    def step(
        self,
        rgb: np.ndarray,
        camera: CameraModel,
        stamp: float,
        T_fixed_cam: np.ndarray | None = None,
        keys: Sequence[str] | None = None,
    ) -> list[Followed]:
        """Follow the objects to an image; all go through the network at once.

        Args:
            rgb: (H, W, 3) uint8, as the camera saw it. camera: of it. stamp: seconds, of the image.
            T_fixed_cam: (4, 4) camera -> a frame that stands still; then what the camera moves by is known.
            keys: of the objects; None: all. Those with a pose of this image or a later one stay.

        Returns:
            One per object that was looked for.
        """
        chosen = [self._objects[key] for key in (self._objects if keys is None else keys)]
        outcomes = self._look([one for one in chosen if one.stamp < stamp], rgb, camera, stamp, T_fixed_cam)
        return self._commit(outcomes, stamp, T_fixed_cam)

    def carry(self, images: Sequence[Image], keys: Sequence[str]) -> list[Followed]:
        """Carry objects through images, oldest first, to the newest one, in as few steps as needed.

        One that can't be followed to the newest image at once goes through the one in the middle, and so on.
        The first shows how the others may have moved: it is often the camera that moves.

        Returns:
            One per object that is in the newest image or was lost on the way.
        """
        newest = images[-1]
        behind = [one for key in keys if (one := self._objects[key]).stamp < newest.stamp]
        behind.sort(key=lambda one: -one.pose.confidence)
        results: list[Followed] = []
        first = None
        while behind and first is None:
            one = behind.pop(0)
            results += self._carry_one(one, images)
            if one.verdict is Verdict.FOLLOWED and one.stamp == newest.stamp:
                first = one
        if behind:
            found = self._look(behind, *newest.read(), newest.stamp, newest.T_fixed_cam, first)
            sure = {key: o for key, o in found.items() if o.score >= self.settings.followed}
            results += self._commit(sure, newest.stamp, newest.T_fixed_cam)
            for one in behind:
                if one.key not in sure:
                    results += self._carry_one(one, images)
        return results

    def _carry_one(self, one: Target, images: Sequence[Image]) -> list[Followed]:
        """One to the newest image, or by way of the one in the middle, and so on."""
        todo = [image for image in images if image.stamp > one.stamp]
        last: list[Followed] = []
        reach = len(todo)
        while todo and not (last and last[0].verdict is Verdict.LOST):
            # Not much further than it came the last time.
            reach = min(len(todo) - 1, 2 * reach + 1)
            while True:
                image = todo[reach]
                outcomes = self._look([one], *image.read(), image.stamp, image.T_fixed_cam)
                if reach == 0 or outcomes[one.key].score >= self.settings.followed:
                    break
                reach //= 2
            last = self._commit(outcomes, image.stamp, image.T_fixed_cam)
            todo = todo[reach + 1 :]
        return last

    def _begun(self, key: str, pose: ObjectPose, stamp: float, T_fixed_cam: np.ndarray | None) -> Target:
        one = Target(key, pose, stamp, stamp, stamp, T_fixed_cam, sure=stamp, estimated=stamp)
        one.history.append((stamp, pose.T_cam_obj, pose.covariance))
        return one

    def _renew(self, one: Target, pose: ObjectPose, stamp: float, T_fixed_cam: np.ndarray | None) -> None:
        """A mask's pose that is newer than the last followed one."""
        T = self.nearest(pose.class_id, pose.T_cam_obj, one.pose.T_cam_obj[:3, :3])
        one.pose = replace(pose, T_cam_obj=T)
        one.stamp, one.T_fixed_cam, one.sure, one.view = stamp, T_fixed_cam, stamp, None
        one.image = None
        one.history.append((stamp, T, pose.covariance))
        self._judge(one, Verdict.FOLLOWED, "", stamp)

    def _tries(
        self,
        one: Target,
        stamp: float,
        T_fixed_cam: np.ndarray | None,
        other: tuple[Target, np.ndarray] | None = None,
    ) -> list[Try]:
        """Where an object is looked for: where its velocity takes it; a lost one where it was last, too, or
        where it is now if it moved as another one did, whose pose now is given."""
        T, velocity = one.pose.T_cam_obj, one.velocity
        if T_fixed_cam is not None and one.T_fixed_cam is not None:
            motion = invert_transform(T_fixed_cam) @ one.T_fixed_cam
            T = motion @ T
            velocity = np.concatenate([motion[:3, :3] @ velocity[:3], motion[:3, :3] @ velocity[3:]])
        ahead = min(stamp - one.stamp, _LONGEST_PREDICTION)
        s = self.settings
        spread = np.r_[np.full(3, (s.speed * ahead) ** 2), np.full(3, (s.spin * ahead) ** 2)]
        prior = one.pose.covariance + np.diag(spread + 1e-10)
        tries = [Try(one, moved(T, velocity * ahead), prior)]
        then = None if other is None or T_fixed_cam is not None else self.pose_at(other[0].key, one.stamp)
        if then is not None:
            T = other[1] @ invert_transform(then[0]) @ T
        if (then is not None or one.verdict is Verdict.LOST) and not np.allclose(tries[0].T, T, atol=1e-3):
            tries.append(Try(one, T, prior))
        return tries

    def _look(
        self,
        objects: Sequence[Target],
        rgb: np.ndarray,
        camera: CameraModel,
        stamp: float,
        T_fixed_cam: np.ndarray | None,
        moved_alike: Target | None = None,
    ) -> dict[str, Outcome]:
        """The best outcome per object; changes nothing.

        Args:
            moved_alike: has its pose of the stamp already, and the others may have moved as it did.
        """
        rgb = straighten([rgb], camera)[0]
        tries: list[Try] = []
        if moved_alike is not None:
            now = moved_alike, moved_alike.pose.T_cam_obj
            for one in objects:  # the last try is the one by that motion
                tries.append(self._tries(one, stamp, T_fixed_cam, now)[-1])
            return look(self.comparer, self.settings, tries, rgb, camera.K)
        lost = [one for one in objects if one.verdict is Verdict.LOST]
        for one in objects:
            if one not in lost:
                tries += self._tries(one, stamp, T_fixed_cam)
        sure = [t for t in tries if t.target.verdict is Verdict.FOLLOWED]
        best = max(sure, key=lambda t: t.target.pose.confidence, default=None)
        for one in lost:
            tries += self._tries(one, stamp, T_fixed_cam, None if best is None else (best.target, best.T))
        return look(self.comparer, self.settings, tries, rgb, camera.K)

    def _commit(
        self, outcomes: Mapping[str, Outcome], stamp: float, T_fixed_cam: np.ndarray | None
    ) -> list[Followed]:
        """Take what was found, judge it, and let go of what has been lost for too long."""
        results = []
        for key, outcome in outcomes.items():
            one, s = outcome.attempt.target, self.settings
            was_lost = one.verdict is Verdict.LOST
            reason, score = outcome.reason, outcome.score
            if outcome.step is not None and score < s.followed:
                reason = f"image and rendering agree little (score {score:.2f})"
            good = outcome.step is not None and score >= s.followed
            usable = good or (not was_lost and (outcome.covered or score >= s.uncertain))
            patient = good or stamp - one.sure <= s.patience
            if usable and patient:
                self._advance(one, outcome, stamp, T_fixed_cam, good)
                self._judge(one, Verdict.FOLLOWED if good else Verdict.UNCERTAIN, reason, stamp)
            else:
                if usable:
                    reason += f", for more than {s.patience:g} s"
                self._judge(one, Verdict.LOST, reason or one.reason, stamp)
                if stamp - one.sure > s.recovery:
                    self._objects.pop(key, None)
            results.append(Followed(key, one.verdict, self._published(one, outcome), one.reason))
        return results

    def _advance(
        self, one: Target, outcome: Outcome, stamp: float, T_fixed_cam: np.ndarray | None, good: bool
    ) -> None:
        """The object's next pose, and its velocity where the pose is sure."""
        T, covariance = outcome.attempt.T, outcome.attempt.prior
        if outcome.step is not None:
            T, covariance = outcome.step.T_cam_obj, outcome.step.covariance
        elapsed = stamp - one.stamp
        if good and one.verdict is not Verdict.LOST:
            start = one.pose.T_cam_obj
            if T_fixed_cam is not None and one.T_fixed_cam is not None:
                start = invert_transform(T_fixed_cam) @ one.T_fixed_cam @ start
            new = pose_error(start, T) / elapsed
            one.velocity = one.velocity + _VELOCITY_GAIN * (new - one.velocity)
        else:
            one.velocity = one.velocity * (1 - _VELOCITY_GAIN)
        if good:
            one.sure = stamp
        one.pose = replace(one.pose, T_cam_obj=T, covariance=covariance, confidence=outcome.score)
        one.stamp, one.T_fixed_cam = stamp, T_fixed_cam
        one.view = outcome.view
        if outcome.step is not None:
            one.image = outcome.rgb
        one.history.append((stamp, T, covariance))

    def _published(self, one: Target, outcome: Outcome) -> ObjectPose:
        if one.verdict is Verdict.UNCERTAIN:
            return replace(one.pose, covariance=one.pose.covariance * self.settings.widened)
        step = outcome.step
        if one.verdict is Verdict.LOST or step is None:
            return one.pose
        return replace(one.pose, inliers=step.inliers, inlier_ratio=step.inlier_ratio, source="offsets")

    def _judge(self, one: Target, verdict: Verdict, reason: str, stamp: float) -> None:
        if verdict is not one.verdict:
            one.since = stamp
        one.verdict, one.reason = verdict, reason
