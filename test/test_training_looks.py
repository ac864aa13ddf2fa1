"""Disturbances of training pairs: what they change, and what they must leave alone."""

from __future__ import annotations

import numpy as np
import pytest

from picopose_ros.synthetic.disturbances import normals_from_depth
from picopose_ros.training.augment import (
    another_look,
    degrade_mask,
    grey_look,
    photometric,
    relight,
)

SIDE = 224


def ball(side: int = 256, radius: float = 0.4) -> tuple[np.ndarray, np.ndarray, float]:
    """Depth (metres) and mask of a ball seen from a metre, and the focal length."""
    focal = 2.0 * side
    y, x = (np.mgrid[:side, :side] - side / 2) / focal
    squared = radius**2 / 4 - x**2 - y**2
    mask = squared > 0
    return np.where(mask, 1 - np.sqrt(np.maximum(squared, 0)), 0).astype(np.float32), mask, focal


def disc(side: int = SIDE) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side / 2
    return (x**2 + y**2 < (0.35 * side) ** 2).astype(np.uint8)


@pytest.mark.parametrize("seed", range(20))
def test_another_look_changes_the_object_only(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = disc() > 0
    rgb = np.where(mask[..., None], rng.integers(40, 200, (SIDE, SIDE, 3)), 0).astype(np.uint8)
    shaded = np.where(mask, 150, 0).astype(np.uint8)
    looked = another_look(rgb, shaded, mask, np.random.default_rng(seed))
    assert looked.dtype == np.uint8 and looked.shape == rgb.shape
    assert np.array_equal(looked[~mask], rgb[~mask])
    assert (looked[mask] > 0).all()  # a black pixel would count as background
    assert np.array_equal(looked, another_look(rgb, shaded, mask, np.random.default_rng(seed)))


def test_another_look_differs_from_seed_to_seed() -> None:
    mask = disc() > 0
    rgb = np.random.default_rng(0).integers(1, 255, (SIDE, SIDE, 3)).astype(np.uint8)
    looks = [
        another_look(rgb, np.full(mask.shape, 150, np.uint8), mask, np.random.default_rng(s))
        for s in range(6)
    ]
    assert len({look.tobytes() for look in looks}) == 6


def test_a_grey_look_has_no_colour_and_keeps_the_shading() -> None:
    mask = disc() > 0
    shaded = np.where(mask, np.linspace(60, 150, SIDE)[None], 0).astype(np.uint8)
    grey = grey_look(shaded, mask, np.random.default_rng(1))
    assert np.array_equal(grey[..., 0], grey[..., 1]) and np.array_equal(grey[..., 1], grey[..., 2])
    assert (grey[mask] >= 8).all() and not grey[~mask].any()
    row = grey[SIDE // 2, mask[SIDE // 2], 0].astype(int)
    assert (np.diff(row) >= 0).all() and np.ptp(row) > 50


def test_light_depends_on_the_normal() -> None:
    depth, mask, focal = ball()
    albedo = np.full((*mask.shape, 3), 120, np.uint8)
    normal = normals_from_depth(depth, mask, focal)
    spread = []
    for seed in range(20):
        lit = relight(albedo, depth, mask, focal, np.random.default_rng(seed))
        assert lit.shape == albedo.shape and np.isfinite(lit).all() and (lit >= 0).all()
        spread.append(np.std(lit[mask].mean(-1)))
    assert normal[mask][:, 2].min() < 0.5 < normal[mask][:, 2].max()
    assert np.median(spread) > 8  # grey levels; unlit albedo has none


@pytest.mark.parametrize("seed", range(40))
def test_a_degraded_mask_is_still_mostly_the_mask(seed: int) -> None:
    mask = disc(384)
    out = degrade_mask(mask, np.random.default_rng(seed))
    assert set(np.unique(out)) <= {0, 1}
    both, either = (out & mask).sum(), (out | mask).sum()
    assert both > 0.3 * mask.sum() and both / either > 0.3


def test_degraded_masks_differ_from_the_mask_by_a_border_mostly() -> None:
    mask = disc(384)
    outs = [degrade_mask(mask, np.random.default_rng(seed)) for seed in range(60)]
    overlap = [(out & mask).sum() / (out | mask).sum() for out in outs]
    assert 0.8 < np.median(overlap) < 0.995
    assert min(overlap) < 0.8  # a part missing, a neighbour included


@pytest.mark.parametrize("seed", range(20))
def test_a_camera_keeps_shape_and_range(seed: int) -> None:
    rgb = np.random.default_rng(seed).uniform(0, 255, (SIDE, SIDE, 3)).astype(np.float32)
    out = photometric(rgb.copy(), np.random.default_rng(seed))
    assert out.shape == rgb.shape and np.isfinite(out).all()
