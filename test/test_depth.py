"""Depth images: which belongs to an image, what of it is believed, and what it says of a surface."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from picopose_ros.geometry.depth import depth_term, reliable_depth, surface_patches
from picopose_ros.messages.reasons import DropReason, Problem

K = np.array([[500.0, 0, 79.5], [0, 500.0, 59.5], [0, 0, 1]])


def _slope(points: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A plane that leans away to the right: (g, g, 3) points and its normal, towards the camera."""
    x, y = np.meshgrid(np.linspace(-0.05, 0.05, points), np.linspace(-0.05, 0.05, points))
    normal = np.array([0.6, 0.0, -0.8])
    return np.stack([x, y, 0.7 + 0.75 * x], -1), normal


def test_patches_have_the_normals_of_the_surface_towards_the_camera() -> None:
    points, normal = _slope()
    points[:, 40:, 2] += 0.05  # a step: there the neighbours are of two surfaces
    points[:5] = 0  # nothing
    patches = surface_patches(points.astype(np.float32), np.eye(4))
    assert 2500 < len(patches.xyz) < 62 * 62
    assert (patches.normals @ normal).min() > 0.99


def test_holes_flying_pixels_and_the_rim_of_a_mask_are_not_believed() -> None:
    depth = np.full((60, 80), 0.8, np.float32)
    depth[:, 40:] = 1.2
    depth[10:20, 10:20] = np.nan
    mask = np.zeros((60, 80), bool)
    mask[5:55, 5:70] = True
    found = reliable_depth(depth, mask)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert (found[:, 39:41] == 0).all()  # between two surfaces
    assert (found[9:21, 9:21] == 0).all() and found[30, 15] == np.float32(0.8)
    assert (found[5] == 0).all() and found[7, 30] > 0 and (found[~mask] == 0).all()
    assert (reliable_depth(np.zeros((4, 4)), None) == 0).all()


def _image_of(points: np.ndarray) -> np.ndarray:
    """(120, 160) depths of the infinite plane that the points lie on."""
    v, u = np.indices((120, 160))
    ray = np.stack([(u - 79.5) / 500, (v - 59.5) / 500, np.ones_like(u)], -1)
    # z = 0.7 + 0.75 x with x = z (u - cx) / f
    return (0.7 / (1 - 0.75 * ray[..., 0])).astype(np.float32)


def test_a_surface_that_is_measured_further_away_is_pulled_there() -> None:
    points, normal = _slope()
    patches = surface_patches(points.astype(np.float32), np.eye(4))
    term = depth_term(_image_of(points), patches, np.eye(4), K, 3.0)
    assert not isinstance(term, str) and term is not None
    assert np.abs(term.linearise(np.eye(4)).residual).max() < 0.5  # in standard deviations
    moved = np.eye(4)
    moved[2, 3] = 0.01
    residual = term.linearise(moved).residual[:, 0] * term.sigma
    np.testing.assert_allclose(residual, 0.01 * normal[2], atol=5e-4)


def test_a_depth_image_of_something_else_is_refused_and_one_with_holes_only_is_none() -> None:
    points, _ = _slope()
    patches = surface_patches(points.astype(np.float32), np.eye(4))
    said = depth_term(1000 * _image_of(points), patches, np.eye(4), K, 3.0)
    assert isinstance(said, str) and "1e+03 times as far" in said and "registered" in said
    assert depth_term(np.zeros((120, 160), np.float32), patches, np.eye(4), K, 3.0) is None


def _message(
    stamp: int, frame: str = "camera", size: tuple[int, int] = (4, 3), encoding: str = "16UC1"
) -> Any:
    header = SimpleNamespace(stamp=SimpleNamespace(sec=stamp // 10**9, nanosec=stamp % 10**9), frame_id=frame)
    width, height = size
    data = np.full((height, width), 750, "<u2").tobytes()
    return SimpleNamespace(
        header=header,
        width=width,
        height=height,
        encoding=encoding,
        is_bigendian=0,
        step=2 * width,
        data=data,
    )


@pytest.fixture
def buffer() -> Any:
    pytest.importorskip("rclpy")  # everything else here is tested without ROS
    from picopose_ros.node.depth import DepthBuffer

    return DepthBuffer("/depth")


def test_the_depth_image_with_the_images_stamp_is_found(buffer: Any) -> None:
    assert buffer.find(_message(5), (4, 3)) is None  # none came at all: there is nothing to say
    for stamp in range(100, 100 + 40 * 33_000_000, 33_000_000):
        buffer.add(_message(stamp))
    found = buffer.find(_message(100 + 39 * 33_000_000), (4, 3))
    np.testing.assert_allclose(found, np.full((3, 4), 0.75))


@pytest.mark.parametrize(
    ("depth", "said"),
    [
        ({"stamp": 3_000_000}, "no depth image has the image's stamp, the nearest is 2.0 ms off"),
        ({"frame": "infra1"}, "'infra1', images in 'camera'"),
        ({"size": (8, 6)}, "8x6 pixels, images 4x3"),
        ({"encoding": "rgb8"}, "'rgb8'"),
    ],
)
def test_a_depth_image_that_does_not_fit_is_said(buffer: Any, depth: dict[str, Any], said: str) -> None:
    buffer.add(_message(**{"stamp": 1_000_000, **depth}))
    problem = buffer.find(_message(1_000_000), (4, 3))
    assert isinstance(problem, Problem) and problem.reason is DropReason.BAD_DEPTH
    assert said in problem.message and "without depth" in problem.message
