"""What the node's tests and the soak share: a world to look at, the node as a process, a client that talks to
it."""

from __future__ import annotations

import array
import ctypes
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rclpy
import torch
import trimesh
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from picopose_ros.msg import SegmentArray
from rcl_interfaces.srv import GetParameters, SetParameters
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header
from tf2_msgs.msg import TFMessage
from vision_msgs.msg import Detection3DArray

from picopose_ros.model import PicoPose, preset, save_model
from picopose_ros.node.conversions import segments_to_message, stamp_to_nanoseconds
from picopose_ros.segmentation import Segment
from picopose_ros.templates.meshes import discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer

if TYPE_CHECKING:
    from picopose_ros.node.node import PicoPoseNode

HEIGHT, WIDTH = 240, 320
K = np.array([[300.0, 0, 160], [0, 300.0, 120], [0, 0, 1]])
CAMERA_FRAME = "camera_optical"
DEADLINE = float(os.environ.get("PICOPOSE_TEST_DEADLINE", "240"))
"""Seconds a condition may take on a loaded machine; never slept through."""
RESEND = 60.0
"""Seconds after which the first request of a client of a service is taken for lost."""

QUICK = {"device": "cpu", "viewpoints": 42, "hypotheses": 1, "refinements": 0}
"""Parameters of a node that is soon ready."""

# Every test process its own part of the domains that are safe on Linux, every node test its own domain in it.
_domains = itertools.count()
_stamps = itertools.count(1_700_000_000_123_456_789, 33_333_333)


def next_domain() -> int:
    """A ROS_DOMAIN_ID that no other test uses, here or in pytest-xdist's other process."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 2
    return 1 + (2 * (os.getpid() * 13 + next(_domains)) + worker) % 100


# The world.


def write_meshes(folder: Path) -> Path:
    """Two objects of about 10 cm, told apart by shape and colour: ``block`` and ``can``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    block = trimesh.creation.box((0.06, 0.08, 0.11)).subdivide().subdivide()
    can = trimesh.creation.cylinder(radius=0.035, height=0.1, sections=24).subdivide()
    for name, mesh in (("block", block), ("can", can)):
        colours = rng.integers(0, 256, (len(mesh.vertices), 3))
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colours)
        mesh.export(folder / f"{name}.ply")
    return folder


def write_weights(path: Path) -> Path:
    """A tiny network that was never trained: poses come out, and nothing here asks whether they are good."""
    torch.manual_seed(3)
    save_model(PicoPose(preset("tiny")).eval(), path)
    return path


