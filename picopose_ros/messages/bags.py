"""rosbag2 files without ROS: message types, reading, writing, and this package's types to bag messages and
back.

The messages are the dataclasses of `rosbags`, so nothing here needs an installed ROS. Interfaces that
`rosbags` does not know are defined below, without their comments; ``msg/`` and vision_msgs hold the
documented originals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rosbags.highlevel import AnyReader
from rosbags.interfaces import Connection, ConnectionExtRosbag2, Qos
from rosbags.rosbag2 import StoragePlugin, Writer, WriterError
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore
from scipy.spatial.transform import Rotation

from picopose_ros.errors import BagError, CameraError, SegmentError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.segmentation import Segment, mask_roi, rle_decode, rle_encode

INTERFACES: dict[str, str] = {
    "picopose_ros/msg/Segment": """
        uint8 ENCODING_RLE = 0
        uint8 ENCODING_BITMAP = 1
        string class_id
        float32 score
        sensor_msgs/RegionOfInterest roi
        uint8 encoding
        uint32[] rle
        uint8[] bitmap
    """,
    "picopose_ros/msg/SegmentArray": """
        std_msgs/Header header
        uint32 height
        uint32 width
        Segment[] segments
    """,
    "vision_msgs/msg/ObjectHypothesis": """
        string class_id
        float64 score
    """,
    "vision_msgs/msg/ObjectHypothesisWithPose": """
        ObjectHypothesis hypothesis
        geometry_msgs/PoseWithCovariance pose
    """,
    "vision_msgs/msg/BoundingBox3D": """
        geometry_msgs/Pose center
        geometry_msgs/Vector3 size
    """,
    "vision_msgs/msg/Detection3D": """
        std_msgs/Header header
        ObjectHypothesisWithPose[] results
        BoundingBox3D bbox
        string id
    """,
    "vision_msgs/msg/Detection3DArray": """
        std_msgs/Header header
        Detection3D[] detections
    """,
}
"""Definitions by type name, in the order of their dependencies."""

IMAGE = "sensor_msgs/msg/Image"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
SEGMENTS = "picopose_ros/msg/SegmentArray"
DETECTIONS = "vision_msgs/msg/Detection3DArray"
TF = "tf2_msgs/msg/TFMessage"

STORAGES: dict[str, StoragePlugin] = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}
"""Storage plug-ins of rosbag2 by the name that `ros2 bag` gives them."""


@cache
def typestore() -> Typestore:
    """ROS 2's common interfaces and those of this package."""
    store = get_typestore(Stores.ROS2_KILTED)
    types: dict[str, Any] = {}
    for name, definition in INTERFACES.items():
        types.update(get_types_from_msg("\n".join(line.strip() for line in definition.splitlines()), name))
    store.register(types)
    return store


def message(name: str, **fields: Any) -> Any:
    """A message of type ``name`` (``package/msg/Type``) with these fields."""
    return typestore().types[name](**fields)


