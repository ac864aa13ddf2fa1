"""Camera models against OpenCV, and calibrations that cannot be used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from picopose_ros.errors import CameraError
from picopose_ros.geometry.cameras import CameraModel, is_rectified_topic

K = np.array([[420.0, 0, 322.5], [0, 418.0, 238.0], [0, 0, 1]])
LENSES = {
    "": (),
    "plumb_bob": (-0.33, 0.12, 0.001, -0.0007, -0.02),
    "rational_polynomial": (0.45, 0.05, 0.0003, -0.0002, 0.004, 0.8, 0.12, 0.01),
    "equidistant": (-0.03, 0.01, -0.004, 0.0008),
}
MORE = [
    ("plumb_bob", (-0.2, 0.05, 0.001, 0.002)),
    ("plumb_bob", LENSES["rational_polynomial"]),  # drivers that name the wrong one of the two
    ("rational_polynomial", LENSES["plumb_bob"]),
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
        ({"distortion_model": "plumb_bob", "D": (0.1,)}, "1 coefficients; it takes 4 or 5 or 8 or 12 or 14"),
        ({"distortion_model": "", "D": (0.1,)}, "no distortion model with 1"),
        ({"distortion_model": "plumb_bob", "D": (0.1, np.inf, 0, 0)}, "D holds NaN"),
    ],
)
def test_unusable_calibrations_are_explained(changes, message):
    broken = CameraModel(**{"K": K, "width": 640, "height": 480, **changes})
    with pytest.raises(CameraError, match=message):
        broken.validate()


# CameraInfo. The stereo pair is the real calibration that image_geometry's own tests use.

LEFT = {
    "d": [-0.363528858080088, 0.16117037733986861, -8.1109585007538829e-05, -0.00044776712298447841, 0.0],
    "k": [430.15433020105519, 0, 311.71339830549732, 0, 430.60920415473657, 221.06824942698509, 0, 0, 1],
    "r": [
        *(0.99806560714807102, 0.0068562422224214027, 0.061790256276695904),
        *(-0.0067522959054715113, 0.99997541519165112, -0.0018909025066874664),
        *(-0.061801701660692349, 0.0014700186639396652, 0.99808736527268516),
    ],
    "p": [
        295.53402059708782,
        0,
        285.55760765075684,
        0,
        0,
        295.53402059708782,
        223.29617881774902,
        0,
        0,
        0,
        1,
        0,
    ],
}
RIGHT = {
    "d": [-0.3560641041112021, 0.15647260261553159, -0.00016442960757099968, -0.00093175810713916221],
    "k": [428.38163131344191, 0, 327.95553847249192, 0, 428.85728580588329, 217.54828640915309, 0, 0, 1],
    "r": [
        *(0.9982082576219119, 0.0067433328293516528, 0.059454199832973849),
        *(-0.0068433268864187356, 0.99997549128605434, 0.0014784127772287513),
        *(-0.059442773257581252, -0.0018826283666309878, 0.99822993965212292),
    ],
    "p": [
        *(295.53402059708782, 0, 285.55760765075684, -26.507895206214123),
        *(0, 295.53402059708782, 223.29617881774902, 0, 0, 0, 1, 0),
    ],
}


def camera_info(
    roi: tuple[int, int, int, int] = (0, 0, 0, 0), binning: tuple[int, int] = (0, 0), **changes: Any
) -> SimpleNamespace:
    """The fields of a CameraInfo of the left camera; roi is (x_offset, y_offset, width, height)."""
    names = ("x_offset", "y_offset", "width", "height")
    return SimpleNamespace(
        **{"width": 640, "height": 480, "distortion_model": "plumb_bob", **LEFT, **changes},
        binning_x=binning[0],
        binning_y=binning[1],
        roi=SimpleNamespace(**dict(zip(names, roi)), do_rectify=False),
    )


def intrinsics(lens: CameraModel) -> list[float]:
    return [lens.K[0, 0], lens.K[1, 1], lens.K[0, 2], lens.K[1, 2]]


@pytest.mark.parametrize(
    ("roi", "binning", "size", "raw", "rectified"),
    [
        ((0, 0, 0, 0), (0, 0), (640, 480), (311.71340, 221.06825), (285.55761, 223.29618)),
        ((0, 0, 0, 0), (1, 1), (640, 480), (311.71340, 221.06825), (285.55761, 223.29618)),
        ((0, 0, 0, 0), (2, 4), (320, 120), (155.85670, 55.26706), (142.77880, 55.82404)),
        ((100, 60, 320, 240), (0, 0), (320, 240), (211.71340, 161.06825), (185.55761, 163.29618)),
        ((100, 60, 320, 240), (2, 2), (160, 120), (105.85670, 80.53412), (92.77880, 81.64809)),
        ((0, 0, 321, 241), (2, 2), (160, 120), (155.85670, 110.53412), (142.77880, 111.64809)),
    ],
)
def test_roi_and_binning_give_the_numbers_of_image_geometry(roi, binning, size, raw, rectified):
    """The offset first, then the binning: cx 311.71340 - 100 = 211.71340, halved 105.85670."""
    bins = np.maximum(binning, 1)
    for centre, focal, is_rectified in (
        (raw, (430.15433, 430.60920), False),
        (rectified, (295.53402, 295.53402), True),
    ):
        lens = CameraModel.from_camera_info(camera_info(roi, binning), is_rectified)
        assert (lens.width, lens.height) == size
        np.testing.assert_allclose(intrinsics(lens), [*(focal / bins), *centre], atol=1e-5)
        assert lens.distorted is not is_rectified


@pytest.mark.parametrize("model", ["plumb_bob", "rational_polynomial", "equidistant"])
def test_a_part_of_an_image_is_seen_where_it_lies_in_the_whole(model):
    """The lens bends the light before the sensor is cut and binned."""
    changes = {"distortion_model": model, "d": list(LENSES[model]), "k": K.ravel().tolist()}
    whole = CameraModel.from_camera_info(camera_info(**changes))
    part = CameraModel.from_camera_info(camera_info((64, 48, 512, 384), (4, 2), **changes))
    points = directions()
    np.testing.assert_allclose(part.project(points), (whole.project(points) - [64, 48]) / [4, 2], atol=1e-9)
    np.testing.assert_allclose(
        part.undistort_points(part.project(points)),
        (points / points[:, 2:])[:, :2] @ part.K[:2, :2].T + part.K[:2, 2],
        atol=1e-5,
    )


@pytest.mark.parametrize("side", [LEFT, RIGHT], ids=["left", "right"])
def test_a_rectified_image_is_what_opencv_makes_of_the_raw_one(side):
    """A point's pixel in the raw image, rectified by OpenCV with R and P, is where the camera of P sees the
    point turned by R; P's fourth column, which the right camera has, moves no pixel."""
    points = directions() * [0.6, 0.6, 1]
    info = camera_info(**side)
    raw = CameraModel.from_camera_info(info).project(points)
    rectified = CameraModel.from_camera_info(info, rectified=True)
    R, P = np.reshape(side["r"], (3, 3)), np.reshape(side["p"], (3, 4))
    K_raw, D = np.reshape(side["k"], (3, 3)), np.array(side["d"])
    exact = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-12)
    expected = cv2.undistortPointsIter(raw[:, None], K_raw, D, R, P, exact).reshape(-1, 2)
    np.testing.assert_allclose(rectified.project(points @ R.T), expected, atol=1e-3)
    np.testing.assert_array_equal(rectified.undistort_points(expected), expected)


