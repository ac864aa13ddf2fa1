"""Instances keep their names, symmetric ones their form, and smoothing waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from picopose_ros.demo.world import World
from picopose_ros.errors import ConfigError
from picopose_ros.estimator import ObjectPose
from picopose_ros.geometry.motion import CameraMotion
from picopose_ros.geometry.poses import invert_transform, make_transform, rotation_angle_deg
from picopose_ros.instances import InstanceNamer, NamedPose, SmoothingSettings
from picopose_ros.templates.meshes import Symmetries

UPRIGHT = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])


def pose(
    class_id: str,
    x: float = 0.0,
    y: float = 0.0,
    z: float = 1.0,
    R: np.ndarray = UPRIGHT,
    centre: Sequence[float] = (0.0, 0.0, 0.0),
    segment: int = 0,
) -> ObjectPose:
    return ObjectPose(
        class_id=class_id,
        T_cam_obj=make_transform(R, np.array([x, y, z])),
        confidence=0.9,
        covariance=np.diag([1e-6, 1e-6, 4e-6, 1e-4, 1e-4, 1e-4]),
        source="offsets",
        segment=segment,
        segment_score=1.0,
        template=0,
        inliers=100,
        inlier_ratio=0.9,
        match_score=0.8,
        bbox_centre=np.array(centre),
        bbox_size=np.array([0.1, 0.1, 0.1]),
    )


def turned(degrees: float, axis: str = "z") -> np.ndarray:
    return UPRIGHT @ Rotation.from_euler(axis, degrees, degrees=True).as_matrix()


def names(named: Sequence[NamedPose]) -> list[str]:
    return [one.name for one in named]


# Names.


def test_a_tracked_id_names_the_instance_wherever_it_is() -> None:
    namer = InstanceNamer(timeout=1.0, max_distance=0.3)
    first = namer.update(0.0, [pose("cup"), pose("cup", 0.1)], tracked_ids=["7", "9"])
    assert names(first) == ["cup_0", "cup_1"]
    # They have changed places, and far: by distance alone they would change names, or get new ones.
    assert names(namer.update(0.1, [pose("cup", 0.1), pose("cup")], tracked_ids=["7", "9"])) == [
        "cup_0",
        "cup_1",
    ]
    assert names(namer.update(0.2, [pose("cup", 2.0)], tracked_ids=["9"])) == ["cup_1"]
    # Another class with the same number is another object; without a number the distance decides.
    assert names(namer.update(0.3, [pose("box", 2.0), pose("cup", 2.0)], tracked_ids=["9", ""])) == [
        "box_0",
        "cup_1",
    ]
    # A number that the detector gave anew: the place is as before.
    assert names(namer.update(0.4, [pose("cup", 2.0)], tracked_ids=["12"])) == ["cup_1"]
    assert names(namer.update(0.5, [pose("cup", 0.1), pose("cup", -1.0)], tracked_ids=["", "12"])) == [
        "cup_0",
        "cup_1",
    ]
    # Back after it was retired.
    namer.update(3.0, [])
    assert namer.names == []
    assert names(namer.update(3.1, [pose("cup", 5.0)], tracked_ids=["12"])) == ["cup_1"]


def test_two_tracked_ids_of_one_image_are_two_instances_though_they_are_told_one_by_one() -> None:
    """As with masks that come after their image was answered: no name is given twice for one image."""
    namer = InstanceNamer()
    assert names(namer.update(1.0, [pose("cup")], tracked_ids=["a"])) == ["cup_0"]
    assert names(namer.update(1.0, [pose("cup", 0.02)], tracked_ids=["b"])) == ["cup_1"]
    assert names(namer.update(1.0, [pose("cup", 0.02)], tracked_ids=["b"])) == ["cup_1"]
    assert names(namer.update(1.1, [pose("cup", 0.02)], tracked_ids=["c"])) == ["cup_1"]


def test_new_instances_are_numbered_by_class_in_order_of_input() -> None:
    named = InstanceNamer().update(0.0, [pose("cup"), pose("box", 0.2), pose("cup", 0.4)])
    assert names(named) == ["cup_0", "box_0", "cup_1"]
    assert all(one.new for one in named)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_names_follow_the_objects_whatever_the_order(order: tuple[int, ...]) -> None:
    namer = InstanceNamer()
    namer.update(0.0, [pose("cup", 0.1 * i) for i in range(3)])
    named = namer.update(0.1, [pose("cup", 0.1 * i + 0.01) for i in order])
    assert names(named) == [f"cup_{i}" for i in order]
    assert not any(one.new for one in named)


def test_a_cup_keeps_its_name_while_others_come_and_go() -> None:
    namer = InstanceNamer()
    namer.update(0.0, [pose("cup", 0.0), pose("cup", 0.2)])
    # One leaves on the right while one comes in on the left, at such distances that a shift would fit too.
    assert names(namer.update(0.1, [pose("cup", -0.2), pose("cup", 0.0)])) == ["cup_2", "cup_0"]
    assert names(namer.update(0.2, [pose("cup", 0.0)])) == ["cup_0"]
    assert names(namer.update(0.3, [pose("cup", 0.0), pose("cup", 0.2)])) == ["cup_0", "cup_1"]


def test_all_move_together_when_the_camera_does() -> None:
    namer = InstanceNamer()
    namer.update(0.0, [pose("cup", 0.0), pose("cup", 0.1)])
    # A slow stream: the shift is as large as the spacing, and nearest first would take the wrong one.
    assert names(namer.update(0.5, [pose("cup", 0.1), pose("cup", 0.2)])) == ["cup_0", "cup_1"]


def test_rotation_decides_where_distance_does_not() -> None:
    namer = InstanceNamer()
    namer.update(0.0, [pose("cup", -0.03), pose("cup", 0.03, R=turned(90))])
    # They meet in the middle, the second a little to the left.
    named = namer.update(0.1, [pose("cup", -0.001, R=turned(90)), pose("cup", 0.001)])
    assert names(named) == ["cup_1", "cup_0"]


def test_a_pose_upside_down_by_mistake_is_still_of_the_same_object() -> None:
    namer = InstanceNamer()
    namer.update(0.0, [pose("cup")])
    assert names(namer.update(0.1, [pose("cup", 0.01, R=turned(180, "x"))])) == ["cup_0"]


def test_the_middle_of_an_object_counts_and_not_its_far_origin() -> None:
    namer = InstanceNamer()
    far = (0.0, 0.0, 5.0)
    first, tilted = pose("part", R=turned(0), centre=far), turned(10, "x")
    namer.update(0.0, [first])
    there = first.T_cam_obj[:3, :3] @ far + first.T_cam_obj[:3, 3]
    again = pose("part", *(there - tilted @ far), R=tilted, centre=far)
    assert np.linalg.norm(again.T_cam_obj[:3, 3] - first.T_cam_obj[:3, 3]) > 0.8
    assert names(namer.update(0.1, [again])) == ["part_0"]


def test_farther_than_max_distance_is_another_instance() -> None:
    namer = InstanceNamer(max_distance=0.3)
    namer.update(0.0, [pose("cup")])
    assert names(namer.update(0.1, [pose("cup", 0.29)])) == ["cup_0"]
    assert names(namer.update(0.2, [pose("cup", -0.1)])) == ["cup_1"]
    assert names(namer.update(0.3, [pose("bowl", -0.1)])) == ["bowl_0"]


def test_a_depth_that_is_wrong_for_a_frame_is_still_of_the_same_object() -> None:
    namer = InstanceNamer(max_distance=0.3)
    namer.update(0.0, [pose("cup", 0.2), pose("cup", 0.4)])
    assert names(namer.update(0.1, [pose("cup", 0.28, z=1.4), pose("cup", 0.4)])) == ["cup_0", "cup_1"]


def test_retired_after_the_timeout_and_only_then_named_again() -> None:
    namer = InstanceNamer(timeout=1.0)
    namer.update(0.0, [pose("cup"), pose("cup", 0.5)])
    assert names(namer.update(0.9, [pose("cup", 0.5), pose("cup", -0.5)])) == ["cup_1", "cup_2"]
    assert namer.retired() == []
    assert names(namer.update(1.1, [pose("cup", 0.5), pose("cup", 1.0)])) == ["cup_1", "cup_0"]
    assert namer.retired() == ["cup_0"]
    assert namer.retired() == []
    assert namer.names == ["cup_1", "cup_2", "cup_0"]


def test_an_instance_seen_again_within_the_timeout_is_the_same() -> None:
    namer = InstanceNamer(timeout=1.0)
    namer.update(0.0, [pose("cup")])
    for stamp in (0.3, 0.6, 0.9):
        assert namer.update(stamp, []) == []
    assert names(namer.update(0.95, [pose("cup", 0.02)])) == ["cup_0"]


def test_a_stream_slower_than_the_timeout_keeps_its_names() -> None:
    namer = InstanceNamer(timeout=1.0)
    namer.update(0.0, [pose("cup"), pose("cup", 0.5)])
    assert names(namer.update(60.0, [pose("cup", 0.5), pose("cup")])) == ["cup_1", "cup_0"]
    assert namer.retired() == []


@pytest.mark.parametrize("late", [{3}, {3, 4}, {2, 4, 6}])
def test_a_late_transform_of_a_moving_camera_changes_no_name(late: set[int]) -> None:
    """As the node does it: the camera goes on as before where TF has not told yet."""
    namer, motion = InstanceNamer(max_distance=0.3), CameraMotion()
    for frame in range(8):
        stamp, T_fixed_cam = 0.1 * frame, np.eye(4)
        T_fixed_cam[0, 3] = 0.25 * frame  # as far as the cups are apart
        if frame not in late:
            motion.know(stamp, T_fixed_cam)
        cups = [pose("cup", x - 0.25 * frame) for x in (0.0, 0.25)]
        assert names(namer.update(stamp, cups, motion.at(stamp))) == ["cup_0", "cup_1"], frame


def test_where_answers_are_slower_than_the_timeout_names_outlast_missing_ones() -> None:
    namer = InstanceNamer(timeout=1.0, max_distance=0.3)
    for stamp in (0.0, 1.2, 2.4, 3.6):
        namer.update(stamp, [pose("cup")])
        namer.expire(stamp + 1.1)  # as the node does while it waits
    namer.retired()  # before the interval was known
    assert namer.update(4.8, []) == [] and namer.update(6.0, []) == []
    # It moved on meanwhile, farther than max_distance, as far as in 1.2 s.
    assert names(namer.update(7.2, [pose("cup", 0.5)])) == ["cup_0"]
    assert namer.retired() == []
    namer.expire(7.2 + 3.7)
    assert namer.retired() == ["cup_0"]


def test_a_pause_is_no_slow_stream() -> None:
    namer = InstanceNamer(timeout=1.0)
    for stamp in (0.0, 0.1, 0.2, 0.3, 0.4):
        namer.update(stamp, [pose("cup")])
    namer.update(30.0, [])
    namer.expire(30.0)
    assert namer.retired() == ["cup_0"]


def test_expire_retires_where_no_frames_come() -> None:
    namer = InstanceNamer(timeout=1.0)
    namer.update(5.0, [pose("cup")])
    namer.expire(5.9)
    assert namer.retired() == []
    namer.expire(6.1)
    assert namer.retired() == ["cup_0"]


def test_what_comes_back_where_it_was_has_its_name_again() -> None:
    """A stream so slow that all are retired between its frames doesn't mix up their names, nor their form."""
    half = make_transform(np.diag([-1.0, -1.0, 1.0]), np.zeros(3))
    namer = InstanceNamer(timeout=1.0, symmetries={"cup": Symmetries(discrete=(half,))})
    places = {"cup_0": 0.0, "cup_1": 0.3, "cup_2": 0.6}
    namer.update(0.0, [pose("cup", x) for x in places.values()])
    angle = 0.0
    for step in range(1, 4):  # then the interval is known, and nothing is retired
        namer.expire(5.0 * step)
        assert sorted(namer.retired()) == list(places)
        angle += 80.0  # in all more than a half turn: followed, not begun anew
        order = ["cup_2", "cup_0", "cup_1"] if step % 2 else ["cup_1", "cup_2", "cup_0"]
        seen = [pose("cup", places[name] + 0.01, R=turned(angle + 180 * step)) for name in order]
        named = namer.update(5.0 * step + 1, seen)
        assert names(named) == order
        for one in named:
            assert one.new
            assert rotation_angle_deg(one.pose.T_cam_obj[:3, :3], turned(angle)) < 1e-6
    # Its name is free all the same: for who comes somewhere else, and then no longer for it.
    namer.expire(100.0)
    assert names(namer.update(101.0, [pose("cup", -2.0), pose("cup", 0.6)])) == ["cup_0", "cup_2"]
    assert names(namer.update(101.1, [pose("cup", -2.0), pose("cup", 0.6), pose("cup", 0.0)]))[2] == "cup_1"


