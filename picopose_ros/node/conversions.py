"""ROS messages to this package's types and back. Pure functions: no node, no state, no clock."""

from __future__ import annotations

import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from geometry_msgs.msg import Pose, TransformStamped
from sensor_msgs.msg import Image
from std_msgs.msg import Header
from vision_msgs.msg import Detection3D, Detection3DArray, ObjectHypothesisWithPose

from picopose_ros.errors import CameraError, SegmentError
from picopose_ros.estimator import ObjectPose
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.covariance import rotate_covariance
from picopose_ros.msg import Segment as SegmentMessage
from picopose_ros.msg import SegmentArray
from picopose_ros.node.drops import DropReason
from picopose_ros.segmentation import Segment, mask_roi, rle_decode, rle_encode


@dataclass(frozen=True)
class BadSegment:
    """A segment of a message that can't be used: which one, and why."""

    index: int
    reason: DropReason
    message: str


def stamp_to_nanoseconds(stamp: Any) -> int:
    """A ``builtin_interfaces/Time`` as integer nanoseconds, exactly."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def camera_from_message(message: Any, topic: str, rectified: bool = False) -> CameraModel:
    """A ``sensor_msgs/CameraInfo`` as camera model; see `CameraModel.from_camera_info`.

    Args:
        message: the CameraInfo.
        topic: where it came from, for the message.
        rectified: its images are rectified.

    Raises:
        CameraError: K is zero, NaN or otherwise no intrinsics, or the distortion model is unknown.
    """
    try:
        return CameraModel.from_camera_info(message, rectified)
    except CameraError as error:
        raise CameraError(f"camera_info on {topic} can't be used: {error}") from error


def segments_from_message(
    message: Any, height: int, width: int, topic: str
) -> tuple[list[Segment], list[BadSegment]]:
    """The segments of a ``picopose_ros/SegmentArray``, each judged by itself.

    Args:
        message: the SegmentArray.
        height: of the image it belongs to, pixels.
        width: of the image it belongs to, pixels.
        topic: where it came from, for the messages.

    Returns:
        The good segments and the bad ones, both in the message's order.

    Raises:
        SegmentError: the masks are masks of an image of another size; none of them can be used.
    """
    if (message.height, message.width) != (height, width):
        raise SegmentError(
            f"segmentation on {topic} is of an image of {message.width}x{message.height} pixels, but the "
            "image with "
            f"its stamp has {width}x{height}: scale the masks to the image before publishing them"
        )
    good: list[Segment] = []
    bad: list[BadSegment] = []
    for index, segment in enumerate(message.segments):
        where = f"segment {index} ('{segment.class_id}') on {topic}"
        try:
            mask = _mask_from_message(segment, height, width)
            decoded = Segment(class_id=segment.class_id, score=float(segment.score), mask=mask)
        except SegmentError as error:
            bad.append(BadSegment(index, DropReason.BAD_SEGMENT, f"{where}: {error}"))
            continue
        if not mask.any():
            bad.append(BadSegment(index, DropReason.EMPTY_MASK, f"{where} has an empty mask"))
            continue
        good.append(decoded)
    return good, bad


def _mask_from_message(segment: Any, height: int, width: int) -> np.ndarray:
    roi = segment.roi
    top, left = int(roi.y_offset), int(roi.x_offset)
    rows, cols = int(roi.height), int(roi.width)
    mask = np.zeros((height, width), dtype=bool)
    if rows == 0 or cols == 0:
        return mask
    # Checked before anything is decoded: the sizes decide how much memory that takes.
    if top + rows > height or left + cols > width:
        raise SegmentError(
            f"its roi ({left}, {top}, {cols}x{rows}) leaves the image of {width}x{height} pixels"
        )
    if segment.encoding == SegmentMessage.ENCODING_RLE:
        inside = rle_decode(np.asarray(segment.rle, dtype=np.uint32), rows, cols)
    elif segment.encoding == SegmentMessage.ENCODING_BITMAP:
        packed = np.asarray(segment.bitmap, dtype=np.uint8)
        if packed.size != (rows * cols + 7) // 8:
            raise SegmentError(
                f"its bitmap has {packed.size} bytes, but its roi of {cols}x{rows} pixels takes "
                f"{(rows * cols + 7) // 8}"
            )
        inside = np.unpackbits(packed, count=rows * cols).astype(bool).reshape(rows, cols)
    else:
        raise SegmentError(
            f"its encoding is {segment.encoding}: use ENCODING_RLE or ENCODING_BITMAP of Segment.msg"
        )
    mask[top : top + rows, left : left + cols] = inside
    return mask


def segments_to_message(segments: Sequence[Segment], header: Header, height: int, width: int) -> SegmentArray:
    """Segments of an image as ``picopose_ros/SegmentArray``, each mask in whichever encoding is smaller.

    Args:
        segments: masks of (height, width).
        header: the image's own; its stamp is how the masks find their image again.
        height: of the image, pixels.
        width: of the image, pixels.

    Raises:
        SegmentError: a mask of another size.
    """
    message = SegmentArray(header=header, height=height, width=width)
    for segment in segments:
        if segment.mask.shape != (height, width):
            raise SegmentError(
                f"the mask of '{segment.class_id}' has shape {segment.mask.shape}, but the image has "
                f"{(height, width)}"
            )
        entry = SegmentMessage(class_id=segment.class_id, score=float(segment.score))
        box = mask_roi(segment.mask)
        if box is not None:
            x, y, w, h = (int(value) for value in box)
            entry.roi.x_offset, entry.roi.y_offset, entry.roi.width, entry.roi.height = x, y, w, h
            inside = segment.mask[y : y + h, x : x + w]
            runs = rle_encode(inside)
            if 4 * len(runs) <= (w * h + 7) // 8:
                entry.encoding = SegmentMessage.ENCODING_RLE
                entry.rle = array.array("I", runs)
            else:
                entry.encoding = SegmentMessage.ENCODING_BITMAP
                entry.bitmap = array.array("B", np.packbits(inside).tobytes())
        message.segments.append(entry)
    return message


def image_from_rgb(rgb: np.ndarray, header: Header) -> Image:
    """An RGB image (H, W, 3) uint8 as ``sensor_msgs/Image``."""
    height, width = rgb.shape[:2]
    message = Image(header=header, height=height, width=width, encoding="rgb8", step=3 * width)
    data = array.array("B")
    data.frombytes(np.ascontiguousarray(rgb))  # assigning bytes instead takes a hundred times as long
    message.data = data
    return message


def rotation_to_quaternion(R: np.ndarray) -> tuple[float, float, float, float]:
    """(x, y, z, w) of a rotation matrix (3, 3), unit length, w >= 0."""
    R = np.asarray(R, dtype=np.float64)
    # Four ways to write the same quaternion; the one with the largest leading term loses no digits.
    squares = np.array(
        [R[0, 0] - R[1, 1] - R[2, 2], R[1, 1] - R[0, 0] - R[2, 2], R[2, 2] - R[0, 0] - R[1, 1], R.trace()]
    )
    rows = {
        0: (1 + squares[0], R[0, 1] + R[1, 0], R[0, 2] + R[2, 0], R[2, 1] - R[1, 2]),
        1: (R[0, 1] + R[1, 0], 1 + squares[1], R[1, 2] + R[2, 1], R[0, 2] - R[2, 0]),
        2: (R[0, 2] + R[2, 0], R[1, 2] + R[2, 1], 1 + squares[2], R[1, 0] - R[0, 1]),
        3: (R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1], 1 + squares[3]),
    }
    q = np.array(rows[int(np.argmax(squares))])
    q /= np.linalg.norm(q)
    if q[3] < 0:
        q = -q
    return float(q[0]), float(q[1]), float(q[2]), float(q[3])


def pose_to_message(T: np.ndarray) -> Pose:
    """A 4x4 transform (metres) as ``geometry_msgs/Pose``."""
    pose = Pose()
    pose.position.x, pose.position.y, pose.position.z = (float(value) for value in T[:3, 3])
    q = pose.orientation
    q.x, q.y, q.z, q.w = rotation_to_quaternion(T[:3, :3])
    return pose


def pose_in_frame(pose: ObjectPose, T_frame_cam: np.ndarray) -> ObjectPose:
    """The pose as seen from another frame, covariance included.

    Args:
        pose: in the camera's frame.
        T_frame_cam: (4, 4) camera -> that frame. Whoever publishes the result names that frame in the header;
            its ``T_cam_obj`` holds T_frame_obj.
    """
    return replace(
        pose,
        T_cam_obj=T_frame_cam @ pose.T_cam_obj,
        covariance=rotate_covariance(pose.covariance, T_frame_cam[:3, :3]),
    )


def detection_from_pose(pose: ObjectPose, instance: str, header: Header) -> Detection3D:
    """One estimated pose as ``vision_msgs/Detection3D``.

    ``results[0].pose`` is the mesh's own origin, ``bbox.center`` the middle of its bounding box (object
    axes), both in the frame of ``header``.
    """
    detection = Detection3D(header=header, id=instance)
    hypothesis = ObjectHypothesisWithPose()
    hypothesis.hypothesis.class_id = pose.class_id
    hypothesis.hypothesis.score = float(pose.confidence)
    hypothesis.pose.pose = pose_to_message(pose.T_cam_obj)
    hypothesis.pose.covariance = np.asarray(pose.covariance, dtype=np.float64).reshape(36)
    detection.results = [hypothesis]
    T_cam_box = pose.T_cam_obj.copy()
    T_cam_box[:3, 3] += T_cam_box[:3, :3] @ pose.bbox_centre
    detection.bbox.center = pose_to_message(T_cam_box)
    size = detection.bbox.size
    size.x, size.y, size.z = (float(value) for value in pose.bbox_size)
    return detection


def detections_message(
    poses: Sequence[ObjectPose], instances: Sequence[str], header: Header
) -> Detection3DArray:
    """All poses of one image, under the image's header."""
    detections = [
        detection_from_pose(pose, name, header) for pose, name in zip(poses, instances, strict=True)
    ]
    return Detection3DArray(header=header, detections=detections)


def transform_from_pose(pose: ObjectPose, instance: str, header: Header, tf_prefix: str) -> TransformStamped:
    """One estimated pose as transform from the image's frame to ``<tf_prefix><instance>``."""
    transform = TransformStamped(header=header, child_frame_id=tf_prefix + instance)
    target = pose_to_message(pose.T_cam_obj)
    t = transform.transform.translation
    t.x, t.y, t.z = target.position.x, target.position.y, target.position.z
    transform.transform.rotation = target.orientation
    return transform
