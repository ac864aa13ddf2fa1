"""Rendered films of objects whose poses are known; what following is measured with.

Each film shows an object in front of a wall. How the films move is fixed by the functions of this module and
never tuned to a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from picopose_ros.geometry.poses import invert_transform, make_transform
from picopose_ros.synthetic.studio import random_rotation
from picopose_ros.synthetic.textures import value_noise
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

WIDTH, HEIGHT = 640, 480
K = np.array([[600.0, 0, 320], [0, 600.0, 240], [0, 0, 1]])
NOISE = 3.0
"""Standard deviation of a pixel's value, of 255."""

_SEVERAL = 2.5
"""Distance of the camera from the objects, in diameters."""

_ARM = 0.5
"""Metres between a camera and what it looks at, for which motions of the camera are given: a film of a small
object is one of a large object, only smaller."""


def _turn(x: float, y: float, z: float) -> np.ndarray:
    return Rotation.from_rotvec(np.radians([x, y, z])).as_matrix()


def _still(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    return np.eye(4), [np.eye(4)]


def _hand_held(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """A camera in a hand, half a metre away: 5 cm and 4 degrees to either side, once in two seconds."""
    w = 2 * np.pi * t
    shift = 0.05 / _ARM * _SEVERAL * d * np.array([np.sin(0.5 * w), np.sin(0.4 * w), 0.5 * np.sin(0.3 * w)])
    return make_transform(_turn(2 * np.sin(0.6 * w), 3 * np.sin(0.5 * w), 4 * np.sin(0.4 * w)), shift), [
        np.eye(4)
    ]


def _turntable(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """36 degrees a second about the image's vertical."""
    return np.eye(4), [make_transform(_turn(0, 36 * t, 0), np.zeros(3))]


def _carried(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """An object in a hand: up to 0.9 of its diameter and 60 degrees a second."""
    w = 2 * np.pi * t
    shift = 0.3 * d * np.array([np.sin(0.25 * w), np.sin(0.35 * w), np.sin(0.2 * w)])
    return np.eye(4), [make_transform(_turn(25 * np.sin(0.3 * w), 30 * np.sin(0.2 * w), 0), shift)]


def _fast(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """A camera that is shaken, half a metre away: 8 cm to either side, one and a half times a second."""
    w = 2 * np.pi * t
    shift = 0.08 / _ARM * _SEVERAL * d * np.sin(1.5 * w)
    return make_transform(_turn(0, 3 * np.sin(1.2 * w), 0), [shift, 0, 0]), [np.eye(4)]


def _crossing(t: float, d: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Two equal objects: one passes before the other, back and forth in 8 seconds."""
    x = 1.2 * d * np.cos(2 * np.pi * t / 8)
    return np.eye(4), [
        make_transform(np.eye(3), [x, 0, -0.8 * d]),
        make_transform(_turn(0, 90, 0), [-x, 0, 0.5 * d]),
    ]


FILMS: dict[str, Callable[[float, float], tuple[np.ndarray, list[np.ndarray]]]] = {
    "still": _still,
    "hand-held": _hand_held,
    "turntable": _turntable,
    "carried": _carried,
    "occlusion": _still,
    "fast": _fast,
    "crossing": _crossing,
}
"""By name: time (s) and diameter (m) -> T_fixed_cam (4, 4), and per object its motion (4, 4) there."""


@dataclass(frozen=True)
class Shot:
    """One image of a film.

    Attributes:
        t: seconds. rgb: (H, W, 3) uint8. T_fixed_cam: (4, 4). truth: T_cam_obj (4, 4) of each object.
        masks: (H, W) bool of each. covered: something stands before the objects.
    """

    t: float
    rgb: np.ndarray
    T_fixed_cam: np.ndarray
    truth: list[np.ndarray]
    masks: list[np.ndarray]
    covered: bool


def make_film(
    renderer: MeshRenderer, mesh: ObjectMesh, name: str, seed: int, seconds: float, rate: float
) -> Iterator[Shot]:
    """Render a film of an object, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    d = mesh.diameter
    wall = np.stack([value_noise(rng, WIDTH, 6, 4) for _ in range(3)], -1)[:HEIGHT]
    R = random_rotation(rng)
    turned = make_transform(R, -R @ mesh.centre)
    place = make_transform(np.eye(3), [0, 0, _SEVERAL * d * (1.6 if name == "crossing" else 1.0)])
    plate = rng.integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    for n in range(round(seconds * rate) + 1):
        t = n / rate
        T_fixed_cam, motions = FILMS[name](t, d)
        truth = [invert_transform(T_fixed_cam) @ place @ motion @ turned for motion in motions]
        view = renderer.render_scene([(mesh, T) for T in truth], K, WIDTH, HEIGHT)
        alone = [renderer.render(mesh, T, K, WIDTH, HEIGHT) for T in truth]
        nearest = np.stack([np.where(one.mask, one.depth, np.inf) for one in alone])
        masks = [one.mask & (nearest.argmin(0) == i) for i, one in enumerate(alone)]
        rgb = np.where(view.mask[..., None], view.rgb, (60 + 140 * wall).astype(np.uint8))
        covered = name == "occlusion" and 0.35 * seconds <= t < 0.65 * seconds
        if name == "occlusion":  # a plate comes from the left, stays, and goes
            edge = np.interp(t / seconds, [0.2, 0.35, 0.65, 0.8], [0, WIDTH, WIDTH, 0])
            rgb[:, : int(edge)] = plate[:, : int(edge)]
            masks = [mask & (np.arange(WIDTH) >= int(edge)) for mask in masks]
        noisy = rgb + rng.normal(0, NOISE, rgb.shape)
        yield Shot(t, noisy.clip(0, 255).astype(np.uint8), T_fixed_cam, truth, masks, covered)
