"""Refinement with the packaged weights: poses get better; what cannot be refined stays and says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh
from oracle import OracleModel
from scipy.spatial.transform import Rotation

from picopose_ros.errors import ConfigError, ImageError
from picopose_ros.estimation import refine as refine_module
from picopose_ros.estimation.confidence import REFINED, Calibration
from picopose_ros.estimation.evidence import Weights
from picopose_ros.estimation.passes import Network
from picopose_ros.estimation.refine import Refined, Start, Task, refine_poses
from picopose_ros.estimation.refine_step import Look, Step, grown
from picopose_ros.estimation.refining import score_of
from picopose_ros.estimator import EstimatorSettings, ObjectPose, PoseEstimator
from picopose_ros.evaluation.released_schedule import ReleasedEstimator
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.crops import CROP_SIZE, crop_box_from_mask
from picopose_ros.geometry.least_squares import moved
from picopose_ros.geometry.poses import make_transform, rotation_angle_deg
from picopose_ros.model import load_model
from picopose_ros.model.fast import Refining
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import TemplateBank, build_bank
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

SIZE = (640, 480)
K = np.array([[600.0, 0, 325], [0, 605, 238], [0, 0, 1]])
CAMERA = CameraModel(K, *SIZE)
LENS = CameraModel(K, *SIZE, "plumb_bob", (-0.25, 0.08, 0.001, -0.002, 0.0))
OFF = np.array([0.004, -0.003, 0.018, 0.06, -0.05, 0.07])
"""By how much the poses to begin with are off: 3 % in depth, 6 degrees."""


def _pose(vector: tuple[float, float, float], shift: tuple[float, float, float]) -> np.ndarray:
    return make_transform(Rotation.from_rotvec(vector).as_matrix(), shift)


class World:
    """A brick and a bar in front of a coloured wall, and an estimator that can refine them."""

    def __init__(self, folder: Path) -> None:
        self.meshes: dict[str, ObjectMesh] = {}
        for name, extents in {"brick": (0.06, 0.08, 0.11), "bar": (0.03, 0.05, 0.14)}.items():
            mesh = trimesh.creation.box(extents).subdivide().subdivide()
            colours = np.random.default_rng(len(name)).integers(0, 255, (len(mesh.vertices), 3))
            mesh.visual.vertex_colors = np.c_[colours, np.full(len(colours), 255)].astype(np.uint8)
            mesh.export(folder / f"{name}.ply")
            self.meshes[name] = load_object(ObjectSpec(name, folder / f"{name}.ply"))
        foil = trimesh.Trimesh([[0, 0, 0], [0.1, 0, 0], [0, 0.1, 0]], [[0, 1, 2]], process=False)
        foil.export(folder / "foil.ply")
        banks = {name: build_bank(mesh, OracleModel(), 42) for name, mesh in self.meshes.items()}
        banks["foil"] = replace(banks["bar"], class_id="foil", spec=ObjectSpec("foil", folder / "foil.ply"))
        banks["nameless"] = replace(banks["bar"], class_id="nameless", spec=None)
        self.banks: dict[str, TemplateBank] = banks
        self.truth = {
            "brick": _pose((0.4, -0.8, 0.5), (-0.12, 0.02, 0.6)),
            "bar": _pose((-1.2, 0.3, 0.1), (0.06, -0.04, 0.55)),
        }
        rng = np.random.default_rng(0)
        wall = cv2.resize(rng.uniform(0, 255, (9, 12, 3)).astype(np.float32), SIZE).astype(np.uint8)
        with MeshRenderer(antialias=True) as renderer:
            placed = [(self.meshes[name], T) for name, T in self.truth.items()]
            view = renderer.render_scene(placed, K, *SIZE)
            self.masks = {n: renderer.render(self.meshes[n], T, K, *SIZE).mask for n, T in self.truth.items()}
        self.rgb = np.where(view.mask[..., None], view.rgb, wall)
        self.estimator = PoseEstimator(
            load_model("tiny"), banks, EstimatorSettings(precision="fp32", refinements=2)
        )

    def segments(self, change=lambda mask: mask) -> list[Segment]:
        return [Segment(name, 1.0, change(self.masks[name])) for name in self.truth]

    def poses(self, off: np.ndarray = OFF) -> list[ObjectPose]:
        return [pose_of(name, moved(T, off), i) for i, (name, T) in enumerate(self.truth.items())]

    def misses(self, poses: list[ObjectPose]) -> tuple[float, float, float]:
        """Largest mean distance in diameters, turn in degrees, share of the depth."""
        worst = np.zeros(3)
        for pose in poses:
            T, mesh = self.truth[pose.class_id], self.meshes[pose.class_id]
            apart = mesh.vertices @ (pose.T_cam_obj - T)[:3, :3].T + (pose.T_cam_obj - T)[:3, 3]
            worst = np.maximum(
                worst,
                [
                    np.linalg.norm(apart, axis=1).mean() / mesh.diameter,
                    rotation_angle_deg(pose.T_cam_obj[:3, :3], T[:3, :3]),
                    abs(pose.T_cam_obj[2, 3] / T[2, 3] - 1),
                ],
            )
        return tuple(worst)


def pose_of(name: str, T: np.ndarray, segment: int = 0) -> ObjectPose:
    return ObjectPose(
        name, T, 0.5, np.eye(6), "offsets", segment, 1.0, 0, 50, 0.9, 0.8, np.zeros(3), np.full(3, 0.1)
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("refine"))


def test_poses_get_better_and_say_by_how_many_rounds(world: World) -> None:
    before = world.poses()
    result = world.estimator.refine(world.rgb, CAMERA, before, world.segments())
    assert world.misses(before)[0] > 0.1
    assert result.unrefined == [] and all(1 <= pose.refinements <= 2 for pose in result.poses)
    add, turn, depth = world.misses(result.poses)
    assert add < 0.035 and turn < 1.5 and depth < 0.01
    assert [pose.class_id for pose in result.poses] == ["brick", "bar"]
    assert result.timings["refine"] > 0


def test_the_covariance_is_of_the_size_of_the_errors(world: World) -> None:
    for pose in world.estimator.refine(world.rgb, CAMERA, world.poses(), world.segments()).poses:
        sigma = np.sqrt(np.diag(pose.covariance))
        assert 1e-4 < sigma[2] < 0.02 and 1e-4 < sigma[:2].max() < 0.004
        assert np.radians(0.05) < sigma[3:].max() < np.radians(4)
        assert np.linalg.eigvalsh(pose.covariance).min() > 0


@pytest.mark.parametrize("grown", [-5, 7])
def test_masks_that_are_too_large_or_small_all_round_do_little_harm(world: World, grown: int) -> None:
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (abs(grown), abs(grown)))
    change = cv2.dilate if grown > 0 else cv2.erode
    segments = world.segments(lambda mask: change(mask.astype(np.uint8), kernel) > 0)
    add, turn, depth = world.misses(world.estimator.refine(world.rgb, CAMERA, world.poses(), segments).poses)
    assert add < 0.065 and turn < 2.0 and depth < 0.02


def test_without_segments_the_silhouettes_are_the_masks(world: World) -> None:
    result = world.estimator.refine(world.rgb, CAMERA, world.poses())
    assert result.unrefined == []
    assert world.misses(result.poses)[0] < 0.06


def test_without_a_mask_flow_and_colours_are_not_believed_in_their_small_errors(world: World) -> None:
    for segments, freedom in ((world.segments(), Weights().freedom), (None, np.inf)):
        for pose in world.estimator.refine(world.rgb, CAMERA, world.poses(), segments).poses:
            assert pose.terms["pairs"].scale_freedom == pose.terms["region"].growth_freedom == freedom
            assert ("contour" in pose.terms) == (segments is not None)


def test_the_released_schedule_refines_too(world: World) -> None:
    """What it has encoded of a query is of another form than ours, and refinement encodes it again."""
    model = load_model("tiny")
    banks = {"brick": build_bank(world.meshes["brick"], model, 42)}
    settings = EstimatorSettings(hypotheses=1, precision="fp32", refinements=1)
    estimator = ReleasedEstimator(model, banks, settings)
    (pose,) = estimator.estimate(world.rgb, CAMERA, world.segments()[:1]).poses
    assert pose.refinements == 1
    assert world.misses([pose])[0] < 0.1


def test_a_silhouette_that_is_too_small_does_not_hide_the_objects_edge(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poses too far away come back: the network sees more than their silhouettes."""
    poses = world.poses(np.zeros(6))
    away = [np.r_[0.05 * pose.T_cam_obj[:3, 3], 0, 0, 0] for pose in poses]
    far = [replace(pose, T_cam_obj=moved(pose.T_cam_obj, by)) for pose, by in zip(poses, away)]
    assert world.misses(far)[2] > 0.045
    with_rim = world.misses(world.estimator.refine(world.rgb, CAMERA, far).poses)[2]
    monkeypatch.setattr(refine_module, "RIM", 0.0)
    without = world.misses(world.estimator.refine(world.rgb, CAMERA, far).poses)[2]
    assert with_rim < 0.005 and with_rim < 0.7 * without


