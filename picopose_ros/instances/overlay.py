"""Poses drawn into the image: outline of the mesh, axes, label."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from picopose_ros.errors import MeshError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

if TYPE_CHECKING:
    from picopose_ros.instances import NamedPose

_log = logging.getLogger(__name__)

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


class OverlayPainter:
    """Draws the named poses of one image after another. Belongs to the thread that calls `paint`.

    Nothing is loaded before it is first drawn, so a painter that nobody looks at costs nothing.

    Args:
        specs: the objects by class id; a class that isn't among them is not drawn.
    """

    def __init__(self, specs: Mapping[str, ObjectSpec]) -> None:
        self._specs = dict(specs)
        self._colours = {class_id: palette(index) for index, class_id in enumerate(sorted(self._specs))}
        self._meshes: dict[str, ObjectMesh | None] = {}
        self._renderer: MeshRenderer | None = None

    def paint(self, rgb: np.ndarray, camera: CameraModel, named: Sequence[NamedPose]) -> np.ndarray:
        """A copy of an image (H, W, 3) uint8 with outline, axes, name and confidence of every pose.

        Raises:
            RenderError: nothing can be rendered.
        """
        drawn = []
        for one in named:
            mesh = self._mesh(one.pose.class_id)
            if mesh is not None:
                label = f"{one.name} {one.pose.confidence:.2f}"
                drawn.append(Drawn(mesh, one.pose.T_cam_obj, label, self._colours[one.pose.class_id]))
        if drawn and self._renderer is None:
            self._renderer = MeshRenderer()
        return draw_poses(rgb, camera, drawn, self._renderer)

    def close(self) -> None:
        """Free what was loaded; closing twice is allowed."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._meshes.clear()

    def _mesh(self, class_id: str) -> ObjectMesh | None:
        if class_id not in self._meshes:
            self._meshes[class_id] = None
            if class_id in self._specs:
                try:
                    self._meshes[class_id] = load_object(self._specs[class_id])
                except MeshError as error:  # changed since it was onboarded
                    _log.warning("object '%s' is not drawn: %s", class_id, error)
        return self._meshes[class_id]


def draw_poses(
    rgb: np.ndarray, camera: CameraModel, objects: Sequence[Drawn], renderer: MeshRenderer | None
) -> np.ndarray:
    """A copy of an image with objects drawn into it.

    The outline is that of the rendered silhouette, bent by the lens where the camera has one. The axes (x
    red, y green, z blue) are the mesh's own, drawn from the centre of its bounding box, because the mesh's
    origin may lie far away.

    Args:
        rgb: (H, W, 3) uint8. camera: of the image. objects: what to draw.
        renderer: of the calling thread; None is enough where there are no objects.

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
    # On top of every outline, and the words on top of every axis.
    middles = [
        None if top is None else _draw_axes(image, camera, drawn, thickness)
        for drawn, top in zip(objects, tops, strict=True)
    ]
    written: list[tuple[int, int, int, int]] = []
    for drawn, top, middle in zip(objects, tops, middles, strict=True):
        if middle is not None and drawn.label:
            _draw_label(image, drawn.label, (middle, top), written, thickness)
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


def _draw_axes(image: np.ndarray, camera: CameraModel, drawn: Drawn, thickness: int) -> int | None:
    """Axes from the box's centre; the column of that centre, or None where it can't be seen."""
    mesh, T = drawn.mesh, np.asarray(drawn.T_cam_obj, np.float64)
    ends = np.concatenate([[mesh.centre], mesh.centre + 0.4 * mesh.diagonal * np.eye(3)])
    ends = ends @ T[:3, :3].T + T[:3, 3]
    if ends[:, 2].min() <= 0:
        return None
    centre, *tips = (tuple(pixel) for pixel in _pixels(camera, ends).tolist())
    for tip, colour in zip(tips, _AXIS_COLOURS, strict=True):
        cv2.line(image, centre, tip, colour, thickness, cv2.LINE_AA)
    return centre[0]


def _draw_label(
    image: np.ndarray,
    label: str,
    above: tuple[int, int],
    written: list[tuple[int, int, int, int]],
    thickness: int,
) -> None:
    """A label over a point (x, y), higher where another one (left, top, right, bottom) is there already."""
    size = 0.22 * (thickness + 1)
    (width, height), descent = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, size, thickness)
    x = int(np.clip(above[0] - width // 2, 0, max(image.shape[1] - width, 0)))
    wanted = int(np.clip(above[1] - 3 * thickness, height + 2, image.shape[0] - 4))

    def free(y: int) -> bool:
        return all(
            x + width < left or right < x or y + descent <= top or bottom <= y - height
            for left, top, right, bottom in written
        )

    rows = [wanted, *range(wanted - 1, height + 1, -1), *range(wanted + 1, image.shape[0] - descent)]
    y = next((row for row in rows if free(row)), wanted)
    written.append((x, y - height, x + width, y + descent))
    for colour, weight in (((0, 0, 0), thickness + 2), ((255, 255, 255), max(1, thickness // 2))):
        cv2.putText(image, label, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size, colour, weight, cv2.LINE_AA)
