"""Following on rendered sequences with the packaged weights, and its decisions with steps that are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from picopose_ros.estimation import follow_look
from picopose_ros.estimation.follow import Follower, FollowSettings, Image, Verdict
from picopose_ros.estimation.follow_shift import find_shift
from picopose_ros.estimation.refine_step import Look, Step
from picopose_ros.estimator import EstimatorSettings, ObjectPose, PoseEstimator
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.least_squares import moved
from picopose_ros.geometry.poses import invert_transform, make_transform, rotation_angle_deg
from picopose_ros.model import load_model
from picopose_ros.templates.bank import build_bank
from picopose_ros.templates.meshes import ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

WIDTH, HEIGHT = 320, 240
K = np.array([[300.0, 0, 160], [0, 300.0, 120], [0, 0, 1]])
CAMERA = CameraModel(K, WIDTH, HEIGHT)
EXTENTS = {"brick": (0.06, 0.08, 0.11), "bar": (0.03, 0.05, 0.14)}
PERIOD = 0.1
TIGHT = np.diag([1e-6] * 2 + [1e-5] + [1e-4] * 3)


def at(x: float, y: float, z: float = 0.5, turn: Sequence[float] = (0.4, -0.8, 0.5)) -> np.ndarray:
    return make_transform(Rotation.from_rotvec(turn).as_matrix(), [x, y, z])


def pose_of(name: str, T: np.ndarray) -> ObjectPose:
    size = np.array(EXTENTS[name])
    return ObjectPose(name, T, 0.9, TIGHT, "offsets", 0, 1.0, 0, 50, 0.9, 0.8, np.zeros(3), size)


class World:
    """A brick and a bar in front of a wall."""

    def __init__(self, folder: Path) -> None:
        self.meshes = {}
        for name, extents in EXTENTS.items():
            mesh = trimesh.creation.box(extents).subdivide().subdivide()
            colours = np.random.default_rng(len(name)).integers(0, 255, (len(mesh.vertices), 3))
            mesh.visual.vertex_colors = np.c_[colours, np.full(len(colours), 255)].astype(np.uint8)
            mesh.export(folder / f"{name}.ply")
            self.meshes[name] = load_object(ObjectSpec(name, folder / f"{name}.ply"))
        model = load_model("tiny")
        banks = {name: build_bank(mesh, model, 42) for name, mesh in self.meshes.items()}
        self.estimator = PoseEstimator(model, banks, EstimatorSettings(precision="fp32"))
        noise = np.random.default_rng(0).uniform(0, 255, (9, 12, 3)).astype(np.float32)
        self.wall = cv2.resize(noise, (WIDTH, HEIGHT)).astype(np.uint8)
        self.renderer = MeshRenderer(antialias=True)

    def image(self, *placed: tuple[str, np.ndarray]) -> np.ndarray:
        view = self.renderer.render_scene([(self.meshes[n], T) for n, T in placed], K, WIDTH, HEIGHT)
        return np.where(view.mask[..., None], view.rgb, self.wall)

    def follower(self, *seen: tuple[str, np.ndarray], **settings: float) -> Follower:
        """Follows objects, called ``brick_0`` and so on, that a mask showed at 0 s."""
        follower = Follower(self.estimator, FollowSettings(**settings))
        for i, (name, T) in enumerate(seen):
            follower.see(f"{name}_{i}", pose_of(name, T), 0.0)
        return follower


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("follow"))


def off(T: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Metres and degrees between two poses."""
    return float(np.linalg.norm(T[:3, 3] - true[:3, 3])), rotation_angle_deg(T[:3, :3], true[:3, :3])


MOTION = np.array([0.08, -0.04, 0.1, 0.4, 0.7, -0.3])
"""Per second: 13 cm and 49 degrees."""


