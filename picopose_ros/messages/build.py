"""Messages that are published or recorded, built from this package's types. Pure functions.

``make`` makes a message of a type from its fields: `picopose_ros.node.conversions.make` those of rclpy,
`picopose_ros.messages.bags.message` those of the `rosbags` library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from picopose_ros.errors import SegmentError
from picopose_ros.geometry.covariance import rotate_covariance
from picopose_ros.geometry.poses import rotation_vector
from picopose_ros.messages.segmentations import ENCODING_BITMAP, ENCODING_RLE
from picopose_ros.segmentation import Segment, mask_roi, rle_encode

if TYPE_CHECKING:
    from picopose_ros.estimator import ObjectPose
    from picopose_ros.templates.meshes import ObjectSpec


class Make(Protocol):
    """Makes a message."""

    def __call__(self, name: str, **fields: Any) -> Any:
        """A message of the type ``name`` (``package/msg/Type``) with these fields, all of them."""


def rotation_to_quaternion(R: np.ndarray) -> tuple[float, float, float, float]:
    """(x, y, z, w) of a rotation matrix (3, 3), unit length, w >= 0."""
    x, y, z = rotation_vector(R).tolist()
    half = 0.5 * math.sqrt(x * x + y * y + z * z)
    share = 0.5 * math.sin(half) / half if half > 0 else 0.5
    return share * x, share * y, share * z, math.cos(half)


def pose_message(make: Make, T: np.ndarray) -> Any:
    """A transform (4, 4) in metres as geometry_msgs/Pose."""
    return make(
        "geometry_msgs/msg/Pose",
        position=make("geometry_msgs/msg/Point", **_xyz(T[:3, 3])),
        orientation=_quaternion(make, T[:3, :3]),
    )


def transform_message(make: Make, T: np.ndarray, header: Any, child_frame_id: str) -> Any:
    """A transform (4, 4) in metres from a header's frame to a child frame, as TransformStamped."""
    transform = make(
        "geometry_msgs/msg/Transform",
        translation=make("geometry_msgs/msg/Vector3", **_xyz(T[:3, 3])),
        rotation=_quaternion(make, T[:3, :3]),
    )
    return make(
        "geometry_msgs/msg/TransformStamped",
        header=header,
        child_frame_id=child_frame_id,
        transform=transform,
    )


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


def detection_message(make: Make, pose: ObjectPose, instance: str, header: Any) -> Any:
    """One estimated pose as ``vision_msgs/Detection3D``.

    ``results[0].pose`` is the mesh's own origin, ``bbox.center`` the middle of its bounding box (object
    axes), both in the frame of ``header``.
    """
    with_covariance = make(
        "geometry_msgs/msg/PoseWithCovariance",
        pose=pose_message(make, pose.T_cam_obj),
        covariance=np.array(pose.covariance, dtype=np.float64).reshape(36),
    )
    hypothesis = make(
        "vision_msgs/msg/ObjectHypothesis", class_id=pose.class_id, score=float(pose.confidence)
    )
    result = make("vision_msgs/msg/ObjectHypothesisWithPose", hypothesis=hypothesis, pose=with_covariance)
    T_cam_box = pose.T_cam_obj.copy()
    T_cam_box[:3, 3] += T_cam_box[:3, :3] @ pose.bbox_centre
    box = make(
        "vision_msgs/msg/BoundingBox3D",
        center=pose_message(make, T_cam_box),
        size=make("geometry_msgs/msg/Vector3", **_xyz(pose.bbox_size)),
    )
    return make("vision_msgs/msg/Detection3D", header=header, results=[result], bbox=box, id=instance)


def detections_message(make: Make, poses: Sequence[ObjectPose], instances: Sequence[str], header: Any) -> Any:
    """All poses of one image as ``vision_msgs/Detection3DArray``, under the image's header."""
    detections = [
        detection_message(make, pose, name, header) for pose, name in zip(poses, instances, strict=True)
    ]
    return make("vision_msgs/msg/Detection3DArray", header=header, detections=detections)


def segments_message(make: Make, segments: Sequence[Segment], header: Any, height: int, width: int) -> Any:
    """Segments of an image as ``picopose_ros/SegmentArray``, each mask in whichever encoding is smaller.

    Args:
        segments: masks of (height, width).
        header: the image's own; its stamp is how the masks find their image again.
        height: of the image, pixels.
        width: of the image, pixels.

    Raises:
        SegmentError: a mask of another size.
    """
    entries = []
    for segment in segments:
        if segment.mask.shape != (height, width):
            raise SegmentError(
                f"the mask of '{segment.class_id}' has shape {segment.mask.shape}, but the image has "
                f"{(height, width)}"
            )
        x, y, w, h = mask_roi(segment.mask) or (0, 0, 0, 0)
        inside = segment.mask[y : y + h, x : x + w]
        runs, bits = np.array(rle_encode(inside), np.uint32), np.packbits(inside)
        use_runs = 4 * len(runs) <= len(bits)
        entries.append(
            make(
                "picopose_ros/msg/Segment",
                class_id=segment.class_id,
                score=float(segment.score),
                roi=make(
                    "sensor_msgs/msg/RegionOfInterest",
                    x_offset=int(x),
                    y_offset=int(y),
                    height=int(h),
                    width=int(w),
                    do_rectify=False,
                ),
                encoding=ENCODING_RLE if use_runs else ENCODING_BITMAP,
                rle=runs if use_runs else np.zeros(0, np.uint32),
                bitmap=np.zeros(0, np.uint8) if use_runs else bits,
            )
        )
    return make(
        "picopose_ros/msg/SegmentArray", header=header, height=int(height), width=int(width), segments=entries
    )


def symmetries_text(specs: Mapping[str, ObjectSpec]) -> str:
    """The symmetries of objects as JSON, in the form of BOP's ``models_info.json`` but in metres.

    Args:
        specs: by class id.

    Returns:
        An object: class id -> ``symmetries_discrete``, 4x4 row by row, and ``symmetries_continuous``, each an
        ``axis`` and an ``offset``; both empty for an object without symmetries.
    """
    return json.dumps(
        {
            class_id: {
                "symmetries_discrete": [np.asarray(T).reshape(16).tolist() for T in spec.symmetries.discrete],
                "symmetries_continuous": [
                    {"axis": np.asarray(axis).tolist(), "offset": np.asarray(offset).tolist()}
                    for axis, offset in spec.symmetries.continuous
                ],
            }
            for class_id, spec in specs.items()
        }
    )


def _quaternion(make: Make, R: np.ndarray) -> Any:
    x, y, z, w = rotation_to_quaternion(R)
    return make("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w)


def _xyz(vector: np.ndarray) -> dict[str, float]:
    return {axis: float(value) for axis, value in zip("xyz", vector, strict=True)}
