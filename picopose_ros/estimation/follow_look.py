"""One image of following: where the objects are looked for, and what came of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import cv2
import numpy as np

from picopose_ros.errors import PicoPoseError
from picopose_ros.estimation.follow_shift import find_shift
from picopose_ros.estimation.refine_step import RIM, Look, Step
from picopose_ros.estimation.results import ObjectPose
from picopose_ros.geometry.poses import rotation_angle_deg
from picopose_ros.templates.posed import PosedView

HISTORY = 256
"""Poses of an object that are remembered, for masks that come late."""

EARLY = 0.9
"""Share of the period of ``follow_rate`` after which the next image is taken: stamps are not even."""


class Verdict(Enum):
    """What following an object has come to."""

    FOLLOWED = "followed"
    UNCERTAIN = "uncertain"
    LOST = "lost"


@dataclass(frozen=True)
class FollowSettings:
    """When an object is followed; measured with the packaged weights (docs/following.md).

    Attributes:
        followed: least score of a pose that is followed. uncertain: of one that is published at all.
        patience: seconds that an object may be uncertain before it is lost.
        recovery: seconds after its loss in which it is looked for where it was last.
        inside: least share of the object in the image. visible: share that other objects leave uncovered.
        reuse_deg: turn of the view up to which the last rendering is used again.
        again: overlap (IoU) of the silhouettes before and after a step, below which a second step follows, as
            it does after a step that leaves the object uncertain.
        furthest: longest step, in diagonals of the object. furthest_deg: the same of its turn.
        speed, spin: standard deviation of an unknown change of velocity, m/s and rad/s.
        widened: factor on the covariance of what is uncertain.
    """

    followed: float = 0.83
    uncertain: float = 0.72
    patience: float = 1.0
    recovery: float = 5.0
    inside: float = 0.5
    visible: float = 0.35
    reuse_deg: float = 4.0
    again: float = 0.85
    furthest: float = 0.6
    furthest_deg: float = 40.0
    speed: float = 0.3
    spin: float = 1.5
    widened: float = 9.0


class Comparer(Protocol):
    """What following needs of the estimator."""

    def render(self, wanted: Sequence[tuple[str, np.ndarray]]) -> Sequence[PosedView | PicoPoseError]:
        """Objects (class id) at poses (4, 4)."""
        ...

    def compare(self, rgb: np.ndarray, K: np.ndarray, looks: Sequence[Look]) -> Sequence[Step | None]:
        """See `refine_step`."""
        ...

    def score(self, step: Step) -> float:
        """0..1, how sure the pose of a step is."""
        ...


@dataclass(eq=False)
class Target:
    """An object that is followed.

    Attributes:
        key: of it. pose: the last one that was believed. stamp: of that, s. seen: of the last mask.
        since: stamp from which on the verdict is so. T_fixed_cam: (4, 4) of the last pose's image, if known.
        velocity: (6,) motion per second, as of `moved`. verdict, reason: of the last image.
        estimated: stamp of the newest image whose mask gave a pose. sure: stamp when it was last followed.
        view: the last rendering. history: stamp, pose, covariance.
        image: (H, W, 3) uint8, undistorted, in which it had the last pose; None: not kept.
    """

    key: str
    pose: ObjectPose
    stamp: float
    seen: float
    since: float
    T_fixed_cam: np.ndarray | None = None
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(6))
    verdict: Verdict = Verdict.FOLLOWED
    reason: str = ""
    sure: float = 0.0
    estimated: float = 0.0
    view: PosedView | None = None
    history: deque[tuple[float, np.ndarray, np.ndarray]] = field(
        default_factory=lambda: deque(maxlen=HISTORY)
    )
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Try:
    """A pose at which an object is looked for, and a rendering near to it if there is one."""

    target: Target
    T: np.ndarray
    prior: np.ndarray | None
    view: PosedView | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a try: a step with its score, view and image (undistorted), or why there is none."""

    attempt: Try
    reason: str = ""
    step: Step | None = None
    score: float = 0.0
    view: PosedView | None = None
    covered: bool = False
    rgb: np.ndarray | None = None


def look(
    comparer: Comparer, settings: FollowSettings, tries: Sequence[Try], rgb: np.ndarray, K: np.ndarray
) -> dict[str, Outcome]:
    """The best outcome per object, of one step from each try, or two where it moved far.

    Args:
        tries: where objects are looked for. rgb: (H, W, 3) uint8 of an undistorted camera. K: (3, 3).
    """
    return _Looking(comparer, settings, rgb, K).best(tries)