def test_two_objects_are_followed_at_once(world: World) -> None:
    start = [at(-0.07, 0.02), at(0.06, 0.0, 0.45, (-0.5, 0.9, 0.2))]
    follower = world.follower(*(("brick", T) for T in start))
    for n in range(1, 7):
        true = [moved(T, MOTION * n * PERIOD) for T in start]
        found = follower.step(world.image(*(("brick", T) for T in true)), CAMERA, n * PERIOD)
        assert [one.key for one in found] == ["brick_0", "brick_1"]
        for one, T in zip(found, true):
            assert one.verdict is not Verdict.LOST, one
            away, turn = off(one.pose.T_cam_obj, T)
            assert away < 0.03 and turn < 15, one
            assert np.linalg.eigvalsh(one.pose.covariance).min() > 0
    status = follower.status["brick_1"]
    assert status.seen == 0
    assert status.stamp == pytest.approx(0.6)


def test_what_tf_says_of_the_camera_is_used(world: World) -> None:
    """The camera turns by 12 degrees between two images: the object is elsewhere in the second one."""
    T_fixed_cam = make_transform(Rotation.from_rotvec([0, 0.2, 0]).as_matrix(), [0.02, 0, 0])
    true = invert_transform(T_fixed_cam) @ at(0.03, 0)
    follower = Follower(world.estimator)
    follower.see("a", pose_of("brick", at(0.03, 0)), 0.0, np.eye(4))
    (found,) = follower.step(world.image(("brick", true)), CAMERA, PERIOD, T_fixed_cam)
    assert found.verdict is Verdict.FOLLOWED
    assert off(found.pose.T_cam_obj, true)[0] < 0.01


def test_it_is_lost_where_it_isnt_and_found_again_near_to_that(world: World) -> None:
    T = at(0.0, 0.0)
    follower = world.follower(("brick", T))
    (gone,) = follower.step(world.image(("bar", at(0.5, 0.5))), CAMERA, 0.1)
    assert gone.verdict is not Verdict.FOLLOWED and gone.reason
    (gone,) = follower.step(world.image(("bar", at(0.5, 0.5))), CAMERA, 1.5)
    assert gone.verdict is Verdict.LOST
    (back,) = follower.step(world.image(("brick", moved(T, np.r_[0.01, 0, 0, 0, 0.1, 0]))), CAMERA, 1.6)
    assert back.verdict is Verdict.FOLLOWED and not back.reason
    assert follower.status["brick_0"].since == 1.6
    # After the time of recovery it is forgotten.
    follower.step(world.image(("bar", at(0.5, 0.5))), CAMERA, 4.0)
    follower.step(world.image(("bar", at(0.5, 0.5))), CAMERA, 9.0)
    assert len(follower) == 0


def test_an_object_is_carried_to_the_newest_image_in_as_few_steps_as_needed(world: World) -> None:
    T = at(-0.06, 0.0)
    read = []

    def image(n: int) -> Image:
        def get() -> tuple[np.ndarray, CameraModel]:
            read.append(n)
            return world.image(("brick", moved(T, MOTION * n * PERIOD))), CAMERA

        return Image(n * PERIOD, get)

    follower = world.follower(("brick", T))
    (found,) = follower.carry([image(n) for n in range(3)], ["brick_0"])
    assert read == [2] and found.verdict is Verdict.FOLLOWED
    assert off(found.pose.T_cam_obj, moved(T, MOTION * 0.2))[0] < 0.015


