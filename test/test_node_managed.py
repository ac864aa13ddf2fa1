"""One node led through its life over DDS: mistakes mended, inputs of every kind, services, QoS, markers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from node_harness import (
    CAMERA_FRAME,
    HEIGHT,
    WIDTH,
    Client,
    NodeProcess,
    Scene,
    camera_message,
    header,
    image_message,
    segments_message,
)
from picopose_ros.msg import SegmentArray
from picopose_ros.srv import EstimatePoses
from rclpy.context import Context
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String
from std_srvs.srv import Trigger
from vision_msgs.msg import Detection2D, Detection2DArray, Detection3DArray, ObjectHypothesisWithPose
from visualization_msgs.msg import Marker, MarkerArray

from picopose_ros.node.conversions import stamp_to_nanoseconds
from picopose_ros.segmentation import Segment, mask_roi

NAMESPACE = "/cell"
NODE = {
    "mesh_dir": "/nowhere",
    "qos_overrides./cell/labels.subscription.durability": "transient_local",
    "qos_overrides./cell/camera_info.subscription.reliability": "best_effort",
    "qos_overrides./cell/segmentation.subscription.reliability": "reliable",
    "qos_overrides./cell/detections.publisher.durability": "transient_local",
}
CONNECTED = False
"""The node's first attempt fails, so nobody can wait for it to listen."""

USUAL = {"segmentation_input": "segments", "mask_class": "", "image_transport": "raw"}
LIFE = ("unconfigured", "inactive", "active")
UP, DOWN = ("configure", "activate"), ("cleanup", "deactivate")


