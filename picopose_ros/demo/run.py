"""The demo: the real node, fed from a bag over DDS, its answers recorded and compared with the truth."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message, serialize_message
from tf2_msgs.msg import TFMessage
from vision_msgs.msg import Detection3DArray

from picopose_ros.demo.evaluate import Row, compare, honesty, names_kept, read_recording, table
from picopose_ros.demo.late import LateFigures, answered_part, measure_late
from picopose_ros.demo.masks import count_segments
from picopose_ros.demo.objects import OBJECTS
from picopose_ros.demo.pictures import write_pictures
from picopose_ros.demo.world import (
    CAMERA,
    CAMERA_INFO_TOPIC,
    IMAGE_TOPIC,
    SEGMENTATION_TOPIC,
    TRUTH_PREFIX,
    DemoFiles,
    build_world,
)
from picopose_ros.errors import PicoPoseError
from picopose_ros.evaluation.consistency import Consistency
from picopose_ros.evaluation.found import FoundCounts
from picopose_ros.messages import bags
from picopose_ros.msg import SegmentArray
from picopose_ros.progress import progress_bar
from picopose_ros.templates.meshes import ObjectMesh, discover_objects, load_object

DETECTIONS_TOPIC = "/detections"
READY_SECONDS = 900.0
"""Onboarding with an empty cache, on a machine that has other things to do too."""
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Masks:
    """Where the masks come from.

    Attributes:
        kind: ``recorded``, those of the recording; ``own``, of this package's segmenter beside the node,
            which sees the images alone; ``late``, of one image a second, late, and the node follows.
        speed: of ``late``, seconds of the recording per second.
        follow_rate: of ``late``, the node's parameter, Hz of the recording's clock.
    """

    kind: Literal["recorded", "own", "late"] = "recorded"
    speed: float = 1.0
    follow_rate: float = 10.0


@dataclass(frozen=True)
class DemoReport:
    """What the demo found out; see ``report.json``."""

    rows: list[Row]
    frames: int
    answered: int
    transforms: int  # TF frames received, without the truth's
    latency: dict[str, str]  # stage -> "median .., p95 .." in ms, as the node says it
    onboarding_seconds: float
    playing_seconds: float
    honesty: Consistency | None = None  # true errors against the covariances
    names: dict[str, list[str]] = field(default_factory=dict)  # true instance -> its published names
    segments: FoundCounts | None = None  # of the own segmenter, where it made the masks
    late: LateFigures | None = None  # where masks were late; then rows are of the answered images

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "objects": [row.as_dict() for row in self.rows],
            "frames": self.frames,
            "frames_answered": self.answered,
            "tf_frames_received": self.transforms,
            "latency_ms": self.latency,
            "onboarding_seconds": round(self.onboarding_seconds, 1),
            "playing_seconds": round(self.playing_seconds, 1),
            "covariance": None if self.honesty is None else self.honesty.as_dict(),
            "names": self.names,
            "segments": None if self.segments is None else self.segments.as_dict(),
            "late": None if self.late is None else self.late.as_dict(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        }


class Collector(Node):
    """Receives what the node publishes, as bytes, by the stamp of the image it belongs to.

    Args:
        segments: also what a segmenter publishes.
    """

    def __init__(self, segments: bool = False) -> None:
        super().__init__("demo_collector")
        self.detections: dict[int, bytes] = {}
        self.answered_at: dict[int, float] = {}  # of a steady clock, s; the first answer to an image
        self.transforms: list[tuple[int, bytes]] = []
        self.segments: dict[int, bytes] = {}
        self.latency: dict[str, str] = {}
        depth = QoSProfile(depth=100)
        self.create_subscription(Detection3DArray, DETECTIONS_TOPIC, self._on_detections, depth, raw=True)
        self.create_subscription(TFMessage, "/tf", self._on_tf, depth, raw=True)
        if segments:
            self.create_subscription(SegmentArray, SEGMENTATION_TOPIC, self._on_segments, depth, raw=True)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, depth)

    def _on_detections(self, raw: bytes) -> None:
        message = deserialize_message(raw, Detection3DArray)
        stamp = bags.stamp_of(message)
        self.answered_at.setdefault(stamp, time.monotonic())
        before = self.detections.get(stamp)
        if before is not None:  # late masks add what the first answer to an image said nothing of
            found = deserialize_message(before, Detection3DArray).detections
            message.detections = [*found, *message.detections]
            raw = serialize_message(message)
        self.detections[stamp] = raw

    def _on_segments(self, raw: bytes) -> None:
        self.segments[bags.stamp_of(deserialize_message(raw, SegmentArray))] = raw

    def _on_tf(self, raw: bytes) -> None:
        transforms = deserialize_message(raw, TFMessage).transforms
        if transforms and not transforms[0].child_frame_id.startswith(
            TRUTH_PREFIX
        ):  # the bag's own are played too
            self.transforms.append((bags.stamp_of(transforms[0]), raw))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if not status.name.endswith("pose estimation"):
                continue
            for value in status.values:
                stage = re.fullmatch(r"latency_(\w+)_ms", value.key)
                if stage:
                    self.latency[stage[1]] = value.value


def _environment(domain: int) -> dict[str, str]:
    """For child processes: everything of ours, on a ROS domain that nobody else on the network listens to."""
    return {**os.environ, "ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _for_both(extra: Sequence[str]) -> list[str]:
    """Of ROS arguments ``-p name:=value`` those that the segmenter has, too."""
    pairs = zip(extra[::2], extra[1::2])
    shared = tuple(f"{name}:=" for name in ("viewpoints", "weights", "preset", "device"))
    return [word for pair in pairs if pair[0] == "-p" and pair[1].startswith(shared) for word in pair]


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, name: str = "picopose_node") -> None:
    """Wait for the node's log line.

    Raises:
        PicoPoseError: the node ended, or took too long; with the last lines of its log.
    """
    deadline = time.monotonic() + READY_SECONDS
    while f"{name} ready" not in log.read_text(errors="replace"):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        if f"{name} stays unconfigured" in tail:
            raise PicoPoseError(f"{name} can't be configured; its log {log} ends:\n{tail}")
        if process.poll() is not None:
            raise PicoPoseError(
                f"{name} ended with exit code {process.returncode}; its log {log} ends:\n{tail}"
            )
        if time.monotonic() > deadline:
            raise PicoPoseError(
                f"{name} was not ready after {READY_SECONDS:g} s; its log {log} ends:\n{tail}"
            )
        time.sleep(0.2)


def _collect(collector: Collector, player: subprocess.Popen[bytes], frames: int) -> None:
    """Receive until the player is done, and a little longer for what is still on its way."""
    with progress_bar(None, frames, "frames answered", "frame") as bar:
        while player.poll() is None:
            rclpy.spin_once(collector, timeout_sec=0.2)
            bar.update(len(collector.detections) - bar.n)
        # Also long enough for a last diagnostics message, which comes once a second.
        end = time.monotonic() + 2.0
        while time.monotonic() < end:
            rclpy.spin_once(collector, timeout_sec=0.1)
        bar.update(len(collector.detections) - bar.n)


def write_output_bag(source: Path, target: Path, collector: Collector) -> None:
    """The input bag with the node's answers, each at the time of recording of its segmentation."""
    shutil.rmtree(target, ignore_errors=True)
    with bags.BagReader(source) as reader, bags.BagWriter(target, reader.storage) as writer:
        for connection in reader.connections:
            writer.add_like(connection)
        writer.add_topic(DETECTIONS_TOPIC, bags.DETECTIONS)
        for connection, recorded, raw in reader.raw():
            writer.write_raw(connection.topic, recorded, raw)
            if connection.msgtype != bags.SEGMENTS:
                continue
            stamp = bags.stamp_of(reader.decode(raw, connection))
            if stamp in collector.detections:
                writer.write_raw(DETECTIONS_TOPIC, recorded, collector.detections[stamp])
            for of, transforms in collector.transforms:
                if of == stamp:
                    writer.write_raw("/tf", recorded, transforms)