def test_clear_and_a_clock_set_back_start_anew() -> None:
    namer = InstanceNamer(timeout=1.0)
    namer.update(100.0, [pose("cup"), pose("cup", 0.5)])
    namer.clear()
    assert namer.retired() == ["cup_0", "cup_1"]
    assert names(namer.update(100.1, [pose("cup", 0.5)])) == ["cup_0"]
    (again,) = namer.update(3.0, [pose("cup", 0.5)])
    assert again.new
    assert namer.retired() == ["cup_0"]


def test_what_is_answered_late_is_named_but_moves_nothing() -> None:
    namer = InstanceNamer(smoothing=SmoothingSettings(translation=0.5))
    namer.update(0.0, [pose("cup", 0.0)])
    namer.update(0.2, [pose("cup", 0.02)])
    (late,) = namer.update(0.1, [pose("cup", 0.05)])
    assert late.name == "cup_0"
    assert late.pose.T_cam_obj[0, 3] == pytest.approx(0.05)
    (after,) = namer.update(0.3, [pose("cup", 0.03)])
    assert after.pose.T_cam_obj[0, 3] == pytest.approx(0.03, abs=1e-6)


def test_a_camera_that_swings_is_no_object_that_moves() -> None:
    namer = InstanceNamer(
        symmetries={"cup": Symmetries(continuous=((np.array([0, 0, 1.0]), np.zeros(3)),))}
    )
    T_world = [make_transform(UPRIGHT, [x, 0.0, 1.0]) for x in (-0.2, 0.0, 0.2)]
    for step in range(8):
        swing = make_transform(Rotation.from_euler("y", 20.0 * step, degrees=True).as_matrix(), np.zeros(3))
        seen = [invert_transform(swing) @ T for T in T_world]
        spin = Rotation.from_euler("z", 40 * step, degrees=True).as_matrix()
        poses = [pose("cup", *T[:3, 3], R=T[:3, :3] @ spin) for T in seen]
        named = namer.update(0.1 * step, poses[::-1] if step % 2 else poses, swing)
        expected = ["cup_0", "cup_1", "cup_2"]
        assert names(named) == (expected[::-1] if step % 2 else expected)
        for one in named:  # in the world it has not turned at all
            world = swing @ one.pose.T_cam_obj
            assert rotation_angle_deg(world[:3, :3], T_world[0][:3, :3]) < 1e-6


