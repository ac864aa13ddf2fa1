"""The node over DDS, between processes: what comes back for what is sent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from node_harness import (
    CAMERA_FRAME,
    HEIGHT,
    QUICK,
    WIDTH,
    Client,
    NodeProcess,
    Scene,
    camera_message,
    header,
    image_message,
    next_domain,
    running_node,
)
from node_publisher import save_scene
from rclpy.qos import ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from vision_msgs.msg import Detection3DArray

from picopose_ros.segmentation import Segment

NAMESPACE = "/cell"
PREFIX = "left/"
NODE = {"tf_prefix": PREFIX}


def ids(detections: Detection3DArray) -> list[str]:
    return [detection.id for detection in detections.detections]


def frame_of(name: str) -> str:
    """TF frame of an instance: objects.yaml gives the can another name there."""
    return name.replace("can_", "tin_can_")


def poses(detections: Detection3DArray) -> np.ndarray:
    """(n, 7) positions and quaternions."""
    rows = []
    for detection in detections.detections:
        p, q = detection.results[0].pose.pose.position, detection.results[0].pose.pose.orientation
        rows.append([p.x, p.y, p.z, q.x, q.y, q.z, q.w])
    return np.array(rows)


def test_it_says_when_it_is_ready_and_which_mesh_it_left_out(client: Client, node: NodeProcess) -> None:
    node.wait_for_log("picopose_node ready: 2 objects (block, can), tiny on cpu")
    assert node.log.count("configuration:") == 1
    (line,) = [line for line in node.log.splitlines() if "crumpled.ply" in line]
    assert "object 'crumpled' is left out" in line


def test_a_late_segmentation_is_answered_for_its_own_image(client: Client, scene: Scene) -> None:
    dark = Scene(scene.rgb // 8, scene.segments)
    answer, tries = None, 0
    while answer is None and tries < 8:  # of three images at once one may get lost: best effort
        before, stamp, after = client.send_frame(dark), client.send_frame(scene), client.send_frame(dark)
        started = time.monotonic()
        client.wait_for(lambda since=started: time.monotonic() > since + 0.3, "a segmenter's 300 ms")
        client.send_segments(scene.segments, stamp)
        answer, tries = client.detections_within(stamp, 30.0), tries + 1
    assert answer is not None, f"{tries} segmentations came to nothing"
    assert not client.answered(before)
    assert not client.answered(after)
    assert answer.header.frame_id == CAMERA_FRAME
    assert ids(answer) == ["block_0", "can_0", "block_1"]
    for detection, segment in zip(answer.detections, scene.segments, strict=True):
        assert detection.header == answer.header
        (result,) = detection.results
        assert result.hypothesis.class_id == segment.class_id
        assert 0.0 <= result.hypothesis.score <= 1.0
        covariance = result.pose.covariance.reshape(6, 6)
        np.testing.assert_allclose(covariance, covariance.T)
        assert (np.linalg.eigvalsh(covariance) > 0).all()
    # The boxes are the meshes' own: 6 x 8 x 11 cm, and 7 cm wide and 10 cm high.
    sizes = [detection.bbox.size for detection in answer.detections]
    np.testing.assert_allclose([sizes[0].x, sizes[0].y, sizes[0].z], [0.06, 0.08, 0.11], atol=1e-4)
    np.testing.assert_allclose([sizes[1].x, sizes[1].y, sizes[1].z], [0.07, 0.07, 0.1], atol=1e-3)

    # The same stamp, the same image: what differs is what the network saw of it.
    np.testing.assert_array_equal(poses(answer), poses(client.ask(scene)))
    assert not np.array_equal(poses(answer), poses(client.ask(dark)))


def test_tf_says_the_same_as_the_detections(client: Client, scene: Scene) -> None:
    answer = client.ask(scene)
    transforms = client.transforms(client.stamp_of(answer), 3)
    assert [transform.child_frame_id for transform in transforms] == [
        PREFIX + frame_of(name) for name in ids(answer)
    ]
    for transform, detection in zip(transforms, answer.detections, strict=True):
        assert transform.header == answer.header
        t, p = transform.transform.translation, detection.results[0].pose.pose.position
        assert (t.x, t.y, t.z) == (p.x, p.y, p.z)
        assert transform.transform.rotation == detection.results[0].pose.pose.orientation


def test_names_stay_with_the_objects_when_the_segmenter_shuffles(client: Client, scene: Scene) -> None:
    first = client.ask(scene)
    shuffled = client.ask(Scene(scene.rgb, scene.segments[::-1]))
    assert ids(shuffled) == ids(first)[::-1]
    np.testing.assert_allclose(poses(shuffled), poses(first)[::-1], atol=1e-6)


def test_a_segmentation_may_come_before_its_image(client: Client, scene: Scene) -> None:
    stamp = client.next_stamp()
    client.send_segments(scene.segments[:1], stamp)
    client.send_frame(scene, stamp)
    assert len(client.detections(stamp).detections) == 1


def test_nothing_seen_is_an_answer_too(client: Client, scene: Scene) -> None:
    assert client.ask(Scene(scene.rgb, [])).detections == []


@pytest.mark.parametrize(
    ("encoding", "channels"), [("bgr8", [2, 1, 0]), ("rgba8", [0, 1, 2, 0]), ("bgra8", [2, 1, 0, 0])]
)
def test_every_colour_encoding_gives_the_same_poses(
    client: Client, scene: Scene, encoding: str, channels: list[int]
) -> None:
    stamp = client.next_stamp()
    client.image.publish(image_message(scene.rgb[:, :, channels], stamp, encoding))
    client.camera_info.publish(camera_message(stamp))
    client.send_segments(scene.segments, stamp)
    np.testing.assert_array_equal(poses(client.detections(stamp)), poses(client.ask(scene)))


@pytest.mark.parametrize("encoding", ["mono8", "mono16", "bayer_rggb8"])
def test_grey_and_raw_images_are_answered(client: Client, scene: Scene, encoding: str) -> None:
    pixels = scene.rgb[:, :, 1].astype(np.uint16) << 8 if encoding == "mono16" else scene.rgb[:, :, 1]
    stamp = client.next_stamp()
    client.image.publish(image_message(pixels, stamp, encoding))
    client.camera_info.publish(camera_message(stamp))
    client.send_segments(scene.segments[:1], stamp)
    assert ids(client.detections(stamp)) == ["block_0"]


def test_a_mask_over_the_border_is_answered(client: Client, scene: Scene) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:80, WIDTH - 60 :] = True
    assert len(client.ask(Scene(scene.rgb, [Segment("can", 1.0, mask)])).detections) == 1


def test_newest_wins_when_segmentations_come_too_fast(client: Client, scene: Scene) -> None:
    stamps = [client.send_frame(scene) for _ in range(8)]
    for stamp in stamps:
        client.send_segments(scene.segments, stamp)
    client.detections(stamps[-1])
    values = client.diagnostic_values(
        lambda v: int(v["pairs_made"]) == int(v["segmentations_answered"]) + int(v.get("dropped_busy", 0)),
        "every pair to be answered or counted",
    )
    assert int(values["dropped_busy"]) >= 1
    answered = [client.answered(stamp) for stamp in stamps]
    assert not all(answered)


def test_scores_and_tf_can_be_changed_while_it_runs(client: Client, scene: Scene) -> None:
    assert client.set_parameter("min_score", 1.0) == (True, "")
    surest = client.ask(scene).detections  # an untrained network may be certain of one
    assert client.set_parameter("min_score", 0.0) == (True, "")
    assert len(surest) < 3 and all(d.results[0].hypothesis.score >= 1.0 for d in surest)
    assert client.set_parameter("publish_tf", False) == (True, "")
    silent = client.ask(scene)
    assert client.set_parameter("publish_tf", True) == (True, "")
    spoken = client.ask(scene)
    assert len(silent.detections) == len(spoken.detections) == 3
    client.transforms(client.stamp_of(spoken), 3)
    assert not client.has_transforms(client.stamp_of(silent))


def test_bad_parameter_values_are_refused_with_a_reason(client: Client) -> None:
    for name, value, reason in (
        ("min_score", 1.5, "range"),
        ("unit", "mm", "while the node is unconfigured, and it is active"),
        ("autostart", False, "read-only"),
        ("hypotheses", 0, "range"),
        ("hypotheses", 2.5, "type"),
        ("instance_timeout", float("nan"), "range"),
        ("smoothing.translation", -1.0, "range"),
    ):
        accepted, message = client.set_parameter(name, value)
        assert not accepted
        assert reason in message


def test_diagnostics_hold_state_counters_and_latencies(client: Client, scene: Scene) -> None:
    client.ask(scene)
    values = client.diagnostic_values(lambda v: int(v["poses_published"]) >= 3, "poses in the diagnostics")
    assert values["state"] == "active"
    assert values["objects"] == "block, can"
    assert int(values["images_received"]) >= int(values["pairs_made"]) >= 1
    assert {f"latency_{stage}_ms" for stage in ("pair", "queue", "encode", "pnp", "total")} <= values.keys()


def test_publisher_killed_and_restarted(
    client: Client, node: NodeProcess, scene: Scene, tmp_path: Path
) -> None:
    save_scene(scene, str(tmp_path / "scene.npz"))
    program = Path(__file__).with_name("node_publisher.py")
    environment = {**os.environ, "ROS_DOMAIN_ID": str(node.domain), "OMP_NUM_THREADS": "1"}

    def publish_until_answered() -> None:
        since = time.time_ns()
        command = [sys.executable, str(program), str(tmp_path / "scene.npz"), NAMESPACE]
        process = subprocess.Popen(command, env=environment)
        try:
            client.wait_for(lambda: client.answered_since(since) >= 2, "answers to the other process")
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    publish_until_answered()
    publish_until_answered()
    assert len(client.ask(scene).detections) == 3


def test_a_best_effort_bag_that_loops_on_simulated_time(
    assets: dict[str, Path], scene: Scene, tmp_path: Path
) -> None:
    domain = next_domain()
    with running_node(tmp_path, domain, "/sim", **{**QUICK, **assets}, use_sim_time=True) as node:
        client = Client(domain, "/sim", ReliabilityPolicy.BEST_EFFORT)
        try:
            client.wait_until_listening(node)
            node.wait_for_log("/sim/image is published best effort")
            clock = client.node.create_publisher(Clock, "/clock", 10)
            start = client.next_stamp()
            for loop in range(2):
                for second in (0, 3):
                    # Best effort may lose an image; a camera sends the next one.
                    answer, tries = None, 0
                    while answer is None:
                        stamp = start + second * 10**9 + (100 * loop + tries) * 10**6
                        clock.publish(Clock(clock=header(stamp).stamp))
                        client.send_frame(scene, stamp)
                        client.send_segments(scene.segments, stamp)
                        answer, tries = client.detections_within(stamp, 5.0), tries + 1
                    assert ids(answer) == ["block_0", "can_0", "block_1"]
            values = client.diagnostic_values(lambda v: int(v["time_jumps"]), "the jump")
            assert values["time_jumps"] == "1"
            assert node.log.count("time has jumped back") == 1
            stamp = client.diagnostic_stamp
            assert start <= stamp < start + 60 * 10**9
        finally:
            client.close()
        assert node.stop() == 0