class _Looking:
    """An image that objects are looked for in."""

    def __init__(self, comparer: Comparer, settings: FollowSettings, rgb: np.ndarray, K: np.ndarray) -> None:
        self._comparer, self._settings, self._rgb, self._K = comparer, settings, rgb, K
        self._size = rgb.shape[:2]
        self._placed: dict[str, tuple[Try, np.ndarray]] = {}

    def best(self, tries: Sequence[Try]) -> dict[str, Outcome]:
        """See `look`."""
        shifted = self._shifted(tries)
        outcomes = self._round(shifted)
        # What looks alike may be something else: then it is where it was predicted.
        least = self._settings.followed
        astray = [i for i, o in enumerate(outcomes) if shifted[i] is not tries[i] and o.score < least]
        outcomes += self._round([tries[i] for i in astray])
        again = {i: _again(o) for i, o in enumerate(outcomes) if self._needs_another(o)}
        for i, better in zip(again, self._round(list(again.values()))):
            # Judged from where it was looked for at first.
            if better.score >= outcomes[i].score:
                outcomes[i] = replace(better, attempt=outcomes[i].attempt)
        outcomes = [self._checked(one) for one in outcomes]
        best: dict[str, Outcome] = {}
        for outcome in outcomes:
            key = outcome.attempt.target.key
            if key not in best or outcome.score > best[key].score:
                best[key] = outcome
        return self._apart(best)

    def _shifted(self, tries: Sequence[Try]) -> list[Try]:
        """The tries, where the object's look is found nearby if it isn't at the predicted place."""
        known = {id(t.target): t.target for t in tries if t.target.image is not None}
        blind = [target for target in known.values() if target.view is None]
        wanted = [(target.pose.class_id, target.pose.T_cam_obj) for target in blind]
        for target, view in zip(blind, self._comparer.render(wanted) if wanted else []):
            if isinstance(view, PosedView):
                target.view = view
        # Of two equal objects side by side one would be taken for the other.
        alone = [not any(_beside(one, other) for other in tries) for one in tries]
        return [self._shifted_one(one) if free else one for one, free in zip(tries, alone)]

    def _shifted_one(self, one: Try) -> Try:
        target = one.target
        if target.view is None or target.image is None or target.image.shape != self._rgb.shape:
            return one
        middles = [centre_of(target.pose, T) for T in (target.pose.T_cam_obj, one.T)]
        if min(middle[2] for middle in middles) <= 0:
            return one
        before, ahead = (self._K[:2, :2] @ (middle[:2] / middle[2]) for middle in middles)
        mask = _silhouette(target.view, target.pose.T_cam_obj, self._K, *self._size)
        reach = 2.0 if target.verdict is Verdict.LOST else 1.0
        shift = find_shift(target.image, self._rgb, mask, ahead - before, reach)
        if shift is None:
            return one
        T = one.T.copy()
        T[:2, 3] += np.linalg.solve(self._K[:2, :2], shift) * middles[1][2]
        return replace(one, T=T)

    def _round(self, tries: Sequence[Try]) -> list[Outcome]:
        """One step from each of some poses."""
        if not tries:
            return []
        views = self._views(tries)
        outcomes = [Outcome(one) for one in tries]
        masks: dict[int, np.ndarray] = {}
        for i, (one, view) in enumerate(zip(tries, views)):
            if isinstance(view, PicoPoseError):
                outcomes[i] = Outcome(one, str(view))
                continue
            share = _share_inside(view, one.T, self._K, *self._size)
            if share < self._settings.inside:
                outcomes[i] = Outcome(one, f"it leaves the image: {share:.0%} of it is inside")
                continue
            masks[i] = _silhouette(view, one.T, self._K, *self._size)
        self._placed |= {tries[i].target.key: (tries[i], mask) for i, mask in masks.items()}
        looks: dict[int, Look] = {}
        for i, whole in masks.items():
            own, free = tries[i], whole.copy()
            for other, theirs in self._placed.values():
                if _hides(other, own):
                    free &= ~theirs
            if np.count_nonzero(free) < self._settings.visible * np.count_nonzero(whole):
                outcomes[i] = Outcome(own, "another object covers it", covered=True)
                continue
            looks[i] = Look(views[i], own.T, free, None, own.prior, rim=RIM)
        for i, step in zip(looks, self._comparer.compare(self._rgb, self._K, list(looks.values()))):
            if step is None:
                outcomes[i] = Outcome(tries[i], "the image doesn't show it where it should be")
            else:
                outcomes[i] = Outcome(tries[i], "", step, self._comparer.score(step), views[i], rgb=self._rgb)
        return outcomes

    def _views(self, tries: Sequence[Try]) -> list[PosedView | PicoPoseError]:
        """Renderings at the poses; those that there are where they will do."""
        views: list[PosedView | PicoPoseError | None] = []
        for one in tries:
            known = min((one.view, one.target.view), key=lambda view: _turned(view, one.T))
            views.append(known if _turned(known, one.T) < self._settings.reuse_deg else None)
        missing = [i for i, view in enumerate(views) if view is None]
        if missing:
            wanted = [(tries[i].target.pose.class_id, tries[i].T) for i in missing]
            for i, view in zip(missing, self._comparer.render(wanted)):
                views[i] = view
        return views  # type: ignore[return-value]

    def _needs_another(self, outcome: Outcome) -> bool:
        """Whether a step went so far that its mask missed much of the object, or led to no good pose."""
        if outcome.step is None or outcome.view is None:
            return False
        if self._settings.uncertain <= outcome.score < self._settings.followed:
            return True
        before, after = (
            _silhouette(outcome.view, T, self._K, *self._size)
            for T in (outcome.attempt.T, outcome.step.T_cam_obj)
        )
        shared, whole = np.count_nonzero(before & after), np.count_nonzero(before | after)
        return shared < self._settings.again * whole

    def _checked(self, outcome: Outcome) -> Outcome:
        """A step that is no small one isn't taken."""
        if outcome.step is None:
            return outcome
        pose, s = outcome.attempt.target.pose, self._settings
        before, after = outcome.attempt.T, outcome.step.T_cam_obj
        far = np.linalg.norm(centre_of(pose, after) - centre_of(pose, before))
        turn = rotation_angle_deg(after[:3, :3], before[:3, :3])
        if far > s.furthest * np.linalg.norm(pose.bbox_size) or turn > s.furthest_deg:
            return Outcome(outcome.attempt, "it would have to jump")
        return outcome

    def _apart(self, best: Mapping[str, Outcome]) -> dict[str, Outcome]:
        """Of two objects of a class that come out at one place, the one that fits worse isn't there."""
        kept = dict(best)
        for key, one in best.items():
            for other_key, other in best.items():
                if key == other_key or one.step is None or kept[other_key].step is None:
                    continue
                a, b = one.attempt.target.pose, other.attempt.target.pose
                apart = np.linalg.norm(centre_of(a, one.step.T_cam_obj) - centre_of(b, other.step.T_cam_obj))
                if a.class_id == b.class_id and apart < 0.3 * a.bbox_size.max():
                    if _strayed(one) > _strayed(other):
                        kept[key] = Outcome(one.attempt, f"{other_key} is there", covered=True)
                        break
        return kept