# Symmetric objects.


def test_a_symmetric_object_does_not_spin() -> None:
    """Each frame's pose is any of the equivalent ones; what is published moves only by the noise."""
    rng = np.random.default_rng(1)
    quarter = np.eye(4)
    quarter[:3, :3] = Rotation.from_euler("z", 90, degrees=True).as_matrix()
    symmetries = {
        "cup": Symmetries(continuous=((np.array([0, 0, 1.0]), np.zeros(3)),)),
        "block": Symmetries(discrete=(quarter,)),
    }
    namer = InstanceNamer(symmetries=symmetries)
    last: dict[str, np.ndarray] = {}
    for frame in range(50):
        noise = Rotation.from_rotvec(rng.normal(0, np.radians(2), 3)).as_matrix()
        cup = pose("cup", R=noise @ turned(rng.uniform(0, 360)))
        block = pose("block", 0.4, R=noise @ turned(20 + 90 * rng.integers(4)))
        for one in namer.update(0.1 * frame, [cup, block]):
            R = one.pose.T_cam_obj[:3, :3]
            if one.name in last:
                assert rotation_angle_deg(R, last[one.name]) < 20
            last[one.name] = R
    # Nothing has crept away either.
    assert rotation_angle_deg(last["block_0"], turned(20)) < 10


