"""Labels of training pairs are exact: through decode and PnP they give back the true pose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from picopose_ros.geometry.correspondences import decode_correspondences
from picopose_ros.geometry.pnp import solve_pose
from picopose_ros.geometry.poses import rotation_angle_deg
from picopose_ros.model.affine import compose_affine
from picopose_ros.training.losses import flow_labels
from picopose_ros.training.pairs import (
    Difficulty,
    PairLabels,
    Sample,
    draw_sample,
    make_query,
    template_centre,
)
from picopose_ros.training.pool import PoolReader, build_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> PoolReader:
    folder = Path(tmp_path_factory.mktemp("pool"))
    build_pool(folder, objects=3, first_seed=40, clusters=3, queries=2)
    return PoolReader(folder)


@pytest.fixture(scope="module")
def sample(pool: PoolReader) -> Sample:
    return draw_sample(pool, np.random.default_rng(5), Difficulty())


@pytest.mark.parametrize("difficulty", [Difficulty(), Difficulty(occlusion=1, cut=1)])
def test_labels_through_decode_and_pnp_give_the_true_pose(pool: PoolReader, difficulty: Difficulty) -> None:
    rng = np.random.default_rng(3)
    worst_rotation, worst_shift = 0.0, 0.0
    for _ in range(6):
        sample = draw_sample(pool, rng, difficulty)
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


def test_affine_labels_are_the_best_similarity(sample: Sample) -> None:
    axis = np.floor((np.arange(64) + 0.5) * 3.5)
    pixels = np.stack([*np.meshgrid(axis, axis), np.ones((64, 64))]).reshape(3, -1)
    for own, labels in zip(sample.own, sample.labels, strict=True):
        assert labels.usable
        valid = labels.valid > 0
        expected, _ = cv2.estimateAffinePartial2D(
            pixels[:2].T.reshape(64, 64, 2)[valid], labels.position[:, valid].T, method=cv2.LMEDS
        )

        def error(
            translation: np.ndarray, scale: float, angle: float, own: int = own, labels: PairLabels = labels
        ) -> float:
            affine = compose_affine(
                torch.tensor(np.asarray(translation))[None].double(),
                torch.tensor([scale]).double(),
                torch.tensor([[np.cos(angle), np.sin(angle)]]),
                torch.from_numpy(template_centre(sample.templates[own]))[None].double(),
            )[0].numpy()
            moved = (affine @ pixels)[:2].reshape(2, 64, 64)
            return float(((moved - labels.position)[:, labels.valid > 0] ** 2).sum(0).mean())

        best = error(labels.translation, labels.scale, labels.angle)
        robust = ((expected @ pixels).reshape(2, 64, 64) - labels.position)[:, valid]
        assert best <= (robust**2).sum(0).mean() * (1 + 1e-6)
        assert best < error(labels.translation, labels.scale, labels.angle + 0.02)
        assert best < error(labels.translation, labels.scale * 1.02, labels.angle)
        assert best < error(labels.translation + np.array([0.05, 0]), labels.scale, labels.angle)


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


def test_a_query_that_is_cut_off_loses_up_to_three_quarters(pool: PoolReader) -> None:
    """The hidden share is spread evenly: an occluder alone seldom leaves less than half."""
    item = pool.at(1, 0)
    view, left = item.queries[0], {}
    for cut in (0, 1):
        plain = Difficulty(occlusion=1, cut=cut, keep_background=1, degrade=0, light=0, photometric=0)
        queries = [make_query(view, np.random.default_rng(s), plain, item.template.rgb) for s in range(60)]
        left[cut] = np.array([query.shown.sum() / view.mask.sum() for query in queries])
    assert left[1].min() > 0.15 and np.mean(left[1] < 0.97) > 0.9  # too little left: not covered at all
    assert np.mean(left[1] < 0.5) > 0.3 > np.mean(left[0] < 0.5)
    assert np.mean(left[1] > 0.6) > 0.25


def test_samples_are_reproducible(pool: PoolReader, sample: Sample) -> None:
    again = draw_sample(pool, np.random.default_rng(5), Difficulty())
    for a, b in zip(sample.queries, again.queries, strict=True):
        assert np.array_equal(a.rgb, b.rgb)
    for a, b in zip(sample.labels, again.labels, strict=True):
        assert np.array_equal(a.position, b.position)


def test_a_query_that_nothing_disturbs_shows_the_rendered_colours(pool: PoolReader) -> None:
    """Every disturbance can be left out, the light too: the rendered view is left, turned and cropped."""
    item = pool.at(0, 0)
    plain = Difficulty(occlusion=0, keep_background=0, degrade=0, light=0, photometric=0)
    changes = []
    for view in item.queries:
        query = make_query(view, np.random.default_rng(2), plain, item.template.rgb)
        warp = query.M_crop_img[:2].astype(np.float64) @ np.vstack([query.turn, [0, 0, 1]])
        expected = cv2.warpAffine(view.rgb, warp, (224, 224), flags=cv2.INTER_LINEAR)
        inside = cv2.erode(query.mask, np.ones((9, 9))) > 0
        assert inside.sum() > 1000
        off = np.abs(query.rgb[inside].astype(int) - expected[inside])
        assert np.mean(off) < 4  # of 255: resampled elsewhere by half a crop pixel at most

        for seed in range(8):
            lit = make_query(view, np.random.default_rng(seed), replace(plain, light=1), item.template.rgb)
            unlit = make_query(view, np.random.default_rng(seed), plain, item.template.rgb)
            changes.append(np.abs(lit.rgb.astype(int) - unlit.rgb)[unlit.mask > 0].mean())
    assert np.mean(changes) > 8  # one in ten stays unlit