class BagReader:
    """A rosbag2 folder, sqlite3 or mcap, open for reading in the order of recording.

    Raises:
        BagError: there is no bag, or it can't be read; names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        try:
            self._reader = self._stack.enter_context(AnyReader([self.path], default_typestore=typestore()))
        except Exception as error:  # a damaged file raises anything, from AnyReaderError to struct.error
            hint = "give the folder that holds metadata.yaml, of a recording that was ended properly"
            raise BagError(f"bag {self.path} can't be read ({error}): {hint}") from error

    def __enter__(self) -> BagReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def connections(self) -> list[Connection]:
        """Topics with their types."""
        return self._reader.connections

    @property
    def message_count(self) -> int:
        """Messages on all topics."""
        return self._reader.message_count

    @property
    def storage(self) -> str:
        """Name of the storage plug-in."""
        return "mcap" if list(self.path.glob("*.mcap*")) else "sqlite3"

    def topic(self, message_type: str, wanted: str | None = None) -> str:
        """Name of the topic of a type: ``wanted`` where given, else the only one there is.

        Raises:
            BagError: there is no such topic, or several and none was named.
        """
        topics = sorted({c.topic for c in self.connections if c.msgtype == message_type})
        if wanted is not None:
            if wanted in topics:
                return wanted
            there = ", ".join(topics) or "none"
            raise BagError(f"bag {self.path} has no topic {wanted} of type {message_type} (it has: {there})")
        if len(topics) == 1:
            return topics[0]
        if not topics:
            raise BagError(f"bag {self.path} has no topic of type {message_type}: record it with the others")
        raise BagError(
            f"bag {self.path} has several topics of type {message_type} ({', '.join(topics)}): name one"
        )

    def raw(self, topics: Sequence[str] | None = None) -> Iterator[tuple[Connection, int, bytes]]:
        """Messages as (connection, time of recording in ns, CDR bytes); of all topics by default.

        Raises:
            BagError: the file breaks off or is damaged.
        """
        chosen = [c for c in self.connections if topics is None or c.topic in topics]
        if not chosen:  # rosbags would take an empty choice for all topics
            return
        messages = self._reader.messages(chosen)
        while True:
            try:
                found = next(messages, None)
            except Exception as error:  # the storages raise anything, from struct.error to sqlite3's own
                raise BagError(f"bag {self.path} is damaged ({error!r}): record or copy it again") from error
            if found is None:
                return
            yield found

    def decode(self, raw: bytes, connection: Connection) -> Any:
        """A message from its CDR bytes.

        Raises:
            BagError: the bytes are no message of the connection's type.
        """
        try:
            return self._reader.deserialize(raw, connection.msgtype)
        except Exception as error:  # a cut message fails in many ways
            where = f"bag {self.path}, topic {connection.topic}"
            raise BagError(f"{where}: a {connection.msgtype} can't be decoded ({error!r})") from error

    def messages(self, topics: Sequence[str] | None = None) -> Iterator[tuple[Connection, int, Any]]:
        """Messages as (connection, time of recording in ns, message)."""
        for connection, stamp, raw in self.raw(topics):
            yield connection, stamp, self.decode(raw, connection)


class BagWriter:
    """A new rosbag2 folder.

    Args:
        path: folder to make; it must not exist.
        storage: "mcap" or "sqlite3".

    Raises:
        BagError: the folder exists or can't be made, or the storage is unknown.
    """

    def __init__(self, path: str | Path, storage: str = "mcap") -> None:
        self.path = Path(path)
        if storage not in STORAGES:
            raise BagError(f"storage '{storage}' is unknown: use one of {', '.join(STORAGES)}")
        self._topics: dict[str, tuple[Connection, str]] = {}
        try:
            self._writer = Writer(self.path, version=9, storage_plugin=STORAGES[storage])
            self._writer.open()
        except (WriterError, OSError) as error:
            raise BagError(
                f"bag {self.path} can't be written ({error}): give a folder that doesn't exist"
            ) from error

    def __enter__(self) -> BagWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def add_topic(self, topic: str, message_type: str, qos: Sequence[Qos] = ()) -> None:
        """Make a topic of a type this package knows; making it twice is allowed.

        Raises:
            BagError: the topic already has another type.
        """
        if topic not in self._topics:
            connection = self._writer.add_connection(
                topic, message_type, typestore=typestore(), offered_qos_profiles=qos
            )
            self._topics[topic] = connection, message_type
        elif self._topics[topic][1] != message_type:
            raise BagError(
                f"topic {topic} already holds {self._topics[topic][1]}, not {message_type}: rename one"
            )

    def add_like(self, connection: Connection) -> None:
        """Make the topic of another bag's connection, with its own definition of the type."""
        if connection.topic in self._topics:
            return
        if not connection.msgdef.data or not connection.digest:
            self.add_topic(connection.topic, connection.msgtype)
            return
        qos = connection.ext.offered_qos_profiles if isinstance(connection.ext, ConnectionExtRosbag2) else ()
        made = self._writer.add_connection(
            connection.topic,
            connection.msgtype,
            msgdef=connection.msgdef.data,
            rihs01=connection.digest,
            offered_qos_profiles=qos,
        )
        self._topics[connection.topic] = made, connection.msgtype

    def write_raw(self, topic: str, stamp: int, raw: bytes) -> None:
        """Write CDR bytes to a topic that was made; ``stamp`` is the time of recording in ns."""
        self._writer.write(self._topics[topic][0], stamp, raw)

    def write(self, topic: str, message_type: str, stamp: int, content: Any) -> None:
        """Write a message; the topic is made if needed."""
        self.add_topic(topic, message_type)
        self.write_raw(topic, stamp, typestore().serialize_cdr(content, message_type))


