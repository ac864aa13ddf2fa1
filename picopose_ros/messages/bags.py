"""rosbag2 files without ROS: message types, reading, writing, and this package's types to bag messages and
back.

The messages are the dataclasses of `rosbags`, so nothing here needs an installed ROS. Interfaces that
`rosbags` does not know are defined below, without their comments; ``msg/`` and vision_msgs hold the
documented originals.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rosbags.interfaces import Connection, ConnectionExtRosbag2, MessageDefinitionFormat, Qos
from rosbags.rosbag2 import Reader, StoragePlugin, Writer, WriterError
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore
from scipy.spatial.transform import Rotation

from picopose_ros.errors import BagError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.messages import build
from picopose_ros.segmentation import Segment

_log = logging.getLogger(__name__)

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
    "vision_msgs/msg/Point2D": """
        float64 x
        float64 y
    """,
    "vision_msgs/msg/Pose2D": """
        Point2D position
        float64 theta
    """,
    "vision_msgs/msg/BoundingBox2D": """
        Pose2D center
        float64 size_x
        float64 size_y
    """,
    "vision_msgs/msg/Detection2D": """
        std_msgs/Header header
        ObjectHypothesisWithPose[] results
        BoundingBox2D bbox
        string id
    """,
    "vision_msgs/msg/Detection2DArray": """
        std_msgs/Header header
        Detection2D[] detections
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
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
CAMERA_INFO = "sensor_msgs/msg/CameraInfo"
SEGMENTS = "picopose_ros/msg/SegmentArray"
BOXES = "vision_msgs/msg/Detection2DArray"
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

    Each topic is decoded by the definition of its type that the recording holds, else by the one that this
    package knows; one without either can be copied, but not decoded.

    Raises:
        BagError: there is no bag, or it can't be read; names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stack = ExitStack()
        self._stores: dict[str, Typestore | None] = {}
        try:
            self._reader = self._stack.enter_context(Reader(self.path))
        except Exception as error:  # a damaged file raises anything, from ReaderError to struct.error
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
        return list(self._reader.connections)

    @property
    def message_count(self) -> int:
        """Messages on all topics."""
        return self._reader.message_count

    @property
    def storage(self) -> str:
        """Name of the storage plug-in."""
        return "mcap" if list(self.path.glob("*.mcap*")) else "sqlite3"

    def topics(self, *message_types: str) -> list[str]:
        """Names of the topics of these types."""
        return sorted({c.topic for c in self.connections if c.msgtype in message_types})

    def topic(self, message_type: str, wanted: str | None = None) -> str:
        """Name of the topic of a type: ``wanted`` where given, else the only one there is.

        Raises:
            BagError: there is no such topic, or several and none was named.
        """
        topics = self.topics(message_type)
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
            BagError: the bytes are no message of the connection's type, or its definition isn't known.
        """
        where = f"bag {self.path}, topic {connection.topic}"
        store = self._store(connection)
        if store is None:
            raise BagError(f"{where}: nothing says what a {connection.msgtype} is made of")
        try:
            return store.deserialize_cdr(raw, connection.msgtype)
        except Exception as error:  # a cut message fails in many ways
            raise BagError(f"{where}: a {connection.msgtype} can't be decoded ({error!r})") from error

    def messages(self, topics: Sequence[str] | None = None) -> Iterator[tuple[Connection, int, Any]]:
        """Messages as (connection, time of recording in ns, message)."""
        for connection, stamp, raw in self.raw(topics):
            yield connection, stamp, self.decode(raw, connection)

    def _store(self, connection: Connection) -> Typestore | None:
        """What decodes a topic; None if its type isn't known."""
        name = connection.msgtype
        if name not in self._stores:
            self._stores[name] = _store_of(connection)
        return self._stores[name]


def _store_of(connection: Connection) -> Typestore | None:
    name, definition = connection.msgtype, connection.msgdef
    try:
        if definition.data and definition.format == MessageDefinitionFormat.MSG:
            types = get_types_from_msg(definition.data, name)
        elif definition.data and definition.format == MessageDefinitionFormat.IDL:
            parts = re.split(r"^={80}\n(?:IDL: .*\n)?", definition.data, flags=re.MULTILINE)
            types = {}
            for part in filter(str.strip, parts):
                types |= get_types_from_idl(part)
        else:
            types = {}
        if name in types:
            store = get_typestore(Stores.EMPTY)
            store.register(types)
            return store
    except Exception as error:  # noqa: BLE001 (the parser raises anything; the topic may not be needed)
        _log.warning("the definition of %s in the recording can't be read (%s)", name, error)
    return typestore() if name in typestore().types else None


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
            self._storage = storage
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

    def add_like(self, connection: Connection) -> str:
        """Make the topic of another bag's connection, with its own definition of the type.

        Returns:
            Why the topic can't be made in this storage; empty if it was.
        """
        topic, kind = connection.topic, connection.msgtype
        if topic in self._topics:
            made = self._topics[topic][1]
            return "" if made == kind else f"topic {topic} holds messages of {made}, too: {kind} is left out"
        definition, digest = connection.msgdef.data, connection.digest
        if definition and not digest:
            digest = _hash_of(connection)
        qos = connection.ext.offered_qos_profiles if isinstance(connection.ext, ConnectionExtRosbag2) else ()
        if not definition and kind in typestore().types:
            self.add_topic(topic, kind, qos)
            return ""
        if not definition:
            if self._storage != "sqlite3":
                return (
                    f"topic {topic} is left out: nothing says what a {kind} is made of, which "
                    f"{self._storage} needs; --storage sqlite3 keeps it"
                )
            self._writer.added_types.add(kind)  # no definition is written
        made = self._writer.add_connection(
            topic, kind, msgdef=definition, rihs01=digest or _NO_HASH, offered_qos_profiles=qos
        )
        self._topics[topic] = made, kind
        return ""

    def write_raw(self, topic: str, stamp: int, raw: bytes) -> None:
        """Write CDR bytes to a topic that was made; ``stamp`` is the time of recording in ns."""
        self._writer.write(self._topics[topic][0], stamp, raw)

    def write(self, topic: str, message_type: str, stamp: int, content: Any) -> None:
        """Write a message; the topic is made if needed."""
        self.add_topic(topic, message_type)
        self.write_raw(topic, stamp, typestore().serialize_cdr(content, message_type))


_NO_HASH = "RIHS01_" + 64 * "0"
"""Of a type that nothing is known of."""


def _hash_of(connection: Connection) -> str:
    """Hash of a type whose definition was recorded without one, as by rosbag2 before ROS 2 Iron."""
    store = _store_of(connection)
    try:
        return store.hash_rihs01(connection.msgtype) if store is not None else ""
    except Exception:  # noqa: BLE001 (a definition that can't be read is copied all the same)
        return ""


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


def segments_message(segments: Sequence[Segment], head: Any, height: int, width: int) -> Any:
    """Segments of one image as SegmentArray; see `picopose_ros.messages.build.segments_message`."""
    return build.segments_message(message, segments, head, height, width)


def transform_message(T: np.ndarray, head: Any, child_frame_id: str) -> Any:
    """A transform (4, 4) in metres from a header's frame to a child frame, as TransformStamped."""
    return build.transform_message(message, T, head, child_frame_id)


def matrix_from(translation: Any, rotation: Any) -> np.ndarray:
    """(4, 4) float64 from a message's translation or position and its quaternion."""
    T = np.eye(4)
    T[:3, :3] = Rotation.from_quat([rotation.x, rotation.y, rotation.z, rotation.w]).as_matrix()
    T[:3, 3] = translation.x, translation.y, translation.z
    return T