def test_what_one_object_moved_by_is_tried_for_the_others(world: World) -> None:
    """The camera moved so far that the second object is found by the motion of the first alone."""
    motion = moved(np.eye(4), np.r_[0.02, 0.02, 0.05, 0.0, 0.0, 0.5])
    seen = ("brick", at(-0.08, 0)), ("bar", at(0.08, 0))

    def answer(T: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float] | None:
        asked.append(T)
        near = [motion @ start for _, start in seen if np.linalg.norm((motion @ start - T)[:3, 3]) < 0.01]
        first = [T] if len(asked) == 1 else []
        return (motion @ seen[0][1] if first else near[0], 0.9) if first or near else None

    asked: list[np.ndarray] = []
    follower, _ = scripted(world, answer, *seen)
    follower.settings = FollowSettings(furthest=9.0)
    found = follower.carry([Image(0.3, lambda: (BLANK, CAMERA))], ["brick_0", "bar_1"])
    assert [one.verdict for one in found] == [Verdict.FOLLOWED] * 2
    np.testing.assert_allclose(found[1].pose.T_cam_obj, motion @ seen[1][1], atol=1e-9)

    # The same for one that is lost while the other one goes on.
    there = [False]

    def later(T: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float] | None:
        number = len(follower._objects["brick_0"].history)
        true = [moved(start, steps * number) for _, start in seen]
        if np.linalg.norm((true[0] - T)[:3, 3]) < 0.03:
            return true[0], 0.9
        return (T, 0.9) if there[0] and np.linalg.norm((true[1] - T)[:3, 3]) < 0.005 else None

    steps = np.r_[0.0, 0.02, 0, 0, 0, 0]
    follower, _ = scripted(world, later, *seen)
    for n in range(1, 5):
        follower.step(BLANK, CAMERA, n * PERIOD)
    assert follower.status["bar_1"].verdict is Verdict.LOST
    there[0] = True
    found = {one.key: one for one in follower.step(BLANK, CAMERA, 5 * PERIOD)}
    assert found["bar_1"].verdict is Verdict.FOLLOWED
    assert off(found["bar_1"].pose.T_cam_obj, moved(seen[1][1], steps * 5))[0] < 0.006


def test_what_moves_far_between_two_images_is_found_by_its_look(world: World) -> None:
    """By three quarters of its width, without a velocity; the image it had its pose in is known."""
    start, true = at(-0.05, 0.0), at(0.02, 0.03)
    follower = Follower(world.estimator)
    first = world.image(("brick", start))
    (key,) = follower.see_all([pose_of("brick", start)], 0.0, 0.3, None, (first, CAMERA))
    (found,) = follower.step(world.image(("brick", true)), CAMERA, PERIOD)
    assert (found.key, found.verdict) == (key, Verdict.FOLLOWED), found
    away, turn = off(found.pose.T_cam_obj, true)
    assert away < 0.01 and turn < 10


@pytest.mark.parametrize("shift", [(0, 0), (30, -12), (-45, 20)])
def test_a_shift_is_that_of_the_look(shift: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    wall = cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), (WIDTH, HEIGHT))
    look = cv2.resize(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8), (70, 70))
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[80:150, 120:190] = True
    before, after = wall.copy(), wall.copy()
    before[80:150, 120:190] = look
    x, y = 120 + shift[0] + 10, 80 + shift[1]
    after[y : y + 70, x : x + 70] = look
    found = find_shift(before, after, mask, np.array([10.0, 0.0]))
    if shift == (0, 0):
        assert found is None
    else:
        np.testing.assert_allclose(found, shift, atol=3)
    # Nowhere: no place is better than another.
    nothing = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    assert find_shift(before, nothing, mask, np.zeros(2)) is None
    assert find_shift(before, after, np.zeros_like(mask), np.zeros(2)) is None
    assert find_shift(np.zeros_like(before), after, mask, np.zeros(2)) is None


def test_a_shift_is_believed_where_the_look_is_dim_but_clearly_there() -> None:
    """Noise as strong as the look: a correlation of a half, and none where it is predicted."""
    rng = np.random.default_rng(3)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[80:150, 120:190] = True
    look = cv2.resize(rng.uniform(90, 150, (8, 8, 3)).astype(np.float32), (70, 70))
    before, after = np.full((2, HEIGHT, WIDTH, 3), 120, np.float32)
    before[80:150, 120:190] = look
    noise = cv2.resize(rng.normal(0, 25, (20, 20, 3)).astype(np.float32), (70, 70))
    after[92:162, 90:160] = look + noise
    before, after = (image.clip(0, 255).astype(np.uint8) for image in (before, after))
    np.testing.assert_allclose(find_shift(before, after, mask, np.zeros(2)), [-30, 12], atol=4)


