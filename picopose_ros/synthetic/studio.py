"""What both kinds of benchmark scenes are made with: the form of the truth, cameras, a camera's faults."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import trimesh

from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.crops import CROP_SIZE
from picopose_ros.templates.meshes import ObjectMesh

WIDTH, HEIGHT = 640, 480
FOCAL_RANGE = (500.0, 800.0)
"""Focal length in pixels, log-uniform per scene: the image is 65 to 44 degrees wide."""
PRINCIPAL_POINT_SHIFT = 12.0
"""Largest distance of the principal point from the image's middle, px, per axis."""
LEAST_VISIBLE = 0.1
"""Instances that are less visible than this are left out, as in BOP."""
LEAST_PIXELS = 100
"""Instances with fewer visible pixels are left out: no segmenter would find them."""


@dataclass(frozen=True)
class SceneInstance:
    """One object in a scene."""

    class_id: str
    T_cam_obj: np.ndarray
    """(4, 4) mesh's frame -> camera, metres."""
    visible: np.ndarray
    """(h, w) bool, the pixels that show it."""
    visib_fract: float
    """Visible pixels / pixels of the whole silhouette, those outside the image included."""


@dataclass(frozen=True)
class Scene:
    """An image and the truth about it."""

    name: str
    rgb: np.ndarray
    """(h, w, 3) uint8."""
    depth: np.ndarray
    """(h, w) float32 metres of what is seen; 0 where nothing is known to be."""
    camera: CameraModel
    instances: tuple[SceneInstance, ...]


def draw_camera(rng: np.random.Generator) -> CameraModel:
    """A camera of 640x480 pixels without distortion."""
    focal = np.exp(rng.uniform(*np.log(FOCAL_RANGE)))
    cx, cy = rng.uniform(-PRINCIPAL_POINT_SHIFT, PRINCIPAL_POINT_SHIFT, 2) + [
        (WIDTH - 1) / 2,
        (HEIGHT - 1) / 2,
    ]
    return CameraModel(np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]]), WIDTH, HEIGHT)


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """Uniform over all rotations: the viewpoint over the sphere, the turn in the image over the circle."""
    return trimesh.transformations.random_rotation_matrix(rng.uniform(0, 1, 3))[:3, :3]


@dataclass(frozen=True)
class Window:
    """A part of the image plane around one object; it may reach beyond the image."""

    left: int
    top: int
    width: int
    height: int

    def intrinsics(self, K: np.ndarray) -> np.ndarray:
        """K (3, 3) of the image -> K of the window."""
        shifted = K.copy()
        shifted[:2, 2] -= self.left, self.top
        return shifted

    def overlap(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Row and column slices of the image, and of this window, where they overlap; both may be empty."""
        x0, x1 = np.clip([self.left, self.left + self.width], 0, WIDTH).tolist()
        y0, y1 = np.clip([self.top, self.top + self.height], 0, HEIGHT).tolist()
        image = slice(y0, y1), slice(x0, x1)
        own = slice(y0 - self.top, y1 - self.top), slice(x0 - self.left, x1 - self.left)
        return image, own


def window_of(vertices: np.ndarray, T_cam_obj: np.ndarray, K: np.ndarray) -> Window:
    """The window that holds the projection of points (n, 3); sizes in steps of 32 px, so that few differ."""
    seen = vertices @ T_cam_obj[:3, :3].T + T_cam_obj[:3, 3]
    uv = seen[:, :2] / np.maximum(seen[:, 2:], 1e-3 * np.abs(seen).max()) * [K[0, 0], K[1, 1]] + K[:2, 2]
    uv = np.clip(uv, [-WIDTH, -HEIGHT], [2 * WIDTH, 2 * HEIGHT])  # right beside the camera, enough is enough
    low, high = np.floor(uv.min(axis=0)).astype(int) - 3, np.ceil(uv.max(axis=0)).astype(int) + 4
    width, height = (int(-(-n // 32) * 32) for n in high - low)
    return Window(int(low[0]), int(low[1]), width, height)


def halved(picture: np.ndarray) -> np.ndarray:
    """Every second pixel of a picture, averaged with its neighbours; float32."""
    soft = cv2.sepFilter2D(picture.astype(np.float32), -1, _TENT, _TENT, borderType=cv2.BORDER_REPLICATE)
    return soft[::2, ::2]


_TENT = np.array([0.25, 0.5, 0.25], np.float32)


def doubled(K: np.ndarray) -> np.ndarray:
    """Intrinsics of twice the resolution whose even pixels are the pixels of ``K``, centre on centre."""
    return np.diag([2.0, 2.0, 1.0]) @ K


def camera_effects(rgb: np.ndarray, side: float, rng: np.random.Generator) -> np.ndarray:
    """What a camera does to a picture (h, w, 3) float32, as strong as training does it to a crop.

    Training blurs crops of 224 px, so blur and lost resolution are measured in the crop of an object that is
    ``side`` px large here. Returns uint8.
    """
    zoom = side / CROP_SIZE
    if rng.uniform() < 0.4:
        rgb = cv2.GaussianBlur(rgb, (0, 0), max(rng.uniform(0.3, 1.6) * zoom, 0.2))
    if rng.uniform() < 0.35:
        shrink = min(rng.uniform(60, 200) / side, 1.0)
        size = max(int(rgb.shape[1] * shrink), 8), max(int(rgb.shape[0] * shrink), 8)
        small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        rgb = cv2.resize(small, rgb.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    mean = float(rgb.mean(dtype=np.float64))  # in float32 its last bit depends on the array's address
    rgb = (rgb - mean) * np.float32(rng.uniform(0.7, 1.25)) + np.float32(mean * rng.uniform(0.65, 1.3))
    if rng.uniform() < 0.4:
        grey = rgb.mean(-1, keepdims=True)
        rgb = grey + (rgb - grey) * np.float32(rng.uniform(0.2, 1.4))
    if rng.uniform() < 0.4:
        rgb = rgb * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    if rng.uniform() < 0.6:
        rgb = rgb + rng.standard_normal(rgb.shape, dtype=np.float32) * np.float32(rng.uniform(0, 8))
    shot = np.clip(rgb, 0, 255).astype(np.uint8)
    if rng.uniform() < 0.25:
        coded = cv2.imencode(".jpg", shot, [cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(35, 95))])[1]
        shot = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    return shot


def instance_of(
    mesh: ObjectMesh, T_cam_obj: np.ndarray, visible: np.ndarray, whole: int
) -> SceneInstance | None:
    """The instance, or None if too little of it is visible; ``whole`` counts the pixels of its silhouette."""
    pixels = int(visible.sum())
    if pixels < LEAST_PIXELS or pixels < LEAST_VISIBLE * whole:
        return None
    return SceneInstance(mesh.spec.class_id, T_cam_obj, visible, pixels / whole)
