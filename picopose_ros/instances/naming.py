"""Instances over time: which pose of a frame is which object of the frames before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import linear_sum_assignment

from picopose_ros.geometry.covariance import move_covariance
from picopose_ros.geometry.poses import invert_transform, rotation_angle_deg
from picopose_ros.instances.smoothing import PoseFilter, SmoothingSettings
from picopose_ros.instances.symmetries import SymmetryGroup
from picopose_ros.templates.meshes import Symmetries

if TYPE_CHECKING:
    from picopose_ros.estimator import ObjectPose

# What hardly moved is found again first: errors of a pose, and how fast an object or a camera usually is.
_STILL = 0.03
_SPEED = 0.5

_DEPTH_WEIGHT = 0.3
"""What a metre along the camera's ray counts against one across it; depths are wrong more often."""

_ROTATION_WEIGHT = 0.25
"""What the largest rotation counts against the largest distance; rotations are wrong more often."""

_ANSWERS = 3
"""Answers that an instance may be missing from, whatever the timeout."""

_NO_SYMMETRY = SymmetryGroup(Symmetries())


@dataclass(frozen=True)
class NamedPose:
    """A pose and whose it is.

    Attributes:
        pose: with the symmetric form and the smoothing applied; the covariance is that of its origin.
        name: ``<class>_<n>``, kept as long as the instance is.
        new: this is its first frame.
    """

    pose: ObjectPose
    name: str
    new: bool


@dataclass(eq=False)
class _Track:
    class_id: str
    number: int
    centre: np.ndarray  # (3,) middle of the object in its own frame
    stamp: float
    T_cam_obj: np.ndarray  # as it was last published
    T_fixed_cam: np.ndarray | None
    tracked_id: str = ""  # what the detector calls it
    filter: PoseFilter | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"{self.class_id}_{self.number}"