def test_the_covariance_goes_with_the_origin_of_the_chosen_form() -> None:
    offset = np.array([0.0, 0.1, 0.0])
    namer = InstanceNamer(symmetries={"cup": Symmetries(continuous=((np.array([0, 0, 1.0]), offset),))})
    first = pose("cup", R=turned(0), centre=(0, 0.1, 0))
    # Half a turn about an axis 10 cm off: the origin is now 20 cm away on the other side.
    half = make_transform(np.diag([-1.0, -1.0, 1.0]), [0, 0.2, 0])
    T = first.T_cam_obj @ half
    second = pose("cup", *T[:3, 3], R=T[:3, :3], centre=(0, 0.1, 0))
    namer.update(0.0, [first])
    (named,) = namer.update(0.1, [second])
    np.testing.assert_allclose(named.pose.T_cam_obj, first.T_cam_obj, atol=1e-9)
    # 0.01 rad over 0.2 m are 2 mm, across the arm only, which lies along the view.
    sigma = np.sqrt(np.diag(named.pose.covariance))
    np.testing.assert_allclose(sigma, [np.hypot(1e-3, 2e-3), np.hypot(1e-3, 2e-3), 2e-3, 0.01, 0.01, 0.01])


# Smoothing.


def test_off_by_default_poses_come_out_as_they_went_in() -> None:
    rng = np.random.default_rng(2)
    namer = InstanceNamer()
    for frame in range(5):
        given = pose("cup", *rng.normal(0, 0.02, 2), R=turned(rng.normal(0, 10)))
        (named,) = namer.update(0.1 * frame, [given])
        np.testing.assert_array_equal(named.pose.T_cam_obj, given.T_cam_obj)
        np.testing.assert_array_equal(named.pose.covariance, given.covariance)


