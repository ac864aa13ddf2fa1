"""Objects and images for measurements: real views of one made mesh, with descriptors of chance.

What a bank weighs and what stages 1 to 3 compute with it does not depend on what its descriptors say; so a
system with hundreds of objects, or the large network without its weights, can be measured without hours of
onboarding. Poses that come of it mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import trimesh

from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.crops import CropBox
from picopose_ros.model import ModelConfig
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import DISTANCE, TEMPLATE_K, TEMPLATE_SIZE, TemplateBank, crop_template
from picopose_ros.templates.renderer import MeshRenderer
from picopose_ros.templates.viewpoints import viewpoint_rotations

VIEWS = 8
"""Views that are really rendered; a bank repeats them."""


def made_mesh() -> trimesh.Trimesh:
    """A brick of about 14 cm, its colours telling its sides apart, metres."""
    mesh = trimesh.creation.box((0.06, 0.08, 0.11))
    for _ in range(4):
        mesh = mesh.subdivide()
    rng = np.random.default_rng(5)
    colours = np.full((len(mesh.vertices), 4), 255, np.uint8)
    colours[:, :3] = rng.integers(0, 256, (len(mesh.vertices), 3))
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colours)
    return mesh


def descriptor_width(config: ModelConfig) -> int:
    """Channels of a network's descriptors."""
    return config.match_dim or config.backbone.tap_dims[-1]


def simulated_descriptors(config: ModelConfig, templates: int, seed: int) -> np.ndarray:
    """(templates, C, 256) float16 unit vectors."""
    # Drawn for 16 templates and repeated in another order of patches: drawing all takes seconds an object.
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((min(templates, 16), descriptor_width(config), 256), np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    drawn = drawn.astype(np.float16)
    parts = [np.roll(drawn[i % len(drawn)], i // len(drawn), axis=1) for i in range(templates)]
    return np.stack(parts)


@cache
def _views(templates: int) -> TemplateBank:
    """Everything of a bank but its descriptors."""
    mesh = made_mesh()
    rotations = viewpoint_rotations(42)[:: 42 // VIEWS][:VIEWS]
    T_cam_ctr = np.tile(np.eye(4), (VIEWS, 1, 1))
    T_cam_ctr[:, :3, :3] = rotations
    T_cam_ctr[:, 2, 3] = DISTANCE * np.linalg.norm(mesh.extents)
    with MeshRenderer(antialias=True) as renderer:
        views = [renderer.render([mesh], T, TEMPLATE_K, *TEMPLATE_SIZE) for T in T_cam_ctr]
    crops = [crop_template(view, TEMPLATE_K) for view in views]
    side = max(crop.box.side for crop in crops)
    images = np.zeros((VIEWS, side, side, 3), np.uint8)
    for image, crop in zip(images, crops):
        image[: crop.box.side, : crop.box.side] = crop.pixels
    bank = TemplateBank(
        class_id="simulated",
        images=images,
        boxes=np.array([(crop.box.left, crop.box.top, crop.box.side) for crop in crops], np.int32),
        masks=np.stack([crop.mask for crop in crops]),
        points_nearest=np.stack([crop.points_nearest for crop in crops]),
        points_consistent=np.stack([crop.points_consistent for crop in crops]),
        T_cam_ctr=T_cam_ctr.astype(np.float32),
        centre=np.zeros(3),
        M_crop_img=np.stack([crop.box.affine() for crop in crops]),
        K=TEMPLATE_K.copy(),
        descriptors=np.empty((VIEWS, 0, 256), np.float16),
        extents=np.asarray(mesh.extents, np.float64),
        diameter=float(np.linalg.norm(mesh.extents)),
    )
    return bank.select(np.arange(templates) % VIEWS)


def simulated_banks(
    config: ModelConfig, objects: int = 1, templates: int = 162, seed: int = 0
) -> dict[str, TemplateBank]:
    """Banks ``object_0`` ... by class id.

    All objects have the same views and share their memory; each has descriptors of its own.

    Args:
        config: of the network that is to use them.
        objects: how many. templates: of each, any number.
        seed: of the descriptors.
    """
    views = _views(templates)
    return {
        f"object_{i}": replace(
            views, class_id=f"object_{i}", descriptors=simulated_descriptors(config, templates, seed + i)
        )
        for i in range(objects)
    }


def simulated_image(
    banks: Mapping[str, TemplateBank] | Sequence[str],
    segments: int = 1,
    width: int = 640,
    height: int = 480,
    classes: int | None = None,
) -> tuple[np.ndarray, CameraModel, list[Segment]]:
    """An image full of the simulated object, its camera and its masks, for ``PoseEstimator.estimate``.

    The objects stand in rows, as large as they fit, at most a third of the image's height.

    Args:
        banks: whose classes the segments are of, in turn.
        segments: how many. width, height: of the image, pixels.
        classes: use so many classes; None for all.
    """
    names = list(banks)[:classes]
    focal = TEMPLATE_K[0, 0] * width / TEMPLATE_SIZE[0]
    camera = CameraModel(np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]), width, height)
    columns = int(np.ceil(np.sqrt(segments * width / height)))
    rows = int(np.ceil(segments / columns))
    side = min(width // columns, height // rows, height // 3)
    rng = np.random.default_rng(6)
    rgb = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
    mesh = made_mesh()
    K = TEMPLATE_K.copy()
    K[:2] *= side / 320
    K[:2, 2] = side / 2
    found = []
    with MeshRenderer(antialias=True) as renderer:
        for index in range(segments):
            T = np.eye(4)
            T[:3, :3] = viewpoint_rotations(42)[(5 * index + 3) % 42]
            T[2, 3] = DISTANCE * np.linalg.norm(mesh.extents)
            view = renderer.render([mesh], T, K, side, side)
            box = CropBox((index % columns) * side, (index // columns) * side, side)
            rgb[box.slices][view.mask] = view.rgb[view.mask]
            mask = np.zeros((height, width), bool)
            mask[box.slices] = view.mask
            found.append(Segment(names[index % len(names)], 0.9, mask))
    return rgb, camera, found