# Decisions, with steps that are given.


def test_a_rendering_is_encoded_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Used again it gives the same step as another one that is equal to it."""
    T, estimator = at(0.0, 0.0), world.estimator
    image = world.image(("brick", moved(T, np.r_[0.004, 0, 0, 0, 0.05, 0])))
    (view,), (equal,) = estimator.render([("brick", T)]), estimator.render([("brick", T)])
    mask = view.silhouette(K, HEIGHT, WIDTH)
    network, crops = estimator._network, []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda given: crops.append(len(given)) or encode(given))
    first, again, other = (
        estimator.compare(image, K, [Look(one, T, mask)])[0] for one in (view, view, equal)
    )
    assert crops == [2, 1, 2], "the image's crop each time, each view once beside it"
    for step in (again, other):
        np.testing.assert_allclose(step.T_cam_obj, first.T_cam_obj, atol=1e-4)
        assert step.agreement == pytest.approx(first.agreement, abs=1e-3)
    # Two of one view in one pass.
    both = estimator.compare(image, K, [Look(equal, T, mask), Look(equal, T, mask)])
    np.testing.assert_allclose(both[1].T_cam_obj, first.T_cam_obj, atol=1e-4)


class Script:
    """An estimator whose steps are given: by the pose that it is asked for, a pose and a score."""

    def __init__(
        self, world: World, answer: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float] | None]
    ):
        self._world, self._answer = world, answer
        self.rendered = 0
        self.masks: list[np.ndarray] = []

    def render(self, wanted):
        self.rendered += len(wanted)
        return self._world.estimator.render(wanted)

    def compare(self, rgb: np.ndarray, K: np.ndarray, looks: Sequence[Look]) -> list[Step | None]:
        self.masks = [look.mask for look in looks]
        answers = [self._answer(look.T_cam_obj, look.mask) for look in looks]
        return [a and Step(a[0], TIGHT, a[1], 1.0, 1.0, 100, 1.0, 1.0, {}) for a in answers]

    def score(self, step: Step) -> float:
        return step.agreement


BLANK = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


def scripted(world: World, answer, *seen: tuple[str, np.ndarray]) -> tuple[Follower, Script]:
    script = Script(world, answer)
    follower = Follower(script)
    for i, (name, T) in enumerate(seen):
        follower.see(f"{name}_{i}", pose_of(name, T), 0.0)
    return follower, script


def test_the_last_rendering_is_used_while_the_view_turns_little(world: World) -> None:
    follower, script = scripted(world, lambda T, mask: (T, 0.9), ("brick", at(0, 0)))
    for n in range(1, 5):
        follower.step(BLANK, CAMERA, n * PERIOD)
    assert script.rendered == 1


def test_a_second_step_and_a_search_use_the_rendering_that_is_there(world: World) -> None:
    """An uncertain step is followed by another; a lost object is looked for where it was."""
    least = FollowSettings.followed
    follower, script = scripted(world, lambda T, mask: (T, least - 0.05), ("brick", at(0, 0)))
    follower.step(BLANK, CAMERA, 0.1)
    assert script.rendered == 1
    there = [True]
    follower, script = scripted(world, lambda T, mask: (T, 0.9) if there[0] else None, ("brick", at(0, 0)))
    follower.step(BLANK, CAMERA, 0.1)
    there[0] = False
    for n in range(2, 5):
        (one,) = follower.step(BLANK, CAMERA, n * PERIOD)
        assert one.verdict is Verdict.LOST
    assert script.rendered == 1 and len(script.masks) == 1, "it is looked for once where it stood still"


def test_what_looks_alike_elsewhere_is_not_all_that_is_tried(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look is found 40 px aside, where nothing is: the object is where it was predicted."""
    monkeypatch.setattr(follow_look, "find_shift", lambda *args: np.array([40.0, 0.0]))
    T = at(-0.05, 0.0)
    follower, _ = scripted(
        world, lambda pose, mask: (pose, 0.9 if abs(pose[0, 3] - T[0, 3]) < 0.01 else 0.2), ("brick", T)
    )
    follower.forget()
    follower.see_all([pose_of("brick", T)], 0.0, 0.3, None, (BLANK, CAMERA))
    (one,) = follower.step(BLANK, CAMERA, PERIOD)
    assert one.verdict is Verdict.FOLLOWED
    np.testing.assert_allclose(one.pose.T_cam_obj, T)


