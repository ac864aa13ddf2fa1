"""Nothing that arrives ends the node, floods its log, or keeps it from answering the next good frame."""

from __future__ import annotations

import array
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from node_harness import (
    HEIGHT,
    WIDTH,
    Client,
    K,
    NodeProcess,
    Scene,
    camera_message,
    image_message,
    make_scene,
    segments_message,
    send_to,
)
from picopose_ros.msg import SegmentArray
from sensor_msgs.msg import CameraInfo, Image
from vision_msgs.msg import Detection3DArray

from picopose_ros.segmentation import Segment

NAMESPACE = "/cell"
BUFFER_IMAGES = 20
NODE = {"buffer_seconds": 60.0, "buffer_images": BUFFER_IMAGES}
REPEATS = 25
LOG_INTERVAL = 10.0
"""Seconds in which a reason may be logged once."""


@pytest.fixture(scope="module")
def scene(assets: dict[str, Path]) -> Scene:
    """One block."""
    scene = make_scene(assets["mesh_dir"])
    return Scene(scene.rgb, scene.segments[:1])


# Each sends one bad thing, from which no pose can come.

Sender = Callable[[Client, Scene], None]


def send(
    client: Client,
    scene: Scene,
    image: Callable[[int], Image] | None = None,
    camera: Callable[[int], CameraInfo] | None = None,
    segmentation: Callable[[int], SegmentArray] | None = None,
) -> None:
    """One frame with some of its messages replaced."""
    stamp = client.next_stamp()
    send_to(client.image, image(stamp) if image else image_message(scene.rgb, stamp))
    send_to(client.camera_info, camera(stamp) if camera else camera_message(stamp))
    masks = segmentation(stamp) if segmentation else segments_message(scene.segments, stamp)
    send_to(client.segmentation, masks)


def zero_intrinsics(client: Client, scene: Scene) -> None:
    send(client, scene, camera=lambda stamp: camera_message(stamp, np.zeros((3, 3))))


def nan_intrinsics(client: Client, scene: Scene) -> None:
    send(client, scene, camera=lambda stamp: camera_message(stamp, np.full((3, 3), np.nan)))


def camera_of_another_size(client: Client, scene: Scene) -> None:
    send(client, scene, camera=lambda stamp: camera_message(stamp, K, 2 * HEIGHT, 2 * WIDTH))


def unknown_encoding(client: Client, scene: Scene) -> None:
    send(client, scene, image=lambda stamp: image_message(scene.rgb, stamp, "snow8"))


