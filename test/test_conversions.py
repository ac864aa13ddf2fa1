"""ROS messages to NumPy and back."""

from __future__ import annotations

import array
import sys
import types
from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import pytest
from geometry_msgs.msg import Pose
from picopose_ros.msg import Segment as SegmentMessage
from picopose_ros.msg import SegmentArray
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from vision_msgs.msg import Detection3DArray

from picopose_ros.errors import CameraError, ImageError, SegmentError
from picopose_ros.estimator import ObjectPose
from picopose_ros.geometry.crops import crop_box_from_mask, crop_rgb
from picopose_ros.messages.build import pose_in_frame, rotation_to_quaternion, transform_message
from picopose_ros.messages.frames import camera_from_message
from picopose_ros.messages.images import image_to_rgb
from picopose_ros.messages.reasons import DropReason
from picopose_ros.messages.segmentations import segments_from_message
from picopose_ros.node.conversions import (
    detections_message,
    image_from_rgb,
    make,
    segments_to_message,
    stamp_to_nanoseconds,
)
from picopose_ros.segmentation import Segment

HEIGHT, WIDTH = 48, 64


def image_message(pixels: np.ndarray, encoding: str, padding: int = 0, is_bigendian: int = 0) -> Image:
    """An Image as a camera driver fills it; ``padding`` bytes of 255 end each row."""
    rows = np.ascontiguousarray(pixels).reshape(pixels.shape[0], -1).view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=255)
    message = Image(height=pixels.shape[0], width=pixels.shape[1], encoding=encoding, step=rows.shape[1])
    message.is_bigendian = is_bigendian
    message.data = array.array("B", rows.tobytes())
    return message


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


# Images.


def with_alpha(rgb: np.ndarray) -> np.ndarray:
    return np.concatenate([rgb, np.full_like(rgb[:, :, :1], 9)], -1)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("rgb8", lambda rgb: rgb),
        ("bgr8", lambda rgb: rgb[:, :, ::-1]),
        ("rgba8", with_alpha),
        ("bgra8", lambda rgb: with_alpha(rgb[:, :, ::-1])),
    ],
)
def test_colour_encodings_are_views(
    rgb: np.ndarray, encoding: str, encode: Callable[[np.ndarray], np.ndarray], padding: int
) -> None:
    message = image_message(encode(rgb), encoding, padding)
    decoded = image_to_rgb(message, "/image")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, rgb)
    assert np.shares_memory(decoded, np.frombuffer(message.data, np.uint8))


def test_mono8_is_grey_without_a_copy() -> None:
    grey = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    message = image_message(grey, "mono8", padding=3)
    decoded = image_to_rgb(message, "/image")
    np.testing.assert_array_equal(decoded, np.stack([grey] * 3, -1))
    assert np.shares_memory(decoded, np.frombuffer(message.data, np.uint8))


@pytest.mark.parametrize("is_bigendian", [0, 1])
def test_mono16_keeps_the_high_byte_in_either_byte_order(is_bigendian: int) -> None:
    grey = (
        np.random.default_rng(2).integers(0, 65536, (HEIGHT, WIDTH)).astype(">u2" if is_bigendian else "<u2")
    )
    message = image_message(grey, "mono16", padding=2, is_bigendian=is_bigendian)
    expected = (grey.astype(np.uint16) >> 8).astype(np.uint8)
    np.testing.assert_array_equal(image_to_rgb(message, "/image"), np.stack([expected] * 3, -1))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("encoding", ["mono16", "rgb16", "bgr16", "rgba16", "bgra16", "bayer_rggb16"])
def test_16_bits_are_scaled_by_those_that_are_used(encoding: str, bits: int) -> None:
    channels = {"mono": 1, "baye": 1, "rgb1": 3, "bgr1": 3, "rgba": 4, "bgra": 4}[encoding[:4]]
    eight = np.full((HEIGHT, WIDTH, channels), 200, np.uint8)
    if channels > 1:
        eight[:] = [200, 120, 40, 255][:channels]
    wide = eight.astype("<u2") << (bits - 8)
    expected = eight[:, :, :3] if encoding.startswith("rgb") else eight[:, :, 2::-1]
    decoded = image_to_rgb(image_message(wide, encoding), "/image")
    np.testing.assert_array_equal(decoded, np.broadcast_to(expected, (HEIGHT, WIDTH, 3)))


