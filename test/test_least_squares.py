"""The joint least squares: every term's derivative, and that each pulls the pose the right way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import t as student

from picopose_ros.geometry.covariance import pose_error
from picopose_ros.geometry.least_squares import (
    Edges,
    InView,
    Linearised,
    Prior,
    Reprojections,
    Surface,
    Term,
    _unlikely,
    moved,
    solve,
)
from picopose_ros.geometry.poses import make_transform

K = np.array([[600.0, 0, 321.0], [0, 590.0, 238.0], [0, 0, 1]])


def _pose(angles: list[float], shift: list[float]) -> np.ndarray:
    return make_transform(Rotation.from_euler("xyz", angles, degrees=True).as_matrix(), shift)


TRUE = _pose([20, -35, 70], [0.05, -0.03, 0.7])
T_VIEW_CAM = _pose([4, -12, 3], [0.14, 0.02, 0.03])
AWAY = np.array([0.006, -0.004, 0.03, 0.08, -0.06, 0.1])


def _project(xyz: np.ndarray, T: np.ndarray) -> np.ndarray:
    camera = xyz @ T[:3, :3].T + T[:3, 3]
    return camera[:, :2] / camera[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2]


def _points(count: int = 80) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.06, 0.06, (count, 3)) + [0.02, 0.0, -0.03]


def _reprojections() -> Reprojections:
    return Reprojections(_project(_points(), TRUE), _points(), K, sigma=1.5, scale_sigma=0.02)


def _seldom_large() -> Reprojections:
    return replace(_reprojections(), scale_freedom=2.0)


def _other_view() -> InView:
    uv = _project(_points(), T_VIEW_CAM @ TRUE)
    return InView(Reprojections(uv, _points(), K, sigma=1.5, cutoff=np.inf), T_VIEW_CAM)


def _edges() -> Edges:
    rng = np.random.default_rng(1)
    angle = rng.uniform(0, 2 * np.pi, 80)
    normal = np.stack([np.cos(angle), np.sin(angle)], 1)
    origin = _project(_points(), TRUE) + rng.uniform(-6, 6, (80, 2))
    offset = ((_project(_points(), TRUE) - origin) * normal).sum(1)
    return Edges(_points(), K, origin, normal, offset, rng.uniform(0.5, 2.0, 80), growth_sigma=0.7)


def _surface() -> Surface:
    rng = np.random.default_rng(2)
    normals = rng.normal(size=(80, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    # Measured elsewhere on the tangent planes: a distance along the plane is none.
    beside = np.cross(normals, rng.normal(size=(80, 3))) * 0.002
    measured = (_points() + beside) @ TRUE[:3, :3].T + TRUE[:3, 3]
    return Surface(measured, _points(), normals, np.full(80, 0.001), depth_sigma=0.002)


def _prior() -> Prior:
    return Prior(TRUE, np.diag([1e-3, 2e-3, 8e-3, 0.03, 0.02, 0.05]) ** 2)


TERMS: dict[str, Callable[[], Term]] = {
    "reprojections": _reprojections,
    "reprojections of another error": _seldom_large,
    "another view": _other_view,
    "edges": _edges,
    "surface": _surface,
    "prior": _prior,
}


@pytest.mark.parametrize("name", TERMS)
def test_derivatives_are_those_of_the_residuals(name: str) -> None:
    term, pose, step = TERMS[name](), moved(TRUE, AWAY), 1e-6
    line = term.linearise(pose)
    for i in range(6):
        by = step * np.eye(6)[i]
        ahead, behind = (term.linearise(moved(pose, sign * by)).residual for sign in (1, -1))
        largest = np.abs(line.jacobian).max()
        np.testing.assert_allclose(
            line.jacobian[..., i], (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-3 * largest
        )


@dataclass(frozen=True)
class _Turned:
    """A term whose derivative has the wrong sign."""

    term: Term
    together: float = 1.0
    cutoff: float = np.inf

    def linearise(self, T_cam_obj: np.ndarray) -> Linearised:
        line = self.term.linearise(T_cam_obj)
        return replace(line, jacobian=-line.jacobian)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_finds_the_pose_by_itself_and_not_with_its_sign_turned(name: str) -> None:
    term = replace(TERMS[name](), **({} if name in ("prior", "another view") else {"cutoff": np.inf}))
    start = moved(TRUE, AWAY)
    found = solve(start, {name: term}, steps=30)
    assert found is not None
    assert np.abs(found.T_cam_obj - TRUE).max() < 1e-4
    turned = solve(start, {name: _Turned(term)}, steps=30)
    assert turned is None or np.abs(turned.T_cam_obj - TRUE).max() > 1e-3


def test_a_few_wrong_pairs_change_nothing_and_count_for_nothing() -> None:
    term = replace(_reprojections(), scale_sigma=0.0)
    uv = term.uv.copy()
    uv[::5] += [40.0, -25.0]
    found = solve(moved(TRUE, AWAY / 10), {"pairs": replace(term, uv=uv)}, steps=30)
    assert found is not None
    assert np.abs(found.T_cam_obj - TRUE).max() < 1e-3
    weights = found.weights["pairs"]
    assert weights[::5].max() < 0.01 < 0.9 < np.delete(weights, np.s_[::5]).min()


def test_what_edges_say_of_the_size_corrects_a_flow_that_is_too_large() -> None:
    pairs = replace(_reprojections(), scale_sigma=0.03)
    middle = pairs.uv.mean(0)
    large = replace(pairs, uv=middle + 1.04 * (pairs.uv - middle))
    edges = replace(_edges(), growth_sigma=0.0)
    alone = solve(TRUE, {"pairs": replace(large, scale_sigma=0.0)})
    both = solve(TRUE, {"pairs": large, "edges": edges})
    trusting = solve(TRUE, {"pairs": replace(large, scale_sigma=1e-4), "edges": edges})
    assert alone is not None and both is not None and trusting is not None
    off = [abs(one.T_cam_obj[2, 3] / TRUE[2, 3] - 1) for one in (alone, both, trusting)]
    assert off[0] > 0.03 and off[1] < 0.005 and off[2] > off[1]
    assert both.modes["pairs"] == pytest.approx([0.04 / 1.0 / 0.03], abs=0.3)


def test_a_mask_that_is_too_large_all_round_is_seen_through_by_what_else_is_known() -> None:
    edges = _edges()
    grown = replace(edges, offset=edges.offset + 2.0, growth_sigma=2.0)
    pairs = replace(_reprojections(), scale_sigma=0.0)
    found = solve(TRUE, {"pairs": pairs, "edges": grown})
    assert found is not None
    assert abs(found.T_cam_obj[2, 3] / TRUE[2, 3] - 1) < 0.003
    assert found.modes["edges"][0] == pytest.approx(1.0, abs=0.2)


def test_a_common_error_that_is_seldom_large_is_believed_where_it_has_to_be() -> None:
    pairs = replace(_reprojections(), scale_sigma=0.006)
    middle = pairs.uv.mean(0)
    large = replace(pairs, uv=middle + 1.05 * (pairs.uv - middle))
    edges = replace(_edges(), growth_sigma=0.5)
    off = {}
    for freedom in (2.0, np.inf):
        found = solve(TRUE, {"pairs": replace(large, scale_freedom=freedom), "edges": edges}, steps=60)
        assert found is not None
        off[freedom] = abs(found.T_cam_obj[2, 3] / TRUE[2, 3] - 1)
        again = solve(TRUE, {"pairs": replace(pairs, scale_freedom=freedom), "edges": edges})
        assert again is not None and abs(again.T_cam_obj[2, 3] / TRUE[2, 3] - 1) < 1e-3
    assert off[2.0] < 0.003 < 0.007 < off[np.inf]


def test_another_view_keeps_the_distribution_of_a_terms_common_error() -> None:
    view = InView(_seldom_large(), T_VIEW_CAM, shift_sigma=0.001, turn_sigma=0.001)
    assert list(view.linearise(TRUE).freedom) == [2.0] + 6 * [np.inf]
    assert list(replace(view, shift_sigma=0.0, turn_sigma=0.0).linearise(TRUE).freedom) == [2.0]


def test_the_likelihood_of_a_common_error_is_what_its_weight_minimises() -> None:
    modes, freedom, step = np.array([0.3, -2.0, 4.0, 1.5]), np.array([2.0, 1.0, 5.0, np.inf]), 1e-6
    cost, weight = _unlikely(modes, freedom)
    for i in range(len(modes)):
        ahead, _ = _unlikely(modes + step * np.eye(len(modes))[i], freedom)
        assert (ahead - cost) / step == pytest.approx(2 * weight[i] * modes[i], rel=1e-4)
    # Student's density itself, but for what doesn't depend on the error.
    apart = -2 * (student.logpdf(4.0, 5.0) - student.logpdf(0.0, 5.0))
    assert _unlikely(np.array([4.0]), np.array([5.0]))[0] == pytest.approx(apart)


def test_the_covariance_is_that_of_the_errors() -> None:
    rng = np.random.default_rng(3)
    pairs, edges = replace(_reprojections(), scale_sigma=0.0), _edges()
    errors, last = [], None
    for _ in range(120):
        uv = pairs.uv + rng.normal(scale=pairs.sigma, size=pairs.uv.shape)
        offset = edges.offset + rng.normal(scale=edges.sigma) + rng.normal(scale=edges.growth_sigma)
        drawn = {"a": replace(pairs, uv=uv), "b": replace(edges, offset=offset)}
        last = solve(TRUE, {name: replace(term, cutoff=np.inf) for name, term in drawn.items()})
        assert last is not None
        errors.append(pose_error(last.T_cam_obj, TRUE))
    whitened = np.array(errors) @ np.linalg.inv(np.linalg.cholesky(last.covariance)).T
    assert (whitened**2).sum(1).mean() == pytest.approx(6.0, abs=1.0)


def test_measurements_that_err_together_count_as_one() -> None:
    pairs = replace(_reprojections(), scale_sigma=0.0)
    one, many = (solve(TRUE, {"a": replace(pairs, together=n)}) for n in (1.0, 50.0))
    assert one is not None and many is not None
    np.testing.assert_allclose(many.covariance, 50 * one.covariance, rtol=1e-6)


def test_a_pose_that_nothing_fixes_is_none_and_so_is_one_behind_the_camera() -> None:
    few = Reprojections(_project(_points(2), TRUE), _points(2), K, sigma=1.0)
    assert solve(TRUE, {"pairs": few}) is None
    assert solve(TRUE, {}) is None
    behind = make_transform(TRUE[:3, :3], [0.0, 0.0, -0.5])
    assert solve(behind, {"pairs": _reprojections()}) is None
