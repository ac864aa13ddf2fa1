"""Light, occluders and imperfect masks of rendered views, as the benchmark has them.

They are a constant of the benchmark: a change makes its figures incomparable with those before. Training has
stronger ones of its own.
"""

from __future__ import annotations

import cv2
import numpy as np


def normals_from_depth(depth: np.ndarray, mask: np.ndarray, focal: float) -> np.ndarray:
    """Camera-facing unit normals (h, w, 3), z towards the camera positive, from a depth map in metres."""
    z = np.where(mask, depth, 0).astype(np.float32)
    # Differences only between pixels that are both on the object; elsewhere the surface counts as flat.
    dx, dy = np.zeros_like(z), np.zeros_like(z)
    dx[:, 1:] = np.where(mask[:, 1:] & mask[:, :-1], z[:, 1:] - z[:, :-1], 0)
    dy[1:] = np.where(mask[1:] & mask[:-1], z[1:] - z[:-1], 0)
    slope = focal / np.maximum(z, 1e-6)
    normal = np.stack([dx * slope, dy * slope, np.ones_like(z)], -1)
    return normal / np.linalg.norm(normal, axis=-1, keepdims=True)


def relight(
    rgb: np.ndarray, depth: np.ndarray, mask: np.ndarray, focal: float, rng: np.random.Generator
) -> np.ndarray:
    """Light an unlit albedo image with a coloured lamp, ambient light and sometimes a highlight; float32."""
    albedo = rgb.astype(np.float32)
    if rng.uniform() < 0.15:
        return albedo
    normal = cv2.GaussianBlur(normals_from_depth(depth, mask, focal), (0, 0), 0.8)
    lamp = rng.normal(size=3)
    lamp[2] = abs(lamp[2]) + 0.3
    lamp = (lamp / np.linalg.norm(lamp)).astype(np.float32)
    ambient, diffuse = rng.uniform(0.3, 0.8), rng.uniform(0.1, 0.9)
    shade = np.float32(ambient) + np.float32(diffuse) * np.maximum(normal @ lamp, 0)
    lit = albedo * shade[..., None] * rng.uniform(0.88, 1.12, 3).astype(np.float32)
    if rng.uniform() < 0.35:
        half = lamp + np.array([0, 0, 1], np.float32)
        half /= np.linalg.norm(half)
        shine = np.maximum(normal @ half, 0) ** np.float32(rng.uniform(8, 60))
        lit += shine[..., None] * np.float32(255 * rng.uniform(0.1, 0.5))
    return lit


def occluder(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A blob or a bar over part of the object, as a uint8 mask of the same size."""
    cover = np.zeros_like(mask)
    rows, cols = np.nonzero(mask)
    at = rng.integers(len(rows))
    centre = np.array([cols[at], rows[at]], float)
    size = max(np.ptp(rows), np.ptp(cols)) + 1
    if rng.uniform() < 0.3:
        angle = rng.uniform(0, np.pi)
        along = np.array([np.cos(angle), np.sin(angle)])
        ends = np.rint([centre - along * 2 * size, centre + along * 2 * size]).astype(int)
        cv2.line(cover, ends[0].tolist(), ends[1].tolist(), 1, max(2, int(size * rng.uniform(0.05, 0.25))))
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        radii = size * rng.uniform(0.12, 0.45) * rng.uniform(0.5, 1.0, len(angles))
        corners = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
        cv2.fillPoly(cover, [np.rint(corners).astype(np.int32)], 1)
    return cover


def degrade_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask as a segmenter gives it: grown, shrunk, ragged, box-like, with pieces missing or added."""
    size = max(1, int(np.sqrt(mask.sum())))
    out = mask
    kind = rng.uniform()
    if kind < 0.6:
        k = int(rng.integers(1, max(2, size // 25) + 1)) * 2 + 1
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (k, k))
        out = cv2.dilate(out, kernel) if rng.uniform() < 0.55 else cv2.erode(out, kernel)
    elif kind < 0.75:
        coarse = max(4, int(size / rng.uniform(3, 10)))
        small = cv2.resize(out.astype(np.float32), (coarse * 2, coarse * 2), interpolation=cv2.INTER_AREA)
        out = (cv2.resize(small, out.shape[::-1], interpolation=cv2.INTER_LINEAR) > 0.5).astype(np.uint8)
    elif kind < 0.95:
        patch = occluder(mask, rng)
        patch = cv2.erode(patch, np.ones((3, 3), np.uint8))
        out = out & ~patch if rng.uniform() < 0.5 else out | patch
    else:
        out = out.copy()
        rows, cols = np.nonzero(mask)
        out[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] = 1
    return out if out.sum() > 0.3 * mask.sum() else mask
