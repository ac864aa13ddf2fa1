"""Poses drawn into the image: outline of the mesh, axes, label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

_AXIS_COLOURS = ((255, 60, 60), (60, 220, 60), (80, 120, 255))
_FAR_PX = 10_000


@dataclass(frozen=True)
class Drawn:
    """One object to draw.

    Attributes:
        mesh: in metres.
        T_cam_obj: (4, 4) mesh's own frame -> camera.
        label: what is written beside it.
        colour: RGB of the outline, 0..255.
    """

    mesh: ObjectMesh
    T_cam_obj: np.ndarray
    label: str
    colour: tuple[int, int, int]


def palette(index: int) -> tuple[int, int, int]:
    """RGB of the index-th class: bright, and far from its neighbours."""
    hue = np.array([[[(index * 67 + 20) % 180, 220, 255]]], np.uint8)
    red, green, blue = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def draw_poses(
    rgb: np.ndarray, camera: CameraModel, objects: Sequence[Drawn], renderer: MeshRenderer
) -> np.ndarray:
    """A copy of an image with objects drawn into it.

    The outline is that of the rendered silhouette, bent by the lens where the camera has one. The axes (x
    red, y green, z blue) are the mesh's own, drawn from the centre of its bounding box, because the mesh's
    origin may lie far away.

    Args:
        rgb: (H, W, 3) uint8. camera: of the image. objects: what to draw. renderer: of the calling thread.

    Raises:
        RenderError: nothing can be rendered.
    """
    image = np.array(rgb)
    thickness = max(1, round(min(image.shape[:2]) / 240))
    tops = []
    for drawn in objects:
        mask = renderer.render(drawn.mesh, drawn.T_cam_obj, camera.K, camera.width, camera.height).mask
        outlines = _bent(mask, camera)
        cv2.polylines(image, outlines, True, (0, 0, 0), thickness + 2, cv2.LINE_AA)
        cv2.polylines(image, outlines, True, drawn.colour, thickness, cv2.LINE_AA)
        tops.append(min((int(line[..., 1].min()) for line in outlines), default=None))
    for drawn, top in zip(objects, tops):  # on top of every outline
        if top is not None:
            _draw_axes_and_label(image, camera, drawn, top, thickness)
    return image


def _bent(mask: np.ndarray, camera: CameraModel) -> list[np.ndarray]:
    """Outlines (k, 1, 2) int32 of a pinhole silhouette, in the pixels of the image as it is."""
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not camera.distorted:
        return list(outlines)
    rays = np.linalg.inv(camera.K)
    return [
        _pixels(camera, np.concatenate([line[:, 0], np.ones((len(line), 1))], 1) @ rays.T)[:, None]
        for line in outlines
    ]


def _pixels(camera: CameraModel, xyz: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(camera.project(xyz), -_FAR_PX, _FAR_PX)).astype(np.int32)


def _draw_axes_and_label(
    image: np.ndarray, camera: CameraModel, drawn: Drawn, top: int, thickness: int
) -> None:
    """Axes from the box's centre; the label over ``top``, the outline's highest row."""
    mesh, T = drawn.mesh, np.asarray(drawn.T_cam_obj, np.float64)
    ends = np.concatenate([[mesh.centre], mesh.centre + 0.4 * mesh.diagonal * np.eye(3)])
    ends = ends @ T[:3, :3].T + T[:3, 3]
    if ends[:, 2].min() <= 0:
        return
    centre, *tips = (tuple(pixel) for pixel in _pixels(camera, ends).tolist())
    for tip, colour in zip(tips, _AXIS_COLOURS):
        cv2.line(image, centre, tip, colour, thickness, cv2.LINE_AA)
    if drawn.label:
        size = 0.22 * (thickness + 1)
        (width, height), _ = cv2.getTextSize(drawn.label, cv2.FONT_HERSHEY_SIMPLEX, size, thickness)
        x = int(np.clip(centre[0] - width // 2, 0, max(image.shape[1] - width, 0)))
        y = int(np.clip(top - 3 * thickness, height + 2, image.shape[0] - 4))
        for colour, weight in (((0, 0, 0), thickness + 2), ((255, 255, 255), max(1, thickness // 2))):
            cv2.putText(
                image, drawn.label, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, weight, cv2.LINE_AA
            )
