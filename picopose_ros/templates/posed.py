"""Views rendered where an object seems to be: what refinement compares an image with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from picopose_ros.errors import MeshError, PicoPoseError
from picopose_ros.geometry.contours import Contour, find_contour
from picopose_ros.geometry.correspondences import fit_similarity
from picopose_ros.geometry.crops import CELL, crop_rgb
from picopose_ros.geometry.poses import invert_transform, make_transform
from picopose_ros.templates.bank import (
    DISTANCE,
    TEMPLATE_K,
    TEMPLATE_SIZE,
    WINDOW,
    TemplateBank,
    TemplateCrop,
    crop_template,
)
from picopose_ros.templates.meshes import ObjectMesh, load_object
from picopose_ros.templates.renderer import MeshRenderer, Shading

_LEAST_CELLS = 12
"""Cells of a view with a surface, below which no affine follows from them."""

_CONTOUR_POINTS = 200
"""About so many points of a contour are taken, evenly spread."""

_NEAREST = 1.1
"""Least distance of a camera from the object's centre, in radii of the sphere around its bounding box."""


@dataclass(frozen=True, eq=False)
class PosedView:
    """A view like those of a bank, but from where the image's camera seems to see the object.

    Two views are equal if they are the same one.

    The view's camera is the image's, turned by the least turn so that it looks at the centre of the object's
    bounding box, and zoomed so that the object is as large as in a template: if the pose is right, image and
    view differ by a homography.

    Attributes:
        rgb: (WINDOW, WINDOW, 3) uint8. depth: (WINDOW, WINDOW) float32 m, 0 off the object.
        crop: of the view, as a template's. K: (3, 3) of the view.
        T_view_obj: (4, 4) mesh's own frame -> the view's camera. R_view_cam: (3, 3) image's -> view's camera.
    """

    rgb: np.ndarray
    depth: np.ndarray
    crop: TemplateCrop
    K: np.ndarray
    T_view_obj: np.ndarray
    R_view_cam: np.ndarray

    @cached_property
    def input(self) -> np.ndarray:
        """(3, 224, 224) float32, the network's input."""
        return crop_rgb(self.rgb, self.crop.box)

    def homography(self, K: np.ndarray) -> np.ndarray:
        """(3, 3) px of the view -> px of an undistorted image with intrinsics K (3, 3)."""
        return K @ self.R_view_cam.T @ np.linalg.inv(self.K)

    def silhouette(self, K: np.ndarray, height: int, width: int) -> np.ndarray:
        """(H, W) bool: where the object is in the image, were it not occluded."""
        whole = (self.depth > 0).astype(np.uint8)
        return cv2.warpPerspective(whole, self.homography(K), (width, height), flags=cv2.INTER_NEAREST) > 0

    @cached_property
    def contour(self) -> Contour:
        """Points of the occluding contour; ``xyz`` in the mesh's own frame, m."""
        seen = find_contour(self.depth, self.K, _CONTOUR_POINTS)
        T = self.T_view_obj
        return Contour(seen.uv, seen.normal, (seen.xyz - T[:3, 3]) @ T[:3, :3])

    def affine(self, T_cam_obj: np.ndarray, K: np.ndarray, M_crop_img: np.ndarray) -> np.ndarray | None:
        """The similarity (3, 3) from the view's crop to a query's that a pose (4, 4) implies.

        None where the object is behind the camera, or hardly any of it is seen.
        """
        uv = self.projected(T_cam_obj, K)
        if uv is None or len(uv) < _LEAST_CELLS:
            return None
        _, places = self._surface
        return fit_similarity(places, uv @ M_crop_img[:2, :2].T + M_crop_img[:2, 2])

    def projected(self, T_cam_obj: np.ndarray, K: np.ndarray) -> np.ndarray | None:
        """Pixels (n, 2) of the surface that the view shows, with the object at a pose (4, 4).

        None where there is none, or a part of it is behind the camera.
        """
        points, _ = self._surface
        T = T_cam_obj @ invert_transform(self.T_view_obj)
        moved = points @ T[:3, :3].T + T[:3, 3]
        if not len(moved) or moved[:, 2].min() <= 0:
            return None
        return moved[:, :2] / moved[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2]

    @cached_property
    def _surface(self) -> tuple[np.ndarray, np.ndarray]:
        """Per cell that shows the object its point (n, 3), view's camera frame, m, and its place (n, 2) in
        the crop, px."""
        points = self.crop.points_consistent
        inside = points[..., 2] > 0
        row, column = np.nonzero(inside)
        places = np.floor((np.stack([column, row], 1) + 0.5) * CELL)
        return points[inside].astype(np.float64), places