def test_an_uncertain_object_has_a_larger_covariance_and_is_lost_after_a_while(world: World) -> None:
    follower, _ = scripted(world, lambda T, mask: (T, FollowSettings.followed - 0.05), ("brick", at(0, 0)))
    (one,) = follower.step(BLANK, CAMERA, 0.5)
    assert one.verdict is Verdict.UNCERTAIN and "score 0." in one.reason
    assert one.pose.covariance[0, 0] > 5 * TIGHT[0, 0] and one.pose.confidence < FollowSettings.followed
    (one,) = follower.step(BLANK, CAMERA, 1.5)
    assert one.verdict is Verdict.LOST and "more than 1 s" in one.reason


def test_what_leaves_the_image_is_lost_at_the_border(world: World) -> None:
    goal = [at(0.1, 0)]
    follower, _ = scripted(world, lambda T, mask: (goal[0], 0.9), ("brick", goal[0]))
    for n in range(1, 12):
        goal[0] = at(0.1 + 0.03 * n, 0)
        (one,) = follower.step(BLANK, CAMERA, n * PERIOD)
        if one.verdict is Verdict.LOST:
            break
    assert n > 2 and one.verdict is Verdict.LOST
    assert "leaves the image" in one.reason
    # It isn't dragged along outside: half the image is 27 cm wide there.
    assert one.pose.T_cam_obj[0, 3] < 0.3


def test_a_jump_is_not_taken(world: World) -> None:
    follower, _ = scripted(
        world, lambda T, mask: (moved(T, np.r_[0.12, 0, 0, 0, 0, 0]), 0.9), ("brick", at(-0.1, 0))
    )
    (one,) = follower.step(BLANK, CAMERA, PERIOD)
    assert one.verdict is Verdict.LOST and "jump" in one.reason


def test_an_object_behind_another_is_uncertain_and_its_pixels_are_its_own(world: World) -> None:
    near, far = at(0.0, 0, 0.4), at(0.1, 0, 0.6)
    follower, script = scripted(world, lambda T, mask: (T, 0.9), ("brick", near), ("brick", far))
    follower.step(BLANK, CAMERA, PERIOD)
    assert not (script.masks[0] & script.masks[1]).any()
    covered, script = scripted(
        world, lambda T, mask: (T, 0.9), ("brick", near), ("bar", at(0.0, 0, 0.6, (0, 0, 0)))
    )
    _, behind = covered.step(BLANK, CAMERA, PERIOD)
    assert behind.verdict is Verdict.UNCERTAIN and "covers it" in behind.reason
    assert len(script.masks) == 1


def test_equal_objects_that_come_out_at_one_place_are_not_both_there(world: World) -> None:
    """The second one's step leads to where the first one is."""
    here, there = at(-0.03, 0), at(0.045, 0)
    follower, _ = scripted(world, lambda T, mask: (here, 0.9), ("brick", here), ("brick", there))
    first, second = follower.step(BLANK, CAMERA, PERIOD)
    assert first.verdict is Verdict.FOLLOWED
    assert second.verdict is Verdict.UNCERTAIN and "brick_0 is there" in second.reason
    assert off(second.pose.T_cam_obj, there)[0] < 1e-6