def test_smoothing_calms_an_object_that_stands_still() -> None:
    rng = np.random.default_rng(3)
    namer = InstanceNamer(smoothing=SmoothingSettings(0.5, 0.5, jump_distance=0.1, jump_deg=60))
    given, smoothed = [], []
    for frame in range(200):
        noise = Rotation.from_rotvec(rng.normal(0, np.radians(4), 3)).as_matrix()
        one = pose("cup", *rng.normal([0.1, 0.2, 1.0], 0.01), R=noise @ UPRIGHT)
        (named,) = namer.update(0.1 * frame, [one])
        if frame >= 20:
            given.append(one.T_cam_obj)
            smoothed.append(named.pose.T_cam_obj)
    spread = [np.std([T[:3, 3] for T in poses], 0).mean() for poses in (given, smoothed)]
    turn = [np.mean([rotation_angle_deg(T[:3, :3], UPRIGHT) for T in poses]) for poses in (given, smoothed)]
    assert spread[1] < 0.6 * spread[0]
    assert turn[1] < 0.6 * turn[0]
    np.testing.assert_allclose(np.mean(smoothed, 0)[:3, 3], [0.1, 0.2, 1.0], atol=0.004)


def test_smoothing_follows_a_steady_motion_without_lag() -> None:
    """On a conveyor that turns, with frames missing: once it has settled, each pose is that of its frame."""
    namer = InstanceNamer(smoothing=SmoothingSettings(0.4, 0.4))
    for frame in range(60):
        stamp = 0.1 * frame
        if frame % 7 == 3:
            continue
        truth = pose("cup", 0.2 * stamp, R=turned(30 * stamp), centre=(0, 0, 0.05))
        (named,) = namer.update(stamp, [truth])
        np.testing.assert_allclose(named.pose.T_cam_obj, truth.T_cam_obj, atol=1e-6)