@pytest.mark.parametrize(
    ("encoding", "pattern"),
    [("bayer_rggb8", "RGGB"), ("bayer_bggr8", "BGGR"), ("bayer_gbrg8", "GBRG"), ("bayer_grbg8", "GRBG")],
)
def test_bayer_patterns_give_the_colour_back(encoding: str, pattern: str) -> None:
    colour = dict(zip("RGB", (200, 120, 40), strict=True))
    tile = np.array([colour[letter] for letter in pattern], np.uint8).reshape(2, 2)
    mosaic = np.tile(tile, (HEIGHT // 2, WIDTH // 2))
    decoded = image_to_rgb(image_message(mosaic, encoding, padding=4), "/image")
    np.testing.assert_array_equal(
        decoded[2:-2, 2:-2].reshape(-1, 3), [[200, 120, 40]] * ((HEIGHT - 4) * (WIDTH - 4))
    )


def test_views_can_be_cropped_like_any_image(rgb: np.ndarray) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:30, 20:50] = True
    box = crop_box_from_mask(mask)
    expected = crop_rgb(rgb, box)
    np.testing.assert_array_equal(
        crop_rgb(image_to_rgb(image_message(rgb[:, :, ::-1], "bgr8", 5), "/image"), box), expected
    )


def test_truncated_data_names_topic_and_sizes(rgb: np.ndarray) -> None:
    message = image_message(rgb, "rgb8")
    message.data = message.data[:-1]
    with pytest.raises(ImageError, match=r"/camera/image is truncated: 9215 bytes.*9216"):
        image_to_rgb(message, "/camera/image")


def test_step_shorter_than_a_row_is_refused(rgb: np.ndarray) -> None:
    message = image_message(rgb, "rgb8")
    message.step = WIDTH
    with pytest.raises(ImageError, match=f"step {WIDTH}"):
        image_to_rgb(message, "/image")


def test_image_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="0x0 pixels"):
        image_to_rgb(Image(encoding="rgb8"), "/image")


def test_unknown_encoding_without_cv_bridge_names_encoding_and_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv_bridge", None)  # as on a machine without it
    message = image_message(np.zeros((4, 4, 2), np.uint8), "yuv422_yuy2")
    with pytest.raises(ImageError, match=r"/camera/image has encoding 'yuv422_yuy2'.*install cv_bridge"):
        image_to_rgb(message, "/camera/image")


def test_unknown_encoding_goes_through_cv_bridge_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class CvBridge:
        def imgmsg_to_cv2(self, message: Image, desired_encoding: str) -> np.ndarray:
            assert desired_encoding == "rgb8"
            if message.encoding != "yuv422_yuy2":
                raise KeyError(message.encoding)
            yuv = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 2)
            return cv2.cvtColor(yuv, cv2.COLOR_YUV2RGB_YUY2)

    module = types.ModuleType("cv_bridge")
    module.CvBridge = CvBridge
    monkeypatch.setitem(sys.modules, "cv_bridge", module)
    grey = image_message(np.full((4, 4, 2), 128, np.uint8), "yuv422_yuy2")
    np.testing.assert_allclose(image_to_rgb(grey, "/image"), 130, atol=2)
    with pytest.raises(ImageError, match="'32FC1', which cv_bridge can't turn into rgb8"):
        image_to_rgb(image_message(np.zeros((4, 4), np.float32), "32FC1"), "/image")


# Cameras.


def camera_message(k: list[float]) -> CameraInfo:
    return CameraInfo(
        k=np.array(k), d=[0.1, -0.05, 0.0, 0.0, 0.0], distortion_model="plumb_bob", width=640, height=480
    )


