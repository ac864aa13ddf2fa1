"""Polygons of a mesh file as triangles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def triangulate(points: np.ndarray, polygons: np.ndarray) -> np.ndarray:
    """Triangles of polygons that all have n corners.

    Convex ones become a fan, others have their ears cut off (Meisters, 1975).

    Args:
        points: (V, 3). polygons: (P, n) indices into it, n >= 3.

    Returns:
        (P (n - 2), 3) positions 0..n - 1 within the polygons, polygon by polygon.
    """
    polygons = np.asarray(polygons, np.int64)
    count, n = polygons.shape
    fan = np.column_stack([np.zeros(n - 2, int), np.arange(1, n - 1), np.arange(2, n)])
    corners = np.tile(fan, (count, 1, 1))
    if n > 3 and count:
        loops = points[polygons]
        after = np.roll(loops, -1, axis=1)
        normals = np.cross(loops, after).sum(axis=1)  # Newell
        turns = np.cross(loops - np.roll(loops, 1, axis=1), after - loops)
        bends = np.einsum("pni,pi->pn", turns, normals)
        size = np.abs(bends).max(axis=1, keepdims=True)
        for index in np.flatnonzero((bends < -1e-9 * size).any(axis=1)):
            corners[index] = _ears(loops[index], normals[index])
    return corners.reshape(-1, 3)


def _ears(loop: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """(n - 2, 3) triangles of one polygon."""
    keep = [axis for axis in range(3) if axis != int(np.abs(normal).argmax())]
    flat = loop[:, keep]
    area = _cross(flat, np.roll(flat, -1, axis=0)).sum()
    if area < 0:
        flat = flat * [1, -1]
    left, triangles = list(range(len(loop))), []
    while len(left) > 3:
        for position in range(len(left)):
            a, b, c = (left[(position + step) % len(left)] for step in (-1, 0, 1))
            if _cross(flat[b] - flat[a], flat[c] - flat[b]) <= 0:
                continue
            others = flat[[one for one in left if one not in (a, b, c)]]
            sides = [
                _cross(q - p, others - p)
                for p, q in ((flat[a], flat[b]), (flat[b], flat[c]), (flat[c], flat[a]))
            ]
            if not (np.min(sides, axis=0) >= 0).any():
                break
        else:  # it crosses itself
            position = 1
            a, b, c = left[0], left[1], left[2]
        triangles.append((a, b, c))
        left.pop(position)
    return np.array([*triangles, tuple(left)])


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def split(
    points: np.ndarray, sizes: np.ndarray, flat: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triangles of polygons with any number of corners.

    Args:
        points: (V, 3). sizes: (P,) corners of each polygon. flat: (sum of sizes,) indices into ``points``.

    Returns:
        faces (F, 3), the polygon of each (F,), and where its corners lie in ``flat`` (F, 3). Polygons of less
        than three corners are left out.
    """
    sizes, flat = np.asarray(sizes, np.int64), np.asarray(flat, np.int64)
    if len(flat) and (flat.min() < 0 or flat.max() >= len(points)):
        bad = flat[(flat < 0) | (flat >= len(points))][0]
        raise ValueError(f"a face refers to vertex {bad}, but there are {len(points)} vertices")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(sizes) else np.zeros(0, np.int64)
    where, owners = [], []
    for n in np.unique(sizes[sizes >= 3]):
        chosen = np.flatnonzero(sizes == n)
        places = starts[chosen, None] + np.arange(n)
        corners = triangulate(points, flat[places])
        rows = np.repeat(np.arange(len(chosen)), n - 2)
        where.append(places[rows[:, None], corners])
        owners.append(chosen[rows])
    if not where:
        return np.zeros((0, 3), np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int64)
    owner, place = np.concatenate(owners), np.concatenate(where)
    order = np.argsort(owner, kind="stable")
    return flat[place[order]], owner[order], place[order]


class Uneven(ValueError):
    """Lines have different numbers of values."""


def numbers(lines: Sequence[str], what: str) -> np.ndarray:
    """(n, columns) float64 of lines of numbers with equally many each.

    Raises:
        Uneven: the lines have different numbers of values.
        ValueError: something is no number.
    """
    if not lines:
        return np.zeros((0, 0))
    columns = len(lines[0].split())
    values = " ".join(lines).split()
    if columns == 0 or len(values) != columns * len(lines):
        raise Uneven(f"its {what} have different numbers of values")
    try:
        return np.array(values, np.float64).reshape(len(lines), columns)
    except ValueError as error:
        raise ValueError(f"its {what} have something that is no number: {error}") from None