class PosedViews:
    """Renders objects at poses, in a thread of its own, to which the OpenGL context belongs.

    Meshes are read when they are first needed.
    """

    def __init__(self, banks: Mapping[str, TemplateBank]) -> None:
        self._banks = dict(banks)
        self._thread = ThreadPoolExecutor(1, "render")
        self._renderers: dict[Shading, MeshRenderer] = {}
        self._meshes: dict[str, ObjectMesh] = {}

    def with_banks(self, banks: Mapping[str, TemplateBank]) -> PosedViews:
        """The same thread for other banks; meshes of those that stay (the same object) are kept."""
        other = PosedViews.__new__(PosedViews)
        other._banks, other._thread, other._renderers = dict(banks), self._thread, self._renderers
        other._meshes = {n: m for n, m in self._meshes.items() if banks.get(n) is self._banks.get(n)}
        return other

    def mesh(self, class_id: str) -> ObjectMesh:
        """The mesh of a bank.

        Raises:
            MeshError: it can't be read, or nothing says where it is.
        """
        if class_id not in self._meshes:
            spec = self._banks[class_id].spec
            if spec is None:
                raise MeshError(f"the bank of '{class_id}' names no mesh: poses of it can't be refined")
            self._meshes[class_id] = load_object(spec)
        return self._meshes[class_id]

    def render(self, wanted: Sequence[tuple[str, np.ndarray]]) -> list[PosedView | PicoPoseError]:
        """Views of objects (class id) at poses ``T_cam_obj`` (4, 4), or why there is none."""
        return self._thread.submit(lambda: [self._render(*one) for one in wanted]).result()

    def _render(self, class_id: str, T_cam_obj: np.ndarray) -> PosedView | PicoPoseError:
        try:
            shading = self._banks[class_id].shading
            if shading not in self._renderers:
                self._renderers[shading] = MeshRenderer(antialias=True, shading=shading)
            return render_posed(self._renderers[shading], self.mesh(class_id), T_cam_obj)
        except PicoPoseError as error:
            return error


def render_posed(renderer: MeshRenderer, mesh: ObjectMesh, T_cam_obj: np.ndarray) -> PosedView:
    """Render an object where a pose (4, 4) puts it.

    Args:
        renderer: with antialiasing, as for a bank; of the calling thread.

    Raises:
        MeshError: the pose puts it behind the camera or around it, or nothing of it can be seen from there.
        RenderError: OpenGL fails.
    """
    name = mesh.spec.class_id
    T_ctr_obj = make_transform(np.eye(3), -mesh.centre)
    T_cam_ctr = np.asarray(T_cam_obj, np.float64) @ invert_transform(T_ctr_obj)
    if not (np.isfinite(T_cam_ctr).all() and T_cam_ctr[2, 3] > 0):
        raise MeshError(f"the pose of '{name}' is behind the camera: there is nothing to render")
    distance = float(np.linalg.norm(T_cam_ctr[:3, 3])) / (mesh.diagonal / 2)
    if distance < _NEAREST:
        raise MeshError(f"the pose of '{name}' has the camera inside the object: there is nothing to render")
    R_view_cam = _turn_onto_axis(T_cam_ctr[:3, 3])
    T_view_obj = make_transform(R_view_cam, np.zeros(3)) @ T_cam_obj
    K = TEMPLATE_K.copy()
    K[:2, 2] -= (TEMPLATE_SIZE[0] - WINDOW) // 2, (TEMPLATE_SIZE[1] - WINDOW) // 2
    # The sphere around the bounding box is as large as in a template.
    K[[0, 1], [0, 1]] *= np.sqrt((distance**2 - 1) / ((2 * DISTANCE) ** 2 - 1))
    view = renderer.render(mesh, T_view_obj, K, WINDOW, WINDOW)
    if not view.mask.any():
        raise MeshError(
            f"mesh {mesh.spec.path} cannot be seen from where its pose says: its faces have no area there; "
            "give it some thickness"
        )
    return PosedView(view.rgb, view.depth, crop_template(view, K), K, T_view_obj, R_view_cam)


def _turn_onto_axis(direction: np.ndarray) -> np.ndarray:
    """The least rotation (3, 3) that takes a direction in front of the camera to its optical axis."""
    ray = direction / np.linalg.norm(direction)
    x, y, z = np.cross(ray, [0.0, 0.0, 1.0])
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + cross + cross @ cross / (1.0 + ray[2])
