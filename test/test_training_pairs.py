"""Labels of training pairs are exact: through decode and PnP they give back the true pose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from picopose_ros.geometry.correspondences import decode_correspondences
from picopose_ros.geometry.pnp import solve_pose
from picopose_ros.geometry.poses import pose_from_affine, rotation_angle_deg
from picopose_ros.model.affine import compose_affine
from picopose_ros.training.losses import flow_labels
from picopose_ros.training.pairs import Difficulty, Sample, draw_sample
from picopose_ros.training.pool import PoolReader, build_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> PoolReader:
    folder = Path(tmp_path_factory.mktemp("pool"))
    build_pool(folder, objects=3, first_seed=40, clusters=3, queries=2)
    return PoolReader(folder)


@pytest.fixture(scope="module")
def sample(pool: PoolReader) -> Sample:
    return draw_sample(pool, np.random.default_rng(5), Difficulty())


def test_labels_through_decode_and_pnp_give_the_true_pose(pool: PoolReader) -> None:
    rng = np.random.default_rng(3)
    worst_rotation, worst_shift = 0.0, 0.0
    for _ in range(6):
        sample = draw_sample(pool, rng, Difficulty())
        for query, own, labels in zip(sample.queries, sample.own, sample.labels, strict=True):
            if labels.valid.sum() < 300:
                continue
            template = sample.templates[own]
            flow = flow_labels(torch.from_numpy(labels.position)[None], 64)[0].numpy()
            certainty = np.where(labels.valid > 0, 9.0, -9.0)
            pairs = decode_correspondences(
                flow, certainty, query.M_crop_img, template.points_consistent, template.T_cam_ctr
            )
            solution = solve_pose(pairs, query.K)
            assert solution is not None
            # Everything scales with the distance: state it at 0.7 m.
            distance = query.T_cam_ctr[2, 3]
            shift = np.linalg.norm(solution.T_cam_obj[:3, 3] - query.T_cam_ctr[:3, 3]) / distance * 0.7
            worst_shift = max(worst_shift, shift)
            rotation = rotation_angle_deg(solution.T_cam_obj[:3, :3], query.T_cam_ctr[:3, :3])
            worst_rotation = max(worst_rotation, rotation)
    assert 0 < worst_rotation < 0.1
    assert worst_shift < 0.0002


def test_affine_labels_give_the_true_translation(sample: Sample) -> None:
    for query, own, labels in zip(sample.queries, sample.own, sample.labels, strict=True):
        template = sample.templates[own]
        centre = (template.M_crop_img @ template.K @ (template.T_cam_ctr[:3, 3] / template.T_cam_ctr[2, 3]))[
            :2
        ]
        affine = compose_affine(
            torch.from_numpy(labels.translation)[None].double(),
            torch.tensor([labels.scale]).double(),
            torch.tensor([[np.cos(labels.angle), np.sin(labels.angle)]]),
            torch.from_numpy(centre)[None].double(),
        )[0].numpy()
        pose = pose_from_affine(
            affine, query.M_crop_img, template.M_crop_img, query.K, template.K, template.T_cam_ctr
        )
        shift = np.linalg.norm(pose[:3, 3] - query.T_cam_ctr[:3, 3])
        assert shift < 1e-3 * query.T_cam_ctr[2, 3]


def test_a_wrong_template_is_labelled_mostly_invisible(sample: Sample) -> None:
    own = np.mean([labels.valid.mean() for labels in sample.labels])
    cross = np.mean([labels.valid.mean() for labels in sample.cross])
    assert cross < 0.5 * own


def test_self_occluded_points_are_invalid(pool: PoolReader) -> None:
    """Against the opposite side nearly nothing is visible, although it projects onto the visible mask."""
    rng = np.random.default_rng(11)
    for _ in range(4):
        sample = draw_sample(pool, rng, Difficulty(occlusion=0, degrade=0))
        for own, query, labels in zip(sample.own, sample.queries, sample.cross, strict=True):
            other = sample.templates[1 - own]
            view = -query.T_cam_ctr[:3, :3].T @ query.T_cam_ctr[:3, 3]
            away = view @ (-other.T_cam_ctr[:3, :3].T @ other.T_cam_ctr[:3, 3])
            if away / np.linalg.norm(view) / other.T_cam_ctr[2, 3] < -0.9:
                assert labels.valid.sum() < 0.15 * (other.points_consistent[..., 2] > 0).sum()


def test_samples_are_reproducible(pool: PoolReader, sample: Sample) -> None:
    again = draw_sample(pool, np.random.default_rng(5), Difficulty())
    for a, b in zip(sample.queries, again.queries, strict=True):
        assert np.array_equal(a.rgb, b.rgb)
    for a, b in zip(sample.labels, again.labels, strict=True):
        assert np.array_equal(a.position, b.position)
