"""Following over DDS: images without masks are answered, late masks, loss, recovery, reset, what an instance
is locked to, the action find_object, a clock that is set back, and what a grasp planner hears of all that."""

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
from action_msgs.msg import GoalStatus
from builtin_interfaces.msg import Duration
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
from picopose_ros.action import FindObject
from picopose_ros.srv import Follow
from rclpy.action import ActionClient
from rosgraph_msgs.msg import Clock
from std_srvs.srv import Trigger
from vision_msgs.msg import Detection3DArray

from picopose_ros.messages import bags
from picopose_ros.node.conversions import stamp_to_nanoseconds
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


@pytest.fixture(scope="module", autouse=True)
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


def send_masks_in_vain(client: Client, scene: Scene, stamp: int) -> None:
    """Masks of an image that is not to be answered again."""
    dropped = client.count("dropped_cleared")
    client.send_segments(scene.segments, stamp)
    client.diagnostic_values(lambda v: int(v.get("dropped_cleared", 0)) > dropped, "that they were dropped")


def test_images_without_masks_are_answered(client: Client, film: Film) -> None:
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


def test_masks_of_an_image_from_before_a_reset_bring_nothing_back(client: Client, film: Film) -> None:
    scene = film.scene(0.0)
    client.ask(scene)
    late = client.send_frame(scene)
    client.detections(late)
    client.call("reset", Trigger)
    send_masks_in_vain(client, scene, late)
    silent = client.send_frame(scene)
    client.ask(scene)
    assert not client.answered(silent) and client.answers[late] == 1


def test_switched_off_images_without_masks_are_not_answered(client: Client, film: Film) -> None:
    scene = film.scene(0.0)
    client.ask(scene)
    late = client.send_frame(scene)
    client.detections(late)
    assert client.set_parameter("follow", False) == (True, "")
    # What was answered already is not answered again, nor is anything before it.
    send_masks_in_vain(client, scene, late)
    silent = client.send_frame(scene)
    client.ask(scene)
    assert not client.answered(silent) and client.answers[late] == 1
    assert client.set_parameter("follow", True) == (True, "")


# The service follow.


def lock(client: Client, name: str, follow: bool) -> tuple[bool, str]:
    response = client.call("follow", Follow, Follow.Request(id=name, follow=follow))
    return response.success, response.status


def test_an_instance_is_locked_off_and_on(client: Client, film: Film) -> None:
    scene = film.scene(-0.05, 0.08)
    client.call("reset", Trigger)
    client.ask(scene)
    done, status = lock(client, "block_7", False)
    assert not done and "block_0, block_1" in status
    assert lock(client, "block_0", False) == (True, "block_0 is published with its masks only")
    passed = client.send_frame(scene)
    assert list(positions(client.detections(passed))) == ["block_1"]
    # Its masks come after later images were answered: it has their image's stamp.
    client.send_segments(scene.segments, passed)
    client.wait_for(lambda: client.answers[passed] == 2, "the answer to late masks")
    assert [t.child_frame_id for t in client.transforms(passed, 2)] == ["block_1", "block_0"]
    values = client.diagnostic_values(lambda v: "block_0: " in v["following"], "what is followed")
    assert "block_0: not followed since" in values["following"]
    assert lock(client, "block_0", True) == (True, "block_0 is followed")
    assert sorted(positions(client.detections(client.send_frame(scene)))) == ["block_0", "block_1"]

    assert lock(client, "", False)[0] and lock(client, "block_1", True)[0]
    assert list(positions(client.detections(client.send_frame(scene)))) == ["block_1"]
    client.call("reset", Trigger)  # from the start everything is followed
    client.ask(scene)
    assert len(positions(client.detections(client.send_frame(scene)))) == 2


# The action find_object.