@pytest.fixture(scope="module")
def meshes(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mesh directory that a test may change."""
    folder = tmp_path_factory.mktemp("own") / "meshes"
    shutil.copytree(assets["mesh_dir"], folder)
    (folder / "crumpled.ply").unlink()
    return folder


def bring_to(client: Client, state: str) -> None:
    """Lead the node from wherever it is to a state of its life."""
    while (now := client.state()) not in LIFE:  # on its way
        pass
    here, there = LIFE.index(now), LIFE.index(state)
    for step in UP[here:there] if here <= there else DOWN[there:here][::-1]:
        assert client.transition(step), step
    assert client.state() == state


def configure(client: Client, node: NodeProcess, meshes: Path, **parameters: object) -> None:
    """An active node with these parameters, everything else as it was at the start."""
    bring_to(client, "unconfigured")
    for name, value in {"mesh_dir": str(meshes), **USUAL, **parameters}.items():
        assert client.set_parameter(name, value) == (True, "")
    bring_to(client, "active")
    client.wait_until_listening(node)


@pytest.fixture
def active(client: Client, node: NodeProcess, meshes: Path) -> Client:
    """A client of the node as a plain start would have it."""
    if client.state() != "active" or any(client.parameter(name) != value for name, value in USUAL.items()):
        configure(client, node, meshes)
    client.wait_until_connected(node)
    return client


def poses(detections: Detection3DArray) -> np.ndarray:
    """(n, 7) positions and quaternions."""
    rows = []
    for detection in detections.detections:
        p, q = detection.results[0].pose.pose.position, detection.results[0].pose.pose.orientation
        rows.append([p.x, p.y, p.z, q.x, q.y, q.z, q.w])
    return np.array(rows)


def classes(detections: Detection3DArray) -> list[str]:
    return [detection.results[0].hypothesis.class_id for detection in detections.detections]


# From a mistake to poses.


def test_autostart_that_fails_leaves_it_unconfigured_with_the_reason(
    client: Client, node: NodeProcess, scene: Scene
) -> None:
    # The failure is known before the transition has ended.
    values = client.diagnostic_values(lambda v: "failure" in v and v["state"] == "unconfigured", "a failure")
    assert client.state() == "unconfigured"
    assert "mesh directory /nowhere does not exist" in values["failure"]
    status = client.diagnostics["/cell/picopose_node: pose estimation"]
    assert status.level == DiagnosticStatus.ERROR
    assert "ros2 lifecycle set /cell/picopose_node configure" in node.log
    assert client.node.count_subscribers("/cell/image") == 0

    answer = client.call("estimate_poses", EstimatePoses, request(scene))
    assert not answer.success
    assert "/cell/picopose_node is unconfigured, so nothing is loaded" in answer.status
    reload = client.call("reload_objects", Trigger)
    assert not reload.success and "unconfigured" in reload.message


def test_mended_it_loads_and_tells_how_far_it_is(client: Client, meshes: Path, tmp_path: Path) -> None:
    bring_to(client, "unconfigured")
    assert client.set_parameter("mesh_dir", str(meshes)) == (True, "")
    assert client.set_parameter("cache_dir", str(tmp_path)) == (True, "")  # everything is onboarded anew
    configured = client.start_transition("configure")
    values = client.diagnostic_values(lambda v: "loading" in v, "the progress")
    assert values["loading"] in ("block 0/2", "block 1/2", "can 1/2", "can 2/2")
    assert values["state"] == "configuring"
    assert client.state() in ("configuring", "inactive")  # it answers meanwhile
    assert not client.transition("configure")
    assert configured()
    values = client.diagnostic_values(lambda v: v["state"] == "inactive", "the inactive state")
    assert values["objects"] == "block, can"
    assert int(values["memory_mb"]) > 0
    assert client.node.count_subscribers("/cell/image") == 0
    accepted, reason = client.set_parameter("mesh_dir", "/elsewhere")
    assert not accepted
    assert "mesh_dir can be set while the node is unconfigured, and it is inactive" in reason


def test_deactivated_it_hears_nothing_and_activated_it_answers_again(
    active: Client, node: NodeProcess, scene: Scene
) -> None:
    first = active.ask(scene)
    assert active.transition("deactivate")
    topics = ("image", "camera_info", "segmentation")
    active.wait_for(
        lambda: not any(active.node.count_subscribers(f"/cell/{topic}") for topic in topics), "silence"
    )
    unheard = active.send_frame(scene)
    active.send_segments(scene.segments, unheard)
    assert active.transition("activate")
    active.wait_until_connected(node)
    second = active.ask(scene)
    np.testing.assert_array_equal(poses(first), poses(second))
    assert not active.answered(unheard)


# Services.


def request(scene: Scene, **fields: object) -> EstimatePoses.Request:
    return EstimatePoses.Request(
        image=image_message(scene.rgb, 77),
        camera_info=camera_message(77),
        segments=segments_message(scene.segments, 77),
        **fields,
    )


@pytest.mark.parametrize("state", ["inactive", "active"])
def test_the_service_gives_the_streams_poses_active_or_not(active: Client, scene: Scene, state: str) -> None:
    stream = active.ask(scene)
    bring_to(active, state)
    answer = active.call("estimate_poses", EstimatePoses, request(scene))
    assert answer.success, answer.status
    assert answer.status == "3 poses of 3 segments"
    assert [detection.id for detection in answer.detections.detections] == ["block_0", "can_0", "block_1"]
    np.testing.assert_array_equal(poses(answer.detections), poses(stream))
    assert answer.detections.header == header(77)
    of_estimates = {"crop", "encode", "match", "regress", "pnp", "refine", "total"}
    assert {"decode", "queue", *of_estimates} == set(answer.stages)
    assert len(answer.milliseconds) == len(answer.stages) and min(answer.milliseconds) >= 0


def test_the_service_takes_some_classes_and_hypotheses(active: Client, scene: Scene) -> None:
    answer = active.call("estimate_poses", EstimatePoses, request(scene, class_ids=["tin"], hypotheses=2))
    assert answer.success
    assert classes(answer.detections) == ["can"]
    assert len(active.ask(scene).detections) == 3


def without_focal_length(wanted: EstimatePoses.Request) -> None:
    wanted.camera_info.k = np.zeros(9)


def with_masks_of_another_size(wanted: EstimatePoses.Request) -> None:
    wanted.segments.height = 2 * HEIGHT


def with_an_unknown_class(wanted: EstimatePoses.Request) -> None:
    wanted.class_ids = ["fork"]


def with_too_many_hypotheses(wanted: EstimatePoses.Request) -> None:
    wanted.hypotheses = 33


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_focal_length, "[uncalibrated] camera_info on the request"),
        (with_masks_of_another_size, "[mask_size] segmentation on the request"),
        (with_an_unknown_class, "class_ids has 'fork', but the objects are block, can"),
        (with_too_many_hypotheses, "hypotheses is 33: give 1 to 32"),
    ],
)
def test_a_request_that_can_not_be_worked_on_is_told_why(
    active: Client, scene: Scene, spoil: object, says: str
) -> None:
    wanted = request(scene)
    spoil(wanted)
    answer = active.call("estimate_poses", EstimatePoses, wanted)
    assert not answer.success
    assert says in answer.status
    assert answer.detections.detections == []


def test_segments_without_a_pose_are_explained_in_the_status(active: Client, scene: Scene) -> None:
    stranger = Segment("fork", 0.9, scene.segments[0].mask)
    empty = Segment("can", 0.9, np.zeros((HEIGHT, WIDTH), bool))
    answer = active.call(
        "estimate_poses", EstimatePoses, request(Scene(scene.rgb, [stranger, empty, scene.segments[1]]))
    )
    assert answer.success
    assert answer.status.startswith("1 poses of 3 segments; [empty_mask] ")
    assert "; [unknown_class] segment 'fork' gave no pose" in answer.status


def test_the_service_is_answered_while_the_stream_runs_and_the_stream_too(
    active: Client, scene: Scene
) -> None:
    stamps = []
    responses = []
    for _ in range(4):
        stamps.append(active.send_frame(scene))
        active.send_segments(scene.segments, stamps[-1])
        responses.append(active.start_call("estimate_poses", EstimatePoses, request(scene)))
    assert all(response().success for response in responses)
    active.detections(stamps[-1])
    active.diagnostic_values(
        lambda v: int(v["pairs_made"]) == int(v["segmentations_answered"]) + int(v["dropped_busy"]),
        "every pair to be answered or counted",
    )


@contextmanager
def held(cache: Path, mesh: Path, viewpoints: int) -> Iterator[None]:
    """Whoever wants to onboard that mesh has to wait."""
    place = hashlib.sha256(str(mesh.resolve()).encode()).hexdigest()[:12]
    with open(cache / f".{mesh.stem}-{place}-tiny-{viewpoints}.safetensors.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_objects_are_reloaded_while_the_stream_goes_on(
    client: Client, node: NodeProcess, meshes: Path, scene: Scene, tmp_path: Path
) -> None:
    bring_to(client, "unconfigured")
    # The new object is onboarded for sure.
    assert client.set_parameter("cache_dir", str(tmp_path)) == (True, "")
    configure(client, node, meshes)
    client.wait_until_connected(node)
    assert client.call("reload_objects", Trigger).message == "2 objects: nothing changed"

    shutil.copy(meshes / "block.ply", meshes / "cup.ply")
    (meshes / "can.ply").rename(meshes.parent / "can.ply")
    objects = (meshes / "objects.yaml").read_text()
    (meshes / "objects.yaml").write_text("cup: {class_ids: [mug]}\n")
    with held(tmp_path, meshes / "cup.ply", client.parameter("viewpoints")):  # as by another process
        reload = client.start_call("reload_objects", Trigger)
        client.diagnostic_values(lambda v: v.get("loading", "").startswith("cup"), "the onboarding to begin")
        assert classes(client.ask(scene)) == ["block", "can", "block"]  # nothing is missing meanwhile
    response = reload()
    assert response.success
    assert response.message == "2 objects: added cup; removed can"

    blocks = [Segment("mug", 0.9, scene.segments[0].mask), scene.segments[1]]
    assert classes(client.ask(Scene(scene.rgb, blocks))) == ["cup"]
    values = client.diagnostic_values(lambda v: v["objects"] == "block, cup", "the new objects")
    assert "onboarded are block, cup" in values["last_unknown_class"]

    for path in meshes.glob("*.ply"):
        path.rename(path.with_suffix(".gone"))
    nothing = client.call("reload_objects", Trigger)
    assert not nothing.success
    assert nothing.message.startswith("nothing changed: ") and "holds no mesh" in nothing.message
    assert len(client.ask(scene).detections) == 2
    (meshes / "block.gone").rename(meshes / "block.ply")
    (meshes.parent / "can.ply").rename(meshes / "can.ply")
    (meshes / "objects.yaml").write_text(objects)
    back = client.call("reload_objects", Trigger)
    assert back.message == "2 objects: added can; removed cup"


# Inputs.


class Segmenter:
    """Publishes segmentations that are images, as a participant of its own: one can't have two types."""

    def __init__(self, domain: int, kind: type) -> None:
        self._context = Context()
        rclpy.init(context=self._context, domain_id=domain)
        self.node = rclpy.create_node("segmenter", namespace=NAMESPACE, context=self._context)
        self.segmentation = self.node.create_publisher(kind, "segmentation", 10)
        latched = QoSProfile(depth=10, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.labels = self.node.create_publisher(Image, "labels", latched)
        self.compressed = self.node.create_publisher(CompressedImage, "image/compressed", 10)

    def close(self) -> None:
        """Leave the graph."""
        self.node.destroy_node()
        self._context.try_shutdown()


@pytest.fixture
def segmenter(request: pytest.FixtureRequest, node: NodeProcess) -> Iterator[Segmenter]:
    segmenter = Segmenter(node.domain, request.param)
    yield segmenter
    segmenter.close()


def connected(client: Client, *publishers: object) -> None:
    client.wait_for(lambda: all(p.get_subscription_count() for p in publishers), "the node's subscriptions")


def labelled(scene: Scene) -> tuple[Detection2DArray, np.ndarray]:
    """The scene's segments as detections with a label image."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint16)
    message = Detection2DArray()
    for index, segment in enumerate(scene.segments):
        labels[segment.mask] = 1000 + index
        detection = Detection2D(id=str(1000 + index))
        result = ObjectHypothesisWithPose()
        result.hypothesis.class_id, result.hypothesis.score = segment.class_id, float(segment.score)
        detection.results = [result]
        message.detections.append(detection)
    return message, labels


@pytest.mark.parametrize("segmenter", [Detection2DArray], indirect=True)
def test_detections_with_a_label_image(
    client: Client, node: NodeProcess, meshes: Path, scene: Scene, segmenter: Segmenter
) -> None:
    configure(client, node, meshes)
    client.wait_until_connected(node)
    expected = client.ask(scene)
    configure(client, node, meshes, segmentation_input="detections")
    connected(client, client.image, client.camera_info, segmenter.segmentation, segmenter.labels)
    message, labels = labelled(scene)
    for labels_first in (False, True):
        stamp = client.send_frame(scene)
        message.header = header(stamp)
        halves = [
            lambda: segmenter.segmentation.publish(message),
            lambda s=stamp: segmenter.labels.publish(image_message(labels, s, "mono16")),
        ]
        for publish in halves[::-1] if labels_first else halves:
            publish()
        answer = client.detections(stamp)
        assert classes(answer) == ["block", "can", "block"]
        np.testing.assert_array_equal(poses(answer), poses(expected))

    message.header = header(client.send_frame(scene))
    segmenter.segmentation.publish(message)
    values = client.diagnostic_values(
        lambda v: int(v["dropped_incomplete_segmentation"]), "the missing label image"
    )
    assert "/cell/segmentation has a message with stamp" in values["last_incomplete_segmentation"]
    # The harness' client goes on publishing another type on this topic, which is told.
    assert any(
        "/cell/client as picopose_ros/msg/SegmentArray, but this node takes vision_msgs/msg/Detection2DArray"
        in value
        for key, value in values.items()
        if key.startswith("problem_")
    )


@pytest.mark.parametrize("segmenter", [Detection2DArray], indirect=True)
def test_boxes_alone(
    client: Client, node: NodeProcess, meshes: Path, scene: Scene, segmenter: Segmenter
) -> None:
    configure(client, node, meshes, segmentation_input="boxes")
    connected(client, client.image, client.camera_info, segmenter.segmentation)
    message, _ = labelled(scene)
    for detection, segment in zip(message.detections, scene.segments, strict=True):
        x, y, w, h = mask_roi(segment.mask)
        detection.bbox.center.position.x, detection.bbox.center.position.y = x + w / 2, y + h / 2
        detection.bbox.size_x, detection.bbox.size_y = float(w), float(h)
    message.detections.append(Detection2D())
    # Boxes before their image, and boxes whose image never comes.
    message.header = header(client.next_stamp())
    segmenter.segmentation.publish(message)
    message.header = header(client.next_stamp())
    segmenter.segmentation.publish(message)
    stamp = client.send_frame(scene, stamp_to_nanoseconds(message.header.stamp))
    assert classes(client.detections(stamp)) == ["block", "can", "block"]
    values = client.diagnostic_values(
        lambda v: "last_bad_segment" in v and "last_no_image" in v, "what can't be used"
    )
    assert "detection 3 ('?') on /cell/segmentation has no result" in values["last_bad_segment"]


def test_yolo_detections(client: Client, node: NodeProcess, meshes: Path, scene: Scene) -> None:
    yolo_msgs = pytest.importorskip("yolo_msgs.msg", reason="yolo_msgs is not installed")
    configure(client, node, meshes, segmentation_input="yolo")
    segmenter = Segmenter(node.domain, yolo_msgs.DetectionArray)
    connected(client, client.image, client.camera_info, segmenter.segmentation)
    named = []
    for places in ((0, 1, 2), (2, 1, 0)):
        message = yolo_msgs.DetectionArray()
        for place, tracked in zip(places, ("4", "5", "6"), strict=True):
            segment = scene.segments[place]
            # On twice the resolution, as a network whose input is larger than the camera's image.
            mask = segment.mask.astype(np.uint8)
            outline = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            found = yolo_msgs.Detection(class_name=segment.class_id, score=0.9, id=tracked)
            found.mask.height, found.mask.width = 2 * HEIGHT, 2 * WIDTH
            found.mask.data = [
                yolo_msgs.Point2D(x=2.0 * x + 1, y=2.0 * y + 1) for x, y in outline[0][0][:, 0].tolist()
            ]
            message.detections.append(found)
        message.detections.append(yolo_msgs.Detection(class_name="line", id="8"))
        message.detections[-1].mask.data = [yolo_msgs.Point2D(), yolo_msgs.Point2D(x=9.0)]
        stamp = client.send_frame(scene)
        message.header = header(stamp)
        segmenter.segmentation.publish(message)
        answer = client.detections(stamp)
        assert classes(answer) == [scene.segments[place].class_id for place in places]
        named.append([detection.id for detection in answer.detections])
    # The two blocks have changed places: they are who the detector says they are.
    assert named[0] == named[1]
    values = client.diagnostic_values(lambda v: "2 points" in v.get("last_bad_segment", ""), "the line")
    assert "('line') on /cell/segmentation: its polygon has 2 points" in values["last_bad_segment"]
    segmenter.close()


@pytest.mark.parametrize("segmenter", [Image], indirect=True)
def test_a_mask_of_a_fixed_class(
    client: Client, node: NodeProcess, meshes: Path, scene: Scene, segmenter: Segmenter
) -> None:
    configure(client, node, meshes)
    client.wait_until_connected(node)
    can = Scene(scene.rgb, scene.segments[1:2])
    expected = client.ask(can)
    configure(client, node, meshes, segmentation_input="mask", mask_class="tin")
    connected(client, client.image, client.camera_info, segmenter.segmentation)
    stamp = client.send_frame(scene)
    mask = 255 * can.segments[0].mask.astype(np.uint8)
    segmenter.segmentation.publish(image_message(mask, stamp, "mono8"))
    answer = client.detections(stamp)
    assert classes(answer) == ["can"]
    np.testing.assert_array_equal(poses(answer), poses(expected))


@pytest.mark.parametrize("segmenter", [SegmentArray], indirect=True)
def test_compressed_images(
    client: Client, node: NodeProcess, meshes: Path, scene: Scene, segmenter: Segmenter
) -> None:
    configure(client, node, meshes)
    client.wait_until_connected(node)
    expected = client.ask(scene)
    configure(client, node, meshes, image_transport="compressed")
    connected(client, segmenter.compressed, client.camera_info, client.segmentation)
    assert client.node.count_subscribers("/cell/image") == 0
    stamp = client.next_stamp()
    png = cv2.imencode(".png", scene.rgb[:, :, ::-1])[1].tobytes()
    client.camera_info.publish(camera_message(stamp))
    segmenter.compressed.publish(CompressedImage(header=header(stamp), format="png", data=png))
    client.send_segments(scene.segments, stamp)
    np.testing.assert_array_equal(poses(client.detections(stamp)), poses(expected))

    broken = client.next_stamp()
    client.camera_info.publish(camera_message(broken))
    segmenter.compressed.publish(CompressedImage(header=header(broken), format="png", data=png[:100]))
    client.send_segments(scene.segments, broken)
    values = client.diagnostic_values(lambda v: int(v["dropped_bad_image"]), "the broken image")
    assert "compressed image on /cell/image/compressed" in values["last_bad_image"]


def test_aliases_map_to_the_meshs_class(active: Client, scene: Scene) -> None:
    renamed = [Segment(name, 0.9, scene.segments[1].mask) for name in ("tin", "41", "can")]
    answer = active.ask(Scene(scene.rgb, renamed))
    assert classes(answer) == ["can"] * 3
    (first, *others) = poses(answer)
    assert all((other == first).all() for other in others)


# QoS.


def test_qos_is_what_the_parameters_say(active: Client) -> None:
    (info,) = active.node.get_subscriptions_info_by_topic("/cell/camera_info")
    assert info.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT
    (image,) = active.node.get_subscriptions_info_by_topic("/cell/image")
    assert image.qos_profile.reliability == ReliabilityPolicy.RELIABLE
    (detections,) = active.node.get_publishers_info_by_topic("/cell/detections")
    assert detections.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL
    name = "qos_overrides./cell/image.subscription.reliability"
    accepted, reason = active.set_parameter(name, "best_effort")
    assert not accepted and "read-only" in reason


def test_who_comes_late_hears_the_objects_symmetries(active: Client) -> None:
    heard: list[String] = []
    latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    active.node.create_subscription(String, "object_symmetries", heard.append, latched)
    active.wait_for(lambda: heard, "the symmetries")
    assert {"block", "can"} <= json.loads(heard[-1].data).keys()


def test_a_qos_that_does_not_fit_is_told_of_either_side_as_long_as_it_lasts(
    active: Client, node: NodeProcess, scene: Scene
) -> None:
    def problems(values: dict[str, str]) -> list[str]:
        return [value for key, value in values.items() if key.startswith("problem_")]

    context = Context()
    rclpy.init(context=context, domain_id=node.domain)
    stranger = rclpy.create_node("stranger", namespace=NAMESPACE, context=context)
    try:
        lossy = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        late = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        stranger.create_publisher(SegmentArray, "segmentation", lossy)
        stranger.create_subscription(MarkerArray, "markers", lambda message: None, late)
        stranger.create_subscription(Detection3DArray, "detections", lambda message: None, late)  # offered
        values = active.diagnostic_values(
            lambda v: len(problems(v)) == 2 == sum("/cell/stranger" in text for text in problems(v)),
            "both problems",
        )
        publisher, subscriber = problems(values)
        for words in (
            "/cell/segmentation is published by /cell/stranger",
            "offered is best_effort and volatile, asked for is reliable and volatile",
            "qos_overrides./cell/segmentation.subscription.<policy>",
        ):
            assert words in publisher
        for words in (
            "/cell/stranger subscribes to /cell/markers",
            "offered is reliable and volatile, asked for is reliable and transient_local",
            "qos_overrides./cell/markers.publisher.<policy>",
        ):
            assert words in subscriber
        status = active.diagnostics["/cell/picopose_node: pose estimation"]
        assert status.level == DiagnosticStatus.WARN
        node.wait_for_log(publisher)
        node.wait_for_log(subscriber)
        assert len(active.ask(scene).detections) == 3  # the others are heard all the same
        active.diagnostic_values(lambda v: len(problems(v)) == 2, "another look")
        assert node.log.count(publisher) == node.log.count(subscriber) == 1
    finally:
        stranger.destroy_node()
        context.try_shutdown()
    active.diagnostic_values(lambda v: not problems(v), "the problems to be gone")


# What is for the eye.


def test_markers_and_overlay_follow_the_instances(active: Client, scene: Scene) -> None:
    markers: list[MarkerArray] = []
    overlays: list[Image] = []
    active.ask(scene)
    values = active.diagnostic_values(lambda v: True, "diagnostics")
    assert "latency_overlay_ms" not in values  # nobody looks
    subscriptions = [
        active.node.create_subscription(MarkerArray, "markers", markers.append, 50),
        active.node.create_subscription(Image, "overlay", overlays.append, 10),
    ]
    connected_to = ("/cell/markers", "/cell/overlay")
    active.wait_for(lambda: all(active.node.count_publishers(t) for t in connected_to), "the publishers")

    def seen() -> bool:
        active.ask(scene)
        return bool(overlays) and any(message.markers for message in markers)

    active.wait_for(seen, "markers and overlay")
    picture = overlays[-1]
    assert picture.header.frame_id == CAMERA_FRAME
    assert (picture.width, picture.height, picture.encoding) == (WIDTH, HEIGHT, "rgb8")
    assert not np.array_equal(np.frombuffer(picture.data, np.uint8).reshape(scene.rgb.shape), scene.rgb)
    added = [m for message in markers for m in message.markers if m.action == Marker.ADD]
    meshes = [m for m in added if m.type == Marker.MESH_RESOURCE]
    assert {m.ns for m in meshes} == {"block", "can"}
    assert all(Path(m.mesh_resource.removeprefix("file://")).is_file() for m in meshes)
    # Nothing more comes: the instances retire, and with them their markers.
    last = {(m.ns, m.id) for m in meshes[-3:]}

    def deleted() -> bool:
        gone = {(m.ns, m.id) for m in markers[-1].markers if m.action == Marker.DELETE}
        return last <= gone

    active.wait_for(deleted, "the markers to be deleted")
    for subscription in subscriptions:
        active.node.destroy_subscription(subscription)
