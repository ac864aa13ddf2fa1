"""The templates of one object with their features, and how one of them is cut from a rendered view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from picopose_ros.geometry.crops import (
    CROP_SIZE,
    CropBox,
    crop_box_from_mask,
    crop_mask,
    crop_points_consistent,
    crop_points_nearest,
    crop_rgb,
)
from picopose_ros.templates.meshes import ObjectSpec
from picopose_ros.templates.renderer import Rendering, Shading

TEMPLATE_K = np.array([[572.4114, 0.0, 320.0], [0.0, 573.57043, 240.0], [0.0, 0.0, 1.0]])
"""Camera of the templates (released network): 640x480 pixels."""

TEMPLATE_SIZE = (640, 480)
"""Width and height of a template image."""

DISTANCE = 2.0
"""Distance of the template camera from the object's centre, in diagonals of its bounding box."""

WINDOW = 320
"""Side of the square in the middle of a template that is rendered. At `DISTANCE` every object lies within
149 pixels of the principal point, so the rest of the image is empty."""

ARRAYS = (
    "images",
    "boxes",
    "masks",
    "points_nearest",
    "points_consistent",
    "T_cam_ctr",
    "centre",
    "M_crop_img",
    "K",
    "descriptors",
    "extents",
)

_PER_TEMPLATE = tuple(name for name in ARRAYS if name not in ("centre", "K", "extents"))


@dataclass(frozen=True, eq=False)
class TemplateBank:
    """All N templates of one object.

    Poses are those of the *centred* object frame (``ctr``): the mesh's own frame moved to the centre of its
    bounding box. ``T_cam_obj = T_cam_ctr @ bank.T_ctr_obj`` goes back to the mesh's own frame. Image
    coordinates are those of the whole 640x480 template.
    """

    class_id: str
    images: np.ndarray
    """(N, B, B, 3) uint8 RGB: the pixels of each crop box, top left in a square of the largest box's side."""
    boxes: np.ndarray
    """(N, 3) int32 left, top and side of the crop boxes, full-image pixels."""
    masks: np.ndarray
    """(N, 224, 224) bool, the object in the crop."""
    points_nearest: np.ndarray
    """(N, 64, 64, 3) float32 camera-frame points for the decode mode ``reference``, m; 0 without depth."""
    points_consistent: np.ndarray
    """(N, 64, 64, 3) float32 camera-frame points for the decode mode ``subpixel``, m; 0 without depth."""
    T_cam_ctr: np.ndarray
    """(N, 4, 4) float32 centred object frame -> template camera, metres."""
    centre: np.ndarray
    """(3,) float64 centre of the bounding box in the mesh's own frame, metres."""
    M_crop_img: np.ndarray
    """(N, 3, 3) float32 full-image pixel -> crop pixel."""
    K: np.ndarray
    """(3, 3) float64 intrinsics of the full template image."""
    descriptors: np.ndarray
    """(N, C, 256) float16 unit vectors, one per patch, row-major: what stage 1 matches."""
    extents: np.ndarray
    """(3,) float64 sides of the bounding box, metres."""
    diameter: float
    """Largest distance between two vertices, metres."""
    warnings: tuple[str, ...] = ()
    """What looks wrong with the mesh."""
    shading: Shading = "flat"
    """How the templates were lit: what is compared with them is to be rendered in the same way."""
    spec: ObjectSpec | None = None
    """Where the mesh is, for who renders it again."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sides(self) -> np.ndarray:
        """(N,) int32 sides of the crop boxes in pixels."""
        return self.boxes[:, 2]

    @property
    def T_ctr_obj(self) -> np.ndarray:
        """(4, 4) float64 mesh's own frame -> centred object frame."""
        transform = np.eye(4)
        transform[:3, 3] = -self.centre
        return transform

    @cached_property
    def centres(self) -> np.ndarray:
        """(N, 2) float32 where the object's centre lies in each crop, crop pixels."""
        centre = self.T_cam_ctr[:, :3, 3] @ self.K.T.astype(np.float32)
        centre = centre / centre[:, 2:]
        return np.einsum("nij,nj->ni", self.M_crop_img, centre)[:, :2]

    def crops(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """The network's input (n, 3, 224, 224) float32 of the templates ``ids`` (n,)."""
        crops = []
        for index in ids:
            side = int(self.boxes[int(index), 2])
            crops.append(crop_rgb(self.images[int(index)], CropBox(0, 0, side)))
        return torch.from_numpy(np.stack(crops)) if crops else torch.empty(0, 3, CROP_SIZE, CROP_SIZE)

    def select(self, ids: Sequence[int] | np.ndarray) -> TemplateBank:
        """The bank of the templates ``ids`` (n,) alone, in this order."""
        ids = np.asarray(ids, np.intp)
        return replace(self, **{name: getattr(self, name)[ids] for name in _PER_TEMPLATE})


@dataclass(frozen=True)
class TemplateCrop:
    """What is kept of one rendered view."""

    box: CropBox
    """In pixels of the view."""
    pixels: np.ndarray
    """(side, side, 3) uint8 RGB."""
    mask: np.ndarray
    """(224, 224) bool."""
    points_nearest: np.ndarray
    """(64, 64, 3) float32, camera frame, metres."""
    points_consistent: np.ndarray
    """(64, 64, 3) float32, camera frame, metres."""


def crop_template(view: Rendering, K: np.ndarray) -> TemplateCrop:
    """Crop a rendered view with intrinsics ``K`` (3, 3) around its object, as the released network does.

    Raises:
        SegmentError: the view is empty.
    """
    box = crop_box_from_mask(view.mask)
    return TemplateCrop(
        box=box,
        pixels=view.rgb[box.slices].copy(),  # not a view that keeps the whole image alive
        mask=crop_mask(view.mask, box).astype(bool),
        points_nearest=crop_points_nearest(view.depth, K, box),
        points_consistent=crop_points_consistent(view.depth, K, box),
    )
