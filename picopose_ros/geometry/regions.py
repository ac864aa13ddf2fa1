"""Where an object ends in the image itself: colours inside and outside, along the normals of its contour.

Each point of the contour has a line across it. The colours that lie surely inside and surely outside, on this
line and on its neighbours, are two histograms; the place on the line that divides the colours best, and how
surely, is where the object ends (after Stoiber et al., SRT3D, IJCV 2022, and ICG, CVPR 2022).
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from picopose_ros.geometry.contours import sample_lines

_CLUSTERS = 32
"""Colours that are told apart: the clusters of those along the contour."""
_COLOUR_SIGMA = 12.0
"""Distance of colours, of 255, that still count as alike."""
_NEIGHBOURS = 0.03
"""Standard deviation of the window of neighbouring lines, as a share of all of them."""
_STRONGEST = 1.5
"""Largest logarithm of the odds that one pixel is believed to tell."""
_INDEPENDENT = 0.35
"""Share of the pixels of a line that count as independent: neighbours are alike."""
_FLOOR_PX = 0.4
"""Least standard deviation of an edge."""


def colour_groups(rgb: np.ndarray, origin: np.ndarray, normal: np.ndarray, reach: float) -> np.ndarray:
    """(k, 3) float32 colours that are told apart around a contour; arguments as of `region_edges`."""
    colours = sample_lines(rgb, origin, normal, _places(reach)[0]).astype(np.float32)
    return _cluster_centres(colours.reshape(-1, 3))


def region_edges(
    rgb: np.ndarray,
    origin: np.ndarray,
    normal: np.ndarray,
    reach: float,
    centres: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Where lines leave the object, by colour.

    Args:
        rgb: (H, W, 3) uint8. origin, normal: (n, 2) lines, in the order of the contour.
        reach: px to either side of the origins within which the edge is looked for; twice as far the colours
            are looked at.
        centres: (k, 3) of `colour_groups`, to be used again while the contour hardly moves; None: their own.
    Returns:
        (n,) px along the lines, and (n,) its standard deviation, px; both of a distribution over the reach.
    """
    at, step = _places(reach)
    colours = sample_lines(rgb, origin, normal, at).astype(np.float32)
    n, s, _ = colours.shape
    flat = colours.reshape(-1, 3)
    if centres is None:
        centres = _cluster_centres(flat)
    labels = _nearest(flat, centres).reshape(n, s)
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    alike = _gaussian(apart / _COLOUR_SIGMA)
    window = _window(n)
    logs = []
    numbered = labels + np.arange(n)[:, None] * len(centres)
    for side in (at < -0.5 * reach, at > 0.5 * reach):
        counts = np.bincount(numbered[:, side].ravel(), minlength=n * len(centres))
        counts = counts.reshape(n, -1).astype(np.float32)
        histogram = window @ (counts @ alike)
        histogram /= histogram.sum(1, keepdims=True) + 1e-9
        logs.append(np.log(histogram + 0.2 / len(centres)))
    odds = np.clip(np.take_along_axis(logs[0] - logs[1], labels, 1), -_STRONGEST, _STRONGEST)
    inner = np.abs(at) <= reach + 1e-6
    # The edge lies between samples: all before it are inside, all behind it outside.
    score = np.cumsum(odds[:, inner], 1) * (_INDEPENDENT * step)
    place = at[inner] + step / 2
    weight = np.exp(score - score.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    mean = weight @ place
    variance = weight @ place**2 - mean**2
    return mean, np.sqrt(np.maximum(variance, 0) + _FLOOR_PX**2)


def _places(reach: float) -> tuple[np.ndarray, float]:
    """Samples on a line, px from its origin, and their distance."""
    step = max(reach / 10.0, 0.5)
    half = int(np.ceil(reach / step))
    return np.arange(-2 * half, 2 * half + 1) * step, step


def _cluster_centres(colours: np.ndarray) -> np.ndarray:
    """(k, 3) of at most `_CLUSTERS` groups of colours (n, 3)."""
    some = colours[:: max(len(colours) // 1000, 1)]
    count = min(_CLUSTERS, len(some))
    criteria = (cv2.TERM_CRITERIA_MAX_ITER, 6, 0.0)
    # Starting from an even choice by brightness: the same colours give the same groups.
    first = _nearest(some, some[np.argsort(some.sum(1))][np.linspace(0, len(some) - 1, count).astype(int)])
    flags = cv2.KMEANS_USE_INITIAL_LABELS
    return cv2.kmeans(some, count, first.astype(np.int32)[:, None], criteria, 1, flags)[2]


def _nearest(colours: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return (0.5 * (centres**2).sum(1) - colours @ centres.T).argmin(1)


@lru_cache(32)
def _window(n: int) -> np.ndarray:
    """(n, n) float32 weights of neighbouring lines on a closed contour."""
    lag = np.abs(np.arange(n)[:, None] - np.arange(n)[None])
    lag = np.minimum(lag, n - lag)
    return _gaussian(lag / max(_NEIGHBOURS * n, 1.0))


def _gaussian(ratio: np.ndarray) -> np.ndarray:
    """float32 exp(-ratio^2 / 2); exactly 0 where it is tiny: processors are slow at numbers next to 0."""
    return np.exp(-0.5 * ratio**2, where=ratio < 5.0, out=np.zeros_like(ratio)).astype(np.float32)
