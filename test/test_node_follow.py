"""Following over DDS: images without masks are answered, late masks, loss, recovery, reset, a clock
that is set back, and what a grasp planner hears of all that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from node_harness import (
    HEIGHT,
    WIDTH,
    Client,
    K,
    NodeProcess,
    Scene,
    die_with_parent,
    header,
    next_domain,
    running_node,
)
from rosgraph_msgs.msg import Clock
from std_srvs.srv import Trigger
from vision_msgs.msg import Detection3DArray

from picopose_ros.messages import bags
from picopose_ros.segmentation import Segment
from picopose_ros.templates.meshes import discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer

NAMESPACE = "/follow"


class Film:
    """Blocks that move in front of a wall."""

    def __init__(self, mesh_dir: Path) -> None:
        self._mesh = next(load_object(s) for s in discover_objects(mesh_dir) if s.class_id == "block")
        self._wall = np.random.default_rng(6).integers(60, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        self._renderer = MeshRenderer()

    def scene(self, *xs: float) -> Scene:
        """Blocks with their middles at these places, 0.45 m away."""
        rgb, segments = self._wall.copy(), []
        for x in xs:
            T_cam_obj = trimesh.transformations.rotation_matrix(0.7, [1, 2, 0.5])
            T_cam_obj[:3, 3] = [x, 0.0, 0.45]
            view = self._renderer.render(self._mesh, T_cam_obj, K, WIDTH, HEIGHT)
            rgb[view.mask] = view.rgb[view.mask]
            segments.append(Segment("block", 0.9, view.mask))
        return Scene(rgb, segments)


@pytest.fixture(scope="module")
def film(assets: dict[str, Path]) -> Film:
    return Film(assets["mesh_dir"])


@pytest.fixture(scope="module")
def node(assets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    folder = tmp_path_factory.mktemp("follow")
    (folder / "meshes").mkdir()
    shutil.copy(assets["mesh_dir"] / "block.ply", folder / "meshes")
    parameters = {
        "device": "cpu",
        "viewpoints": 42,
        "hypotheses": 3,
        "mesh_dir": folder / "meshes",
        "cache_dir": folder / "cache",
        "follow": True,
        "instance_timeout": 100.0,
        "buffer_seconds": 100.0,
        "use_sim_time": True,
    }
    with running_node(folder, next_domain(), NAMESPACE, **parameters) as process:
        yield process
        assert process.stop() == 0
        assert "Traceback" not in process.log


class Planner:
    """A grasp planner, a process that listens to all that the node says on /tf and detections."""

    def __init__(self, folder: Path, domain: int) -> None:
        self._bag = folder / "planner"
        program = Path(__file__).with_name("grasp_planner.py")
        command = [sys.executable, str(program), str(self._bag), f"{NAMESPACE}/detections"]
        environment = {**os.environ, "ROS_DOMAIN_ID": str(domain)}
        self.process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)

    def heard(self) -> tuple[list[Any], list[Any]]:
        """Transforms and detections in the order in which they came; the process has ended then."""
        self.process.terminate()
        assert self.process.wait(60) == 0
        with bags.BagReader(self._bag) as reader:
            transforms = [t for _, _, message in reader.messages(["/tf"]) for t in message.transforms]
            return transforms, [m for _, _, m in reader.messages([f"{NAMESPACE}/detections"])]


@pytest.fixture(scope="module")
def planner(node: NodeProcess, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    planner = Planner(tmp_path_factory.mktemp("planner"), node.domain)
    topic = f"{NAMESPACE}/detections"
    client.wait_for(lambda: client.node.count_subscribers(topic) == 2, "the planner's subscription")
    yield planner
    planner.process.kill()
    planner.process.wait()


def positions(answer: Detection3DArray) -> dict[str, float]:
    """By id, x in metres."""
    return {one.id: one.results[0].pose.pose.position.x for one in answer.detections}


def test_images_without_masks_are_answered(client: Client, film: Film, planner: Planner) -> None:
    first = client.ask(film.scene(-0.05, 0.08))
    names = list(positions(first))
    assert names == ["block_0", "block_1"]
    for n in range(1, 4):
        stamp = client.send_frame(film.scene(-0.05 + 0.004 * n, 0.08))
        answer = client.detections(stamp)
        assert list(positions(answer)) == names
        moved = positions(answer)["block_0"] - positions(first)["block_0"]
        assert moved == pytest.approx(0.004 * n, abs=0.008)
        assert [t.child_frame_id for t in client.transforms(stamp, 2)] == names
    values = client.diagnostic_values(lambda v: "block_1: " in v["following"], "what is followed")
    assert values["following"].startswith("block_0: followed since ")


def test_a_late_mask_names_and_adds_and_tf_never_goes_back(client: Client, film: Film) -> None:
    """Of an image before those that were answered meanwhile; a third block is new in it."""
    known = client.ask(film.scene(-0.05, 0.08))
    late = client.send_frame(film.scene(-0.05, 0.08))
    client.detections(late)
    newest = client.send_frame(film.scene(-0.05, 0.08))
    client.detections(newest)
    client.send_segments(film.scene(-0.05, 0.08).segments[::-1], late)
    client.diagnostic_values(lambda v: v["following"].count(f"mask {late * 1e-9:.3f}") == 2, "the masks")
    after = client.send_frame(film.scene(-0.05, 0.08))
    answer = client.detections(after)
    assert positions(answer).keys() == positions(known).keys()
    for name, x in positions(answer).items():
        assert x == pytest.approx(positions(known)[name], abs=0.02)
    assert client.answers[late] == client.answers[newest] == 1
    assert not [one for stamp in (late, newest) for one in client.transforms(stamp, 2)[2:]]


def test_what_is_gone_is_not_published_and_found_again(client: Client, film: Film) -> None:
    client.call("reset", Trigger)
    client.ask(film.scene(0.0))
    client.detections(client.send_frame(film.scene(0.0)))
    # It may be uncertain for a second.
    images = (client.detections(client.send_frame(film.scene())) for _ in range(40))
    assert not next(answer for answer in images if not answer.detections).detections
    client.diagnostic_values(lambda v: "block_0: lost since" in v["following"], "the loss")
    back = client.detections(client.send_frame(film.scene(0.0)))
    assert len(back.detections) >= 1


def test_reset_forgets_all(client: Client, film: Film) -> None:
    client.ask(film.scene(0.0))
    response = client.call("reset", Trigger)
    assert response.success and "block_0" in response.message
    silent = client.send_frame(film.scene(0.0))
    assert list(positions(client.ask(film.scene(-0.05, 0.08)))) == ["block_0", "block_1"]
    assert not client.answered(silent)


def test_switched_off_images_without_masks_are_not_answered(client: Client, film: Film) -> None:
    client.ask(film.scene(0.0))
    assert client.set_parameter("follow", False) == (True, "")
    silent = client.send_frame(film.scene(0.0))
    client.ask(film.scene(0.0))
    assert not client.answered(silent)
    assert client.set_parameter("follow", True) == (True, "")


# The end of a recording that starts over, and what was heard.


def test_a_recording_that_starts_over_is_followed_anew(node: NodeProcess, client: Client, film: Film) -> None:
    """With its clock; what was followed before is forgotten, and no transform is of the time before."""
    clock = client.node.create_publisher(Clock, "/clock", 10)
    client.wait_for(clock.get_subscription_count, "the node's use of simulated time")
    start = client.next_stamp() - 60_000_000_000

    def send(number: int, scene: Scene) -> int:
        stamp = start + number * 100_000_000
        clock.publish(Clock(clock=header(stamp).stamp))
        return client.send_frame(scene, stamp)

    for loop in range(2):
        jumps = client.count("time_jumps")
        if loop:
            start -= 10_000_000_000
        silent = send(0, film.scene(0.0))
        client.diagnostic_values(lambda v: int(v["time_jumps"]) > jumps, "the jump")  # noqa: B023
        client.diagnostic_values(lambda v: v["following"] == "", "that nothing is followed")
        assert not client.answered(silent)
        stamp = send(1, film.scene(0.0))
        client.send_segments(film.scene(0.0).segments, stamp)
        assert list(positions(client.detections(stamp))) == ["block_0"]
        assert list(positions(client.detections(send(2, film.scene(0.0))))) == ["block_0"]
    assert node.alive


def test_what_a_planner_hears_is_in_order(planner: Planner) -> None:
    """Of everything above: each frame once per image, where the detection says, never back in time but where
    the recording started over."""
    transforms, detections = planner.heard()
    said = {
        (bags.stamp_of(message), one.id): one.results[0].pose.pose.position
        for message in detections
        for one in message.detections
    }
    assert len(said) == sum(len(message.detections) for message in detections) > 15
    sent = [(bags.stamp_of(t), t.child_frame_id) for t in transforms]
    assert max(Counter(sent).values()) == 1 and set(sent) == set(said)
    for transform, key in zip(transforms, sent):
        assert transform.header.frame_id == "camera_optical"
        assert transform.transform.translation.x == pytest.approx(said[key].x, abs=1e-9)
    for name in {name for _, name in sent}:
        stamps = np.array([stamp for stamp, other in sent if other == name])
        back = np.diff(stamps)[np.diff(stamps) < 0]
        assert (back < -5_000_000_000).all() and len(back) <= 2, name
