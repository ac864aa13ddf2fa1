"""Contours of rendered objects, and where masks end along their normals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from picopose_ros.geometry.contours import (
    contour_lines,
    find_contour,
    mask_edges,
    sample_lines,
    signed_distance,
)
from picopose_ros.geometry.poses import make_transform

K = np.array([[500.0, 0, 80.0], [0, 500.0, 60.0], [0, 0, 1]])
CENTRE, RADIUS = np.array([83.3, 61.7]), 31.4


def _disc(
    radius: float = RADIUS, centre: np.ndarray = CENTRE, shape: tuple[int, int] = (130, 170)
) -> np.ndarray:
    v, u = np.indices(shape)
    return np.hypot(u - centre[0], v - centre[1]) < radius


def test_a_contour_lies_between_the_pixels_and_its_normals_point_outward() -> None:
    depth = np.where(_disc(), 0.8, 0).astype(np.float32)
    contour = find_contour(depth, K, 100)
    assert 80 <= len(contour) <= 110
    out = contour.uv - CENTRE
    distance = np.linalg.norm(out, axis=1)
    assert np.abs(distance - RADIUS).max() < 0.7 and abs(distance.mean() - RADIUS) < 0.1
    assert ((out / distance[:, None]) * contour.normal).sum(1).min() > 0.93
    projected = contour.xyz[:, :2] / contour.xyz[:, 2:] * 500 + K[:2, 2]
    np.testing.assert_allclose(projected, contour.uv, atol=1e-6)
    np.testing.assert_allclose(contour.xyz[:, 2], 0.8, rtol=1e-6)


def test_the_edge_of_a_hole_has_normals_into_the_hole_and_nothing_has_no_contour() -> None:
    ring = _disc() & ~_disc(12.0)
    contour = find_contour(np.where(ring, 0.8, 0).astype(np.float32), K, 400)
    out = contour.uv - CENTRE
    inner = np.linalg.norm(out, axis=1) < 20
    assert inner.sum() > 30
    assert (out[inner] * contour.normal[inner]).sum(1).max() < 0
    assert len(find_contour(np.zeros((20, 20), np.float32), K, 100)) == 0


def test_signed_distance_is_zero_halfway_and_negative_inside() -> None:
    distance = signed_distance(_disc())
    v, u = np.indices(distance.shape)
    true = np.hypot(u - CENTRE[0], v - CENTRE[1]) - RADIUS
    near = np.abs(true) < 8
    assert np.abs(distance - true)[near].max() < 1.0
    assert abs((distance - true)[near].mean()) < 0.1


def test_lines_find_the_masks_edge_or_nothing_within_their_reach() -> None:
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    normal = np.stack([np.cos(angle), np.sin(angle)], 1)
    distance = signed_distance(_disc())
    for start in (-5.0, 0.0, 4.0):
        offset, cosine = mask_edges(distance, CENTRE + (RADIUS + start) * normal, normal, 7.0)
        assert np.abs(offset + start).max() < 0.6 and abs((offset + start).mean()) < 0.1
        assert cosine.min() > 0.9
    offset, _ = mask_edges(distance, CENTRE + (RADIUS + 12.0) * normal, normal, 7.0)
    assert np.isnan(offset).all()
    # Against the outward direction a line enters the mask, and never leaves it.
    offset, _ = mask_edges(distance, CENTRE + (RADIUS + 4.0) * normal, -normal, 7.0)
    assert np.isnan(offset).all()


def test_samples_are_taken_along_the_lines() -> None:
    ramp = np.tile(np.arange(50, dtype=np.float32), (40, 1))
    values = sample_lines(
        ramp, np.array([[10.0, 20.0], [30.0, 5.0]]), np.array([[1.0, 0], [0, 1.0]]), np.arange(-2.0, 3)
    )
    np.testing.assert_allclose(values, [[8, 9, 10, 11, 12], [30] * 5], atol=1e-5)


@pytest.mark.parametrize("turn", [0.0, 25.0])
def test_a_views_contour_as_lines_in_the_image(turn: float) -> None:
    depth = np.where(_disc(), 0.8, 0).astype(np.float32)
    T_view_obj = make_transform(
        Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix(), [0, 0, 0.8]
    )
    seen = find_contour(depth, K, 80)
    T = T_view_obj
    contour = type(seen)(seen.uv, seen.normal, (seen.xyz - T[:3, 3]) @ T[:3, :3])
    R_cam_view = Rotation.from_euler("zyx", [turn, -12, 8], degrees=True).as_matrix()
    T_cam_obj = make_transform(R_cam_view, [0.02, -0.05, 0.3]) @ T_view_obj
    K_img = np.array([[700.0, 0, 320.0], [0, 690.0, 240.0], [0, 0, 1]])
    uv, normal = contour_lines(contour, T_view_obj, T_cam_obj, K, K_img)

    def image(view_uv: np.ndarray) -> np.ndarray:
        z = seen.xyz[:, 2:]
        xyz = np.concatenate([(view_uv - K[:2, 2]) / 500 * z, z], 1) @ R_cam_view.T + [0.02, -0.05, 0.3]
        return xyz[:, :2] / xyz[:, 2:] * [700, 690] + [320, 240]

    np.testing.assert_allclose(uv, image(seen.uv), atol=1e-6)
    step = image(seen.uv + 1e-4 * seen.normal) - image(seen.uv)
    np.testing.assert_allclose(normal, step / np.linalg.norm(step, axis=1, keepdims=True), atol=1e-5)
