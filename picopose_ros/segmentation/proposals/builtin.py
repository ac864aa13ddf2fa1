"""Proposals without weights: regions of one colour or between edges, merged step by step at all scales.

Small cells of a watershed are merged pairwise, the most alike neighbours first; every region on the way is a
candidate (Felzenszwalb and Huttenlocher 2004, Uijlings et al. 2013, Arbelaez et al. 2014). Two orders of
merging are followed: by colour, and by the edge between two regions (and the step in depth, where depth is
given). Of every size those are kept that live longest: made early and merged late.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from math import dist

import cv2
import numpy as np

from picopose_ros.segmentation.proposals import SAME, Picture

SIDE = 320
"""Longer side (px) of the picture that is looked at."""

CELL = 10
"""Mean side (px) of a cell of the watershed there."""

SMALLEST, LARGEST = 0.001, 0.35
"""Shares of the image that a proposal covers."""

MOST = 6
"""Proposals per image."""

SIZES = 3
"""Classes of size that share them, each some seven times as large as the one before."""

_COLOUR_WEIGHTS = (1.0, 0.35)  # of the difference in colour, by order of merging
_EDGE_WEIGHTS = (0.3, 1.0)
_DEPTH_STEP = 0.02  # of the distance: a step this large counts as much as an edge of 50 grey values


@dataclass(frozen=True)
class Cells:
    """The n cells of a picture, and what two neighbours have in common.

    Attributes:
        labels: (h, w) int32, 0 .. n - 1, of the small picture. area: (n,) px. colour: (n, 3) mean Lab.
        pairs: of neighbours (lower, higher) the length of their border and the sum of the edges on it.
    """

    labels: np.ndarray
    area: np.ndarray
    colour: np.ndarray
    pairs: dict[tuple[int, int], tuple[float, float]]


def propose(picture: Picture) -> list[np.ndarray]:
    """Masks (H, W) bool, the likeliest to be things first."""
    height, width = picture.rgb.shape[:2]
    regions = find_cells(picture)
    members: list[np.ndarray] = []
    worth: list[np.ndarray] = []
    for colour_weight, edge_weight in zip(_COLOUR_WEIGHTS, _EDGE_WEIGHTS):
        own, lifetime = _merge(regions, colour_weight, edge_weight)
        members.append(own)
        worth.append(lifetime)
    chosen = _choose(np.concatenate(members), np.concatenate(worth), regions)
    masks = []
    for row in chosen:
        mask = row[regions.labels].astype(np.uint8)
        masks.append(_filled(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)))
    return masks


def find_cells(picture: Picture) -> Cells:
    """The cells of a picture, at the scale that proposals are made at."""
    height, width = picture.rgb.shape[:2]
    scale = min(SIDE / max(height, width), 1.0)
    size = max(round(width * scale), 8), max(round(height * scale), 8)
    small = cv2.resize(picture.rgb, size, interpolation=cv2.INTER_AREA)
    small = cv2.bilateralFilter(small, 5, 30, 3)
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).astype(np.float32)
    edges = _edges(lab)
    ground = lab
    if picture.depth is not None:
        steps = _depth_edges(picture.depth, size)
        edges = np.maximum(edges, steps)
        ground = np.dstack([lab[..., 0], lab[..., 1:].mean(2), steps])
    return _watershed(lab, edges, ground)


def _edges(lab: np.ndarray) -> np.ndarray:
    """(h, w) float32 strength of the edges of a picture (h, w, 3), about the step in grey values."""
    soft = cv2.GaussianBlur(lab, (0, 0), 0.8)
    dx, dy = (cv2.Sobel(soft, cv2.CV_32F, *order, ksize=3) / 4 for order in ((1, 0), (0, 1)))
    return np.sqrt((dx**2 + dy**2).sum(2))


def _depth_edges(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The same of a depth image (H, W), by the size of a step against the distance."""
    small = cv2.resize(np.nan_to_num(depth).astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
    known = small > 0
    kernel = np.ones((3, 3), np.uint8)
    far, near = cv2.dilate(small, kernel), cv2.erode(np.where(known, small, np.inf), kernel)
    step = np.where(known & np.isfinite(near), (far - near) / np.maximum(small, 1e-6), 0)
    return np.minimum(50 * step / _DEPTH_STEP, 150).astype(np.float32)


def _watershed(lab: np.ndarray, edges: np.ndarray, ground: np.ndarray) -> Cells:
    """Watershed from a grid of seeds, each moved to the calmest place near it."""
    height, width = edges.shape
    markers = np.zeros((height, width), np.int32)
    count = 0
    for top in range(0, height - CELL // 2, CELL):
        for left in range(0, width - CELL // 2, CELL):
            part = edges[top : top + CELL, left : left + CELL]
            y, x = np.unravel_index(int(part.argmin()), part.shape)
            count += 1
            markers[top + y, left + x] = count
    # OpenCV floods over the smallest steps of the ground's three channels first.
    labels = cv2.watershed(np.rint(ground).astype(np.uint8), markers).astype(np.int32)
    # The lines between cells (-1) and the image's border go to a neighbour.
    while (labels <= 0).any():
        grown = cv2.dilate(np.maximum(labels, 0).astype(np.float32), np.ones((3, 3))).astype(np.int32)
        labels = np.where(labels > 0, labels, grown)
        if not grown.any():
            labels[:] = 1
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)
    n = int(labels.max()) + 1
    area = np.bincount(labels.ravel(), minlength=n).astype(np.float64)
    colour = np.stack([np.bincount(labels.ravel(), c.ravel(), n) / area for c in cv2.split(lab)], 1)
    return Cells(labels, area, colour, _borders(labels, edges, n))


def _borders(labels: np.ndarray, edges: np.ndarray, n: int) -> dict[tuple[int, int], tuple[float, float]]:
    keys, strengths = [], []
    for one, other, a, b in (
        (labels[:, :-1], labels[:, 1:], edges[:, :-1], edges[:, 1:]),
        (labels[:-1], labels[1:], edges[:-1], edges[1:]),
    ):
        differ = one != other
        low, high = np.minimum(one, other)[differ], np.maximum(one, other)[differ]
        keys.append(low.astype(np.int64) * n + high)
        strengths.append(np.maximum(a, b)[differ])
    key, where = np.unique(np.concatenate(keys), return_inverse=True)
    length = np.bincount(where)
    total = np.bincount(where, np.concatenate(strengths))
    return {
        (int(k // n), int(k % n)): (float(count), float(sum_)) for k, count, sum_ in zip(key, length, total)
    }


def _merge(regions: Cells, colour_weight: float, edge_weight: float) -> tuple[np.ndarray, np.ndarray]:
    """All regions of one order of merging.

    Returns:
        (m, n) bool, which cells each region holds; (m,) how long it lived: the cost at which it was merged
        over the cost at which it was made.
    """
    n = len(regions.area)
    area, colour = regions.area.tolist(), regions.colour.tolist()  # of few numbers Python is faster
    members = [np.eye(1, n, k, dtype=bool)[0] for k in range(n)]
    made = [1.0] * n
    ended: dict[int, float] = {}
    around: list[dict[int, tuple[float, float]]] = [{} for _ in range(n)]
    for (i, j), border in regions.pairs.items():
        around[i][j] = around[j][i] = border
    total = float(sum(area))

    def cost(i: int, j: int) -> float:
        length, edge = around[i][j]
        difference = colour_weight * dist(colour[i], colour[j])
        # Small regions first, or the largest one swallows its surroundings cell by cell.
        small = (min(area[i], area[j]) / total) ** 0.25
        return (difference + edge_weight * edge / length + 1.0) * small

    heap = [(cost(i, j), i, j) for i, j in regions.pairs]
    heapq.heapify(heap)
    alive = set(range(n))
    floor = 0.0
    while heap:
        value, i, j = heapq.heappop(heap)
        if i not in alive or j not in alive:
            continue
        floor = max(floor, value)
        ended[i] = ended[j] = floor
        alive -= {i, j}
        k = len(area)
        area.append(area[i] + area[j])
        share = area[i] / area[k]
        colour.append([share * a + (1 - share) * b for a, b in zip(colour[i], colour[j])])
        members.append(members[i] | members[j])
        made.append(floor)
        joined: dict[int, tuple[float, float]] = {}
        for side in (i, j):
            for other, (length, edge) in around[side].items():
                if other in alive:
                    before = joined.get(other, (0.0, 0.0))
                    joined[other] = before[0] + length, before[1] + edge
        around.append(joined)
        alive.add(k)
        for other, border in joined.items():
            around[other].pop(i, None)
            around[other].pop(j, None)
            around[other][k] = border
            heapq.heappush(heap, (cost(other, k), other, k))
    rows = range(n, len(area))  # a single cell is no region
    lifetime = np.array([ended.get(k, floor) / max(made[k], 1e-6) for k in rows])
    return np.array(members[n:]).reshape(len(rows), n), lifetime


def _choose(members: np.ndarray, worth: np.ndarray, regions: Cells) -> np.ndarray:
    """The best regions (k, n) that differ from each other."""
    share = members @ regions.area / regions.area.sum()
    fits = (share >= SMALLEST) & (share <= LARGEST)
    members, worth, share = members[fits], worth[fits], share[fits]
    order = np.argsort(-worth, kind="stable")
    members, share = members[order].astype(np.float32), share[order]
    common = (members * (regions.area / regions.area.sum()).astype(np.float32)) @ members.T
    same = common > SAME * (share[:, None] + share[None] - common)
    size = (np.log2(LARGEST / share) * SIZES / np.log2(LARGEST / SMALLEST)).astype(int).clip(0, SIZES - 1)
    kept: list[int] = []
    for row in range(len(members)):
        if np.count_nonzero(size[kept] == size[row]) < MOST // SIZES and not same[row, kept].any():
            kept.append(row)
    return members[kept] > 0


def _filled(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) uint8 without holes, bool."""
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(mask), outlines, -1, 1, cv2.FILLED) > 0