def send_to(publisher: Publisher, message: Any, patience: float = 10.0) -> None:
    """Publish a message; again where the machine is so busy that DDS gives up after its tenth of a second."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return publisher.publish(message)
        except rclpy_implementation.RCLError:
            if time.monotonic() > deadline:
                raise


@dataclass(frozen=True)
class Scene:
    """An image and its masks.

    Attributes:
        rgb: (H, W, 3) uint8.
        segments: what a perfect segmenter sees in it.
    """

    rgb: np.ndarray
    segments: list[Segment]


def make_scene(mesh_dir: Path) -> Scene:
    """A block, a can, and another block, side by side 0.6 m away."""
    meshes = {
        spec.class_id: load_object(spec)
        for spec in discover_objects(mesh_dir)
        if spec.class_id in ("block", "can")
    }
    placed = [("block", -0.17, 0.4), ("can", 0.0, 1.1), ("block", 0.17, 2.0)]
    rng = np.random.default_rng(6)
    rgb = rng.integers(60, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    segments = []
    with MeshRenderer() as renderer:
        for class_id, x, angle in placed:
            T_cam_obj = trimesh.transformations.rotation_matrix(angle, [1, 2, 0.5])
            T_cam_obj[:3, 3] = [x, 0.0, 0.6]
            view = renderer.render(meshes[class_id], T_cam_obj, K, WIDTH, HEIGHT)
            rgb[view.mask] = view.rgb[view.mask]
            segments.append(Segment(class_id, 0.9, view.mask))
    return Scene(rgb, segments)


# Messages.


def header(stamp: int, frame_id: str = CAMERA_FRAME) -> Header:
    """A header; ``stamp`` in nanoseconds."""
    message = Header(frame_id=frame_id)
    message.stamp.sec, message.stamp.nanosec = divmod(stamp, 1_000_000_000)
    return message


def image_message(pixels: np.ndarray, stamp: int, encoding: str = "rgb8") -> Image:
    """Pixels (H, W[, C]) as Image."""
    pixels = np.ascontiguousarray(pixels)
    message = Image(header=header(stamp), height=pixels.shape[0], width=pixels.shape[1], encoding=encoding)
    message.step = pixels.nbytes // pixels.shape[0]
    message.data = array.array("B", pixels.tobytes())
    return message


def camera_message(
    stamp: int, intrinsics: np.ndarray = K, height: int = HEIGHT, width: int = WIDTH
) -> CameraInfo:
    """A CameraInfo without distortion."""
    message = CameraInfo(header=header(stamp), height=height, width=width, distortion_model="plumb_bob")
    message.d = [0.0] * 5
    message.k = np.asarray(intrinsics, float).reshape(9)
    return message


def segments_message(
    segments: Sequence[Segment], stamp: int, height: int = HEIGHT, width: int = WIDTH
) -> SegmentArray:
    """Segments as SegmentArray."""
    return segments_to_message(segments, header(stamp), height, width)


# The node.


_PAGE = os.sysconf("SC_PAGE_SIZE")
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """In a child process: SIGKILL when its parent ends, however it ends; nothing is left running."""
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)


class NodeProcess:
    """``python -m picopose_ros.node`` as its own process, with its log in a file that outlives it.

    Args:
        folder: for the log; a node that is started again goes on in it.
        domain: ROS_DOMAIN_ID.
        namespace: of the node.
        parameters: given on the command line.
        environment: variables besides those of this process.
        nodes: that run in it; picopose_node if none is named.
    """

    def __init__(
        self,
        folder: Path,
        domain: int,
        namespace: str,
        parameters: Mapping[str, object],
        environment: Mapping[str, str] | None = None,
        nodes: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path = folder / "node.log"
        self.namespace = namespace
        self.domain = domain
        self._command = [sys.executable, "-m", "picopose_ros.node", *nodes, "--ros-args"]
        self._command += ["-r", f"__ns:={namespace}"]
        for name, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            self._command += ["-p", f"{name}:={text}"]
        own = {"ROS_DOMAIN_ID": str(domain), "ROS_LOG_DIR": str(folder)}
        self._environment = {**os.environ, **own, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its readiness shows on the graph."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        """Everything the node has said."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def lines(self, reason: str) -> int:
        """How many lines of the log give this reason."""
        return self.log.count(f"[{reason}]")

    def resident_bytes(self) -> int:
        """Its resident memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * _PAGE

    def wait(self, timeout: float = DEADLINE) -> int:
        """Exit code, once the process has ended."""
        return self.process.wait(timeout)

    def wait_for_log(self, text: str, timeout: float = DEADLINE) -> None:
        """Until the log has ``text``; fails when the process ends first."""
        end = time.monotonic() + timeout
        while text not in self.log:
            assert self.alive, f"the node ended: {self.log}"
            assert time.monotonic() < end, f"no {text!r} in: {self.log}"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL."""
        if self.alive:
            self.process.kill()
            self.process.wait()

    def stop(self, timeout: float = DEADLINE) -> int:
        """SIGINT and the exit code; SIGKILL and -9 if that takes too long, 0 if it never ran."""
        if self.process is None:
            return 0
        if self.alive:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode


