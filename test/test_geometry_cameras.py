"""Camera models against OpenCV, and calibrations that cannot be used."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from picopose_ros.errors import CameraError
from picopose_ros.geometry.cameras import CameraModel

K = np.array([[420.0, 0, 322.5], [0, 418.0, 238.0], [0, 0, 1]])
LENSES = {
    "": (),
    "plumb_bob": (-0.33, 0.12, 0.001, -0.0007, -0.02),
    "rational_polynomial": (0.45, 0.05, 0.0003, -0.0002, 0.004, 0.8, 0.12, 0.01),
    "equidistant": (-0.03, 0.01, -0.004, 0.0008),
}
MORE = [
    ("plumb_bob", (-0.2, 0.05, 0.001, 0.002)),
    ("rational_polynomial", (*LENSES["rational_polynomial"], 0.002, -0.001, 0.003, 0.0005)),
    ("rational_polynomial", (*LENSES["rational_polynomial"], 0.002, -0.001, 0.003, 0.0005, 0.02, -0.01)),
]
"""Shorter and longer lists of coefficients: thin prism, tilted sensor."""


def camera(model: str) -> CameraModel:
    return CameraModel(K, 640, 480, model, LENSES[model])


def directions() -> np.ndarray:
    """Points whose pixels cover the image."""
    rng = np.random.default_rng(1)
    xy = rng.uniform([-0.7, -0.52], [0.7, 0.52], (400, 2))
    return np.concatenate([xy, np.ones((400, 1))], 1) * rng.uniform(0.3, 3, (400, 1))


@pytest.mark.parametrize("model", LENSES)
def test_project_agrees_with_opencv(model):
    points = directions()
    if model == "equidistant":
        expected, _ = cv2.fisheye.projectPoints(
            points[:, None], np.zeros(3), np.zeros(3), K, np.array(LENSES[model])
        )
    else:
        expected, _ = cv2.projectPoints(
            points, np.zeros(3), np.zeros(3), K, np.array(LENSES[model] or (0, 0, 0, 0.0))
        )
    np.testing.assert_allclose(camera(model).project(points), expected.reshape(-1, 2), atol=1e-9)


@pytest.mark.parametrize(("model", "D"), MORE, ids=lambda v: str(len(v)))
def test_all_numbers_of_coefficients_agree_with_opencv(model, D):
    points = directions()
    lens = CameraModel(K, 640, 480, model, D)
    lens.validate()
    expected, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), K, np.array(D))
    np.testing.assert_allclose(lens.project(points), expected.reshape(-1, 2), atol=1e-9)
    straight = lens.undistort_points(expected.reshape(-1, 2))
    np.testing.assert_allclose(straight, (points / points[:, 2:])[:, :2] @ K[:2, :2].T + K[:2, 2], atol=1e-5)


@pytest.mark.parametrize("model", LENSES)
def test_undistort_inverts_project(model):
    points = directions()
    uv = camera(model).undistort_points(camera(model).project(points))
    np.testing.assert_allclose(uv, (points / points[:, 2:])[:, :2] @ K[:2, :2].T + K[:2, 2], atol=1e-5)


@pytest.mark.parametrize("model", ["plumb_bob", "rational_polynomial", "equidistant"])
def test_undistort_agrees_with_opencv(model):
    u, v = np.meshgrid(np.linspace(120, 520, 9), np.linspace(90, 390, 7))
    uv = np.stack([u.ravel(), v.ravel()], -1)
    undistort = cv2.fisheye.undistortPoints if model == "equidistant" else cv2.undistortPoints
    expected = undistort(uv[:, None], K, np.array(LENSES[model]), P=K).reshape(-1, 2)
    found = camera(model).undistort_points(uv)
    np.testing.assert_allclose(found, expected, atol=0.05)  # OpenCV stops early
    assert np.abs(found - uv).max() > 2


def test_a_pixel_the_lens_cannot_reach_is_nan():
    lens = CameraModel(K, 640, 480, "plumb_bob", (-0.4, 0.0, 0.0, 0.0, 0.0))
    uv = lens.undistort_points([[1500.0, 238.0], [322.5, 238.0]])
    assert np.isnan(uv[0]).all()
    np.testing.assert_allclose(uv[1], [322.5, 238.0], atol=1e-6)


@pytest.mark.parametrize("model", ["", "plumb_bob", "anything"])
def test_zero_coefficients_mean_no_distortion(model):
    lens = CameraModel(K, 640, 480, model, (0.0, 0.0, 0.0, 0.0, 0.0))
    lens.validate()
    np.testing.assert_array_equal(lens.undistort_points([[1.0, 2.0]]), [[1.0, 2.0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"K": np.zeros((3, 3))}, "uncalibrated"),
        ({"K": K * [[np.nan, 1, 1], [1, 1, 1], [1, 1, 1]]}, "NaN"),
        ({"K": K * [[-1, 1, 1], [1, 1, 1], [1, 1, 1]]}, "positive"),
        ({"K": K.T}, "must look like"),
        ({"width": 0}, "image size is 0x480"),
        ({"distortion_model": "kannala", "D": (0.1,)}, "'kannala' is unknown"),
        ({"distortion_model": "plumb_bob", "D": (0.1,)}, "1 coefficients; it takes 4 or 5"),
        ({"distortion_model": "", "D": (0.1,)}, "no distortion model with 1"),
        ({"distortion_model": "plumb_bob", "D": (0.1, np.inf, 0, 0)}, "D holds NaN"),
    ],
)
def test_unusable_calibrations_are_explained(changes, message):
    broken = CameraModel(**{"K": K, "width": 640, "height": 480, **changes})
    with pytest.raises(CameraError, match=message):
        broken.validate()


def test_camera_file_round_trip(tmp_path):
    path = tmp_path / "camera.json"
    path.write_text(json.dumps(camera("plumb_bob").to_dict()))
    back = CameraModel.from_json(path)
    np.testing.assert_array_equal(back.K, K)
    assert (back.width, back.height, back.D) == (640, 480, LENSES["plumb_bob"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "object"),
        ('{"width": 4, "height": 3}', "K missing"),
        ('{"K": [1, 2, 3], "width": 4, "height": 3}', "9 numbers"),
        ('{"K": "abc", "width": 4, "height": 3}', "abc"),
        ('{"K": [0,0,0,0,0,0,0,0,0], "width": 4, "height": 3}', "uncalibrated"),
    ],
)
def test_broken_camera_files_are_explained(tmp_path, text, message):
    path = tmp_path / "cam.json"
    path.write_text(text)
    with pytest.raises(CameraError, match=message) as caught:
        CameraModel.from_json(path)
    assert "cam.json" in str(caught.value)
