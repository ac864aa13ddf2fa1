"""Both nodes in one process over DDS: images become segments and those poses; bad input is survived."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from node_harness import (
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
from picopose_ros.msg import SegmentArray
from vision_msgs.msg import Detection2D, Detection2DArray

from picopose_ros.messages.segmentations import segments_from_message
from picopose_ros.node.conversions import stamp_to_nanoseconds
from picopose_ros.segmentation import mask_roi

NAMESPACE = "/cell"
NODES = ("picopose_node", "segmenter_node")


@pytest.fixture(scope="module")
def node(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """picopose_node and segmenter_node in one process; proposals are the boxes of another detector."""
    folder = tmp_path_factory.mktemp("both")
    own = {"segmenter.proposals": "boxes", "segmenter.rate": 0, "segmenter.min_score": 0}
    own["buffer_seconds"] = 120.0  # on a machine that is busy the segments may come late
    # A whole number for a real parameter, as a user writes it.
    with running_node(folder, next_domain(), NAMESPACE, NODES, **{**QUICK, **assets, **own}) as process:
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


@pytest.fixture(scope="module")
def client(node: NodeProcess) -> Iterator[Client]:
    client = Client(node.domain, NAMESPACE)
    client.boxes = client.node.create_publisher(Detection2DArray, "boxes", 10)
    client.segments = {}

    def keep(message: SegmentArray) -> None:
        client.segments[stamp_to_nanoseconds(message.header.stamp)] = message

    client.node.create_subscription(SegmentArray, "segmentation", keep, 10)
    client.wait_until_connected(node)
    client.wait_for(
        lambda: client.boxes.get_subscription_count() and client.image.get_subscription_count() == 2,
        "the segmenter's subscriptions",
    )
    yield client
    client.close()


def boxes(scene: Scene, stamp: int) -> Detection2DArray:
    """The scene's boxes, without classes."""
    message = Detection2DArray(header=header(stamp))
    for segment in scene.segments:
        x, y, w, h = mask_roi(segment.mask)
        detection = Detection2D()
        detection.bbox.center.position.x, detection.bbox.center.position.y = x + w / 2, y + h / 2
        detection.bbox.size_x, detection.bbox.size_y = float(w), float(h)
        message.detections.append(detection)
    return message


def ask(client: Client, scene: Scene, message: Detection2DArray | None = None) -> int:
    """Send an image and its boxes; the stamp."""
    stamp = client.send_frame(scene)
    client.boxes.publish(boxes(scene, stamp) if message is None else message)
    return stamp


def segmenter(client: Client) -> dict[str, str]:
    """The segmenter's last diagnostics."""
    status = client.diagnostics.get(f"{NAMESPACE}/segmenter_node: segmentation")
    return {} if status is None else {value.key: value.value for value in status.values}


def test_images_become_segments_and_those_poses(client: Client, scene: Scene) -> None:
    stamp = ask(client, scene)
    message = client.wait_for(lambda: client.segments.get(stamp), "segments")
    assert (message.height, message.width) == (HEIGHT, WIDTH)
    found, bad = segments_from_message(message, HEIGHT, WIDTH, "/segmentation")
    assert found and not bad and {segment.class_id for segment in found} <= {"block", "can"}
    seen = np.any([segment.mask for segment in scene.segments], axis=0)
    assert all((segment.mask & seen).any() for segment in found)
    answer = client.detections(stamp)
    assert len(answer.detections) == len(found)


def test_the_newest_boxes_win(client: Client, scene: Scene) -> None:
    stamps = [ask(client, scene) for _ in range(6)]
    client.wait_for(lambda: client.segments.get(stamps[-1]), "the newest")
    assert sum(stamp in client.segments for stamp in stamps) < len(stamps)


def test_what_can_not_be_used_is_named_and_survived(client: Client, scene: Scene) -> None:
    # Nothing proposed is an answer, too.
    nothing = ask(client, scene, Detection2DArray(header=header(client.next_stamp())))
    empty = Detection2DArray(header=header(nothing))
    client.boxes.publish(empty)
    assert client.wait_for(lambda: client.segments.get(nothing), "an empty answer").segments == []
    # The boxes before were of an image that never came.
    values = client.wait_for(lambda: segmenter(client) if "last_no_image" in segmenter(client) else None, "")
    assert "of boxes on /cell/boxes: the detector must copy" in values["last_no_image"]

    stamp = client.send_frame(scene)
    wrong = boxes(scene, stamp)
    wrong.detections[0].bbox.size_x = 0.0
    wrong.detections[1].bbox.center.position.x = -500.0
    client.boxes.publish(wrong)
    client.wait_for(lambda: client.segments.get(stamp), "the rest of the boxes")
    stamp = client.next_stamp()
    client.image.publish(image_message(scene.rgb, stamp, "snow8"))
    client.camera_info.publish(camera_message(stamp))
    client.boxes.publish(boxes(scene, stamp))
    wanted = {"last_bad_segment": "no area", "last_empty_mask": "outside", "last_bad_image": "snow8"}
    client.wait_for(lambda: set(wanted) <= set(segmenter(client)), "all of it in the diagnostics")
    for key, says in wanted.items():
        assert says in segmenter(client)[key]
    again = ask(client, scene)
    client.wait_for(lambda: client.segments.get(again), "segments as before")


def test_the_segmenter_says_what_it_does(client: Client, node: NodeProcess, scene: Scene) -> None:
    client.wait_for(lambda: int(segmenter(client).get("images_segmented", 0)) > 0, "its diagnostics")
    values = segmenter(client)
    assert values["proposals"] == "boxes" and values["objects"] == "block, can"
    assert "latency_match_ms" in values and values["state"] == "active"
    assert "segmenter_node ready: listening to /cell/image" in node.log
    assert "there is no parameter" not in node.log, "the nodes' parameters may stand in one file"