def test_camera_info_becomes_a_camera_model() -> None:
    camera = camera_from_message(camera_message([600.0, 0, 320, 0, 610, 240, 0, 0, 1]), "/camera_info")
    np.testing.assert_array_equal(camera.K, [[600, 0, 320], [0, 610, 240], [0, 0, 1]])
    assert (camera.width, camera.height, camera.distortion_model) == (640, 480, "plumb_bob")
    assert camera.D == (0.1, -0.05, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("k", [[0.0] * 9, [np.nan] * 9, [600.0, 0, 320, 0, np.nan, 240, 0, 0, 1]])
def test_camera_info_without_calibration_names_its_topic(k: list[float]) -> None:
    with pytest.raises(CameraError, match="/left/camera_info"):
        camera_from_message(camera_message(k), "/left/camera_info")


def test_unknown_distortion_model_is_refused() -> None:
    message = camera_message([600.0, 0, 320, 0, 610, 240, 0, 0, 1])
    message.distortion_model = "barrel_of_fish"
    with pytest.raises(CameraError, match="barrel_of_fish"):
        camera_from_message(message, "/camera_info")


# Segments.


def over_the_wire(message: SegmentArray) -> SegmentArray:
    return deserialize_message(serialize_message(message), SegmentArray)


def disc(height: int, width: int, row: float, col: float, radius: float) -> np.ndarray:
    rows, cols = np.mgrid[:height, :width]
    return (rows - row) ** 2 + (cols - col) ** 2 < radius**2


def test_segments_survive_the_wire_without_loss() -> None:
    height, width = 240, 320
    masks = [
        disc(height, width, 120, 200, 60),
        disc(height, width, 0, 0, 90),  # over the border
        disc(height, width, 120, 200, 6),  # so small that bits are shorter than runs
        np.random.default_rng(3).random((height, width)) < 0.5,  # ragged
        np.ones((height, width), bool),
    ]
    segments = [Segment(f"thing {i}", 0.5 + i / 10, mask) for i, mask in enumerate(masks)]
    header = Header(frame_id="camera")
    header.stamp.sec, header.stamp.nanosec = 5, 6
    message = over_the_wire(segments_to_message(segments, header, height, width))
    assert [entry.encoding for entry in message.segments] == [
        SegmentMessage.ENCODING_RLE,
        SegmentMessage.ENCODING_RLE,
        SegmentMessage.ENCODING_BITMAP,
        SegmentMessage.ENCODING_BITMAP,
        SegmentMessage.ENCODING_RLE,
    ]
    good, bad = segments_from_message(message, height, width, "/segmentation")
    assert bad == []
    for before, after in zip(segments, good, strict=True):
        assert after.class_id == before.class_id
        assert after.score == pytest.approx(before.score)
        np.testing.assert_array_equal(after.mask, before.mask)
    assert stamp_to_nanoseconds(message.header.stamp) == 5_000_000_006


def test_ten_instances_at_640x480_stay_under_50_kB() -> None:
    segments = [Segment("cup", 1.0, disc(480, 640, 60 + 36 * i, 100 + 45 * i, 90)) for i in range(10)]
    assert len(serialize_message(segments_to_message(segments, Header(), 480, 640))) < 50_000


def test_masks_of_another_size_are_refused_as_a_whole() -> None:
    message = segments_to_message(
        [Segment("cup", 1.0, disc(HEIGHT, WIDTH, 20, 20, 5))], Header(), HEIGHT, WIDTH
    )
    with pytest.raises(SegmentError, match=r"/segmentation is of an image of 64x48 pixels.*has 128x96"):
        segments_from_message(message, 96, 128, "/segmentation")
    with pytest.raises(SegmentError, match="shape"):
        segments_to_message([Segment("cup", 1.0, np.ones((3, 3), bool))], Header(), HEIGHT, WIDTH)


def broken(**changes: object) -> SegmentMessage:
    """A solid square in run lengths, with some of its fields changed."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:30, 15:35] = True
    (segment,) = segments_to_message([Segment("cup", 1.0, mask)], Header(), HEIGHT, WIDTH).segments
    for name, value in changes.items():
        target = segment.roi if hasattr(segment.roi, name) else segment
        setattr(target, name, value)
    return segment


@pytest.mark.parametrize(
    ("segment", "reason", "match"),
    [
        (broken(rle=array.array("I", [1, 2, 3])), DropReason.BAD_SEGMENT, "add up to 6"),
        (broken(rle=array.array("I", [])), DropReason.BAD_SEGMENT, "add up to 0"),
        (broken(rle=array.array("I", [2**32 - 1] * 3)), DropReason.BAD_SEGMENT, "add up to"),
        (broken(x_offset=60), DropReason.BAD_SEGMENT, "leaves the image"),
        (broken(height=2**32 - 1, width=2**32 - 1), DropReason.BAD_SEGMENT, "leaves the image"),
        (broken(encoding=7), DropReason.BAD_SEGMENT, "encoding is 7"),
        (broken(encoding=1, bitmap=array.array("B", [0])), DropReason.BAD_SEGMENT, "1 bytes"),
        (broken(score=float("nan")), DropReason.BAD_SEGMENT, "score"),
        (broken(width=0, height=0), DropReason.EMPTY_MASK, "empty"),
        (
            broken(x_offset=0, y_offset=0, width=2, height=2, rle=array.array("I", [4])),
            DropReason.EMPTY_MASK,
            "empty",
        ),
    ],
)
def test_a_broken_segment_is_named_and_the_others_go_on(
    segment: SegmentMessage, reason: DropReason, match: str
) -> None:
    message = SegmentArray(height=HEIGHT, width=WIDTH, segments=[segment, broken()])
    good, (bad,) = segments_from_message(message, HEIGHT, WIDTH, "/segmentation")
    assert len(good) == 1
    assert (bad.index, bad.reason) == (0, reason)
    assert "segment 0 ('cup') on /segmentation" in bad.message
    assert match in bad.message


# Poses.


def random_rotations(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [cv2.Rodrigues(rng.normal(size=3) * 2)[0] for _ in range(count)]


HALF_TURNS = [np.diag(d).astype(float) for d in ([1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1])]


@pytest.mark.parametrize("R", [*HALF_TURNS, *random_rotations(20)])
def test_quaternions_turn_back_into_the_same_rotation(R: np.ndarray) -> None:
    x, y, z, w = rotation_to_quaternion(R)
    assert w >= 0
    assert x * x + y * y + z * z + w * w == pytest.approx(1.0)
    back = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    np.testing.assert_allclose(back, R, atol=1e-12)


def object_pose() -> ObjectPose:
    T = np.eye(4)
    T[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]  # a quarter turn about z
    T[:3, 3] = [0.1, -0.2, 0.9]
    return ObjectPose(
        class_id="cup",
        T_cam_obj=T,
        confidence=0.75,
        covariance=np.arange(36.0).reshape(6, 6),
        source="offsets",
        segment=0,
        segment_score=0.9,
        template=3,
        inliers=40,
        inlier_ratio=0.5,
        match_score=0.8,
        bbox_centre=np.array([0.01, 0.0, 0.05]),
        bbox_size=np.array([0.08, 0.06, 0.1]),
    )


def vector(point: object) -> list[float]:
    return [point.x, point.y, point.z]


def assert_quarter_turn(q: object) -> None:
    np.testing.assert_allclose([q.x, q.y, q.z, q.w], [0, 0, 0.5**0.5, 0.5**0.5], atol=1e-12)


def test_a_pose_becomes_a_detection_with_everything_in_it() -> None:
    header = Header(frame_id="camera_optical")
    header.stamp.sec = 12
    message = detections_message([object_pose()], ["cup_0"], header)
    message = deserialize_message(serialize_message(message), Detection3DArray)
    (detection,) = message.detections
    assert message.header == detection.header == header
    assert detection.id == "cup_0"
    (result,) = detection.results
    assert (result.hypothesis.class_id, result.hypothesis.score) == ("cup", 0.75)
    np.testing.assert_array_equal(result.pose.covariance, np.arange(36.0))
    pose: Pose = result.pose.pose
    assert vector(pose.position) == [0.1, -0.2, 0.9]
    assert_quarter_turn(pose.orientation)
    # The box's middle is 1 cm along the object's x, which is the camera's y, and 5 cm along z.
    np.testing.assert_allclose(vector(detection.bbox.center.position), [0.1, -0.19, 0.95])
    assert_quarter_turn(detection.bbox.center.orientation)
    assert vector(detection.bbox.size) == [0.08, 0.06, 0.1]


def test_a_pose_becomes_a_transform_from_the_image_frame() -> None:
    header = Header(frame_id="camera_optical")
    transform = transform_message(make, object_pose().T_cam_obj, header, "left/cup_0")
    assert transform.header == header
    assert transform.child_frame_id == "left/cup_0"
    assert vector(transform.transform.translation) == [0.1, -0.2, 0.9]
    assert_quarter_turn(transform.transform.rotation)


def test_a_pose_can_be_seen_from_a_robot() -> None:
    """The camera looks down along the robot's -z from 1 m above, its x is the robot's -y."""
    T_base_cam = np.array([[0, -1.0, 0, 0.5], [-1, 0, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]])
    sigma = np.array([1e-3, 2e-3, 3e-3, 0.01, 0.02, 0.03])
    seen = pose_in_frame(replace(object_pose(), covariance=np.diag(sigma**2)), T_base_cam)
    np.testing.assert_allclose(seen.T_cam_obj[:3, 3], [0.7, -0.1, 0.1])
    np.testing.assert_allclose(seen.T_cam_obj[:3, :3], [[-1, 0, 0], [0, 1, 0], [0, 0, -1]], atol=1e-12)
    # What was the camera's x is the robot's y now, for both halves.
    np.testing.assert_allclose(np.sqrt(np.diag(seen.covariance)), sigma[[1, 0, 2, 4, 3, 5]])


def test_an_image_becomes_a_message_and_back(rgb: np.ndarray) -> None:
    header = Header(frame_id="camera_optical")
    message = deserialize_message(serialize_message(image_from_rgb(rgb[::-1], header)), Image)
    assert (message.encoding, message.height, message.width, message.step) == (
        "rgb8",
        HEIGHT,
        WIDTH,
        3 * WIDTH,
    )
    assert message.header == header
    np.testing.assert_array_equal(image_to_rgb(message, "/overlay"), rgb[::-1])
