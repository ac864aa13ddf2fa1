"""Rendered views of an object that training pairs are made of: a template and queries near it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import trimesh

from picopose_ros.geometry.crops import CropBox, crop_box_from_mask, crop_mask, crop_points_consistent
from picopose_ros.templates.bank import TEMPLATE_K
from picopose_ros.templates.renderer import MeshRenderer

QUERY_SIZE = 256
_WINDOW = CropBox(left=160, top=80, side=320)
"""The part of the template camera's image that can show a centred object at twice its diagonal."""


@dataclass(frozen=True)
class TemplateView:
    """One template of an object."""

    rgb: np.ndarray  # (224, 224, 3) uint8 RGB crop, black background
    mask: np.ndarray  # (224, 224) bool
    points_consistent: np.ndarray  # (64, 64, 3) float32, camera frame, metres; 0 where no object
    T_cam_ctr: np.ndarray  # (4, 4) float32, centred object frame -> camera
    M_crop_img: np.ndarray  # (3, 3) float32, full-image px -> crop px
    K: np.ndarray  # (3, 3) float32, of the full 640x480 image
    viewpoint: int  # index into viewpoint_rotations(162)
    shaded: np.ndarray | None = (
        None  # (224, 224) uint8, the crop without colours in a headlight; pools have it
    )


@dataclass(frozen=True)
class QueryView:
    """One view of an object from near a template's direction."""

    rgb: np.ndarray  # (256, 256, 3) uint8 RGB, unlit albedo, black background
    depth: np.ndarray  # (256, 256) float32 metres, 0 = background
    T_cam_ctr: np.ndarray  # (4, 4) float32, centred object frame -> camera
    K: np.ndarray  # (3, 3) float32

    @property
    def mask(self) -> np.ndarray:
        """(256, 256) bool, True on the object."""
        return self.depth > 0


def template_pose(rotation: np.ndarray, diagonal: float) -> np.ndarray:
    """T_cam_ctr (4, 4) of a template: the centre on the optical axis at twice the bounding-box diagonal."""
    pose = np.eye(4)
    pose[:3, :3] = rotation
    pose[2, 3] = 2.0 * diagonal
    return pose


def render_template(
    renderer: MeshRenderer, parts: Sequence[trimesh.Trimesh], T_cam_ctr: np.ndarray, viewpoint: int
) -> TemplateView:
    """Render one template of a centred object as the bank does: window, square crop, 224 pixels."""
    shifted = TEMPLATE_K.copy()
    shifted[0, 2] -= _WINDOW.left
    shifted[1, 2] -= _WINDOW.top
    view = renderer.render(parts, T_cam_ctr, shifted, _WINDOW.side, _WINDOW.side)
    bare = [
        trimesh.Trimesh(part.vertices, part.faces, vertex_normals=part.vertex_normals, process=False)
        for part in parts
    ]
    grey = renderer.render(bare, T_cam_ctr, shifted, _WINDOW.side, _WINDOW.side, shading="headlight")
    renderer.release(bare)
    box = crop_box_from_mask(view.mask)
    full = CropBox(box.left + _WINDOW.left, box.top + _WINDOW.top, box.side)
    return TemplateView(
        rgb=cv2.resize(view.rgb[box.slices], (224, 224), interpolation=cv2.INTER_LINEAR),
        shaded=cv2.resize(grey.rgb[box.slices][..., 0], (224, 224), interpolation=cv2.INTER_LINEAR),
        mask=crop_mask(view.mask, box) > 0,
        points_consistent=crop_points_consistent(view.depth, shifted, box),
        T_cam_ctr=T_cam_ctr.astype(np.float32),
        M_crop_img=full.affine(),
        K=TEMPLATE_K.astype(np.float32),
        viewpoint=viewpoint,
    )


def _rotation_about(axis: np.ndarray, angle: float) -> np.ndarray:
    return trimesh.transformations.rotation_matrix(angle, axis)[:3, :3]


def draw_query_pose(rng: np.random.Generator, rotation: np.ndarray, diagonal: float) -> np.ndarray:
    """Draw T_cam_ctr (4, 4) of a query near a template's rotation.

    The direction of view differs by up to 10 degrees (70 %) or 10 to 25 degrees (30 %), without any roll
    (training rolls the image instead); the distance is 2.5 to 8 diagonals; half of the objects lie off the
    optical axis, by up to 15 degrees, because the perspective of an object near the border of an image is
    another one.
    """
    tilt = np.deg2rad(10.0 * np.sqrt(rng.uniform()) if rng.uniform() < 0.7 else rng.uniform(10.0, 25.0))
    heading = rng.uniform(0, 2 * np.pi)
    pose = np.eye(4)
    pose[:3, :3] = _rotation_about(np.array([np.cos(heading), np.sin(heading), 0.0]), tilt) @ rotation
    pose[2, 3] = diagonal * np.exp(rng.uniform(np.log(2.5), np.log(8.0)))
    aside = np.deg2rad(rng.uniform(0, 15.0)) if rng.uniform() < 0.5 else 0.0
    heading = rng.uniform(0, 2 * np.pi)
    turn = np.eye(4)
    turn[:3, :3] = _rotation_about(np.array([np.cos(heading), np.sin(heading), 0.0]), aside)
    return turn @ pose


def framing_intrinsics(points: np.ndarray, T_cam_ctr: np.ndarray, size: int = QUERY_SIZE) -> np.ndarray:
    """Intrinsics (3, 3) that let the projection of points ``(n, 3)`` fill 90 % of a square image, centred."""
    seen = points @ T_cam_ctr[:3, :3].T + T_cam_ctr[:3, 3]
    rays = seen[:, :2] / seen[:, 2:]
    low, high = rays.min(axis=0), rays.max(axis=0)
    focal = 0.9 * size / (high - low).max()
    centre = (size - 1) / 2 - focal * (low + high) / 2
    return np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1.0]])