def header(stamp: int, frame_id: str) -> Any:
    """A std_msgs/Header with a stamp in ns."""
    seconds, nanoseconds = divmod(stamp, 1_000_000_000)
    time = message("builtin_interfaces/msg/Time", sec=int(seconds), nanosec=int(nanoseconds))
    return message("std_msgs/msg/Header", stamp=time, frame_id=frame_id)


def stamp_of(content: Any) -> int:
    """The stamp in a message's header, ns."""
    return content.header.stamp.sec * 1_000_000_000 + content.header.stamp.nanosec


def image_message(rgb: np.ndarray, head: Any) -> Any:
    """RGB (H, W, 3) uint8 as rgb8 Image."""
    height, width, _ = rgb.shape
    data = np.ascontiguousarray(rgb).reshape(-1)
    return message(
        IMAGE,
        header=head,
        height=height,
        width=width,
        encoding="rgb8",
        is_bigendian=0,
        step=3 * width,
        data=data,
    )


def camera_message(camera: CameraModel, head: Any) -> Any:
    """A camera as CameraInfo of unrectified images."""
    whole = message(
        "sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    P = np.zeros((3, 4))
    P[:, :3] = camera.K
    return message(
        CAMERA_INFO,
        header=head,
        height=camera.height,
        width=camera.width,
        distortion_model=camera.distortion_model or "plumb_bob",
        d=np.array(camera.D or (0.0,) * 5, np.float64),
        k=np.array(camera.K, np.float64).reshape(-1),
        r=np.eye(3).reshape(-1),
        p=P.reshape(-1),
        binning_x=0,
        binning_y=0,
        roi=whole,
    )


def camera_from_message(content: Any, topic: str, rectified: bool = False) -> CameraModel:
    """A CameraInfo as camera model; see `CameraModel.from_camera_info`.

    Args:
        content: the message.
        topic: where it came from, for the error message.
        rectified: its images are rectified.

    Raises:
        CameraError: it can't be used; names the topic.
    """
    try:
        return CameraModel.from_camera_info(content, rectified)
    except CameraError as error:
        raise CameraError(f"camera_info on {topic} can't be used: {error}") from error


def segments_message(segments: Sequence[Segment], head: Any, height: int, width: int) -> Any:
    """Segments of one image as SegmentArray, each mask in whichever encoding is smaller."""
    entries = []
    for segment in segments:
        x, y, w, h = mask_roi(segment.mask) or (0, 0, 0, 0)
        inside = segment.mask[y : y + h, x : x + w]
        runs, bits = np.array(rle_encode(inside), np.uint32), np.packbits(inside)
        use_runs = 4 * len(runs) <= len(bits)
        roi = message(
            "sensor_msgs/msg/RegionOfInterest", x_offset=x, y_offset=y, height=h, width=w, do_rectify=False
        )
        entry = message(
            "picopose_ros/msg/Segment",
            class_id=segment.class_id,
            score=float(segment.score),
            roi=roi,
            encoding=0 if use_runs else 1,
            rle=runs if use_runs else np.zeros(0, np.uint32),
            bitmap=np.zeros(0, np.uint8) if use_runs else bits,
        )
        entries.append(entry)
    return message(SEGMENTS, header=head, height=height, width=width, segments=entries)


def segments_from_message(content: Any, height: int, width: int, topic: str) -> list[Segment]:
    """The segments of a SegmentArray.

    Args:
        content: the message.
        height, width: of the image it belongs to, pixels.
        topic: where it came from, for the error messages.

    Raises:
        SegmentError: the masks are of another image size, or one of them is broken.
    """
    if (content.height, content.width) != (height, width):
        raise SegmentError(
            f"segmentation on {topic} is of a {content.width}x{content.height} image, but the image"
            f" with its stamp has {width}x{height}: scale the masks to the image"
        )
    segments = []
    for index, entry in enumerate(content.segments):
        where = f"segment {index} ('{entry.class_id}') on {topic}"
        y, x, h, w = (
            int(v) for v in (entry.roi.y_offset, entry.roi.x_offset, entry.roi.height, entry.roi.width)
        )
        if y + h > height or x + w > width:
            raise SegmentError(
                f"{where}: its roi ({x}, {y}, {w}x{h}) leaves the image of {width}x{height} pixels"
            )
        mask = np.zeros((height, width), bool)
        if h and w:
            try:
                mask[y : y + h, x : x + w] = _decode_roi(entry, h, w)
            except SegmentError as error:
                raise SegmentError(f"{where}: {error}") from error
        segments.append(Segment(entry.class_id, float(entry.score), mask))
    return segments


def _decode_roi(entry: Any, height: int, width: int) -> np.ndarray:
    if entry.encoding == 0:
        return rle_decode(np.asarray(entry.rle, np.int64), height, width)
    packed = np.asarray(entry.bitmap, np.uint8)
    if entry.encoding != 1 or len(packed) != (height * width + 7) // 8:
        raise SegmentError(
            f"encoding {entry.encoding} with {len(packed)} bytes is no mask of {width}x{height} pixels"
        )
    return np.unpackbits(packed, count=height * width).astype(bool).reshape(height, width)


def pose_message(T: np.ndarray) -> Any:
    """A transform (4, 4) in metres as geometry_msgs/Pose."""
    x, y, z, w = (float(v) for v in Rotation.from_matrix(T[:3, :3]).as_quat(canonical=True))
    return message(
        "geometry_msgs/msg/Pose",
        position=message("geometry_msgs/msg/Point", **_xyz(T[:3, 3])),
        orientation=message("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w),
    )


def transform_message(T: np.ndarray, head: Any, child_frame_id: str) -> Any:
    """A transform (4, 4) in metres from a header's frame to a child frame, as TransformStamped."""
    pose = pose_message(T)
    return message(
        "geometry_msgs/msg/TransformStamped",
        header=head,
        child_frame_id=child_frame_id,
        transform=message(
            "geometry_msgs/msg/Transform",
            translation=message("geometry_msgs/msg/Vector3", **_xyz(T[:3, 3])),
            rotation=pose.orientation,
        ),
    )


def matrix_from(translation: Any, rotation: Any) -> np.ndarray:
    """(4, 4) float64 from a message's translation or position and its quaternion."""
    T = np.eye(4)
    T[:3, :3] = Rotation.from_quat([rotation.x, rotation.y, rotation.z, rotation.w]).as_matrix()
    T[:3, 3] = translation.x, translation.y, translation.z
    return T


def detection_message(
    class_id: str,
    name: str,
    score: float,
    T_cam_obj: np.ndarray,
    covariance: np.ndarray,
    bbox_centre: np.ndarray,
    bbox_size: np.ndarray,
    head: Any,
) -> Any:
    """One pose as Detection3D: ``results[0].pose`` is the mesh's origin, ``bbox.center`` the middle of its
    box.

    Args:
        class_id: of the object.
        name: of the instance.
        score: 0..1.
        T_cam_obj: (4, 4), metres.
        covariance: (6, 6) in ROS's order.
        bbox_centre: (3,) in the object's frame, metres.
        bbox_size: (3,) metres.
        head: the image's header.
    """
    pose = message(
        "geometry_msgs/msg/PoseWithCovariance",
        pose=pose_message(T_cam_obj),
        covariance=np.asarray(covariance, np.float64).reshape(36),
    )
    hypothesis = message("vision_msgs/msg/ObjectHypothesis", class_id=class_id, score=float(score))
    box = T_cam_obj.copy()
    box[:3, 3] += box[:3, :3] @ bbox_centre
    return message(
        "vision_msgs/msg/Detection3D",
        header=head,
        results=[message("vision_msgs/msg/ObjectHypothesisWithPose", hypothesis=hypothesis, pose=pose)],
        bbox=message(
            "vision_msgs/msg/BoundingBox3D",
            center=pose_message(box),
            size=message("geometry_msgs/msg/Vector3", **_xyz(bbox_size)),
        ),
        id=name,
    )


def _xyz(vector: np.ndarray) -> dict[str, float]:
    return {axis: float(value) for axis, value in zip("xyz", vector, strict=True)}
