"""Several views of a still object from a moving camera: one pose that agrees with all of them.

The views before are kept in one fixed frame, each with what its pose was solved from (`ObjectPose.terms`). A
new pose is solved once more together with them. Where the camera was is known with an error of its own: a
motion that every view is allowed, and that is solved for too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from picopose_ros.estimation.evidence import Weights
from picopose_ros.estimation.results import ObjectPose
from picopose_ros.geometry.covariance import move_covariance, pose_error, rotate_covariance
from picopose_ros.geometry.least_squares import InView, Term, solve
from picopose_ros.geometry.poses import invert_transform

_SHIFT_M, _TURN_RAD = 0.001, np.radians(0.1)
"""Standard deviation of where TF puts a camera, per axis: what a hand-eye calibration leaves."""
_DISAGREE = 16.8
"""Squared Mahalanobis distance of two poses that happens once in a hundred times (6 degrees of freedom)."""
_LEAST_TURN_RAD = np.radians(3.0)
"""A view that sees the object from nearly where another one did adds nothing: it takes that one's place."""
_NEAR = 1.0
"""In diagonals of the object: further off is another object of the class."""


@dataclass(frozen=True)
class _View:
    """A view of an object: its camera, and what the pose in it was solved from."""

    T_fixed_cam: np.ndarray
    pose: ObjectPose

    @property
    def T_fixed_obj(self) -> np.ndarray:
        return self.T_fixed_cam @ self.pose.T_cam_obj

    def seen_from(self) -> np.ndarray:
        """(3,) direction from the object's centre to the camera, fixed frame."""
        centre = self.T_fixed_obj[:3, :3] @ self.pose.bbox_centre + self.T_fixed_obj[:3, 3]
        away = self.T_fixed_cam[:3, 3] - centre
        return away / np.linalg.norm(away)


@dataclass
class _Object:
    class_id: str
    views: list[_View] = field(default_factory=list)


@dataclass(frozen=True)
class Fused:
    """Poses that agree with the views before.

    Attributes:
        poses: in their order; one without earlier views is as it was.
        remarks: (position in ``poses``, why earlier views of it were forgotten).
    """

    poses: list[ObjectPose]
    remarks: list[tuple[int, str]]


class Views:
    """The last views of every object that stands still. Not for use by two threads at once.

    Args:
        most: views that a pose is solved from, the new one included.
        weights: of refinement; the measured ones if None.
    """

    def __init__(self, most: int, weights: Weights | None = None) -> None:
        self.most = most
        self._factor = (weights or Weights()).covariance
        self._objects: list[_Object] = []

    def clear(self) -> None:
        """Forget all views."""
        self._objects = []

    def fuse(self, poses: Sequence[ObjectPose], T_fixed_cam: np.ndarray) -> Fused:
        """Solve the poses of an image together with the views before, and remember it.

        Args:
            poses: of refinement; others are left as they are.
            T_fixed_cam: (4, 4) where the image's camera was, in a frame in which the objects stand still.
        """
        found, remarks, seen = [], [], []
        for i, pose in enumerate(poses):
            if not pose.terms:
                found.append(pose)
                continue
            view = _View(np.asarray(T_fixed_cam, np.float64), pose)
            known = self._nearest(view, seen)
            agreeing = [] if known is None else [one for one in known.views if _agree(one, view)]
            if known is not None and len(agreeing) < len(known.views):
                remarks.append((i, _said(known, view, len(known.views) - len(agreeing))))
            fused = self._solve(view, agreeing)
            found.append(fused)
            if known is None:
                known = _Object(pose.class_id)
                self._objects.append(known)
            seen.append(known)
            known.views = _with(agreeing, view, self.most)
        return Fused(found, remarks)

    def _nearest(self, view: _View, taken: Sequence[_Object]) -> _Object | None:
        here = view.T_fixed_obj[:3, 3]
        size = np.linalg.norm(view.pose.bbox_size)
        others = [
            (np.linalg.norm(one.views[-1].T_fixed_obj[:3, 3] - here), k)
            for k, one in enumerate(self._objects)
            if one.class_id == view.pose.class_id and not any(one is other for other in taken)
        ]
        if not others or min(others)[0] > _NEAR * size:
            return None
        return self._objects[min(others)[1]]

    def _solve(self, view: _View, others: Sequence[_View]) -> ObjectPose:
        """The pose of a view from all of them; as it was where there are no others."""
        if not others:
            return view.pose
        terms: dict[str, Term] = dict(view.pose.terms)
        for k, other in enumerate(others):
            T_view_cam = invert_transform(other.T_fixed_cam) @ view.T_fixed_cam
            for name, term in other.pose.terms.items():
                terms[f"{name} {k}"] = InView(term, T_view_cam, _SHIFT_M, _TURN_RAD)
        solution = solve(view.pose.T_cam_obj, terms)
        if solution is None:
            return view.pose
        return replace(
            view.pose, T_cam_obj=solution.T_cam_obj, covariance=self._factor * solution.covariance
        )


def _with(views: Sequence[_View], new: _View, most: int) -> list[_View]:
    """The views and a new one, which takes the place of one from nearly the same direction."""
    direction = new.seen_from()
    kept = [one for one in views if np.arccos(np.clip(one.seen_from() @ direction, -1, 1)) > _LEAST_TURN_RAD]
    return [*kept, new][-most:]


def _agree(one: _View, other: _View) -> bool:
    """Whether two views may be of an object that stood still."""
    off = pose_error(one.T_fixed_obj, other.T_fixed_obj)
    covariance = np.zeros((6, 6))
    camera = np.diag([_SHIFT_M**2] * 3 + [_TURN_RAD**2] * 3)
    for view in (one, other):
        # The camera's own error turns the object about the camera.
        own = move_covariance(camera, view.T_fixed_obj[:3, 3] - view.T_fixed_cam[:3, 3])
        covariance = covariance + own + rotate_covariance(view.pose.covariance, view.T_fixed_cam[:3, :3])
    return float(off @ np.linalg.solve(covariance, off)) < _DISAGREE


def _said(known: _Object, view: _View, count: int) -> str:
    off = np.linalg.norm(known.views[-1].T_fixed_obj[:3, 3] - view.T_fixed_obj[:3, 3])
    return (
        f"{count} of {len(known.views)} views before are forgotten: the object is {1e3 * off:.0f} mm from "
        "where they saw it; it moved, or TF does not say rightly where the camera is"
    )