def _frames(raw: bytes) -> list[str]:
    """Child frames of a TFMessage."""
    return [transform.child_frame_id for transform in deserialize_message(raw, TFMessage).transforms]


def load_meshes(folder: Path) -> dict[str, ObjectMesh]:
    """The demo's meshes by class id."""
    return {spec.class_id: load_object(spec) for spec in discover_objects(folder)}


def node_command(files: DemoFiles, cache: Path, extra: Sequence[str] = ()) -> list[str]:
    """The command that starts the node on the demo's topics; ``extra`` goes behind ``--ros-args``."""
    return [
        sys.executable,
        "-m",
        "picopose_ros.node",
        "--ros-args",
        *("-p", f"mesh_dir:={files.meshes}"),
        *("-p", f"cache_dir:={cache}"),
        *("-p", "buffer_seconds:=120.0"),  # the player waits for the node, so images wait for their masks
        *("-r", f"image:={IMAGE_TOPIC}"),
        *("-r", f"camera_info:={CAMERA_INFO_TOPIC}"),
        *("-r", f"segmentation:={SEGMENTATION_TOPIC}"),
        *("-r", f"detections:={DETECTIONS_TOPIC}"),
        *extra,
    ]


def segmenter_command(files: DemoFiles, cache: Path, extra: Sequence[str] = ()) -> list[str]:
    """The command that starts the segmenter on the demo's topics."""
    return [
        *(sys.executable, "-m", "picopose_ros.node", "segmenter_node", "--ros-args"),
        *("-p", f"mesh_dir:={files.meshes}"),
        *("-p", f"cache_dir:={cache}"),
        *("-p", "segmenter.rate:=0.0"),
        *("-r", f"image:={IMAGE_TOPIC}"),
        *("-r", f"segmentation:={SEGMENTATION_TOPIC}"),
        *extra,
    ]