class InstanceNamer:
    """Gives every pose the name of the instance it belongs to.

    Poses and instances of one class are paired by the distance of the object's centre and, where that leaves
    a choice, by the rotation modulo symmetry; the sum over all pairs is least (Hungarian method). Instances
    that hardly moved are paired first, so that an object stays what it is while others come and go; then the
    rest, up to ``max_distance``. A pose without an instance begins a new one. An instance that is missing
    longer than ``timeout`` is retired, and only then is its name free: for what turns up where it was last
    seen, else for whatever comes, the smallest number first.

    A detector that follows what it sees (yolo_ros) may say which pose is what: a pose with the tracked id of
    an instance belongs to it wherever it is, because the detector has seen the images in between.

    Where answers come slowly, both limits grow with the measured interval between them: the timeout is at
    least three intervals, and the distance at least what an object usually moves in one.

    Stamps are seconds of the images' clock. What is answered late (a stamp before the newest) is named, but
    moves nothing. A stamp more than ``timeout`` before the newest is a clock that was set back: all starts
    anew.

    Args:
        timeout: seconds an instance may be missing.
        max_distance: farthest (m) that an instance is found again after one or more frames; along the
            camera's ray three times as far, because depth is the least certain.
        max_rotation_deg: rotations this large or larger count as equally different. None excludes a pair:
            a pose that is upside down by mistake is still of the same object.
        smoothing: None for none.
        symmetries: by class id; see :meth:`set_symmetries`.

    Attributes:
        settings: the smoothing; may be replaced at any time, by any thread.
    """

    def __init__(
        self,
        *,
        timeout: float = 1.0,
        max_distance: float = 0.3,
        max_rotation_deg: float = 60.0,
        smoothing: SmoothingSettings | None = None,
        symmetries: Mapping[str, Symmetries] | None = None,
    ) -> None:
        self.timeout = timeout
        self.max_distance = max_distance
        self.max_rotation_deg = max_rotation_deg
        self.settings = smoothing or SmoothingSettings()
        self._groups: dict[str, SymmetryGroup] = {}
        self._tracks: list[_Track] = []
        self._ghosts: dict[str, _Track] = {}  # what had a name before, where it was last seen
        self._retired: list[str] = []
        self._newest = -np.inf
        self._intervals: deque[float] = deque(maxlen=9)
        self.set_symmetries(symmetries or {})

    @property
    def names(self) -> list[str]:
        """Of the instances that are there or may come back."""
        return [track.name for track in self._tracks]

    def set_symmetries(self, symmetries: Mapping[str, Symmetries]) -> None:
        """Replace the symmetries of all classes."""
        self._groups = {class_id: SymmetryGroup(value) for class_id, value in symmetries.items()}

    def update(
        self,
        stamp: float,
        poses: Sequence[ObjectPose],
        T_fixed_cam: np.ndarray | None = None,
        tracked_ids: Sequence[str] | None = None,
    ) -> list[NamedPose]:
        """Name the poses of one image.

        Args:
            stamp: of the image, seconds.
            poses: of the image.
            T_fixed_cam: (4, 4) camera -> a frame that stands still, at that stamp, where it is known. Then a
                camera that swings doesn't look like objects that move.
            tracked_ids: per pose what its detector calls the instance, "" for nothing.

        Returns:
            One per pose, in the same order.
        """
        if stamp < self._newest - self.timeout:
            self.clear()
        late = stamp < self._newest
        if np.isfinite(self._newest) and stamp > self._newest:
            self._intervals.append(stamp - self._newest)
        self._newest = max(self._newest, stamp)
        ids = [""] * len(poses) if tracked_ids is None else tracked_ids
        found = self._associate(stamp, poses, range(len(poses)), self._tracks, T_fixed_cam, ids)
        self.expire(self._newest, keep=[track.name for track in found.values()])
        new = [row for row in range(len(poses)) if row not in found]
        taken = set(self.names)
        free = [ghost for ghost in self._ghosts.values() if ghost.name not in taken]
        again = self._associate(stamp, poses, new, free, T_fixed_cam, ids)
        taken |= {ghost.name for ghost in again.values()}
        named: dict[int, NamedPose] = {}
        for row in (*again, *(row for row in new if row not in again)):
            if row in again:
                number = again[row].number
            else:
                number = next(n for n in count() if f"{poses[row].class_id}_{n}" not in taken)
            named[row] = self._begin(number, stamp, poses[row], T_fixed_cam, again.get(row))
            taken.add(named[row].name)
        for row, track in found.items():
            named[row] = self._follow(track, stamp, poses[row], T_fixed_cam, late)
        by_name = {track.name: track for track in self._tracks}
        for row, one in named.items():
            by_name[one.name].tracked_id = ids[row] or by_name[one.name].tracked_id
        return [named[row] for row in range(len(poses))]

    def nearest(self, class_id: str, T_cam_obj: np.ndarray, R_cam_obj: np.ndarray) -> np.ndarray:
        """The equivalent pose (4, 4) of an object of a class whose rotation is nearest to a rotation."""
        return self._groups.get(class_id, _NO_SYMMETRY).nearest(T_cam_obj, R_cam_obj)

    def expire(self, stamp: float, keep: Iterable[str] = ()) -> None:
        """Retire the instances that were last seen more than the timeout before ``stamp``.

        Every update does so; for when no frames come.

        Args:
            stamp: seconds. keep: names that are not retired.
        """
        kept = set(keep)
        timeout = max(self.timeout, _ANSWERS * self._interval)
        gone = [t for t in self._tracks if stamp - t.stamp > timeout and t.name not in kept]
        self._tracks = [track for track in self._tracks if track not in gone]
        self._retired += [track.name for track in gone]
        self._ghosts |= {track.name: track for track in gone}

    def retired(self) -> list[str]:
        """Names retired since the last call. One of them may belong to a new instance already."""
        names, self._retired = self._retired, []
        return names

    def clear(self) -> None:
        """Retire all: the clock was set back, or the node was deactivated."""
        self._retired += self.names
        self._tracks = []
        self._ghosts = {}
        self._newest = -np.inf
        self._intervals.clear()

    @property
    def _interval(self) -> float:
        """Seconds between answers, the median; 0 while too few have come to tell."""
        return float(np.median(self._intervals)) if len(self._intervals) >= _ANSWERS else 0.0

    def _associate(
        self,
        stamp: float,
        poses: Sequence[ObjectPose],
        rows: Sequence[int],
        tracks: Sequence[_Track],
        T_fixed_cam: np.ndarray | None,
        ids: Sequence[str],
    ) -> dict[int, _Track]:
        """Pairs of poses, by their rows, and instances: by the tracked ids, then by where they are."""
        known = {(track.class_id, track.tracked_id): track for track in tracks if track.tracked_id}
        found = {row: known.pop(key) for row in rows if (key := (poses[row].class_id, ids[row])) in known}
        paired = {track.name for track in found.values()}
        for class_id in dict.fromkeys(poses[row].class_id for row in rows):
            own = [row for row in rows if poses[row].class_id == class_id and row not in found]
            those = [track for track in tracks if track.class_id == class_id and track.name not in paired]
            if own and those:
                found |= self._associate_class(stamp, poses, own, those, T_fixed_cam, ids)
        return found

    def _associate_class(
        self,
        stamp: float,
        poses: Sequence[ObjectPose],
        rows: Sequence[int],
        tracks: Sequence[_Track],
        T_fixed_cam: np.ndarray | None,
        ids: Sequence[str],
    ) -> dict[int, _Track]:
        found: dict[int, _Track] = {}
        shape = len(rows), len(tracks)
        distance, rotation, usual = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        group = self._groups.get(poses[rows[0]].class_id, _NO_SYMMETRY)
        for j, track in enumerate(tracks):
            seen = _in_this_camera(track, T_fixed_cam)
            before = _point(seen, track.centre)
            # Named in an earlier call for the same image: the detector tells the two apart.
            told_apart = track.stamp == stamp and track.tracked_id != ""
            usual[:, j] = _STILL + _SPEED * abs(stamp - track.stamp)
            for i, row in enumerate(rows):
                T = group.nearest(poses[row].T_cam_obj, seen[:3, :3])
                distance[i, j] = _distance(_point(T, poses[row].bbox_centre), before)
                rotation[i, j] = rotation_angle_deg(T[:3, :3], seen[:3, :3])
                if told_apart and ids[row] not in ("", track.tracked_id):
                    distance[i, j] = np.inf
        farthest = max(self.max_distance, _STILL + _SPEED * self._interval)
        turned = _ROTATION_WEIGHT * np.minimum(rotation / self.max_rotation_deg, 1.0) ** 2
        free_rows, free_tracks = np.arange(shape[0]), np.arange(shape[1])
        for limit in (np.minimum(usual, farthest), np.full(shape, farthest)):
            part = np.ix_(free_rows, free_tracks)
            # A pair that is not to be costs more than any other, so that it is chosen only to be dropped.
            cost = np.where(
                distance[part] <= limit[part],
                (distance[part] / limit[part]) ** 2 + turned[part],
                1.0 + _ROTATION_WEIGHT,
            )
            pairs = [
                (free_rows[i], free_tracks[j])
                for i, j in zip(*linear_sum_assignment(cost), strict=True)
                if distance[free_rows[i], free_tracks[j]] <= limit[free_rows[i], free_tracks[j]]
            ]
            found |= {rows[i]: tracks[j] for i, j in pairs}
            free_rows = free_rows[~np.isin(free_rows, [i for i, _ in pairs])]
            free_tracks = free_tracks[~np.isin(free_tracks, [j for _, j in pairs])]
            if not (len(free_rows) and len(free_tracks)):
                break
        return found

    def _begin(
        self,
        number: int,
        stamp: float,
        pose: ObjectPose,
        T_fixed_cam: np.ndarray | None,
        before: _Track | None,
    ) -> NamedPose:
        group = self._groups.get(pose.class_id, _NO_SYMMETRY)
        if before is None:
            T = group.canonical(pose.T_cam_obj)
        else:
            T = group.nearest(pose.T_cam_obj, _in_this_camera(before, T_fixed_cam)[:3, :3])
        form = _with_form(pose, T)
        track = _Track(
            pose.class_id, number, np.asarray(pose.bbox_centre), stamp, form.T_cam_obj, T_fixed_cam
        )
        self._tracks.append(track)
        return NamedPose(self._smoothed(track, stamp, form), track.name, True)

    def _follow(
        self, track: _Track, stamp: float, pose: ObjectPose, T_fixed_cam: np.ndarray | None, late: bool
    ) -> NamedPose:
        seen = _in_this_camera(track, T_fixed_cam)
        group = self._groups.get(pose.class_id, _NO_SYMMETRY)
        form = _with_form(pose, group.nearest(pose.T_cam_obj, seen[:3, :3]))
        if late:
            return NamedPose(form, track.name, False)
        if track.filter is not None and T_fixed_cam is not None and track.T_fixed_cam is not None:
            track.filter.move(invert_transform(T_fixed_cam) @ track.T_fixed_cam)
        smoothed = self._smoothed(track, stamp, form)
        track.stamp, track.T_cam_obj, track.T_fixed_cam = stamp, smoothed.T_cam_obj, T_fixed_cam
        return NamedPose(smoothed, track.name, False)

    def _smoothed(self, track: _Track, stamp: float, pose: ObjectPose) -> ObjectPose:
        settings = self.settings
        if not settings.enabled:
            track.filter = None
            return pose
        if track.filter is None:
            track.filter = PoseFilter(track.centre)
        return replace(pose, T_cam_obj=track.filter.update(stamp, pose.T_cam_obj, settings))


def _point(T: np.ndarray, point: np.ndarray) -> np.ndarray:
    return T[:3, :3] @ point + T[:3, 3]


def _distance(point: np.ndarray, before: np.ndarray) -> float:
    """Metres between two points before a camera, with what one can't see well counting less."""
    ray = before / np.linalg.norm(before)
    along = (point - before) @ ray
    return float(np.hypot(np.linalg.norm(point - before - along * ray), _DEPTH_WEIGHT * along))


def _in_this_camera(track: _Track, T_fixed_cam: np.ndarray | None) -> np.ndarray:
    """T_cam_obj (4, 4) of an instance that stayed where it was, as the camera sees it from where it is."""
    if T_fixed_cam is None or track.T_fixed_cam is None:
        return track.T_cam_obj
    return invert_transform(T_fixed_cam) @ track.T_fixed_cam @ track.T_cam_obj


def _with_form(pose: ObjectPose, T_cam_obj: np.ndarray) -> ObjectPose:
    """The pose in an equivalent form (4, 4); its covariance goes with the origin."""
    arm = T_cam_obj[:3, 3] - pose.T_cam_obj[:3, 3]
    return replace(pose, T_cam_obj=T_cam_obj, covariance=move_covariance(pose.covariance, arm))