def test_a_driver_that_fills_in_no_p():
    info = camera_info(p=[0.0] * 12)
    with pytest.raises(CameraError, match="rectified, but P is zero"):
        CameraModel.from_camera_info(info, rectified=True)
    straight = camera_info(p=[0.0] * 12, d=[])
    np.testing.assert_allclose(CameraModel.from_camera_info(straight, True).K.ravel(), LEFT["k"])


@pytest.mark.parametrize(
    ("roi", "message"),
    [
        ((0, 0, 641, 480), "leaves the image of 640x480"),
        ((400, 0, 320, 240), "leaves the image"),
        ((0, 300, 640, 240), "leaves the image"),
        ((10, 0, 0, 0), "is empty"),
        ((0, 0, 640, 0), "is empty"),
    ],
)
def test_a_roi_that_can_not_be_is_explained(roi, message):
    with pytest.raises(CameraError, match=message):
        CameraModel.from_camera_info(camera_info(roi))


def test_a_binning_larger_than_the_image_is_no_camera():
    with pytest.raises(CameraError, match="image size is 0x480"):
        CameraModel.from_camera_info(camera_info(binning=(1000, 1)))


def test_the_message_of_ros_is_read_as_it_is():
    from sensor_msgs.msg import CameraInfo

    message = CameraInfo(width=640, height=480, distortion_model="plumb_bob", d=LEFT["d"])
    message.k, message.r, message.p = (np.array(LEFT[name], float) for name in "krp")
    message.binning_x = message.binning_y = 2
    message.roi.x_offset, message.roi.width, message.roi.height = 100, 320, 240
    lens = CameraModel.from_camera_info(message)
    np.testing.assert_allclose(intrinsics(lens), [215.07717, 215.30460, 105.85670, 110.53412], atol=1e-5)
    assert (lens.width, lens.height, lens.D) == (160, 120, tuple(LEFT["d"]))


@pytest.mark.parametrize(
    ("topic", "rectified"),
    [
        ("/camera/image_rect", True),
        ("/camera/image_rect_color", True),
        ("/left/image_rect/compressed", True),
        ("/camera/infra1/image_rect_raw", True),
        ("image_rectified", True),
        ("/camera/image_raw", False),
        ("/camera/image_raw/compressed", False),
        ("/rect/image", False),
        ("/camera/rectangle", False),
        ("/compressed", False),
    ],
)
def test_rectified_topics_are_known_by_their_name(topic, rectified):
    assert is_rectified_topic(topic) is rectified