def run_node(
    files: DemoFiles,
    out: Path,
    extra: Sequence[str] = (),
    domain: int | None = None,
    masks: Masks = Masks(),
) -> tuple[Collector, float, float]:
    """Start the node, play the bag into it, collect what it says.

    Args:
        files: the demo's world.
        out: folder for the cache, the node's log and the output bag ``output/``.
        extra: further ROS arguments of the node.
        domain: ROS_DOMAIN_ID; one that hardly anybody else has if None.
        masks: where they come from.

    Returns:
        The collector, seconds until the node was ready, seconds of playing.

    Raises:
        PicoPoseError: the node or the player failed.
    """
    domain = 1 + os.getpid() % 100 if domain is None else domain
    environment = _environment(domain)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    log = out / "node.log"
    rclpy.init(domain_id=domain)
    own_masks, late = masks.kind == "own", masks.kind == "late"
    collector = Collector(own_masks)
    started = time.monotonic()
    player: subprocess.Popen[bytes] | None = None
    if late:
        extra = [*extra, "-p", "follow:=true", "-p", f"follow_rate:={float(masks.follow_rate)}"]
    commands = {"picopose_node": (node_command(files, out / "cache", extra), log)}
    if own_masks:
        command = segmenter_command(files, out / "cache", _for_both(extra))
        commands["segmenter_node"] = (command, out / "segmenter.log")
    nodes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, (command, path) in commands.items():
            with path.open("wb") as stream:
                nodes[name] = subprocess.Popen(
                    command, env=environment, stdout=stream, stderr=subprocess.STDOUT
                )
        print(f"node starts and onboards the objects in {files.meshes} (log: {log})", flush=True)
        for name, process in nodes.items():
            _wait_until_ready(process, commands[name][1], name)
        ready = time.monotonic()
        print(f"node ready after {ready - started:.1f} s; playing {files.bag}", flush=True)
        options = ["--no-masks"] if own_masks else ["--late", str(masks.speed)] if late else []
        player = subprocess.Popen(
            [sys.executable, "-m", "picopose_ros.demo.play", str(files.bag), *options], env=environment
        )
        _collect(collector, player, files.frames)
        if player.returncode:
            raise PicoPoseError(
                f"the bag player ended with exit code {player.returncode}: see its message above"
            )
        return collector, ready - started, time.monotonic() - ready
    finally:
        for process in (player, *nodes.values()):
            if process is not None:
                _stop(process)
        collector.destroy_node()
        rclpy.try_shutdown()


