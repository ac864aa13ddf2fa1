"""Viewpoints of the templates: cameras on a subdivided icosahedron, all looking at the object centre."""

from __future__ import annotations

import numpy as np

from picopose_ros.errors import ConfigError

VIEWPOINT_COUNTS: tuple[int, ...] = (42, 162, 642)
"""Numbers of viewpoints that exist: the icosahedron's edges bisected one, two or three times."""


def icosphere(subdivisions: int) -> np.ndarray:
    """Vertices of an icosahedron whose edges were bisected ``subdivisions`` times.

    Two vertices lie at the poles (+z and -z), the upper ring (z = 1/sqrt 5) at azimuths 72 k degrees and the
    lower ring at 36 + 72 k degrees, as in the released network's predefined poses.

    Returns:
        (10 * 4**subdivisions + 2, 3) float64 unit vectors, in ascending order of z, then of azimuth.
    """
    z = 1.0 / np.sqrt(5.0)
    ring = np.arange(5) * np.deg2rad(72.0)
    radius = 2.0 / np.sqrt(5.0)
    upper = np.stack([radius * np.cos(ring), radius * np.sin(ring), np.full(5, z)], axis=1)
    shifted = ring + np.deg2rad(36.0)
    lower = np.stack([radius * np.cos(shifted), radius * np.sin(shifted), np.full(5, -z)], axis=1)
    points = np.concatenate([[[0.0, 0.0, 1.0]], upper, lower, [[0.0, 0.0, -1.0]]])

    faces = []
    for k in range(5):
        a, b = 1 + k, 1 + (k + 1) % 5  # neighbours on the upper ring
        c, d = 6 + k, 6 + (k + 1) % 5  # neighbours on the lower ring; c lies between a and b
        faces += [(0, a, b), (a, c, b), (b, c, d), (11, d, c)]

    faces = np.asarray(faces)
    for _ in range(subdivisions):
        edges = np.sort(np.stack([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=-1)
        unique, index = np.unique(edges.reshape(-1, 2), axis=0, return_inverse=True)
        middles = points[unique].sum(axis=1)
        ab, bc, ca = len(points) + index.reshape(3, -1)
        points = np.concatenate([points, middles / np.linalg.norm(middles, axis=1, keepdims=True)])
        a, b, c = faces.T
        finer = [(a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca)]
        faces = np.concatenate([np.stack(corners, axis=1) for corners in finer])

    # Rounded keys: points of one ring differ in z by float noise, which must not decide the order.
    azimuth = np.mod(np.arctan2(points[:, 1], points[:, 0]), 2.0 * np.pi)
    return points[np.lexsort((np.round(azimuth, 6), np.round(points[:, 2], 6)))]


def viewpoint_rotations(count: int = 162) -> np.ndarray:
    """Rotations of the template cameras around an object (released network: 162, paper: 42 to 642).

    The camera sits at the viewpoint p (unit vector, object frame), its optical axis z = -p points at the
    object's centre, x = normalise((0, 0, -1) x z) is horizontal and y = z x x points down; at the two poles
    (0, -1, 0) replaces (0, 0, -1).

    Args:
        count: 42, 162 or 642.

    Returns:
        (count, 3, 3) float64 ``R_cam_obj`` (object -> OpenCV camera), the lowest camera first.

    Raises:
        ConfigError: any other count.
    """
    if count not in VIEWPOINT_COUNTS:
        choices = ", ".join(map(str, VIEWPOINT_COUNTS))
        raise ConfigError(f"viewpoints is {count}, but a subdivided icosahedron has one of {choices}")
    positions = icosphere(1 + VIEWPOINT_COUNTS.index(count))
    rotations = np.empty((count, 3, 3))
    for rotation, position in zip(rotations, positions, strict=True):
        z = -position
        at_pole = np.hypot(position[0], position[1]) < 1e-3
        x = np.cross((0.0, -1.0, 0.0) if at_pole else (0.0, 0.0, -1.0), z)
        x /= np.linalg.norm(x)
        rotation[:] = x, np.cross(z, x), z
    return rotations


def spread_viewpoints(count: int, of: int = 162) -> np.ndarray:
    """Evenly spread views among those of :func:`viewpoint_rotations`: a smaller bank's templates.

    Where a coarser icosphere has so many vertices (12, 42, 162), these. Otherwise the views of least
    repulsion, as of equal charges on a sphere (6: the corners of an octahedron; 2: opposite each other), the
    first in order of equally good ones.

    Args:
        count: of the views. of: number of views to choose from: 42, 162 or 642.

    Returns:
        (count,) indices, ascending.

    Raises:
        ConfigError: there are not so many views.
    """
    cameras = -viewpoint_rotations(of)[:, 2]
    if not 1 <= count <= of:
        raise ConfigError(f"cannot take {count} views of {of}: take 1 to {of}")
    for subdivisions in range(len(VIEWPOINT_COUNTS) + 1):
        if count == 10 * 4**subdivisions + 2:
            nearest = (icosphere(subdivisions) @ cameras.T).argmax(axis=1)
            return np.sort(nearest)
    distances = np.linalg.norm(cameras[:, None] - cameras[None], axis=2)
    repulsion = 1.0 / np.where(distances > 0, distances, np.inf)
    best, least = np.arange(count), np.inf
    for start in range(of):
        chosen = _least_repulsion(repulsion, start, count)
        energy = repulsion[np.ix_(chosen, chosen)].sum()
        if energy < least - 1e-9:
            best, least = chosen, energy
    return np.sort(best)


def _least_repulsion(repulsion: np.ndarray, start: int, count: int) -> np.ndarray:
    """Take the view that the ones taken repel least, again and again; then move each as long as it helps."""
    taken = np.zeros(len(repulsion), bool)
    taken[start] = True
    while taken.sum() < count:
        taken[np.where(taken, np.inf, repulsion[taken].sum(axis=0).round(9)).argmin()] = True
    moved = True
    while moved:
        moved = False
        for view in np.flatnonzero(taken):
            taken[view] = False
            energy = np.where(taken, np.inf, repulsion[taken].sum(axis=0))
            better = energy.argmin()
            if energy[better] < energy[view] - 1e-9:
                taken[better] = moved = True
            else:
                taken[view] = True
    return np.flatnonzero(taken)