def _again(outcome: Outcome) -> Try:
    """From where a step led; what was known before is in it already."""
    return Try(outcome.attempt.target, outcome.step.T_cam_obj, None, outcome.view)


def centre_of(pose: ObjectPose, T: np.ndarray) -> np.ndarray:
    """Middle (3,) of an object at a pose (4, 4), camera frame."""
    return T[:3, :3] @ pose.bbox_centre + T[:3, 3]


def _strayed(outcome: Outcome) -> float:
    """How far a step went, in diagonals of the object."""
    pose, step = outcome.attempt.target.pose, outcome.step
    apart = centre_of(pose, step.T_cam_obj) - centre_of(pose, outcome.attempt.T)
    return float(np.linalg.norm(apart) / np.linalg.norm(pose.bbox_size))


def _beside(one: Try, other: Try) -> bool:
    """Whether another object of the same class is near."""
    a, b = one.target.pose, other.target.pose
    if one.target is other.target or a.class_id != b.class_id:
        return False
    return bool(np.linalg.norm(centre_of(a, one.T) - centre_of(b, other.T)) < 2 * np.linalg.norm(a.bbox_size))


def _hides(other: Try, own: Try) -> bool:
    """Whether one object is certainly nearer than another; a lost one hides nothing."""
    if other.target is own.target or other.target.verdict is Verdict.LOST:
        return False
    near, far = (centre_of(one.target.pose, one.T)[2] for one in (other, own))
    return bool(near < far)


def _turned(view: PosedView | None, T_cam_obj: np.ndarray) -> float:
    """Degrees by which a pose shows another side than a view does."""
    if view is None:
        return np.inf
    before = view.T_view_obj
    seen, now = (-T[:3, :3].T @ T[:3, 3] for T in (before, T_cam_obj))
    cosine = seen @ now / (np.linalg.norm(seen) * np.linalg.norm(now))
    roll = rotation_angle_deg(before[:3, :3], T_cam_obj[:3, :3])
    return max(float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))), roll / 4)


def _share_inside(view: PosedView, T_cam_obj: np.ndarray, K: np.ndarray, height: int, width: int) -> float:
    uv = view.projected(T_cam_obj, K)
    if uv is None:
        return 0.0
    return float(((uv > -0.5) & (uv < [width - 0.5, height - 0.5])).all(1).mean())


def _silhouette(view: PosedView, T_cam_obj: np.ndarray, K: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool of an object at a pose near to a view's."""
    affine = view.affine(T_cam_obj, K, np.eye(3))
    if affine is None:
        return np.zeros((height, width), bool)
    whole = view.crop.mask.astype(np.uint8)
    return cv2.warpAffine(whole, affine[:2], (width, height), flags=cv2.INTER_NEAREST) > 0