def run_demo(
    out: str | Path,
    frames: int = 60,
    seed: int = 7,
    storage: str = "mcap",
    extra: Sequence[str] = (),
    domain: int | None = None,
    masks: Masks = Masks(),
) -> DemoReport:
    """Make the world if needed, run the node on it, compare, print, write pictures and ``report.json``.

    Args:
        out: folder for everything.
        frames: images in the bag.
        seed: of the world.
        storage: of the bags.
        extra: further ROS arguments of the node.
        domain, masks: see :func:`run_node`. Of late masks the figures of the objects are over the images
            that were answered.

    Raises:
        PicoPoseError: the world can't be rendered, or the node or the player failed.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PicoPoseError(f"--out {out} can't be made: {error.strerror}; name another folder") from error
    with progress_bar(None, frames, "rendering the world", "frame") as bar:
        files = build_world(out, frames, seed, storage, lambda done, total: bar.update(done - bar.n))
    meshes = load_meshes(files.meshes)
    collector, onboarding, playing = run_node(files, out, extra, domain, masks)
    output = out / "output"
    write_output_bag(files.bag, output, collector)

    recording = read_recording(output, DETECTIONS_TOPIC)
    asked, visible, late = recording, files.visible, None
    if masks.kind == "late":
        came = [(stamp, _frames(raw)) for stamp, raw in collector.transforms]
        late = measure_late(recording, visible, came, collector.answered_at, masks.speed, masks.follow_rate)
        asked, visible = answered_part(recording, visible)
    rows = compare(asked, meshes, visible, {name: made.seen_in_training for name, made in OBJECTS.items()})
    transforms = sum(len(names) for names in recording.transforms.values())
    report = DemoReport(
        rows,
        frames,
        len(recording.detections),
        transforms,
        collector.latency,
        onboarding,
        playing,
        honesty(asked, meshes, visible),
        names_kept(recording, files.visible),
        count_segments(files.bag, files.visible, collector.segments) if masks.kind == "own" else None,
        late,
    )
    (out / "report.json").write_text(json.dumps(report.as_dict(), indent=2))
    pictures = write_pictures(output, recording, meshes, out / "pictures", IMAGE_TOPIC, CAMERA)

    print(f"\n{table(rows)}\n")
    print(f"{report.answered} of {frames} frames answered, {transforms} transforms on /tf")
    kept = sum(len(names) <= 1 for names in report.names.values())
    print(f"{kept} of {len(report.names)} instances had one name all the time")
    for stage, text in report.latency.items():
        print(f"  {stage:<10} {text} ms")
    if report.segments is not None:
        own = report.segments
        print(
            f"segments: {own.found} of {own.asked} instances found ({own.recall:.2f}), {own.missed} missed, "
            f"{own.false_per_image:.2f} false per image"
        )
    if report.late is not None:
        print(report.late)
        every = rows[-1]
        right = (every.recall, every.recall_05d, every.recall_02d)
        told = " ".join(f"{share * every.instances / max(every.detected, 1):.2f}" for share in right)
        print(f"of {every.detected} poses {told} are right to .1, .05 and .02 of the diameter")
    if report.honesty is not None:
        print(f"covariances: {report.honesty.pose}")
    print(f"report: {out / 'report.json'}\npictures: {pictures[-1]}\nbag: {output}")
    return report
