"""Crops against the released network's inputs, and at the image's edges."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from parity import assert_matches, load_parity

from picopose_ros.errors import SegmentError
from picopose_ros.geometry.crops import (
    BACKGROUND,
    CropBox,
    crop_box_from_bbox,
    crop_box_from_mask,
    crop_box_of_extent,
    crop_mask,
    crop_points_consistent,
    crop_points_nearest,
    crop_rgb,
    mask_background,
    sides_at_border,
)


def boxes_as_released(boxes: list[CropBox]) -> np.ndarray:
    return np.array([[b.top, b.top + b.side, b.left, b.left + b.side] for b in boxes], np.float32)


def test_query_crops_equal_the_released_network():
    parity = load_parity()
    rgb, masks = parity.tensor("raw/query_rgb"), parity.tensor("raw/query_mask")
    boxes = [crop_box_from_mask(m) for m in masks]
    np.testing.assert_array_equal(boxes_as_released(boxes), parity.tensor("provider/real_bbox"))
    assert_matches("provider/real_M", np.stack([b.affine() for b in boxes]), 1e-6)
    np.testing.assert_array_equal(
        np.stack([crop_mask(m, b) for m, b in zip(masks, boxes)]), parity.tensor("provider/real_mask")
    )
    assert_matches("provider/real_rgb", np.stack([crop_rgb(rgb, b) for b in boxes]), 1e-6)


def test_template_crops_equal_the_released_network():
    parity = load_parity()
    rgba, K = parity.tensor("raw/template_rgba"), parity.tensor("raw/template_K")
    boxes = [crop_box_from_mask(view[..., 3]) for view in rgba]
    np.testing.assert_array_equal(boxes_as_released(boxes), parity.tensor("provider/tem_bbox"))
    assert_matches("provider/tem_M", np.stack([b.affine() for b in boxes]), 1e-6)
    rgb = np.stack([crop_rgb(view[..., :3], b) for view, b in zip(rgba, boxes)])
    assert_matches("provider/tem_rgb", rgb, 1e-6)
    opaque = np.stack([crop_mask(view[..., 3] == 255, b) for view, b in zip(rgba, boxes)])
    assert_matches("provider/tem_mask", opaque.astype(np.float32), 1e-6)
    depth = parity.tensor("raw/template_depth_mm") / 1000.0
    points = np.stack([crop_points_nearest(d, K, b) for d, b in zip(depth, boxes)])
    assert_matches("provider/tem_pts3d", points, 1e-6)


def test_channels_are_bgr_with_constants_in_index_order():
    red = np.zeros((10, 10, 3), np.uint8)
    red[..., 0] = 255
    crop = crop_rgb(red, CropBox(0, 0, 10))
    assert crop.dtype == np.float32 and crop.shape == (3, 224, 224)
    np.testing.assert_allclose(
        crop[:, 5, 5], [BACKGROUND[0], BACKGROUND[1], (1 - 0.40821073) / 0.27577711], 1e-6
    )


def test_consistent_points_lie_on_the_plane_and_project_onto_their_cells():
    K = np.array([[500.0, 0, 320], [0, 510, 240], [0, 0, 1]])
    depth = np.full((480, 640), 0.8)
    box = CropBox(100, 60, 150)
    points = crop_points_consistent(depth, K, box)
    uv = points[..., :2] / points[..., 2:] * [500, 510] + [320, 240]
    in_crop = uv @ box.affine()[:2, :2].T + box.affine()[:2, 2]
    expected = np.floor((np.arange(64) + 0.5) * 3.5)
    np.testing.assert_allclose(in_crop[..., 0], np.broadcast_to(expected, (64, 64)), atol=1e-3)
    np.testing.assert_allclose(in_crop[..., 1], np.broadcast_to(expected[:, None], (64, 64)), atol=1e-3)
    assert not crop_points_consistent(np.zeros((480, 640)), K, box).any()


@pytest.mark.parametrize(
    ("rows", "cols"),
    [((0, 30), (0, 9)), ((80, 100), (120, 160)), ((0, 100), (0, 160)), ((99, 100), (159, 160))],
)
def test_a_box_at_the_border_is_shifted_inside(rows, cols):
    mask = np.zeros((100, 160), bool)
    mask[slice(*rows), slice(*cols)] = True
    box = crop_box_from_mask(mask)
    assert box.side % 2 == 0 and 2 <= box.side <= 100
    assert 0 <= box.left <= 160 - box.side and 0 <= box.top <= 100 - box.side
    assert crop_mask(mask, box).any()
    x, y, w, h = cols[0], rows[0], cols[1] - cols[0], rows[1] - rows[0]
    assert crop_box_from_bbox(x, y, w, h, 100, 160) == box


def test_nothing_to_crop_is_said():
    with pytest.raises(SegmentError, match="empty"):
        crop_box_from_mask(np.zeros((48, 64), bool))
    with pytest.raises(SegmentError, match="no area"):
        crop_box_from_bbox(3, 4, 0, 5, 48, 64)
    with pytest.raises(SegmentError, match="too small"):
        crop_box_from_mask(np.ones((1, 64), bool))


def test_masked_background_is_black_like_a_template():
    rgb = np.full((20, 20, 3), 200, np.uint8)
    mask = np.zeros((20, 20), np.uint8)
    mask[:, :10] = 1
    box = CropBox(0, 0, 20)
    crop = mask_background(crop_rgb(rgb, box), crop_mask(mask, box))
    black = crop_rgb(np.zeros_like(rgb), box)
    np.testing.assert_array_equal(crop[..., 112:], black[..., 112:])
    assert (crop[..., :112] > 1).all() and crop.dtype == np.float32


def test_a_box_may_reach_out_of_the_image() -> None:
    box = crop_box_of_extent(np.array([-3.0, 1.0]), np.array([4.2, 5.0]))
    assert (box.left, box.top, box.side) == (-4, -1, 8)  # a square around both, of whole pixels
    # As if there were black pixels around the image, which is large enough for a box on it to be inside.
    rng = np.random.default_rng(1)
    large = np.zeros((300, 400, 3), np.uint8)
    image = cv2.resize(rng.integers(0, 255, (10, 14, 3), dtype=np.uint8), (140, 100))
    large[100:200, 100:240] = image
    mask, around = image[..., 0] > 99, large[..., 0] > 99
    for left, top, side in ((-50, -30, 112), (90, 20, 90), (-20, -40, 180)):
        out, inside = CropBox(left, top, side), CropBox(left + 100, top + 100, side)
        np.testing.assert_allclose(crop_rgb(image, out), crop_rgb(large, inside), atol=0.15)
        assert (crop_mask(mask, out) != crop_mask(around, inside)).mean() < 0.05
    outside = crop_rgb(image, CropBox(-90, 0, 80))
    np.testing.assert_allclose(outside, np.broadcast_to(BACKGROUND[:, None, None], outside.shape), atol=1e-6)
    assert not crop_mask(mask, CropBox(-90, 0, 80)).any()


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (slice(10, 20), slice(10, 20), (False, False, False, False)),
        (slice(10, 20), slice(1, 20), (True, False, False, False)),
        (slice(10, 20), slice(2, 20), (False, False, False, False)),
        (slice(0, 20), slice(10, 59), (False, True, True, False)),
        (slice(10, 39), slice(10, 58), (False, False, False, True)),
    ],
)
def test_sides_at_the_border(rows: slice, columns: slice, expected: tuple[bool, ...]) -> None:
    """Left, top, right, bottom of an image of 60 x 40; one free pixel still counts as the border."""
    mask = np.zeros((40, 60), bool)
    mask[rows, columns] = True
    assert (*np.concatenate(sides_at_border(mask)),) == expected
    assert not np.concatenate(sides_at_border(np.zeros((40, 60), bool))).any()
