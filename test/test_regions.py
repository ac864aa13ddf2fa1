"""Where an object ends in an image, by the colours on both sides of its contour."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from picopose_ros.geometry.regions import region_edges

CENTRE, RADIUS = np.array([160.4, 121.7]), 61.3
ANGLE = np.linspace(0, 2 * np.pi, 150, endpoint=False)
NORMAL = np.stack([np.cos(ANGLE), np.sin(ANGLE)], 1)


def _picture(inside: list[tuple[int, int, int]], outside: list[tuple[int, int, int]]) -> np.ndarray:
    """A disc of patches of some colours before patches of others, with a camera's blur and noise."""
    rng = np.random.default_rng(0)
    both = []
    for colours in (inside, outside):
        patches = np.array(colours, np.float32)[rng.integers(0, len(colours), (24, 32))]
        both.append(np.kron(patches, np.ones((10, 10, 1), np.float32)))
    v, u = np.indices((240, 320))
    disc = (np.hypot(u - CENTRE[0], v - CENTRE[1]) < RADIUS)[..., None]
    picture = cv2.GaussianBlur(np.where(disc, *both), (0, 0), 0.8) + rng.normal(scale=4, size=(240, 320, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("start", [-4.0, 0.0, 5.0])
def test_the_edge_is_found_from_either_side_of_it(start: float) -> None:
    picture = _picture([(200, 60, 40), (220, 180, 30)], [(40, 90, 200), (30, 160, 60), (90, 90, 90)])
    offset, sigma = region_edges(picture, CENTRE + (RADIUS + start) * NORMAL, NORMAL, 10.0)
    off = offset + start
    assert abs(np.average(off, weights=sigma**-2)) < 0.5
    assert np.median(np.abs(off)) < 0.8
    assert (np.abs(off) < 3 * sigma).mean() > 0.9


def test_where_both_sides_look_alike_it_knows_that_it_does_not_know() -> None:
    told, untold = (
        np.median(region_edges(_picture([(200, 60, 40)], [other]), CENTRE + RADIUS * NORMAL, NORMAL, 10.0)[1])
        for other in ((40, 90, 200), (200, 60, 40))
    )
    assert untold > 1.8 * told and untold > 4.0


def test_a_picture_of_one_colour_and_a_very_small_object_are_no_error() -> None:
    plain = np.full((240, 320, 3), 90, np.uint8)
    for radius in (RADIUS, 2.0):
        offset, sigma = region_edges(plain, CENTRE + radius * NORMAL, NORMAL, 3.0)
        assert np.isfinite(offset).all() and np.isfinite(sigma).all() and (sigma > 1.0).all()