@contextmanager
def running_node(
    folder: Path, domain: int, namespace: str, nodes: Sequence[str] = (), **parameters: object
) -> Iterator[NodeProcess]:
    """A node that is gone at the end, whatever happened."""
    # The tests' networks are untrained: no pose of theirs would reach the default.
    values = {"min_score": 0.0, **parameters}
    node = NodeProcess(folder, domain, namespace, values, {"OMP_NUM_THREADS": "1"}, nodes)
    node.start()
    try:
        yield node
    finally:
        node.kill()


@contextmanager
def local_node(**parameters: object) -> Iterator[PicoPoseNode]:
    """A node in this process that nobody spins: its transitions are triggered by the test."""
    from picopose_ros.node.node import PicoPoseNode

    context = Context()
    rclpy.init(context=context, domain_id=next_domain())
    values = {"autostart": False, "min_score": 0.0, **QUICK, **parameters}
    overrides = [
        Parameter(name, value=str(value) if isinstance(value, Path) else value)
        for name, value in values.items()
    ]
    try:
        node = PicoPoseNode(context=context, parameter_overrides=overrides)
        try:
            yield node
        finally:
            assert node.close(DEADLINE)
            node.destroy_node()
    finally:
        context.shutdown()


# The client.


OF_A_PART = frozenset(
    {
        *("bad_depth", "bad_segment", "empty_mask", "small_mask", "unknown_class", "no_pose", "low_score"),
        *("unrefined", "views_forgotten", "bad_frame_id", "no_transform", "no_overlay"),
        "not_sent",
    }
)
"""Reasons that drop a segment or an output beside the detections: the segmentation is still answered."""