@pytest.mark.parametrize("jump", [{"x": 0.2}, {"R": turned(70)}])
def test_a_jump_comes_through_at_once(jump: dict) -> None:
    namer = InstanceNamer(smoothing=SmoothingSettings(1.0, 1.0))
    for frame in range(20):
        namer.update(0.1 * frame, [pose("cup")])
    (named,) = namer.update(2.0, [pose("cup", **jump)])
    np.testing.assert_allclose(named.pose.T_cam_obj, pose("cup", **jump).T_cam_obj, atol=1e-12)
    (after,) = namer.update(2.1, [pose("cup", **jump)])
    np.testing.assert_allclose(after.pose.T_cam_obj, pose("cup", **jump).T_cam_obj, atol=1e-12)


def test_smoothing_can_be_changed_while_it_runs() -> None:
    namer = InstanceNamer()
    namer.update(0.0, [pose("cup")])
    namer.settings = SmoothingSettings(translation=5.0)
    namer.update(0.1, [pose("cup")])
    namer.update(0.2, [pose("cup")])
    (smoothed,) = namer.update(0.3, [pose("cup", 0.03)])
    assert 0 < smoothed.pose.T_cam_obj[0, 3] < 0.029
    namer.settings = SmoothingSettings()
    (plain,) = namer.update(0.4, [pose("cup", 0.04)])
    assert plain.pose.T_cam_obj[0, 3] == 0.04


@pytest.mark.parametrize(
    "values", [{"translation": -1.0}, {"rotation": float("nan")}, {"jump_distance": 0.0}, {"jump_deg": -5.0}]
)
def test_settings_that_cannot_be_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        SmoothingSettings(**values)


# The demo's world.


@pytest.fixture(scope="module")
def world() -> World:
    with World() as world:
        return world  # its places and its camera's path; nothing more is rendered


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("smoothing", [None, SmoothingSettings(0.2, 0.2)])
def test_the_demo_keeps_one_name_per_object(
    world: World, drop: float, smoothing: SmoothingSettings | None
) -> None:
    """The demo's true poses with noise and flips, frames and single poses missing, the order shuffled."""
    rng = np.random.default_rng(4)
    namer = InstanceNamer(smoothing=smoothing)
    owners: dict[str, set[str]] = {}
    errors: list[float] = []
    for frame in range(60):
        if rng.random() < drop:
            continue
        T_cam_world = world.camera_pose(frame / 59)
        seen = [i for i in rng.permutation(len(world.instances)) if rng.random() >= drop / 4]
        truth = [T_cam_world @ world.instances[i].T_world_obj for i in seen]
        poses = []
        for i, T in zip(seen, truth, strict=True):
            flip = np.diag([-1.0, -1.0, 1.0]) if rng.random() < 0.03 else np.eye(3)
            noise = Rotation.from_rotvec(rng.normal(0, np.radians(3), 3)).as_matrix()
            at = T[:3, 3] * (1 + rng.normal(0, 0.01)) + rng.normal(0, 0.004, 3)
            poses.append(pose(world.instances[i].class_id, *at, R=noise @ T[:3, :3] @ flip))
        for i, T, one in zip(seen, truth, namer.update(0.1 * frame, poses), strict=True):
            owners.setdefault(world.instances[i].name, set()).add(one.name)
            errors.append(np.linalg.norm(one.pose.T_cam_obj[:3, 3] - T[:3, 3]))
    # One name per object and one object per name; which parcel is the first one is the order's affair.
    assert all(len(own) == 1 for own in owners.values()), owners
    assert {next(iter(own)) for own in owners.values()} == {one.name for one in world.instances}
    assert namer.retired() == []
    assert np.median(errors) < 0.015
