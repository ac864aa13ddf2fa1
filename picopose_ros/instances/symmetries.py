"""Which of a symmetric object's equivalent poses to give: the nearest to one that was given before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from picopose_ros.geometry.poses import make_transform
from picopose_ros.templates.meshes import Symmetries

CANONICAL = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
"""Rotation object -> camera of what stands upright before the camera: x to the right, y away, z up."""

_LARGEST_GROUP = 120
"""More rotations than any solid has: a list whose products don't end before is no group."""

_SAME = 1e-3
"""Rotations (matrix entries) and directions closer than this are one; files are written with few digits."""

_TIE = 1e-6
"""Of forms this equally near (trace of a rotation) the first is taken, whatever the float noise says."""


class SymmetryGroup:
    """All motions that leave an object looking the same.

    The discrete symmetries are completed: generators are enough. Rotations about an axis are taken as such,
    not in steps. Two axes make a sphere, which looks the same whatever its rotation.

    Args:
        symmetries: of the mesh; transforms act in its own frame.
    """

    def __init__(self, symmetries: Symmetries) -> None:
        self._discrete = np.stack(_completed(symmetries.discrete))
        axes = symmetries.continuous
        self._axis = axes[0] if axes else None
        # A point that every rotation leaves where it is, where all of them are symmetries.
        self._sphere: np.ndarray | None = None
        if any(np.linalg.norm(np.cross(axes[0][0], axis)) > _SAME for axis, _ in axes[1:]):
            self._sphere = _common_point(axes)

    @property
    def trivial(self) -> bool:
        """Whether the object has no symmetry."""
        return len(self._discrete) == 1 and self._axis is None

    def nearest(self, T_cam_obj: np.ndarray, R_cam_obj: np.ndarray) -> np.ndarray:
        """The equivalent pose whose rotation is nearest to a given one.

        Args:
            T_cam_obj: (4, 4) pose. R_cam_obj: (3, 3) rotation to come near to.

        Returns:
            (4, 4) pose that looks the same as ``T_cam_obj``.
        """
        T = np.asarray(T_cam_obj, np.float64)
        if self.trivial:
            return T
        R = np.asarray(R_cam_obj, np.float64)[:3, :3]
        if self._sphere is not None:
            return make_transform(R, T[:3, 3] + (T[:3, :3] - R) @ self._sphere)
        # Near is a large trace(R' T C D) = trace(C M), with D discrete, C a turn about the axis, M = D R' T.
        M = self._discrete[:, :3, :3] @ (R.T @ T[:3, :3])
        traces = np.trace(M, axis1=1, axis2=2)
        if self._axis is None:
            return T @ self._discrete[_first_of_largest(traces)]
        # C = a a' + cos (1 - a a') + sin [a]x, so that the best angle has a closed form.
        axis, offset = self._axis
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        along = axis @ M @ axis
        cos, sin = traces - along, (cross * M.transpose(0, 2, 1)).sum((1, 2))
        length = np.hypot(cos, sin)
        best = _first_of_largest(along + length)
        motion = self._discrete[best]
        if length[best] < _TIE:  # every angle is as near
            return T @ motion
        outer = np.outer(axis, axis)
        turn = outer + cos[best] / length[best] * (np.eye(3) - outer) + sin[best] / length[best] * cross
        return T @ make_transform(turn, offset - turn @ offset) @ motion

    def canonical(self, T_cam_obj: np.ndarray) -> np.ndarray:
        """The equivalent pose to begin with: the same one, whichever of them ``T_cam_obj`` (4, 4) is."""
        return self.nearest(T_cam_obj, CANONICAL)


def _first_of_largest(values: np.ndarray) -> int:
    return int(np.argmax(values > values.max() - _TIE))


def _completed(motions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The motions with all their products, identity first; as they are if the products don't come to an
    end."""
    group = [np.eye(4)]
    given: list[np.ndarray] = []
    for motion in motions:
        motion = np.asarray(motion, np.float64)
        if not any(_alike(motion, other) for other in (*group, *given)):
            u, _, v = np.linalg.svd(motion[:3, :3])  # files are written with few digits
            given.append(make_transform(u @ v, motion[:3, 3]))
    fresh = group
    while fresh:
        products = [a @ b for a in fresh for b in given]
        fresh = []
        for product in products:
            if not any(_alike(product, other) for other in group):
                group.append(product)
                fresh.append(product)
        if len(group) > _LARGEST_GROUP:
            return [np.eye(4), *given]
    return group


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    # By rotation alone: two symmetries of one rotation and other translations would make the object endless.
    return bool(np.abs(a[:3, :3] - b[:3, :3]).max() < 10 * _SAME)


def _common_point(axes: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(3,) the point nearest to all axes."""
    across = [np.eye(3) - np.outer(axis, axis) for axis, _ in axes]
    sides = sum(project @ offset for project, (_, offset) in zip(across, axes, strict=True))
    return np.linalg.solve(sum(across), sides)
