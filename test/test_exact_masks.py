"""Whether a mask ends where the object does: believed to a part of a pixel where everything else agrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from test_docs import load_script

from picopose_ros.estimation.evidence import Weights
from picopose_ros.estimation.refine_step import _or_exact
from picopose_ros.geometry.least_squares import Edges, Reprojections, Solution, Term, projected, solve
from picopose_ros.geometry.poses import make_transform

K = np.array([[600.0, 0, 320.0], [0, 600.0, 240.0], [0, 0, 1]])
TRUE = make_transform(Rotation.from_rotvec([0.3, -0.5, 0.2]).as_matrix(), [0.02, -0.01, 0.8])
WEIGHTS = Weights()


def _projected(xyz: np.ndarray) -> np.ndarray:
    return projected(xyz @ TRUE[:3, :3].T, TRUE[:3, 3], K)[0]


def _terms(flow_scale: float, growth_px: float, ragged_px: float = 0.0) -> dict[str, Term]:
    """Correspondences that are too far apart by a factor, and a mask's edge that is too far out."""
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-0.04, 0.04, (200, 3))
    uv = _projected(xyz)
    uv = uv.mean(0) + flow_scale * (uv - uv.mean(0))
    pairs = Reprojections(uv, xyz, K, 0.5, 100.0, scale_sigma=WEIGHTS.pair_scale)
    pairs = replace(pairs, scale_freedom=WEIGHTS.freedom)
    # The outline of a ball: the points of the sphere that the camera sees from the side.
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle), np.zeros(200)], 1) * 0.04
    outline = ring @ TRUE[:3, :3]
    origin = _projected(outline)
    normal = origin - origin.mean(0)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    offset = growth_px + ragged_px * rng.normal(size=200)
    sigma = np.full(200, max(WEIGHTS.edge_sigma, 1.5 * ragged_px))
    edge = Edges(outline, K, origin, normal, offset + np.zeros(200), sigma, 4.0, growth_sigma=1.2)
    return {"pairs": pairs, "contour": edge}


def _found(terms: dict[str, Term]) -> tuple[float, bool]:
    """How far the depth is off, and whether the mask was taken for exact."""
    loose = solve(TRUE, terms)
    assert isinstance(loose, Solution)
    solution, used = _or_exact(loose, terms, WEIGHTS)
    assert set(used) == set(terms) and used["pairs"] is terms["pairs"]
    return abs(solution.T_cam_obj[2, 3] / TRUE[2, 3] - 1), used is not terms


def test_an_exact_mask_corrects_a_flow_that_is_a_little_too_small() -> None:
    terms = _terms(0.985, 0.0)
    loose = solve(TRUE, terms)
    assert loose is not None
    off, exact = _found(terms)
    assert exact and off < 0.004 < 0.006 < abs(loose.T_cam_obj[2, 3] / TRUE[2, 3] - 1)


@pytest.mark.parametrize("growth_px", [-2.0, 2.0])
def test_a_mask_that_the_flow_contradicts_is_not_exact(growth_px: float) -> None:
    off, exact = _found(_terms(1.0, growth_px))
    assert not exact and off < 0.02


def test_a_ragged_mask_is_not_exact() -> None:
    _, exact = _found(_terms(0.985, 0.0, ragged_px=1.5))
    assert not exact


def test_without_a_mask_nothing_is_decided() -> None:
    terms = {"pairs": replace(_terms(1.0, 0.0)["pairs"], scale_sigma=0.0)}
    loose = solve(TRUE, terms)
    assert loose is not None
    assert _or_exact(loose, terms, WEIGHTS) == (loose, terms)


def test_what_all_measurements_are_off_by_is_measured_at_the_true_pose() -> None:
    script = load_script(Path(__file__).parents[1] / "scripts/refinement_terms.py")
    step = SimpleNamespace(terms=_terms(0.985, 0.7, ragged_px=0.3) | {"depth": SimpleNamespace()})
    found = script.common_errors(step, TRUE)
    assert set(found) == {"pairs", "contour"}
    assert found["pairs"] == pytest.approx(-0.0152, abs=0.0005)
    assert found["contour"] == pytest.approx(0.7, abs=0.1)
