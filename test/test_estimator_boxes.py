"""Segments that are boxes: what the estimator finds in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh

from picopose_ros.estimator import EstimatorSettings, PoseEstimator
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.model import load_model
from picopose_ros.segmentation import Segment, mask_roi
from picopose_ros.segmentation.boxes import box_mask
from picopose_ros.synthetic.objects import VALIDATION_SEED, build_object
from picopose_ros.templates.bank import onboard
from picopose_ros.templates.meshes import discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer

HEIGHT, WIDTH = 240, 320
K = np.array([[400.0, 0, 160], [0, 400.0, 120], [0, 0, 1]])


@pytest.fixture(scope="module")
def shot(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, Segment, PoseEstimator]:
    """An object over a noisy background, its true segment, and an estimator of the packaged weights."""
    folder = tmp_path_factory.mktemp("boxes")
    (folder / "meshes").mkdir()
    made = trimesh.Scene(build_object(VALIDATION_SEED + 3, 128).centred())
    made.apply_scale(0.12 / float(np.linalg.norm(made.extents)))
    made.export(folder / "meshes" / "thing.glb")
    model = load_model("tiny", None, torch.device("cpu"))
    onboarding = onboard(folder / "meshes", model, 42, cache_dir=folder / "cache")
    (spec,) = discover_objects(folder / "meshes")
    T = trimesh.transformations.rotation_matrix(0.9, [1, 2, 0.5])
    T[:3, 3] = [0.02, 0.0, 0.45]
    with MeshRenderer(antialias=True) as renderer:
        view = renderer.render(load_object(spec), T, K, WIDTH, HEIGHT)
    noise = np.random.default_rng(1).normal(110, 6, (HEIGHT, WIDTH, 3))
    rgb = np.where(view.mask[..., None], view.rgb, np.clip(noise, 0, 255)).astype(np.uint8)
    estimator = PoseEstimator(model, onboarding.banks, EstimatorSettings(hypotheses=1, refinements=0))
    return rgb, Segment(spec.class_id, 1.0, view.mask), estimator


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return np.count_nonzero(one & other) / np.count_nonzero(one | other)


def boxed(segment: Segment) -> Segment:
    x, y, w, h = mask_roi(segment.mask)
    mask = box_mask((x + w / 2, y + h / 2), (w, h), 0.0, HEIGHT, WIDTH)
    return Segment(segment.class_id, segment.score, mask, is_box=True)


def test_a_box_becomes_what_is_in_it(shot: tuple[np.ndarray, Segment, PoseEstimator]) -> None:
    rgb, segment, estimator = shot
    box = boxed(segment)
    (query, other), skipped = estimator._crop(rgb, [box, segment])
    assert not skipped and query.segment.is_box and other.segment is segment
    assert iou(query.segment.mask, segment.mask) > 1 - 0.5 * (1 - iou(box.mask, segment.mask))


def test_boxes_give_poses_of_every_kind(shot: tuple[np.ndarray, Segment, PoseEstimator]) -> None:
    rgb, segment, estimator = shot
    camera = CameraModel(K, WIDTH, HEIGHT)
    whole = np.ones((HEIGHT, WIDTH), bool)
    pixel = box_mask((10.5, 10.5), (1, 1), 0.0, HEIGHT, WIDTH)
    over = box_mask((0, 120), (160, 200), 0.3, HEIGHT, WIDTH)
    boxes = [Segment(segment.class_id, 1.0, mask, is_box=True) for mask in (whole, pixel, over)]
    result = estimator.estimate(rgb, camera, [boxed(segment), *boxes, segment])
    assert "1 pixels" in dict(result.skipped)[2]
    by_segment = {pose.segment: pose.T_cam_obj for pose in result.poses}
    assert {0, 4} <= set(by_segment)
    apart = np.linalg.norm(by_segment[0][:3, 3] - by_segment[4][:3, 3])
    assert apart < 0.06, "box and mask show the same object in the same place"
