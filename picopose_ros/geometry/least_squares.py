"""One robust least squares over everything that is known of an object's pose.

The unknown is a small motion (v, w) of ``T_cam_obj``: the object's origin moves by v and the object turns by
w about it, both in the camera's axes, which is the order of ROS's covariances. Each term gives residuals in
standard deviations and their derivatives. Measurements of a term may err together, in two ways:

- so many of them count as one (``together``), as the offsets of neighbouring cells do;
- all of them are off by a common amount (``modes``): an unknown of scale 1 that is solved for beside the
  pose, such as the scale of a flow or the growth of a mask. What other terms say then corrects it. It is
  normal, or of Student's distribution: mostly small, now and then large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import cv2
import numpy as np

from picopose_ros.geometry.covariance import pose_error
from picopose_ros.geometry.poses import make_transform

_STEPS = 12
_SETTLED = 5e-2
"""A step that is smaller than this share of its standard deviation ends the iteration."""


@dataclass(frozen=True)
class Linearised:
    """A term at a pose.

    Attributes:
        residual: (n, k) of n measurements with k numbers each, in standard deviations.
        jacobian: (n, k, 6) its derivative by the motion (v, w).
        modes: (n, k, m) its derivative by the term's m common unknowns.
        freedom: (m,) or one for all, degrees of freedom of the unknowns' distribution; infinite: normal.
    """

    residual: np.ndarray
    jacobian: np.ndarray
    modes: np.ndarray
    freedom: np.ndarray | float = np.inf


class Term(Protocol):
    """Something that is known of the pose.

    Attributes:
        together: so many measurements count as one.
        cutoff: residual, in standard deviations, from which on a measurement counts less and less
            (Geman-McClure's kernel); infinite where all are believed.
    """

    together: float
    cutoff: float

    def linearise(self, T_cam_obj: np.ndarray) -> Linearised:
        """Residuals and derivatives at a pose (4, 4)."""
        ...


@dataclass(frozen=True)
class Solution:
    """The pose at the minimum.

    Attributes:
        T_cam_obj: (4, 4). covariance: (6, 6) of the motion (v, w).
        cost: of the minimum.
        weights: per term (n,) how much each measurement counted, 0..1.
        modes: per term (m,) its common unknowns, in units of their scale.
    """

    T_cam_obj: np.ndarray
    covariance: np.ndarray
    cost: float
    weights: dict[str, np.ndarray]
    modes: dict[str, np.ndarray]


def moved(T_cam_obj: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """The pose after a motion (6,): (v, w)."""
    turn = cv2.Rodrigues(motion[3:])[0]
    return make_transform(turn @ T_cam_obj[:3, :3], T_cam_obj[:3, 3] + motion[:3])


@dataclass(frozen=True)
class Reprojections:
    """Points of the object that were found in the image, in pairs with a common error of scale.

    The network's flow is good in its shape and worse in its size: ``scale_sigma`` lets all pairs be too far
    from their middle, or too near to it, by a common factor.

    Attributes:
        uv: (n, 2) px of an undistorted camera. xyz: (n, 3) object frame, m. K: (3, 3).
        sigma: px, of one coordinate. together, cutoff: see `Term`.
        scale_sigma: scale of the common factor's deviation from 1; 0: there is none.
        scale_freedom: degrees of freedom of its distribution, see `Linearised`.
    """

    uv: np.ndarray
    xyz: np.ndarray
    K: np.ndarray
    sigma: float
    together: float = 1.0
    cutoff: float = 3.0
    scale_sigma: float = 0.0
    scale_freedom: float = np.inf

    def linearise(self, T_cam_obj: np.ndarray) -> Linearised:
        """See `Term`."""
        arm = self.xyz @ T_cam_obj[:3, :3].T
        uv, by_motion = projected(arm, T_cam_obj[:3, 3], self.K)
        residual = (uv - self.uv) / self.sigma
        return Linearised(residual, by_motion / self.sigma, self._modes, self.scale_freedom)

    @cached_property
    def _modes(self) -> np.ndarray:
        if not (self.scale_sigma and len(self.uv)):
            return np.zeros((len(self.uv), 2, 0))
        return (self.scale_sigma / self.sigma) * (self.uv - self.uv.mean(0))[..., None]


@dataclass(frozen=True)
class Edges:
    """Points of the rendered contour, and where along their normals the object ends in the image.

    Attributes:
        xyz: (n, 3) points of the contour, object frame, m. K: (3, 3).
        origin: (n, 2) px of an undistorted camera, where their lines begin.
        normal: (n, 2) unit vectors out of the object, along the lines.
        offset: (n,) px along the line, where the edge is. sigma: (n,) of that, px.
        together, cutoff: see `Term`.
        growth_sigma: scale, px, of what all edges are too far out or in by; 0: nothing.
        growth_freedom: degrees of freedom of its distribution, see `Linearised`.
    """

    xyz: np.ndarray
    K: np.ndarray
    origin: np.ndarray
    normal: np.ndarray
    offset: np.ndarray
    sigma: np.ndarray
    together: float = 1.0
    cutoff: float = 3.0
    growth_sigma: float = 0.0
    growth_freedom: float = np.inf

    def linearise(self, T_cam_obj: np.ndarray) -> Linearised:
        """See `Term`."""
        arm = self.xyz @ T_cam_obj[:3, :3].T
        uv, by_motion = projected(arm, T_cam_obj[:3, 3], self.K)
        along = ((uv - self.origin) * self.normal).sum(1)
        jacobian = (self.normal[:, None] @ by_motion)[:, 0]
        modes = np.zeros((len(uv), 1, 0))
        if self.growth_sigma:
            modes = (self.growth_sigma / self.sigma)[:, None, None]
        return Linearised(
            ((along - self.offset) / self.sigma)[:, None],
            (jacobian / self.sigma[:, None])[:, None],
            modes,
            self.growth_freedom,
        )


@dataclass(frozen=True)
class Surface:
    """Measured points that lie on the object's surface, point to plane.

    Attributes:
        measured: (n, 3) camera frame, m. xyz: (n, 3) points of the surface near to them, object frame, m.
        normals: (n, 3) of the surface there, unit vectors, object frame.
        sigma: (n,) of the distance, m. together, cutoff: see `Term`.
        depth_sigma: standard deviation, m, of a common error along the camera's axis; 0: there is none.
    """

    measured: np.ndarray
    xyz: np.ndarray
    normals: np.ndarray
    sigma: np.ndarray
    together: float = 1.0
    cutoff: float = 3.0
    depth_sigma: float = 0.0

    def linearise(self, T_cam_obj: np.ndarray) -> Linearised:
        """See `Term`."""
        R, t = T_cam_obj[:3, :3], T_cam_obj[:3, 3]
        arm, normal = self.xyz @ R.T, self.normals @ R.T
        off = arm + t - self.measured
        # n . (p - y) with p and n both turning: w . (arm x n) + w . (n x off)
        by_turn = np.cross(arm, normal) + np.cross(normal, off)
        scale = 1.0 / self.sigma
        modes = np.zeros((len(arm), 1, 0))
        if self.depth_sigma:
            modes = (self.depth_sigma * normal[:, 2] * scale)[:, None, None]
        return Linearised(
            ((off * normal).sum(1) * scale)[:, None],
            (np.concatenate([normal, by_turn], 1) * scale[:, None])[:, None],
            modes,
        )


@dataclass(frozen=True)
class InView:
    """What another view of the same object says: a term of that view's camera.

    Attributes:
        term: of the pose in the view's camera.
        T_view_cam: (4, 4) camera of the pose -> the view's camera.
        shift_sigma, turn_sigma: standard deviation of where that puts the object in the view, per axis, m
            and rad: an unknown motion that all measurements of the view share. 0: it is exact.
    """

    term: Term
    T_view_cam: np.ndarray
    shift_sigma: float = 0.0
    turn_sigma: float = 0.0

    @property
    def together(self) -> float:
        """See `Term`."""
        return self.term.together

    @property
    def cutoff(self) -> float:
        """See `Term`."""
        return self.term.cutoff

    def linearise(self, T_cam_obj: np.ndarray) -> Linearised:
        """See `Term`."""
        line = self.term.linearise(self.T_view_cam @ T_cam_obj)
        turn = np.zeros((6, 6))  # a motion in the axes of one camera as one in those of the other
        turn[:3, :3] = turn[3:, 3:] = self.T_view_cam[:3, :3]
        modes, freedom = line.modes, np.broadcast_to(line.freedom, line.modes.shape[2])
        if self.shift_sigma or self.turn_sigma:
            own = line.jacobian * np.repeat([self.shift_sigma, self.turn_sigma], 3)
            modes = np.concatenate([modes, own], 2)
            freedom = np.concatenate([freedom, np.full(6, np.inf)])
        return Linearised(line.residual, line.jacobian @ turn, modes, freedom)


@dataclass(frozen=True)
class Prior:
    """What was known of the pose before.

    Attributes:
        T_cam_obj: (4, 4). covariance: (6, 6) of the motion (v, w) from it to the true pose.
    """

    T_cam_obj: np.ndarray
    covariance: np.ndarray
    together: float = field(default=1.0, init=False)
    cutoff: float = field(default=np.inf, init=False)

    @cached_property
    def _whiten(self) -> np.ndarray:
        return np.linalg.inv(np.linalg.cholesky(self.covariance))

    def linearise(self, T_cam_obj: np.ndarray) -> Linearised:
        """See `Term`."""
        whiten = self._whiten
        off = pose_error(self.T_cam_obj, T_cam_obj)
        by_motion = np.eye(6)
        by_motion[3:, 3:] = _left_jacobian_inverse(off[3:])
        return Linearised((whiten @ off)[None], (whiten @ by_motion)[None], np.zeros((1, 6, 0)))


def solve(T_cam_obj: np.ndarray, terms: Mapping[str, Term], steps: int = _STEPS) -> Solution | None:
    """Levenberg and Marquardt's method on the terms, measurements weighted by Geman-McClure's kernel.

    Args:
        T_cam_obj: (4, 4) to begin with. terms: by name; those without measurements change nothing.
        steps: most that are taken.

    Returns:
        The solution, or None where the terms don't fix the pose.
    """
    pose = np.asarray(T_cam_obj, np.float64)
    system = _System(terms)
    state = system.at(pose, None)
    if not np.isfinite(state.cost):
        return None
    damping = 1e-4
    for _ in range(steps):
        H = state.H + damping * np.diag(np.diag(state.H))
        step = _solved(H, -state.g)
        if step is None:
            return None
        trial_pose = moved(pose, step[:6])
        trial = system.at(trial_pose, state.modes + step[6:])
        if np.isfinite(trial.cost) and trial.cost <= state.cost:
            small = step @ state.H @ step < _SETTLED**2
            pose, state, damping = trial_pose, trial, damping / 10
            if small:
                break
        else:
            damping *= 10
            if damping > 1e6:
                break
    scale = np.sqrt(np.diag(state.H))
    if not (scale > 0).all():
        return None
    normed = state.H / np.outer(scale, scale)  # metres and radians differ by orders of magnitude
    if np.linalg.cond(normed) > 1e12:
        return None
    covariance = (np.linalg.inv(normed) / np.outer(scale, scale))[:6, :6]
    return Solution(
        pose,
        (covariance + covariance.T) / 2,
        state.cost,
        dict(zip(terms, state.weights)),
        dict(zip(terms, system.split(state.modes))),
    )


@dataclass(frozen=True)
class _State:
    """The weighted normal equations at a pose."""

    cost: float
    H: np.ndarray
    g: np.ndarray
    modes: np.ndarray
    weights: list[np.ndarray]


class _System:
    """The normal equations of some terms, the pose's motion first, then every term's common unknowns."""

    def __init__(self, terms: Mapping[str, Term]) -> None:
        self._terms = list(terms.values())
        self._counts: list[int] = []

    def split(self, modes: np.ndarray) -> list[np.ndarray]:
        """The common unknowns by term."""
        return np.split(modes, np.cumsum(self._counts)[:-1]) if self._counts else []

    def at(self, pose: np.ndarray, modes: np.ndarray | None) -> _State:
        """Linearise all terms and weight their measurements."""
        lines = [term.linearise(pose) for term in self._terms]
        self._counts = [line.modes.shape[2] for line in lines]
        modes = np.zeros(sum(self._counts)) if modes is None else modes
        size = 6 + len(modes)
        H, g = np.zeros((size, size)), np.zeros(size)
        shares = [np.broadcast_to(line.freedom, line.modes.shape[2]) for line in lines]
        freedom = np.concatenate([np.empty(0), *shares])
        own_cost, own_weight = _unlikely(modes, freedom)
        H[6:, 6:] += np.diag(own_weight)
        g[6:] += own_weight * modes
        cost, weights, first = own_cost, [], 6
        for term, line, own in zip(self._terms, lines, self.split(modes)):
            count, last = len(own), first + len(own)
            r = line.residual + line.modes @ own if count else line.residual
            squared = np.einsum("nk,nk->n", r, r)
            kept = 1.0 / (1.0 + squared / term.cutoff**2)
            weight = kept**2
            weights.append(weight)
            # Jacobian, modes and residual side by side: one product gives all of the normal equations.
            rows = np.empty((*r.shape, 7 + count))
            rows[..., :6], rows[..., 6:-1], rows[..., -1] = line.jacobian, line.modes, r
            rows *= (kept / np.sqrt(term.together))[:, None, None]
            flat = rows.reshape(-1, 7 + count)
            product = flat.T @ flat
            H[:6, :6] += product[:6, :6]
            g[:6] += product[:6, -1]
            if count:
                H[first:last, first:last] += product[6:-1, 6:-1]
                H[:6, first:last] += product[:6, 6:-1]
                H[first:last, :6] += product[6:-1, :6]
                g[first:last] += product[6:-1, -1]
            first = last
            cost += float(squared @ kept) / term.together
        return _State(cost, H, g, modes, weights)


def _unlikely(modes: np.ndarray, freedom: np.ndarray) -> tuple[float, np.ndarray]:
    """How unlikely common unknowns (m,) are: -2 ln of their density but for a constant, and its derivative
    by their squares (m,)."""
    normal = np.isinf(freedom)
    many = np.where(normal, 1.0, freedom)
    squared = modes**2
    weight = np.where(normal, 1.0, (many + 1) / (many + squared))
    cost = np.where(normal, squared, (many + 1) * np.log1p(squared / many))
    return float(cost.sum()), weight


def _solved(H: np.ndarray, g: np.ndarray) -> np.ndarray | None:
    scale = np.sqrt(np.maximum(np.diag(H), 1e-300))
    try:
        step = np.linalg.solve(H / np.outer(scale, scale), g / scale) / scale
    except np.linalg.LinAlgError:
        return None
    return step if np.isfinite(step).all() else None


def projected(arm: np.ndarray, origin: np.ndarray, K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 2) of points, and their derivative (n, 2, 6) by the motion of the pose.

    Args:
        arm: (n, 3) the points less the object's origin, camera frame. origin: (3,) camera frame.
        K: (3, 3).
    """
    ax, ay, az = arm.T
    with np.errstate(all="ignore"):
        near = 1.0 / np.where(az + origin[2] > 0, az + origin[2], np.nan)
    u, v = (ax + origin[0]) * near, (ay + origin[1]) * near
    uv = np.stack([K[0, 0] * u + K[0, 2], K[1, 1] * v + K[1, 2]], 1)
    # By the point b = (across, 0, along); by a turn: b . (w x arm) = w . (arm x b).
    by_motion = np.zeros((len(arm), 2, 6))
    across = K[0, 0] * near
    along = -u * across
    by_motion[:, 0, 0], by_motion[:, 0, 2] = across, along
    by_motion[:, 0, 3], by_motion[:, 0, 4] = ay * along, az * across - ax * along
    by_motion[:, 0, 5] = -ay * across
    across = K[1, 1] * near
    along = -v * across
    by_motion[:, 1, 1], by_motion[:, 1, 2] = across, along
    by_motion[:, 1, 3], by_motion[:, 1, 4] = ay * along - az * across, -ax * along
    by_motion[:, 1, 5] = ax * across
    return uv, by_motion


def _left_jacobian_inverse(w: np.ndarray) -> np.ndarray:
    """Derivative (3, 3) at 0 of the rotation vector of exp(d) exp(w) by d."""
    angle = np.linalg.norm(w)
    x, y, z = w
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    square = 1 / 12 if angle < 1e-4 else 1 / angle**2 - (1 + np.cos(angle)) / (2 * angle * np.sin(angle))
    return np.eye(3) - cross / 2 + square * cross @ cross