class Client:
    """A camera, a segmenter and a listener in this process, on a domain of their own.

    Args:
        domain: ROS_DOMAIN_ID.
        namespace: of the node under test.
        image_reliability: of the image publisher.

    Attributes:
        answers: how often each stamp (ns) was answered.
        diagnostics: the last status of every node, by name.
        publishers: by the name of the input.
    """

    def __init__(
        self, domain: int, namespace: str, image_reliability: ReliabilityPolicy = ReliabilityPolicy.RELIABLE
    ) -> None:
        self._context = Context()
        rclpy.init(context=self._context, domain_id=domain, args=[])
        self.node = rclpy.create_node("client", namespace=namespace, context=self._context)
        self._status_name = f"{self.node.get_namespace()}/picopose_node: pose estimation"
        self._changed = threading.Condition()
        self._detections: dict[int, Detection3DArray] = {}
        self.answers: Counter[int] = Counter()
        self._transforms: dict[int, list] = {}
        self.diagnostics: dict[str, DiagnosticStatus] = {}
        self.diagnostic_stamp = 0

        camera_qos = QoSProfile(depth=10, reliability=image_reliability)
        self.image = self.node.create_publisher(Image, "image", camera_qos)
        self.camera_info = self.node.create_publisher(CameraInfo, "camera_info", camera_qos)
        self.segmentation = self.node.create_publisher(SegmentArray, "segmentation", 50)
        self.publishers = {
            "image": self.image,
            "camera_info": self.camera_info,
            "segmentation": self.segmentation,
        }
        self.node.create_subscription(Detection3DArray, "detections", self._on_detections, 50)
        self.node.create_subscription(TFMessage, "/tf", self._on_tf, 100)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._clients: dict[str, Any] = {}
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave the graph."""
        self._context.try_shutdown()
        self._thread.join(10)
        self.node.destroy_node()

    def _spin(self) -> None:
        try:
            self._executor.spin()
        except ExternalShutdownException:
            pass

    def _on_detections(self, message: Detection3DArray) -> None:
        with self._changed:
            stamp = stamp_to_nanoseconds(message.header.stamp)
            self._detections[stamp] = message
            self.answers[stamp] += 1
            self._changed.notify_all()

    def _on_tf(self, message: TFMessage) -> None:
        with self._changed:
            for transform in message.transforms:
                self._transforms.setdefault(stamp_to_nanoseconds(transform.header.stamp), []).append(
                    transform
                )
            self._changed.notify_all()

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        with self._changed:
            self.diagnostic_stamp = stamp_to_nanoseconds(message.header.stamp)
            for status in message.status:
                self.diagnostics[status.name] = status
            self._changed.notify_all()

    def wait(self, condition: Callable[[], object], seconds: float) -> object:
        """The first true value of ``condition``, or the last one once the time is over.

        It is looked at after every message, and ten times a second.
        """
        end = time.monotonic() + seconds
        with self._changed:
            while not (value := condition()) and time.monotonic() < end:
                self._changed.wait(0.1)
        return value

    def wait_for(self, condition: Callable[[], object], what: str, timeout: float = DEADLINE) -> object:
        """The first true value of ``condition``; fails when the time is over."""
        value = self.wait(condition, timeout)
        assert value, f"waited {timeout:g} s for {what}"
        return value

    def connected(self) -> bool:
        """Whether somebody listens to all publishers."""
        return all(publisher.get_subscription_count() for publisher in self.publishers.values())

    def wait_until_connected(self, node: NodeProcess) -> None:
        """Until the node listens and this client is connected to all its topics; the node is ready then."""

        def connected() -> bool:
            assert node.alive, f"the node ended: {node.log}"
            return self.connected() and bool(self.node.count_publishers(f"{node.namespace}/detections"))

        self.wait_for(connected, "the node's subscriptions")

    def wait_until_listening(self, node: NodeProcess) -> None:
        """Until the node is on the graph with its inputs, whose QoS need not match this client's yet."""

        def listening() -> bool:
            assert node.alive, f"the node ended: {node.log}"
            return bool(self.node.count_subscribers(f"{node.namespace}/segmentation"))

        self.wait_for(listening, "the node's subscriptions")

    def next_stamp(self) -> int:
        """A stamp (ns) that no client of this process used yet, 33 ms after the last."""
        return next(_stamps)

    def send_frame(self, scene: Scene, stamp: int | None = None) -> int:
        """Publish image and camera_info; returns their stamp."""
        stamp = self.next_stamp() if stamp is None else stamp
        send_to(self.image, image_message(scene.rgb, stamp))
        send_to(self.camera_info, camera_message(stamp))
        return stamp

    def send_segments(self, segments: Sequence[Segment], stamp: int) -> None:
        """Publish a segmentation."""
        send_to(self.segmentation, segments_message(segments, stamp))

    def detections(self, stamp: int, timeout: float = DEADLINE) -> Detection3DArray:
        """The answer with this stamp, waiting for it."""
        return self.wait_for(lambda: self._detections.get(stamp), f"detections of {stamp}", timeout)

    def answered(self, stamp: int) -> bool:
        """Whether the answer with this stamp has come."""
        return stamp in self._detections

    def detections_within(self, stamp: int, seconds: float) -> Detection3DArray | None:
        """The answer with this stamp if it comes in time."""
        self.wait(lambda: self.answered(stamp), seconds)
        return self._detections.get(stamp)

    def answered_since(self, stamp: int) -> int:
        """How many answers have a later stamp than this."""
        return sum(other > stamp for other in self._detections)

    @staticmethod
    def stamp_of(message: Detection3DArray) -> int:
        """Its stamp in nanoseconds."""
        return stamp_to_nanoseconds(message.header.stamp)

    def has_transforms(self, stamp: int) -> bool:
        """Whether any transform with this stamp has come."""
        return stamp in self._transforms

    def transforms(self, stamp: int, count: int) -> list:
        """``count`` transforms with this stamp, waiting for them."""
        self.wait_for(lambda: len(self._transforms.get(stamp, [])) >= count, f"{count} transforms of {stamp}")
        return self._transforms[stamp]

    def ask(self, scene: Scene) -> Detection3DArray:
        """A good frame and its answer."""
        stamp = self.send_frame(scene)
        self.send_segments(scene.segments, stamp)
        return self.detections(stamp)

    # What the diagnostics say.

    @property
    def values(self) -> dict[str, str]:
        """The last diagnostics of the node; empty if there were none."""
        status = self.diagnostics.get(self._status_name)
        return {pair.key: pair.value for pair in status.values} if status else {}

    def forget_diagnostics(self) -> None:
        """Forget what the node said of itself so far."""
        with self._changed:
            self.diagnostics.pop(self._status_name, None)

    def diagnostic_values(self, condition: Callable[[dict[str, str]], object], what: str) -> dict[str, str]:
        """The first diagnostics of the node from now on that fulfil ``condition``."""
        self.forget_diagnostics()

        def values() -> dict[str, str] | None:
            found = self.values
            return found if found and condition(found) else None

        return self.wait_for(values, what)

    def ready(self) -> bool:
        """Whether the node says that it is active, and its topics are connected.

        The graph alone does not tell: for seconds it holds a node that was killed.
        """
        return self.values.get("state") == "active" and self.connected()

    def count(self, key: str) -> int:
        """A counter of the node's, 0 if it is not there."""
        return int(self.values.get(key, 0))

    def dropped(self) -> dict[str, int]:
        """Segmentations that were not answered, by reason."""
        found = {}
        for key, value in self.values.items():
            reason = re.fullmatch(r"dropped_(\w+)", key)
            if reason and reason[1] not in OF_A_PART:
                found[reason[1]] = int(value)
        return found

    def latency(self, stage: str) -> float | None:
        """Median of a stage in milliseconds, as the node tells it."""
        found = re.search(r"median ([\d.]+)", self.values.get(f"latency_{stage}_ms", ""))
        return float(found[1]) if found else None

    # Services.

    def call(self, service: str, kind: type, request: object = None, timeout: float = DEADLINE) -> Any:
        """The response of one of the node's services."""
        return self.start_call(service, kind, request, timeout)(timeout)

    def start_call(
        self, service: str, kind: type, request: object = None, timeout: float = DEADLINE
    ) -> Callable[..., Any]:
        """Send a request; what comes back waits for the response.

        A service that has not discovered the client's reader yet answers to nobody, though it is ready: the
        first request of a client is sent again when nothing has come for long.
        """
        new = service not in self._clients
        if new:
            self._clients[service] = self.node.create_client(kind, f"picopose_node/{service}")
        self.wait_for(self._clients[service].service_is_ready, f"the service {service}", timeout)
        request = kind.Request() if request is None else request
        futures = [self._clients[service].call_async(request)]

        def done() -> Any:
            return next((future for future in futures if future.done()), None)

        def response(timeout: float = DEADLINE) -> Any:
            if new and not self.wait(done, min(timeout, RESEND)):
                futures.append(self._clients[service].call_async(request))
            return self.wait_for(done, f"the answer of the service {service}", timeout).result()

        return response

    def set_parameter(self, name: str, value: object) -> tuple[bool, str]:
        """Whether the node took the value, and its reason if not."""
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        result = self.call("set_parameters", SetParameters, request).results[0]
        return result.successful, result.reason

    def parameter(self, name: str) -> object:
        """The node's value of a parameter."""
        response = self.call("get_parameters", GetParameters, GetParameters.Request(names=[name]))
        return parameter_value_to_python(response.values[0])

    def state(self) -> str:
        """Label of the node's state."""
        return self.call("get_state", GetState).current_state.label

    def start_transition(self, label: str) -> Callable[..., bool]:
        """Ask for a transition; what comes back waits for it and says whether it was made."""
        request = ChangeState.Request(transition=Transition(label=label))
        response = self.start_call("change_state", ChangeState, request)
        return lambda: response().success

    def transition(self, label: str) -> bool:
        """Make a transition; whether it was made."""
        return self.start_transition(label)()