class Finder:
    """A planner that waits for an object."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._action = ActionClient(client.node, FindObject, "picopose_node/find_object")
        client.wait_for(self._action.server_is_ready, "the action find_object")

    def answers(self) -> bool:
        """Whether a goal that ends at once is answered, and so is the question for its result.

        A server that has not discovered the client's readers yet answers to nobody, though it is ready.
        """
        goal = FindObject.Goal(class_id="block", min_score=1.0, timeout=Duration(nanosec=50_000_000))
        taken = self._action.send_goal_async(goal)
        if not self._client.wait(taken.done, 5.0):
            return False
        return bool(self._client.wait(taken.result().get_result_async().done, 5.0))

    def ask(self, **goal: Any) -> Goal:
        """Send a goal; waits until it is taken or refused."""
        feedback: list[FindObject.Feedback] = []
        future = self._action.send_goal_async(
            FindObject.Goal(**goal), lambda message: feedback.append(message.feedback)
        )
        self._client.wait_for(future.done, "whether the goal is taken")
        return Goal(self._client, future.result(), feedback)


class Goal:
    """A goal that was sent."""

    def __init__(self, client: Client, handle: Any, feedback: list[FindObject.Feedback]) -> None:
        self._client, self._handle, self.feedback = client, handle, feedback
        self.accepted = handle.accepted
        self._result = handle.get_result_async() if handle.accepted else None

    @property
    def done(self) -> bool:
        return self._result.done()

    def cancel(self) -> None:
        future = self._handle.cancel_goal_async()
        self._client.wait_for(future.done, "the answer to the cancellation")
        assert future.result().goals_canceling

    def result(self) -> tuple[int, FindObject.Result]:
        """Status and result of the goal, waiting for them."""
        self._client.wait_for(self._result.done, "the goal's result")
        return self._result.result().status, self._result.result().result


@pytest.fixture(scope="module")
def finder(client: Client) -> Finder:
    finder = Finder(client)
    assert any(finder.answers() for _ in range(20))
    return finder


def test_an_object_is_found_when_its_poses_agree(client: Client, film: Film, finder: Finder) -> None:
    client.call("reset", Trigger)
    goal = finder.ask(class_id="block", frames=3)
    assert goal.accepted
    client.ask(film.scene(0.0))
    client.wait_for(lambda: goal.feedback, "feedback")
    assert (goal.feedback[0].candidates, goal.feedback[0].agreeing) == (1, 1)
    # Another place, so that the count begins anew; from there on the answers agree.
    client.ask(film.scene(0.06))
    for _ in range(20):
        if goal.done:
            break
        client.detections(client.send_frame(film.scene(0.06)))
    status, result = goal.result()
    assert status == GoalStatus.STATUS_SUCCEEDED and result.success, result.status
    assert max(message.agreeing for message in goal.feedback) <= 3
    answer = client.detections(stamp_to_nanoseconds(result.header.stamp))
    (detection,) = answer.detections
    assert (result.header, result.id) == (answer.header, detection.id)
    assert result.pose == detection.results[0].pose
    assert result.score == pytest.approx(detection.results[0].hypothesis.score)
    assert np.trace(np.reshape(result.pose.covariance, (6, 6))) > 0


def test_a_search_is_cancelled(client: Client, film: Film, finder: Finder) -> None:
    client.call("reset", Trigger)
    goal = finder.ask(class_id="block", min_score=1.0)
    client.ask(film.scene(0.0))
    client.wait_for(lambda: goal.feedback, "feedback")
    assert goal.feedback[-1].candidates == 1 and goal.feedback[-1].agreeing == 0
    goal.cancel()
    status, result = goal.result()
    assert status == GoalStatus.STATUS_CANCELED and not result.success
    assert result.status.startswith("cancelled: ") and "1 of 'block'" in result.status


def test_a_search_ends_with_its_time(finder: Finder) -> None:
    status, result = finder.ask(class_id="block", timeout=Duration(nanosec=200_000_000)).result()
    assert status == GoalStatus.STATUS_ABORTED and not result.success
    assert result.status.startswith("not found in 0.2 s: ") and "are there images" in result.status


def test_goals_that_make_no_sense_are_refused(node: NodeProcess, finder: Finder) -> None:
    for goal, reason in (
        ({"class_id": "unicorn"}, "no object is called 'unicorn'"),
        ({"class_id": "block", "min_score": 1.5}, "min_score is 1.5"),
        ({"class_id": "block", "min_score": float("nan")}, "min_score is nan"),
        ({"class_id": "block", "timeout": Duration(sec=-1)}, "timeout is -1 s"),
    ):
        assert not finder.ask(**goal).accepted
        assert f"a goal is refused: {reason}" in node.log
    both = [finder.ask(class_id="block", min_score=1.0) for _ in range(2)]
    assert not finder.ask(class_id="block").accepted
    for goal in both:
        goal.cancel()
        assert goal.result()[0] == GoalStatus.STATUS_CANCELED


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
        last = send(2, film.scene(0.0))
        assert list(positions(client.detections(last))) == ["block_0"]
        client.transforms(last, 1)
    assert node.alive


def test_what_a_planner_hears_is_in_order(planner: Planner) -> None:
    """Of everything above: each frame once per image, where the detection says, never back in time but where
    the recording started over."""
    transforms, detections = planner.heard()
    answers = [(bags.stamp_of(message), one) for message in detections for one in message.detections]
    twice = [key for key, times in Counter((stamp, one.id) for stamp, one in answers).items() if times > 1]
    assert not twice and len(answers) > 20
    said = {(stamp, one.id): one.results[0].pose.pose.position for stamp, one in answers}
    sent = [(bags.stamp_of(t), t.child_frame_id) for t in transforms]
    # The node may discover one of the planner's two subscriptions after its first answer.
    first = {sent[0][0], answers[0][0]}
    missed = set(sent) ^ set(said)
    assert max(Counter(sent).values()) == 1 and {stamp for stamp, _ in missed} <= first
    for transform, key in ((transform, key) for transform, key in zip(transforms, sent) if key in said):
        assert transform.header.frame_id == "camera_optical"
        assert transform.transform.translation.x == pytest.approx(said[key].x, abs=1e-9)
    for name in {name for _, name in sent}:
        stamps = np.array([stamp for stamp, other in sent if other == name])
        back = np.diff(stamps)[np.diff(stamps) < 0]
        assert (back < -5_000_000_000).all() and len(back) <= 2, name
