"""The nearest of a symmetric object's equivalent poses, by closed form, against all of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation

from picopose_ros.geometry.poses import make_transform, rotation_angle_deg
from picopose_ros.instances import CANONICAL, SymmetryGroup
from picopose_ros.templates.meshes import Symmetries, discover_objects

Z = np.array([0.0, 0, 1])
OFFSET = np.array([0.02, -0.03, 0.0])


def about(axis: str | np.ndarray, degrees: float, point: np.ndarray | None = None) -> np.ndarray:
    """(4, 4) rotation about an axis through a point."""
    if isinstance(axis, str):
        R = Rotation.from_euler(axis, degrees, degrees=True).as_matrix()
    else:
        R = Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix()
    point = np.zeros(3) if point is None else point
    return make_transform(R, point - R @ point)


def random_pose(rng: np.random.Generator) -> np.ndarray:
    return make_transform(Rotation.random(random_state=rng).as_matrix(), rng.normal(0, 0.3, 3) + [0, 0, 1])


TILTED = np.array([1.0, 2, 2]) / 3

KINDS = {
    "none": Symmetries(),
    "half turn": Symmetries(discrete=(about("z", 180, OFFSET),)),
    "all listed": Symmetries(discrete=tuple(about("z", 90 * k, OFFSET) for k in (1, 2, 3))),
    "round": Symmetries(continuous=((Z, OFFSET),)),
    "round about a tilted axis": Symmetries(continuous=((TILTED, OFFSET),)),
    "round and reversible": Symmetries(discrete=(about("x", 180, OFFSET),), continuous=((Z, OFFSET),)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_equivalent_pose_is_nearer(kind: str) -> None:
    """Against all of them, continuous ones in steps of half a degree; and the answer is one of them."""
    rng = np.random.default_rng(1)
    symmetries = KINDS[kind]
    group, motions = SymmetryGroup(symmetries), symmetries.transforms(step_deg=0.5)
    for _ in range(20):
        T, R = random_pose(rng), Rotation.random(random_state=rng).as_matrix()
        nearest = group.nearest(T, R)
        everywhere = T @ motions
        angles = np.array([rotation_angle_deg(R, one[:3, :3]) for one in everywhere])
        assert rotation_angle_deg(R, nearest[:3, :3]) <= angles.min() + 1e-6
        assert rotation_angle_deg(R, nearest[:3, :3]) >= angles.min() - 0.5
        gaps = np.abs(everywhere - nearest).max((1, 2))
        assert gaps.min() < 0.006  # a quarter of a degree in steps of half a degree
    assert group.trivial == (kind == "none")


def test_the_published_pose_is_the_given_one_where_that_is_nearest() -> None:
    group = SymmetryGroup(KINDS["round and reversible"])
    T = random_pose(np.random.default_rng(2))
    np.testing.assert_allclose(group.nearest(T, T[:3, :3]), T, atol=1e-12)


def test_points_on_the_axis_stay_where_they_are() -> None:
    group = SymmetryGroup(KINDS["round"])
    rng = np.random.default_rng(3)
    T = random_pose(rng)
    near = group.nearest(T, Rotation.random(random_state=rng).as_matrix())
    for height in (-0.1, 0.0, 0.3):
        point = OFFSET + height * Z
        np.testing.assert_allclose(
            near[:3, :3] @ point + near[:3, 3], T[:3, :3] @ point + T[:3, 3], atol=1e-12
        )
    assert np.abs(near[:3, 3] - T[:3, 3]).max() > 1e-3  # but the origin beside it does move


def test_generators_are_enough() -> None:
    """A cube given by two quarter turns has 24 rotations, and a short list in a file is no smaller group."""
    group = SymmetryGroup(Symmetries(discrete=(about("z", 90), about("x", 90))))
    rng = np.random.default_rng(4)
    for _ in range(50):
        T, R = random_pose(rng), Rotation.random(random_state=rng).as_matrix()
        # No rotation is farther than 62.8 degrees from one of a cube's.
        assert rotation_angle_deg(group.nearest(T, R)[:3, :3], R) < 62.9


def test_few_digits_in_a_file_stay_one_group() -> None:
    third = np.round(about("z", 120), 3)
    group = SymmetryGroup(Symmetries(discrete=(third,)))
    T = np.eye(4)
    for k in range(3):
        near = group.nearest(T @ about("z", 120.0 * k), np.eye(3))
        assert rotation_angle_deg(near[:3, :3], np.eye(3)) < 0.2
        np.testing.assert_allclose(near[:3, :3] @ near[:3, :3].T, np.eye(3), atol=1e-9)


def test_a_list_that_is_no_group_is_taken_as_it_is() -> None:
    """Turns by one radian about two axes never come back; only what is listed counts."""
    listed = about("z", np.degrees(1)), about("x", np.degrees(1))
    group = SymmetryGroup(Symmetries(discrete=listed))
    np.testing.assert_allclose(group.nearest(np.eye(4), listed[1][:3, :3]), listed[1], atol=1e-9)
    two = (listed[0] @ listed[1])[:3, :3]
    assert rotation_angle_deg(group.nearest(np.eye(4), two)[:3, :3], two) > 30


def test_two_axes_make_a_sphere() -> None:
    centre = np.array([0.1, 0.2, -0.05])
    group = SymmetryGroup(Symmetries(continuous=((Z, centre + 3 * Z), (TILTED, centre - TILTED))))
    rng = np.random.default_rng(5)
    T, R = random_pose(rng), Rotation.random(random_state=rng).as_matrix()
    near = group.nearest(T, R)
    np.testing.assert_allclose(near[:3, :3], R, atol=1e-12)
    np.testing.assert_allclose(R @ centre + near[:3, 3], T[:3, :3] @ centre + T[:3, 3], atol=1e-12)
    same = SymmetryGroup(Symmetries(continuous=((Z, OFFSET), (-Z, OFFSET))))
    assert rotation_angle_deg(same.nearest(T, R)[:3, :3], R) > 1  # the same axis twice is no sphere


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_the_first_pose_does_not_depend_on_which_form_was_estimated(kind: str) -> None:
    rng = np.random.default_rng(6)
    group = SymmetryGroup(KINDS[kind])
    T = random_pose(rng)
    first = group.canonical(T)
    for motion in KINDS[kind].transforms(step_deg=30.0):
        np.testing.assert_allclose(group.canonical(T @ motion), first, atol=1e-9)


def test_a_round_object_on_a_table_begins_with_x_to_the_right() -> None:
    """However it was estimated, and however steeply the camera looks down."""
    group = SymmetryGroup(Symmetries(continuous=((Z, np.zeros(3)),)))
    for pitch in (0, 30, 60, 80):
        tilt = about("x", -pitch)
        for yaw in (0, 77, 180, 300):
            T = make_transform(tilt[:3, :3] @ CANONICAL @ about("z", yaw)[:3, :3], [0, 0, 1])
            np.testing.assert_allclose(group.canonical(T)[:3, 0], [1, 0, 0], atol=1e-9)


def test_equally_near_forms_do_not_alternate() -> None:
    """A half turn away from either form: the first is taken, also where noise makes the other nearer."""
    group = SymmetryGroup(Symmetries(discrete=(about("z", 180),)))
    quarter = about("z", 90)[:3, :3]
    for noise in (-1e-8, 0.0, 1e-8):
        T = about("z", noise)
        assert rotation_angle_deg(group.nearest(T, quarter)[:3, :3], np.eye(3)) < 1e-3


def test_files_give_their_symmetries(tmp_path: Path) -> None:
    """From models_info.json in millimetres and from objects.yaml, as they are onboarded."""
    for name in ("obj_000001.ply", "obj_000002.ply"):
        trimesh.creation.box((30, 30, 80)).export(tmp_path / name)
    info = {"symmetries_continuous": [{"axis": [0, 0, 1], "offset": [20, -30, 0]}]}
    (tmp_path / "models_info.json").write_text(json.dumps({"1": info, "2": {}}))
    numbers = about("z", 90, 1000 * OFFSET).round(6).tolist()
    (tmp_path / "objects.yaml").write_text(
        f"obj_000002: {{symmetries: {{discrete: [{sum(numbers, [])}]}}}}\n"
    )
    specs = {spec.class_id: spec for spec in discover_objects(tmp_path)}
    rng = np.random.default_rng(7)
    T, R = random_pose(rng), Rotation.random(random_state=rng).as_matrix()
    round_one = SymmetryGroup(specs["obj_000001"].symmetries).nearest(T, R)
    np.testing.assert_allclose(round_one, SymmetryGroup(KINDS["round"]).nearest(T, R), atol=1e-9)
    square = SymmetryGroup(specs["obj_000002"].symmetries).nearest(T, R)
    np.testing.assert_allclose(square, SymmetryGroup(KINDS["all listed"]).nearest(T, R), atol=1e-9)