def test_what_leaves_the_image_is_shown_as_large_as_in_the_view(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = world.masks["bar"]
    rows = np.flatnonzero(mask.any(1))
    below = int(rows[0] + 0.6 * len(rows))
    assert len(rows) > 1.2 * mask.any(0).sum(), "it is cut across its longer side"
    rgb, camera = world.rgb[:below], CameraModel(K, SIZE[0], below)
    shown: list[np.ndarray] = []
    start = Network.start

    def spied(network: Network, affines: torch.Tensor, patches: torch.Tensor) -> Refining:
        shown.extend(affines.numpy())
        return start(network, affines, patches)

    monkeypatch.setattr(Network, "start", spied)
    pose = world.poses()[1]
    world.estimator.refine(rgb, camera, [pose])
    scales = [np.sqrt(np.linalg.det(affine[:2, :2])) for affine in shown]
    assert len(scales) == 2 and all(0.85 < scale < 1.05 for scale in scales), scales
    # The crop of what is seen would show it larger.
    box = crop_box_from_mask(mask[:below])
    assert CROP_SIZE / box.side > 1.2 * max(scales) * CROP_SIZE / crop_box_from_mask(mask).side


def test_a_mask_grows_by_a_share_of_its_longer_side_inside_the_image() -> None:
    mask = np.zeros((60, 80), bool)
    mask[20:40, 0:50] = True
    larger = grown(mask, 0.1)  # by 5 px
    rows, columns = np.flatnonzero(larger.any(1)), np.flatnonzero(larger.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (15, 44, 0, 54)
    assert larger[mask].all() and not larger[15, 54], "corners are round"
    assert grown(mask, 0.001) is mask
    assert not grown(np.zeros_like(mask), 0.1).any()


def test_a_lens_is_taken_out_first(world: World) -> None:
    v, u = np.indices(SIZE[::-1], np.float64)
    straight = LENS.undistort_points(np.stack([u.ravel(), v.ravel()], 1)).reshape(*u.shape, 2)
    maps = [np.nan_to_num(straight[..., i], nan=-1).astype(np.float32) for i in range(2)]
    rgb = cv2.remap(world.rgb, *maps, cv2.INTER_LINEAR)
    segments = world.segments(lambda mask: cv2.remap(mask.astype(np.uint8), *maps, cv2.INTER_NEAREST) > 0)
    add, turn, _ = world.misses(world.estimator.refine(rgb, LENS, world.poses(), segments).poses)
    assert add < 0.04 and turn < 2.0


def test_what_cannot_be_refined_stays_and_says_why(world: World) -> None:
    good, bar = world.poses()
    behind = replace(bar, T_cam_obj=make_transform(bar.T_cam_obj[:3, :3], [0, 0, -0.5]))
    around = replace(bar, T_cam_obj=make_transform(bar.T_cam_obj[:3, :3], [0, 0, 0.05]))
    edge_on = pose_of("foil", _pose((np.pi / 2, 0, 0), (-0.05, 0, 0.5)), 1)
    elsewhere = replace(bar, segment=0)
    nameless = replace(bar, class_id="nameless")
    asked = [good, behind, around, edge_on, elsewhere, nameless]
    result = world.estimator.refine(world.rgb, CAMERA, asked, world.segments())
    assert len(result.poses) == len(asked) and len(result.unrefined) == 5
    for pose, given in zip(result.poses[1:], asked[1:]):
        assert pose is given
    assert result.poses[0].refinements > 0
    for (segment, reason), pose, said in zip(
        result.unrefined,
        asked[1:],
        ("behind the camera", "inside the object", "thickness", "another place", "names no mesh"),
    ):
        assert segment == pose.segment and said in reason


def test_poses_of_nothing_that_is_known_are_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="no object is called 'cup'"):
        world.estimator.refine(world.rgb, CAMERA, [pose_of("cup", np.eye(4))])
    with pytest.raises(ConfigError, match="segment 7"):
        world.estimator.refine(world.rgb, CAMERA, [pose_of("bar", np.eye(4), 7)], world.segments())


def _step(T: np.ndarray, agreement: float, moved: float = 9.0) -> Step:
    return Step(T, np.eye(6), agreement, 1.0, 1.0, 100, 1.0, moved, {})


def test_the_score_of_a_refined_pose_is_mapped_before_the_networks_own_mapping(world: World) -> None:
    own = Calibration(0.5, -1.0)
    scores = []
    for agreement in (0.1, 0.4, 0.7, 0.95):
        step = _step(np.eye(4), agreement)
        scores.append(score_of(step, Calibration()))
        assert scores[-1] == world.estimator.score(step) == pytest.approx(float(REFINED.apply(agreement)))
        assert score_of(step, own) == pytest.approx(float(own.apply(scores[-1])))
    assert sorted(scores) == scores
    poses = world.estimator.refine(world.rgb, CAMERA, world.poses(), world.segments()).poses
    assert all(pose.confidence > 0.85 for pose in poses), "they are right, and nothing covers them"


def _shifted(x: float) -> np.ndarray:
    return make_transform(np.eye(3), [x, 0, 0.6])


def _run(
    monkeypatch: pytest.MonkeyPatch, world: World, starts: int, rounds: int, answer
) -> tuple[Refined | str, list[list[float]]]:
    """Refinement with given answers of the steps; the result, and where each round looked (x, in metres)."""
    seen: list[list[float]] = []

    def steps(
        network, rgb, K, looks: list[Look], blacken: bool, weights: Weights | None
    ) -> list[Step | None]:
        seen.append([round(float(look.T_cam_obj[0, 3]), 4) for look in looks])
        return [answer(float(look.T_cam_obj[0, 3]), len(seen)) for look in looks]

    monkeypatch.setattr(refine_module, "refine_step", steps)
    mask = np.zeros(SIZE[::-1], bool)
    mask[213:263, 310:385] = True
    task = Task("bar", mask, tuple(Start(_shifted(0.01 * i), 1.0 - 0.1 * i) for i in range(starts)))
    views = world.estimator._views
    return refine_poses(None, views, world.rgb, K, [task], rounds)[0], seen


def test_half_of_the_hypotheses_drop_out_each_round(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    """The third start agrees best, and goes on from where its steps led."""
    found, seen = _run(monkeypatch, world, 5, 3, lambda x, n: _step(_shifted(x + 0.001), 0.5 + 10 * x))
    assert seen == [[0.0, 0.01, 0.02], [0.021, 0.011], [0.022]]
    assert isinstance(found, Refined)
    assert found.start == 2 and found.rounds == 3
    assert found.step.T_cam_obj[0, 3] == pytest.approx(0.023)


def test_it_ends_when_steps_are_smaller_than_their_uncertainty(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    found, seen = _run(
        monkeypatch, world, 1, 8, lambda x, n: _step(_shifted(x + 0.001), 0.5, 9.0 if n < 3 else 0.5)
    )
    assert len(seen) == 3
    assert isinstance(found, Refined) and found.rounds == 3


def test_a_jump_to_another_pose_is_not_taken(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    half_turn = make_transform(Rotation.from_rotvec([0, 0, np.pi]).as_matrix(), [0, 0, 0.6])
    found, _ = _run(monkeypatch, world, 1, 2, lambda x, n: _step(half_turn, 0.9))
    assert isinstance(found, str) and "another pose" in found


def test_a_step_that_fails_later_keeps_what_was_reached(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    found, seen = _run(
        monkeypatch, world, 1, 4, lambda x, n: _step(_shifted(x + 0.001), 0.5) if n == 1 else None
    )
    assert len(seen) == 2
    assert isinstance(found, Refined) and found.rounds == 1
    assert found.step.T_cam_obj[0, 3] == pytest.approx(0.001)


def _depth_image(world: World, seed: int = 0) -> np.ndarray:
    """What a stereo camera would see of the objects before a wall at 0.9 m: noise, holes, flying pixels."""
    rng = np.random.default_rng(seed)
    with MeshRenderer() as renderer:
        placed = [(world.meshes[name], T) for name, T in world.truth.items()]
        depth = renderer.render_scene(placed, K, *SIZE).depth
    depth = np.where(depth > 0, depth, np.float32(0.9))
    depth = cv2.blur(depth, (3, 3))  # at edges depths lie between the surfaces
    noise = cv2.GaussianBlur(rng.normal(size=depth.shape).astype(np.float32), (0, 0), 1.5)
    depth = depth + noise / noise.std() * (0.001 + 0.002 * depth**2)
    holes = cv2.GaussianBlur(rng.normal(size=depth.shape).astype(np.float32), (0, 0), 4)
    depth[holes > 1.2 * holes.std()] = 0
    return depth.astype(np.float32)


def test_a_depth_image_makes_the_depth_right_where_masks_are_ragged(world: World) -> None:
    rng = np.random.default_rng(1)
    noise = cv2.GaussianBlur(rng.normal(size=SIZE[::-1]).astype(np.float32), (0, 0), 5)

    def ragged(mask: np.ndarray) -> np.ndarray:
        soft = cv2.GaussianBlur(cv2.dilate(mask.astype(np.float32), np.ones((7, 7))), (0, 0), 3)
        return soft + 0.3 * noise / noise.std() > 0.5

    depth = _depth_image(world)
    segments = world.segments(ragged)
    alone, metres, millimetres = (
        world.estimator.refine(world.rgb, CAMERA, world.poses(), segments, depth=one)
        for one in (None, depth, np.rint(1000 * depth).astype(np.uint16))
    )
    assert metres.unrefined == millimetres.unrefined == []
    assert world.misses(metres.poses)[2] < min(0.006, world.misses(alone.poses)[2] + 0.001)
    assert world.misses(metres.poses)[0] < 0.03
    assert world.misses(millimetres.poses)[2] < 0.006
    for with_depth, without in zip(metres.poses, alone.poses):
        assert with_depth.covariance[2, 2] < without.covariance[2, 2]


def test_a_depth_image_in_the_wrong_unit_is_said_and_not_used(world: World) -> None:
    wrong = 1000 * _depth_image(world)
    result = world.estimator.refine(world.rgb, CAMERA, world.poses(), world.segments(), depth=wrong)
    without = world.estimator.refine(world.rgb, CAMERA, world.poses(), world.segments())
    assert [segment for segment, _ in result.unrefined] == [0, 1]
    assert all("depth image is not used" in said and "millimetres" in said for _, said in result.unrefined)
    for one, other in zip(result.poses, without.poses):
        np.testing.assert_allclose(one.T_cam_obj, other.T_cam_obj, atol=1e-9)


@pytest.mark.parametrize(
    ("depth", "said"),
    [
        (np.zeros((240, 320), np.float32), "320x240.*registered"),
        (np.zeros((480, 640, 3), np.float32), r"\(480, 640, 3\)"),
        (np.zeros((480, 640), np.int32), "int32"),
    ],
)
def test_a_depth_image_of_another_form_is_refused(world: World, depth: np.ndarray, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        world.estimator.refine(world.rgb, CAMERA, world.poses(), depth=depth)


def test_a_depth_image_that_saw_nothing_changes_nothing(world: World) -> None:
    blind = np.full(SIZE[::-1], np.nan, np.float32)
    one, other = (
        world.estimator.refine(world.rgb, CAMERA, world.poses(), world.segments(), depth=depth)
        for depth in (blind, None)
    )
    assert one.unrefined == []
    np.testing.assert_allclose(one.poses[0].T_cam_obj, other.poses[0].T_cam_obj, atol=1e-9)
