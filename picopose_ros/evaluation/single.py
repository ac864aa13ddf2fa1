"""Scenes of one object, disturbed as training disturbs its crops but in a full-size image.

The lighting and the occluders are training's own; blur, resolution, exposure, colour, noise and JPEG have
training's ranges (:func:`picopose_ros.synthetic.studio.camera_effects`). The object is seen from anywhere on
the sphere, turned by any angle, anywhere in the image. The constants are part of the benchmark's difficulty.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from picopose_ros.geometry.crops import CROP_SIZE
from picopose_ros.synthetic.disturbances import occluder, relight
from picopose_ros.synthetic.studio import (
    HEIGHT,
    WIDTH,
    Scene,
    camera_effects,
    doubled,
    draw_camera,
    halved,
    instance_of,
    random_rotation,
    window_of,
)
from picopose_ros.synthetic.textures import paint, palette
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

DISTANCE_RANGE = (2.2, 6.0)
"""Of the object's centre, in bounding-box diagonals, log-uniform: the diagonal is 83 to 364 px long."""
BORDER_INSET = 0.35
"""The centre keeps this share of the object's apparent size from the image's border, so that some objects are
cut off by it, but none by much."""
OCCLUSION = 0.4
"""Share of the scenes with an occluder in front of the object, as in training."""
MOST_HIDDEN = 0.6
"""How much of the object an occluder hides is drawn evenly up to this share. (Training takes its occluders as
they come; most of them hide little.)"""
_COVERS = 8  # occluders of which the one is taken that hides most nearly the drawn share


class SingleScenes:
    """Makes scenes of one object each.

    Args:
        renderer: without antialiasing. objects: scene ``i`` shows number ``i % n`` of them.
        background: False leaves everything black that is no object.
    """

    def __init__(self, renderer: MeshRenderer, objects: Sequence[ObjectMesh], background: bool) -> None:
        self._renderer, self._objects, self._background = renderer, objects, background

    def scene(self, seed: int, index: int) -> Scene:
        """Scene ``index`` of a seed."""
        rng = np.random.default_rng([seed, index, 0x51])
        mesh = self._objects[index % len(self._objects)]
        camera = draw_camera(rng)
        T_cam_obj = _draw_pose(rng, mesh, camera.K)
        window = window_of(mesh.vertices, T_cam_obj, camera.K)
        view = self._renderer.render(
            mesh, T_cam_obj, doubled(window.intrinsics(camera.K)), 2 * window.width, 2 * window.height
        )
        depth = np.ascontiguousarray(view.depth[::2, ::2])
        alpha = halved(view.mask)[..., None]
        albedo = halved(view.rgb) / np.maximum(alpha, 0.05)
        lit = relight(albedo, depth, depth > 0, float(camera.K[0, 0]), rng)

        picture = self._backdrop(rng)
        whole = np.zeros((HEIGHT, WIDTH), np.uint8)
        seen = np.zeros((HEIGHT, WIDTH), np.float32)
        image, own = window.overlap()
        picture[image] = lit[own] * alpha[own] + picture[image] * (1 - alpha[own])
        whole[image] = depth[own] > 0
        seen[image] = depth[own]
        visible = whole
        if rng.uniform() < OCCLUSION:
            cover, visible = _cover(rng, whole)
            if cover is not None:
                soft = cv2.GaussianBlur(cover.astype(np.float32), (0, 0), 0.6)[..., None]
                picture = self._backdrop(rng) * soft + picture * (1 - soft)
                seen[cover > 0] = np.float32(0.9 * depth[depth > 0].min())  # it stands before the object
        rows, columns = np.nonzero(whole)
        side = max(np.ptp(rows), np.ptp(columns)) + 1 if len(rows) else CROP_SIZE
        rgb = camera_effects(picture, float(side), rng)
        instance = instance_of(mesh, T_cam_obj, visible > 0, int((depth > 0).sum()))
        instances = () if instance is None else (instance,)
        return Scene(f"single-{seed}-{index:05d}", rgb, seen, camera, instances)

    def _backdrop(self, rng: np.random.Generator) -> np.ndarray:
        """A picture (h, w, 3) float32: one colour, soft fields, a texture, or one of the objects."""
        if not self._background:
            return np.zeros((HEIGHT, WIDTH, 3), np.float32)
        kind = rng.integers(4)
        if kind == 0:
            return np.tile(rng.uniform(0, 255, 3).astype(np.float32), (HEIGHT, WIDTH, 1))
        if kind == 1:
            return _soft(rng)
        if kind == 2:
            picture = np.rot90(paint(rng, 320, held_out=bool(rng.uniform() < 0.2))[1], int(rng.integers(4)))
            wide = cv2.resize(np.ascontiguousarray(picture), (WIDTH, WIDTH), interpolation=cv2.INTER_LINEAR)
            return wide[:HEIGHT].astype(np.float32)
        other = self._objects[int(rng.integers(len(self._objects)))]
        T = np.eye(4)
        T[:3, :3] = random_rotation(rng)
        T[:3, 3] = other.diagonal * np.array([*rng.uniform(-0.4, 0.4, 2), 1.3]) - T[:3, :3] @ other.centre
        K = np.array([[500.0, 0, (WIDTH - 1) / 2], [0, 500.0, (HEIGHT - 1) / 2], [0, 0, 1]])
        view = self._renderer.render(other, T, K, WIDTH, HEIGHT)
        return np.where(view.mask[..., None], view.rgb, palette(rng, 1)[0]).astype(np.float32)


def _soft(rng: np.random.Generator) -> np.ndarray:
    coarse = rng.uniform(0, 255, (*rng.integers(2, 20, 2), 3)).astype(np.float32)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)


def _draw_pose(rng: np.random.Generator, mesh: ObjectMesh, K: np.ndarray) -> np.ndarray:
    rotation = random_rotation(rng)
    distance = mesh.diagonal * np.exp(rng.uniform(*np.log(DISTANCE_RANGE)))
    inset = BORDER_INSET * K[0, 0] * mesh.diagonal / distance
    uv = rng.uniform([inset, inset], [WIDTH - 1 - inset, HEIGHT - 1 - inset])
    ray = np.linalg.inv(K) @ [*uv, 1.0]
    T = np.eye(4)
    T[:3, :3] = rotation
    T[:3, 3] = distance * ray / np.linalg.norm(ray) - rotation @ mesh.centre
    return T


def _cover(rng: np.random.Generator, whole: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """An occluder (uint8), or None if none leaves enough, and what it leaves of the object."""
    wanted = rng.uniform(0, MOST_HIDDEN)
    covers = [occluder(whole, rng) for _ in range(_COVERS)]
    hidden = np.array([1 - (whole & ~cover).sum() / whole.sum() for cover in covers])
    miss = np.where((hidden > 0) & (hidden <= MOST_HIDDEN), np.abs(hidden - wanted), np.inf)
    best = int(miss.argmin())
    return (covers[best], whole & ~covers[best]) if np.isfinite(miss[best]) else (None, whole)
