"""The largest distance between two vertices, in a time that does not grow with their square."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

_EXACT = 3000
"""So many points are compared each with each."""

_DIRECTIONS = 256

_SAMPLE = 100_000
"""So many points, evenly picked, are enough to find where to begin."""


def diameter(vertices: np.ndarray) -> float:
    """Largest distance between two of (V, 3) points.

    Exact, unless more than `_EXACT` points could be an end of it, as those of a sphere with a fine mesh: then
    it is the longest of the local maxima that are found from 256 directions, short of the true one by less
    than the length of an edge.
    """
    points = np.asarray(vertices, np.float64)
    if len(points) <= _EXACT:
        return _largest(points)
    centre = (points.min(axis=0) + points.max(axis=0)) / 2.0
    points = points - centre
    best = _climb(points)
    # The ends of a distance longer than this are at least so far from the centre.
    radii = np.linalg.norm(points, axis=1)
    far = points[radii >= best - radii.max() - 1e-12 * best]
    if _EXACT < len(far) <= 20 * _EXACT:
        far = np.unique(far, axis=0)
    return _largest(far) if len(far) <= _EXACT else best


def _climb(points: np.ndarray) -> float:
    """The longest of the distances from point to farthest point, begun at the extremes of many directions."""
    index = np.arange(_DIRECTIONS) + 0.5
    z = 1.0 - index / _DIRECTIONS  # half a sphere, by a Fibonacci spiral
    angle = np.pi * (1.0 + 5.0**0.5) * index
    radius = np.sqrt(1.0 - z * z)
    directions = np.stack([radius * np.cos(angle), radius * np.sin(angle), z])
    low, high = np.full(_DIRECTIONS, np.inf), np.full(_DIRECTIONS, -np.inf)
    ends = np.zeros((2, _DIRECTIONS), np.int64)
    step = max(1, len(points) // _SAMPLE)
    sample = points[::step]
    for start in range(0, len(sample), 8192):
        along = sample[start : start + 8192] @ directions
        for values, extreme, row, pick in ((along, high, 0, np.argmax), (along, low, 1, np.argmin)):
            at = pick(values, axis=0)
            value = values[at, np.arange(_DIRECTIONS)]
            better = value > extreme if row == 0 else value < extreme
            extreme[better] = value[better]
            ends[row, better] = start + at[better]
    ends *= step
    spans = np.linalg.norm(points[ends[0]] - points[ends[1]], axis=1)
    best, squares = float(spans.max()), np.einsum("ij,ij->i", points, points)
    for column in np.argsort(-spans)[:8]:
        here = ends[0, column]
        for _ in range(10):
            distances = squares - 2.0 * (points @ points[here]) + squares[here]
            there = int(distances.argmax())
            length = float(np.linalg.norm(points[there] - points[here]))
            if length <= best:
                break
            best, here = length, there
    return best


def _largest(points: np.ndarray) -> float:
    largest = 0.0
    for start in range(0, len(points), 256):
        largest = max(largest, float(cdist(points[start : start + 256], points).max()))
    return largest