def test_a_late_mask_corrects_only_what_disagrees_beyond_both_uncertainties(world: World) -> None:
    shift, goal = np.r_[0.01, 0, 0, 0, 0, 0], [at(0, 0)]
    follower, _ = scripted(world, lambda T, mask: (goal[0], 0.9), ("brick", at(0, 0)))
    for n in range(1, 4):
        goal[0] = moved(at(0, 0), n * shift)
        follower.step(BLANK, CAMERA, n * PERIOD)
    before = follower.pose_at("brick_0", 0.3)[0]
    assert not follower.see("brick_0", pose_of("brick", moved(at(0, 0), shift)), 0.1)
    np.testing.assert_array_equal(follower.pose_at("brick_0", 0.3)[0], before)
    assert follower.status["brick_0"].seen == 0.1
    truth = moved(at(0, 0), shift + np.r_[0, 0.02, 0, 0, 0, 0])
    assert follower.see("brick_0", pose_of("brick", truth), 0.1)
    now = follower.pose_at("brick_0", 0.3)[0]
    np.testing.assert_allclose(now[:3, 3] - before[:3, 3], [0, 0.02, 0], atol=1e-9)
    assert follower.status["brick_0"].stamp == pytest.approx(0.3)


def test_masks_that_show_what_was_followed_there_are_not_worth_a_pose(world: World) -> None:
    """Two objects are followed to the right; of the masks of the first image one alone is estimated again."""
    moves = np.r_[0.004, 0, 0, 0, 0, 0]
    seen = ("brick", at(-0.08, 0)), ("bar", at(0.08, 0))
    follower, _ = scripted(world, lambda T, mask: (moved(T, moves), 0.9), *seen)
    for n in range(1, 4):
        follower.step(BLANK, CAMERA, n * PERIOD)
    then = {name: moved(T, 2 * moves) for name, T in seen}
    views = world.estimator.render(list(then.items()))
    masks = [(name, view.silhouette(K, HEIGHT, WIDTH)) for name, view in zip(then, views)]

    def worth(*segments: tuple[str, np.ndarray], keys: Sequence[str] | None = None) -> list[int]:
        return follower.unexplained(segments, 2 * PERIOD, CAMERA, keys)

    follower.see("brick_0", pose_of("brick", then["brick"]), 2 * PERIOD)
    assert worth(*masks) == [1], "the one that was estimated longest ago"
    assert follower.status["brick_0"].seen == follower.status["bar_1"].seen + 2 * PERIOD
    follower.see("bar_1", pose_of("bar", then["bar"]), 2.5 * PERIOD)
    assert worth(*masks) == [0]
    # What is elsewhere, of another class, not known then, or not to be followed is estimated.
    elsewhere = masks[1][0], np.roll(masks[1][1], 60, 0)
    assert worth(masks[0], elsewhere) == [0, 1]
    assert worth(masks[0], ("brick", masks[1][1]), keys=["bar_1"]) == [0, 1]
    assert worth(*masks, keys=[]) == [0, 1]
    assert follower.unexplained(masks, 9.0, CAMERA) == [0, 1]
    # Covered by the other one it is the same mask less what is covered.
    half = masks[1][1].copy()
    half[:, : int(np.nonzero(half)[1].mean())] = False
    assert worth(masks[0], ("bar", half)) == [0, 1]
    assert worth(masks[0], ("bar", half), ("brick", masks[1][1] & ~half)) == [0, 2]


def test_poses_of_late_masks_are_matched_with_where_the_objects_were_then(world: World) -> None:
    """Two bricks pass each other; the mask's image is from when they were still where they began."""
    left, right = at(-0.1, 0), at(0.1, 0)
    follower, _ = scripted(world, lambda T, mask: (T, 0.9), ("brick", left), ("brick", right))
    for key, T in (("brick_0", right), ("brick_1", left)):
        follower.see(key, pose_of("brick", T), 1.0)
    poses = [pose_of("brick", right), pose_of("brick", left), pose_of("bar", left)]
    assert follower.match(poses, 0.0, 0.3) == ["brick_1", "brick_0", None]
    assert follower.match(poses, 1.0, 0.3) == ["brick_0", "brick_1", None]
    assert follower.match([pose_of("brick", at(0, 0.1, 1.0))], 0.0, 0.05) == [None]
    follower.forget(["brick_0"])
    assert list(follower.status) == ["brick_1"]
