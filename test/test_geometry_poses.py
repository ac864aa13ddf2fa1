"""Decode, PnP and the affine's pose: against the released network and against known answers."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from parity import load_parity

from picopose_ros.geometry.correspondences import (
    Correspondences,
    cell_centres_in_image,
    decode_correspondences,
)
from picopose_ros.geometry.crops import crop_box_from_mask, crop_points_consistent, crop_points_nearest
from picopose_ros.geometry.pnp import solve_pose
from picopose_ros.geometry.poses import invert_transform, make_transform, pose_from_affine, rotation_angle_deg

PIXELS = 1e-4
"""Pixel coordinates are float32; their last bits depend on the processor."""
K = np.array([[600.0, 0, 320], [0, 610, 240], [0, 0, 1]])


class Released:
    """The released network's scene, with template points made by this package's crops."""

    def __init__(self) -> None:
        self.parity = load_parity()
        self.tensor = self.parity.tensor
        self.K = self.tensor("raw/query_K")
        self.template_K = self.tensor("raw/template_K")
        depths = self.tensor("raw/template_depth_mm") / 1000.0
        boxes = [crop_box_from_mask(view[..., 3]) for view in self.tensor("raw/template_rgba")]
        self.M_template = [box.affine() for box in boxes]
        self.nearest = [crop_points_nearest(d, self.template_K, b) for d, b in zip(depths, boxes)]
        self.consistent = [crop_points_consistent(d, self.template_K, b) for d, b in zip(depths, boxes)]

    def hypotheses(self):
        for h in range(self.parity.hypotheses):
            for b in range(self.parity.detections):
                yield h, b, int(self.tensor("stage1/topk_id")[b, h])

    def decode(self, group: str, b: int, template: int, mode: str) -> Correspondences:
        if group == "oracle":
            flow, certainty = self.tensor("oracle/flow64")[b], np.ones((64, 64))
        else:
            flow, certainty = self.tensor(f"{group}/flow_2")[b], self.tensor(f"{group}/certainty_2")[b, 0]
        points = (self.nearest if mode == "reference" else self.consistent)[template]
        M, T = self.tensor("provider/real_M")[b], self.tensor("provider/tem_pose")[template]
        return decode_correspondences(flow, certainty, M, points, T, mode)


@pytest.fixture(scope="module")
def released() -> Released:
    return Released()


def test_cell_centres_equal_the_released_network(released):
    stored = released.tensor("provider/real_pts2d")
    found = np.stack([cell_centres_in_image(M) for M in released.tensor("provider/real_M")])
    np.testing.assert_allclose(found.transpose(0, 2, 1, 3), stored, atol=PIXELS)


def test_reference_decode_equals_the_released_network(released):
    for h, b, template in released.hypotheses():
        pairs = released.decode(f"hyp{h}", b, template, "reference")
        np.testing.assert_allclose(pairs.uv, released.tensor(f"hyp{h}/pairs2d_{b}"), atol=PIXELS)
        np.testing.assert_allclose(pairs.xyz, released.tensor(f"hyp{h}/pairs3d_{b}"), rtol=1e-5, atol=1e-7)
        # Column by column, floored, and cells without depth are kept: x * 64 + y of the kept cells.
        targets = released.tensor(f"hyp{h}/tar_pts")[b]
        x, y = targets[targets[:, 0] >= 0].T
        centres = cell_centres_in_image(released.tensor("provider/real_M")[b])
        np.testing.assert_array_equal(pairs.uv, centres[y, x])
        assert (pairs.certainty > 0.5).all()


def test_reference_oracle_pairs_and_pose_equal_the_released_network(released):
    for b in range(released.parity.detections):
        template = int(released.tensor("raw/near_template")[b])
        pairs = released.decode("oracle", b, template, "reference")
        np.testing.assert_allclose(pairs.uv, released.tensor(f"oracle/pairs2d_{b}"), atol=PIXELS)
        np.testing.assert_allclose(pairs.xyz, released.tensor(f"oracle/pairs3d_{b}"), rtol=1e-5, atol=1e-7)
        solution = solve_pose(pairs, released.K, threshold=2.0, iterations=150, refine=False)
        stored, report = released.tensor(f"oracle/pnp_{b}"), released.parity.meta["oracle_report"][b]
        # OpenCV's draws depend on the last bits of its linear algebra, which differ between CPUs.
        assert solution.inlier_ratio == pytest.approx(stored[12], abs=0.04)
        assert rotation_angle_deg(solution.T_cam_obj[:3, :3], stored[:9].reshape(3, 3)) < 1.0
        gt = released.tensor("oracle/gt_pose")[b]
        assert rotation_angle_deg(solution.T_cam_obj[:3, :3], gt[:3, :3]) < report["official_rot_deg"] + 1.0


def test_reference_pnp_is_the_released_call(released):
    for h, b, _ in released.hypotheses():
        uv, xyz = released.tensor(f"hyp{h}/pairs2d_{b}"), released.tensor(f"hyp{h}/pairs3d_{b}")
        pairs = Correspondences(uv, xyz, np.ones(len(uv)))
        solution = solve_pose(pairs, released.K, threshold=2.0, iterations=150, refine=False)
        ok, rvec, tvec, inliers = cv2.solvePnPRansac(
            xyz, uv, released.K, None, iterationsCount=150, reprojectionError=2.0, flags=cv2.SOLVEPNP_EPNP
        )
        assert ok and solution.covariance is None
        np.testing.assert_array_equal(solution.T_cam_obj, make_transform(cv2.Rodrigues(rvec)[0], tvec))
        np.testing.assert_array_equal(solution.inliers, inliers.ravel())
        assert solution.inlier_ratio == pytest.approx(released.tensor(f"hyp{h}/pnp_{b}")[12], abs=0.06)


def test_best_hypothesis_by_ratio_is_the_released_networks(released):
    ratios = np.zeros((released.parity.detections, released.parity.hypotheses))
    for h, b, template in released.hypotheses():
        pairs = released.decode(f"hyp{h}", b, template, "reference")
        ratios[b, h] = solve_pose(pairs, released.K, 2.0, 150, refine=False).inlier_ratio
    # The ratios come of RANSAC's draws, which differ between CPUs: where two are close either is best.
    best = released.tensor("final/best_hypothesis").astype(int).ravel()
    assert (ratios[np.arange(len(best)), best] >= ratios.max(1) - 0.06).all()


def test_subpixel_decode_of_the_oracle_is_as_exact_as_the_labels(released):
    for b in range(released.parity.detections):
        template = int(released.tensor("raw/near_template")[b])
        pairs = released.decode("oracle", b, template, "subpixel")
        solution = solve_pose(pairs, released.K)
        gt, report = released.tensor("oracle/gt_pose")[b], released.parity.meta["oracle_report"][b]
        angle = rotation_angle_deg(solution.T_cam_obj[:3, :3], gt[:3, :3])
        offset = np.abs(solution.T_cam_obj[:3, 3] - gt[:3, 3])
        assert angle < 0.03 and angle == pytest.approx(report["subpix_rot_deg"], abs=0.005)
        assert (offset < 1e-4).all(), f"off by {offset * 1000} mm"
        assert solution.inlier_ratio > 0.99
        sigma = np.sqrt(np.diag(solution.covariance))
        assert (sigma[:3] < 3e-4).all() and (sigma[3:] < 1e-3).all()


def test_affine_pose_equals_the_released_network(released):
    M_query, poses = released.tensor("provider/real_M"), released.tensor("provider/tem_pose")
    cases = [
        (released.tensor(f"hyp{h}/affine_M")[b], b, t, released.tensor(f"hyp{h}/pose_stage2")[b])
        for h, b, t in released.hypotheses()
    ]
    for b in range(released.parity.detections):
        template = int(released.tensor("raw/near_template")[b])
        cases.append(
            (released.tensor("oracle/gt_M")[b], b, template, released.tensor("oracle/pose_from_gt_M")[b])
        )
    for M, b, t, stored in cases:
        found = pose_from_affine(
            M, M_query[b], released.M_template[t], released.K, released.template_K, poses[t]
        )
        np.testing.assert_allclose(found, stored, rtol=1e-5, atol=1e-6)


def test_affine_without_scale_is_refused():
    with pytest.raises(ValueError, match="scale"):
        pose_from_affine(
            np.diag([0, 0, 1.0]), np.eye(3), np.eye(3), K, K, make_transform(np.eye(3), [0, 0, 1])
        )


def test_subpixel_decode_drops_what_cannot_be_a_pair():
    flow = np.full((2, 64, 64), 0.5)
    certainty = np.full((64, 64), 3.0)
    certainty[:, 40:] = -3.0
    points = np.ones((64, 64, 3))
    points[10:20] = 0.0
    mask = np.zeros((224, 224), np.uint8)
    mask[:112] = 1
    T = make_transform(np.eye(3), [0, 0, 1])
    all_pairs = decode_correspondences(flow, certainty, np.eye(3), points, T, "subpixel")
    assert len(all_pairs) == 40 * (63 - 10)
    pairs = decode_correspondences(flow, certainty, np.eye(3), points, T, "subpixel", mask)
    assert 40 * (31 - 10) <= len(pairs) <= 40 * (34 - 10)
    # An identity flow of one half lands half a label's pixel beyond the cell's whole-pixel centre.
    assert pairs.uv[0] == pytest.approx([0.5 * 3.5 + 0.5, 0.5 * 3.5 + 0.5])
    assert len(decode_correspondences(flow, certainty - 10, np.eye(3), points, T, "subpixel", mask)) == 0
    with pytest.raises(ValueError, match="exact"):
        decode_correspondences(flow, certainty, np.eye(3), points, T, "exact")


def synthetic(
    rng: np.random.Generator, n: int, noise: float, outliers: float
) -> tuple[Correspondences, np.ndarray]:
    """Pairs of a curved surface at half a metre, and the true pose."""
    xyz = rng.uniform(-0.06, 0.06, (n, 3))
    xyz[:, 2] = 0.03 - 6 * (xyz[:, :2] ** 2).sum(1)
    T = make_transform(
        cv2.Rodrigues(rng.normal(0, 0.6, 3))[0], [*rng.uniform(-0.1, 0.1, 2), rng.uniform(0.4, 0.8)]
    )
    camera = xyz @ T[:3, :3].T + T[:3, 3]
    uv = camera[:, :2] / camera[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2]
    uv += rng.normal(0, noise, uv.shape)
    wrong = rng.permutation(n)[: int(n * outliers)]
    uv[wrong] = rng.uniform(uv.min(0), uv.max(0), (len(wrong), 2))
    return Correspondences(uv, xyz, np.ones(n)), T


@pytest.mark.parametrize("outliers", [0.0, 0.5, 0.75])
def test_pnp_finds_the_known_pose_among_outliers(outliers):
    rng = np.random.default_rng(5)
    for _ in range(5):
        pairs, T = synthetic(rng, 1200, 0.5, outliers)
        pairs.uv[3] = np.nan  # what an impossible lens position looks like
        solution = solve_pose(pairs, K, threshold=2.0)
        assert rotation_angle_deg(solution.T_cam_obj[:3, :3], T[:3, :3]) < 0.6
        assert np.abs(solution.T_cam_obj[:3, 3] - T[:3, 3]).max() < 0.003
        assert solution.inlier_ratio == pytest.approx(1 - outliers, abs=0.06)
        assert 3 not in solution.inliers


def test_pnp_is_deterministic():
    pairs, _ = synthetic(np.random.default_rng(6), 900, 1.0, 0.6)
    first, second = solve_pose(pairs, K), solve_pose(pairs, K)
    np.testing.assert_array_equal(first.T_cam_obj, second.T_cam_obj)


def test_covariance_is_what_repeated_estimates_scatter_by():
    """Squared errors weighed by the inverse covariance average to the six degrees of freedom."""
    rng = np.random.default_rng(7)
    clean, T = synthetic(rng, 80, 0.0, 0.0)
    errors, weighed, covariances = [], [], []
    for _ in range(300):
        noisy = Correspondences(clean.uv + rng.normal(0, 0.4, clean.uv.shape), clean.xyz, clean.certainty)
        solution = solve_pose(noisy, K, threshold=4.0)
        turn = cv2.Rodrigues(solution.T_cam_obj[:3, :3] @ T[:3, :3].T)[0].ravel()
        error = np.concatenate([solution.T_cam_obj[:3, 3] - T[:3, 3], turn])
        errors.append(error)
        covariances.append(solution.covariance)
        weighed.append(error @ np.linalg.solve(solution.covariance, error))
    assert np.mean(weighed) == pytest.approx(6.0, abs=0.9)
    predicted, scatter = np.mean(covariances, 0), np.cov(np.array(errors).T)
    np.testing.assert_allclose(np.sqrt(np.diag(scatter)), np.sqrt(np.diag(predicted)), rtol=0.15)
    # The order matters: depth is the least certain translation, rotation about the view axis the best known.
    assert predicted[2, 2] > 4 * max(predicted[0, 0], predicted[1, 1])
    assert predicted[5, 5] < 0.5 * min(predicted[3, 3], predicted[4, 4])
    sigma = np.sqrt(np.diag(predicted))
    np.testing.assert_allclose(scatter / np.outer(sigma, sigma), predicted / np.outer(sigma, sigma), atol=0.2)


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("n", [0, 3])
def test_too_few_pairs_have_no_pose(refine, n):
    pairs, _ = synthetic(np.random.default_rng(8), 10, 0.0, 0.0)
    assert solve_pose(pairs.select(np.arange(n)), K, refine=refine) is None


@pytest.mark.parametrize("refine", [True, False])
def test_degenerate_pairs_do_not_raise(refine):
    same = Correspondences(np.full((50, 2), 300.0), np.zeros((50, 3)), np.ones(50))
    solution = solve_pose(same, K, refine=refine)
    assert solution is None or solution.covariance is None or np.isfinite(solution.covariance).all()
    line = np.linspace(0, 1, 50)[:, None] * [[0.1, 0, 0]]
    on_line = Correspondences(line[:, :2] * 3000 + 100, line, np.ones(50))
    solution = solve_pose(on_line, K, refine=refine)
    assert solution is None or np.isfinite(solution.T_cam_obj).all()


def test_transforms():
    R = cv2.Rodrigues(np.array([0.1, -0.2, 0.3]))[0]
    T = make_transform(R, [1, 2, 3])
    np.testing.assert_allclose(invert_transform(T) @ T, np.eye(4), atol=1e-12)
    assert rotation_angle_deg(R, np.eye(3)) == pytest.approx(np.degrees(np.linalg.norm([0.1, -0.2, 0.3])))
    tiny = cv2.Rodrigues(np.array([1e-6, 0, 0]))[0]
    assert rotation_angle_deg(tiny, np.eye(3)) == pytest.approx(np.degrees(1e-6), rel=1e-3)
    assert rotation_angle_deg(np.diag([-1.0, -1, 1]), np.eye(3)) == pytest.approx(180.0)
