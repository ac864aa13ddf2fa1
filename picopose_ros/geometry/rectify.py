"""Images and masks as an undistorted camera with the same intrinsics would have taken them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

from picopose_ros.geometry.cameras import CameraModel


def straighten(images: Sequence[np.ndarray], camera: CameraModel) -> list[np.ndarray]:
    """Images (H, W, 3) uint8, depth images (H, W) float and masks (H, W) bool without the lens' distortion.

    Masks and depth are taken from the nearest pixel. What lies outside the image is 0.
    """
    if not camera.distorted:
        return list(images)
    maps = _maps(camera.K.tobytes(), camera.width, camera.height, camera.distortion_model, camera.D)
    found = []
    for image in images:
        smooth = image.ndim == 3
        plain = image.astype(np.uint8) if image.dtype == bool else image
        flags = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST
        moved = cv2.remap(plain, *maps, flags, borderMode=cv2.BORDER_CONSTANT)
        found.append(moved.astype(image.dtype))
    return found


@lru_cache(maxsize=4)
def _maps(
    K: bytes, width: int, height: int, model: str, D: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    camera = CameraModel(np.frombuffer(K).reshape(3, 3), width, height, model, D)
    v, u = np.indices((height, width), np.float64)
    rays = np.stack([u.ravel(), v.ravel(), np.ones(u.size)], 1) @ np.linalg.inv(camera.K).T
    maps = camera.project(rays).reshape(height, width, 2).astype(np.float32)
    return np.ascontiguousarray(maps[..., 0]), np.ascontiguousarray(maps[..., 1])