def truncated_image(client: Client, scene: Scene) -> None:
    def image(stamp: int) -> Image:
        message = image_message(scene.rgb, stamp)
        message.data = message.data[: len(message.data) // 2]
        return message

    send(client, scene, image=image)


def image_without_pixels(client: Client, scene: Scene) -> None:
    send(client, scene, image=lambda stamp: image_message(np.zeros((1, 0, 3), np.uint8), stamp))


def mask_of_another_size(client: Client, scene: Scene) -> None:
    small = [Segment("block", 0.9, scene.segments[0].mask[::2, ::2])]
    send(client, scene, segmentation=lambda stamp: segments_message(small, stamp, HEIGHT // 2, WIDTH // 2))


def segments_with(mask: np.ndarray, class_id: str = "block") -> Sender:
    return lambda client, scene: send(
        client, scene, segmentation=lambda stamp: segments_message([Segment(class_id, 0.9, mask)], stamp)
    )


def empty_mask(client: Client, scene: Scene) -> None:
    segments_with(np.zeros((HEIGHT, WIDTH), bool))(client, scene)


def small_mask(client: Client, scene: Scene) -> None:
    segments_with(five_pixels())(client, scene)


def five_pixels() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[100, 100:105] = True
    return mask


def unknown_class(client: Client, scene: Scene) -> None:
    segments_with(scene.segments[0].mask, "fork")(client, scene)


def broken_run_lengths(client: Client, scene: Scene) -> None:
    def segmentation(stamp: int) -> SegmentArray:
        message = segments_message(scene.segments, stamp)
        message.segments[0].encoding = 0
        message.segments[0].rle = array.array("I", [3, 4, 2**32 - 1])
        return message

    send(client, scene, segmentation=segmentation)


def image_never_came(client: Client, scene: Scene) -> None:
    client.send_segments(scene.segments, client.next_stamp())


BAD = {
    "uncalibrated": [zero_intrinsics],
    "bad_camera_info": [nan_intrinsics, camera_of_another_size],
    "bad_image": [unknown_encoding, truncated_image, image_without_pixels],
    "mask_size": [mask_of_another_size],
    "empty_mask": [empty_mask],
    "small_mask": [small_mask],
    "unknown_class": [unknown_class],
    "bad_segment": [broken_run_lengths],
    "no_image": [image_never_came],
}


SAYS: dict[Sender, str] = {
    zero_intrinsics: "focal lengths are 0 and 0",
    nan_intrinsics: "NaN",
    camera_of_another_size: f"{2 * WIDTH}x{2 * HEIGHT}",
    unknown_encoding: f"{NAMESPACE}/image has encoding 'snow8'",
    truncated_image: f"{NAMESPACE}/image is truncated",
    image_without_pixels: "0x1 pixels",
    mask_of_another_size: f"{WIDTH // 2}x{HEIGHT // 2}",
    empty_mask: "empty mask",
    small_mask: "5 pixels",
    unknown_class: "onboarded are block, can",
    broken_run_lengths: "run lengths",
    image_never_came: "header.stamp",
}

UNPAIRED = ("no_image", "image_left_buffer", "no_camera_info")
REJECTED = ("busy", "bad_image", "uncalibrated", "bad_camera_info", "mask_size")


def total(values: dict[str, str], reasons: tuple[str, ...]) -> int:
    return sum(int(values.get(f"dropped_{reason}", 0)) for reason in reasons)


def settled(values: dict[str, str]) -> bool:
    """Whether every segmentation that came in was answered or counted."""
    received, pairs = int(values["segmentations_received"]), int(values["pairs_made"])
    answered = int(values["segmentations_answered"])
    return received == pairs + total(values, UNPAIRED) and pairs == answered + total(values, REJECTED)


def answered(client: Client, scene: Scene) -> Detection3DArray:
    """The answer to a good frame after a burst of bad ones.

    On a busy machine the burst delays the frame's camera_info for longer than the node waits for it; then the
    frame is counted like those before it, and the next one is answered.
    """
    for _ in range(5):
        stamp = client.send_frame(scene)
        client.send_segments(scene.segments, stamp)
        if answer := client.detections_within(stamp, 20.0):
            return answer
        client.diagnostic_values(settled, "the good frame to be counted")
    raise AssertionError("no good frame is answered")


@pytest.mark.parametrize("reason", BAD)
def test_it_is_counted_logged_once_and_the_next_good_frame_is_answered(
    client: Client, node: NodeProcess, scene: Scene, reason: str
) -> None:
    before = total(client.diagnostic_values(settled, "a quiet node"), (reason,))
    lines, started = node.lines(reason), time.monotonic()
    for sender in BAD[reason]:
        for _ in range(REPEATS):
            sender(client, scene)
    assert [detection.id for detection in answered(client, scene).detections] == ["block_0"]

    # All of a burst but the newest may be overtaken, and counted as that; one by itself is not.
    client.diagnostic_values(settled, "everything to be answered or counted")
    BAD[reason][0](client, scene)
    client.diagnostic_values(lambda v: settled(v) and total(v, (reason,)) > before, f"{reason} to be counted")
    assert node.lines(reason) >= 1
    assert node.lines(reason) - lines <= 1 + int((time.monotonic() - started) / LOG_INTERVAL)


@pytest.mark.parametrize("sender", [sender for senders in BAD.values() for sender in senders])
def test_each_kind_has_a_message_that_says_what_is_wrong(
    client: Client, scene: Scene, sender: Sender
) -> None:
    (reason,) = (reason for reason, senders in BAD.items() if sender in senders)
    before = total(client.diagnostic_values(settled, "a quiet node"), (reason,))
    sender(client, scene)
    values = client.diagnostic_values(lambda v: total(v, (reason,)) == before + 1, f"{reason} to be counted")
    assert SAYS[sender] in values[f"last_{reason}"]


def test_the_image_of_a_segmentation_left_the_buffer(client: Client, node: NodeProcess, scene: Scene) -> None:
    values = client.diagnostic_values(settled, "a quiet node")
    received, before = int(values["images_received"]), total(values, ("image_left_buffer",))
    lines, started = node.lines("image_left_buffer"), time.monotonic()
    old = client.send_frame(scene)

    def newer_images() -> bool:
        for _ in range(8):  # fewer than either side queues
            client.image.publish(image_message(np.zeros((2, 2, 3), np.uint8), client.next_stamp()))
        values = client.diagnostic_values(lambda v: True, "diagnostics")
        return int(values["images_received"]) > received + BUFFER_IMAGES + 1

    client.wait_for(newer_images, "the buffer to fill")
    for _ in range(REPEATS):
        client.send_segments(scene.segments, old)
    values = client.diagnostic_values(
        lambda v: total(v, ("image_left_buffer",)) == before + REPEATS, "image_left_buffer to be counted"
    )
    assert "raise buffer_seconds or buffer_images" in values["last_image_left_buffer"]
    assert node.lines("image_left_buffer") - lines <= 1 + int((time.monotonic() - started) / LOG_INTERVAL)
    assert len(client.ask(scene).detections) == 1


def test_a_bad_segment_does_not_take_the_good_ones_with_it(client: Client, scene: Scene) -> None:
    stamp = client.send_frame(scene)
    broken = segments_message(
        [
            Segment("fork", 0.9, scene.segments[0].mask),
            scene.segments[0],
            Segment("block", 0.9, five_pixels()),
            scene.segments[0],
        ],
        stamp,
    )
    broken.segments[3].roi.x_offset = WIDTH
    client.segmentation.publish(broken)
    assert [detection.id for detection in client.detections(stamp).detections] == ["block_0"]


@pytest.mark.parametrize("frame_id", ["", "/camera"])
def test_a_frame_that_tf_can_not_have_still_gives_detections(
    client: Client, node: NodeProcess, scene: Scene, frame_id: str
) -> None:
    stamp = client.next_stamp()
    image = image_message(scene.rgb, stamp)
    image.header.frame_id = frame_id
    client.image.publish(image)
    client.camera_info.publish(camera_message(stamp))
    client.send_segments(scene.segments, stamp)
    assert client.detections(stamp).header.frame_id == frame_id
    client.transforms(client.stamp_of(client.ask(scene)), 1)
    assert not client.has_transforms(stamp)
    assert node.lines("bad_frame_id") >= 1
