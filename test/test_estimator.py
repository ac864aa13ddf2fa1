"""The estimator with a network that knows the answer, then with what can go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import trimesh
from oracle import OracleModel, Placed

from picopose_ros.errors import CameraError, CheckpointError, ConfigError, ImageError, MeshError
from picopose_ros.estimation.solving import hypothesis_quality
from picopose_ros.estimator import (
    EstimatorSettings,
    ObjectPose,
    PoseEstimator,
    torch_device,
)
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.covariance import move_covariance
from picopose_ros.geometry.poses import make_transform, rotation_angle_deg
from picopose_ros.model import PRESETS, PicoPose, load_model, save_model
from picopose_ros.model.checkpoint import save_calibration
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import TemplateBank, build_bank
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, load_object
from picopose_ros.templates.renderer import MeshRenderer

SIZE = (640, 480)
K = np.array([[600.0, 0, 325], [0, 605, 238], [0, 0, 1]])
PINHOLE = CameraModel(K, *SIZE)


@pytest.fixture(scope="module")
def meshes(tmp_path_factory) -> dict[str, ObjectMesh]:
    """Two solids whose file's origin is far from their centre."""
    folder = tmp_path_factory.mktemp("meshes")
    bracket = trimesh.util.concatenate(
        [
            trimesh.creation.box((0.10, 0.06, 0.03)),
            trimesh.creation.box(
                (0.03, 0.06, 0.07), trimesh.transformations.translation_matrix([0.035, 0, 0.03])
            ),
        ]
    )
    bracket.apply_translation([0.2, -0.1, 0.05])
    cone = trimesh.creation.cone(0.04, 0.09)
    cone.apply_translation([0, 0, -0.3])
    for name, mesh in {"bracket": bracket, "cone": cone}.items():
        mesh.export(folder / f"{name}.ply")
    return {n: load_object(ObjectSpec(n, folder / f"{n}.ply")) for n in ("bracket", "cone")}


@pytest.fixture(scope="module")
def renderer() -> Iterator[MeshRenderer]:
    with MeshRenderer() as renderer:
        yield renderer


@pytest.fixture(scope="module")
def banks(meshes) -> dict[str, TemplateBank]:
    return {name: build_bank(mesh, OracleModel(), 42) for name, mesh in meshes.items()}


def pose_at(
    mesh: ObjectMesh, rotation: tuple[float, float, float], where: tuple[float, float, float]
) -> np.ndarray:
    """T_cam_obj of the mesh's own frame that puts its box's centre at ``where``."""
    R = cv2.Rodrigues(np.array(rotation, np.float64))[0]
    return make_transform(R, np.array(where) - R @ mesh.centre)


class World:
    """Objects before a camera, and an estimator whose network knows them."""

    def __init__(self, meshes, banks, renderer) -> None:
        self.meshes, self.banks, self.renderer = meshes, banks, renderer
        self.model = OracleModel()
        for bank in banks.values():
            self.model.know(bank)

    def picture(self, placements: list[tuple[str, np.ndarray]], camera: CameraModel = PINHOLE):
        """RGB, truths and segments; a distorted camera gets a picture warped by its lens."""
        scene = [(self.meshes[name], T) for name, T in placements]
        rgb = self.renderer.render_scene(scene, K, *SIZE).rgb
        masks = [self.renderer.render(mesh, T, K, *SIZE).mask for mesh, T in scene]
        if camera.distorted:
            u, v = np.meshgrid(np.arange(SIZE[0], dtype=float), np.arange(SIZE[1], dtype=float))
            straight = camera.undistort_points(np.stack([u, v], -1).reshape(-1, 2))
            maps = straight.reshape(SIZE[1], SIZE[0], 2).astype(np.float32)
            rgb = cv2.remap(rgb, maps, None, cv2.INTER_LINEAR)
            masks = [cv2.remap(m.astype(np.uint8), maps, None, cv2.INTER_NEAREST) > 0 for m in masks]
        truths = [
            Placed(self.banks[name], T, Segment(name, 0.5 + 0.1 * i, mask))
            for i, ((name, T), mask) in enumerate(zip(placements, masks))
        ]
        return rgb, truths, self.model.show(rgb, camera, truths)

    def estimator(self, **settings) -> PoseEstimator:
        return PoseEstimator(self.model, self.banks, EstimatorSettings(**{"refinements": 0, **settings}))


@pytest.fixture
def world(meshes, banks, renderer) -> World:
    return World(meshes, banks, renderer)


@pytest.fixture
def three(world) -> list[tuple[str, np.ndarray]]:
    """Two brackets and a cone."""
    return [
        ("bracket", pose_at(world.meshes["bracket"], (0.4, -0.8, 0.5), (-0.12, 0.02, 0.6))),
        ("cone", pose_at(world.meshes["cone"], (-1.2, 0.3, 0.1), (0.02, -0.06, 0.5))),
        ("bracket", pose_at(world.meshes["bracket"], (2.0, 0.5, -0.7), (0.17, 0.08, 0.9))),
    ]


def check(pose: ObjectPose, truth: np.ndarray, degrees: float, metres: float) -> None:
    angle = rotation_angle_deg(pose.T_cam_obj[:3, :3], truth[:3, :3])
    centre = np.append(pose.bbox_centre, 1.0)
    offset = np.linalg.norm((pose.T_cam_obj @ centre - truth @ centre)[:3])
    assert angle < degrees and offset < metres, f"{pose.class_id}: {angle:.3f} deg, {offset * 1000:.3f} mm"


def test_several_classes_and_instances_in_one_pass(world, three):
    rgb, truths, segments = world.picture(three)
    estimator = world.estimator(hypotheses=3)
    result = estimator.estimate(rgb, PINHOLE, segments)
    assert result.skipped == []
    assert [(p.segment, p.class_id, p.source) for p in result.poses] == [
        (0, "bracket", "offsets"),
        (1, "cone", "offsets"),
        (2, "bracket", "offsets"),
    ]
    for pose, truth in zip(result.poses, truths):
        check(pose, truth.T_cam_obj, 0.1, 0.0005)
        assert 0.6 < pose.confidence <= 1 and pose.inlier_ratio > 0.95 and pose.inliers > 300
        assert pose.segment_score == truth.segment.score
        np.testing.assert_allclose(pose.bbox_centre, truth.bank.centre)
        np.testing.assert_allclose(pose.bbox_size, world.meshes[pose.class_id].extents)
        sigma = np.sqrt(np.diag(pose.covariance))
        assert (sigma > 0).all() and (sigma < 0.02).all()
    # One query pass for three segments, one pass for the up to nine templates.
    assert world.model.encoded[0] == 3 and len(world.model.encoded) == 2
    assert set(result.timings) == {"crop", "encode", "match", "regress", "pnp", "refine", "total"}
    assert result.timings["total"] >= sum(v for k, v in result.timings.items() if k != "total") - 1


def test_a_second_image_finds_its_templates_remembered(world, three):
    rgb, _, segments = world.picture(three)
    estimator = world.estimator(hypotheses=2)
    first = estimator.estimate(rgb, PINHOLE, segments)
    before = len(world.model.encoded)
    second = estimator.estimate(rgb, PINHOLE, segments)
    assert world.model.encoded[before:] == [3]
    for a, b in zip(first.poses, second.poses):
        np.testing.assert_array_equal(a.T_cam_obj, b.T_cam_obj)


def test_small_batches_and_memory_give_the_same_poses(world, three):
    rgb, _, segments = world.picture(three)
    wide = world.estimator(hypotheses=3).estimate(rgb, PINHOLE, segments)
    world.model.encoded.clear()
    narrow = world.estimator(hypotheses=3, max_batch=2, template_cache_mb=1)
    result = narrow.estimate(rgb, PINHOLE, segments)
    assert max(world.model.encoded) == 2
    for a, b in zip(wide.poses, result.poses):  # batches of another size may round otherwise
        np.testing.assert_allclose(a.T_cam_obj, b.T_cam_obj, atol=1e-4)
    world.model.encoded.clear()
    narrow.estimate(rgb, PINHOLE, segments)
    assert sum(world.model.encoded) > 3, "a cache of 1 MB can't hold all templates"


@pytest.mark.parametrize(
    ("model", "D"),
    [
        ("plumb_bob", (-0.28, 0.09, 0.0008, -0.0005, 0.0)),
        ("rational_polynomial", (0.3, 0.05, 0.0003, -0.0002, 0.004, 0.6, 0.1, 0.01)),
        ("equidistant", (-0.02, 0.004, -0.001, 0.0002)),
    ],
)
@pytest.mark.parametrize("scrambled", [False, True])
def test_a_lens_is_undone_before_pnp(world, three, model, D, scrambled):
    camera = CameraModel(K, *SIZE, model, D)
    rgb, truths, segments = world.picture(three, camera)
    world.model.scrambled = scrambled
    result = world.estimator(hypotheses=1).estimate(rgb, camera, segments)
    assert len(result.poses) == 3
    for pose, truth in zip(result.poses, truths):
        if scrambled:
            assert pose.source == "affine"
            check(pose, truth.T_cam_obj, 180, 0.002)
        else:
            assert pose.source == "offsets"
            check(pose, truth.T_cam_obj, 0.15, 0.001)


def test_reference_decode_gives_the_released_networks_coarser_pose(world, three):
    rgb, truths, segments = world.picture(three)
    fine = world.estimator(hypotheses=2).estimate(rgb, PINHOLE, segments)
    coarse = world.estimator(hypotheses=2, decode="reference").estimate(rgb, PINHOLE, segments)
    errors = []
    for poses in (fine.poses, coarse.poses):
        errors.append(
            [rotation_angle_deg(p.T_cam_obj[:3, :3], t.T_cam_obj[:3, :3]) for p, t in zip(poses, truths)]
        )
    assert np.mean(errors[0]) < 0.1 < np.mean(errors[1]) < 3
    assert all(pose.covariance.shape == (6, 6) for pose in coarse.poses)


def test_five_lucky_pairs_lose(world, three):
    """The best match has five pairs that agree perfectly; the next one has all of them."""
    rgb, truths, segments = world.picture(three[:1])
    bank = truths[0].bank
    angles = [rotation_angle_deg(T[:3, :3], truths[0].T_cam_obj[:3, :3]) for T in bank.T_cam_ctr]
    world.model.uncertain = {(bank.class_id, int(np.argmin(angles)))}
    (pose,) = world.estimator(hypotheses=2).estimate(rgb, PINHOLE, segments).poses
    assert pose.template != np.argmin(angles) and pose.inliers > 100
    # The released network's choice by ratio alone falls for it.
    (pose,) = world.estimator(hypotheses=2, decode="reference").estimate(rgb, PINHOLE, segments).poses
    assert pose.template == np.argmin(angles)
    # Alone, it isn't believed either.
    (pose,) = world.estimator(hypotheses=1).estimate(rgb, PINHOLE, segments).poses
    assert pose.source == "affine"


def test_quality_counts_what_is_explained():
    mask = np.ones((224, 224), np.uint8)
    grid = (
        np.stack(np.meshgrid(np.arange(7, 224, 14), np.arange(7, 224, 14)), -1).reshape(-1, 2).astype(float)
    )
    assert hypothesis_quality(grid, 1.0, np.eye(3), mask) == 1.0
    assert hypothesis_quality(grid, 0.5, np.eye(3), mask) == 0.5
    assert hypothesis_quality(grid[:5], 1.0, np.eye(3), mask) == pytest.approx(5 / 256)
    half = mask.copy()
    half[:112] = 0
    assert hypothesis_quality(grid[128:], 1.0, np.eye(3), half) == 1.0
    assert hypothesis_quality(grid[:128], 1.0, np.eye(3), half) == 0.0
    sliver = np.zeros_like(mask)
    sliver[:, 100:102] = 1
    assert hypothesis_quality(np.array([[101.0, 50.0]]), 1.0, np.eye(3), sliver) == pytest.approx(1 / 16)


def test_without_agreement_the_affine_pose_is_marked(world, three):
    rgb, truths, segments = world.picture(three)
    world.model.scrambled = True
    result = world.estimator(hypotheses=2).estimate(rgb, PINHOLE, segments)
    assert [pose.source for pose in result.poses] == ["affine"] * 3
    for pose, truth in zip(result.poses, truths):
        check(pose, truth.T_cam_obj, 180, 0.002)
        assert 0 < pose.confidence <= 0.1 and pose.inliers == 0
        centre = pose.T_cam_obj[:3, :3] @ truth.bank.centre
        sigma = np.sqrt(np.diag(move_covariance(pose.covariance, centre)))  # what the affine places
        assert sigma[2] == pytest.approx(0.1 * (pose.T_cam_obj[2, 3] + centre[2]), rel=0.01)
        assert sigma[:2].max() < 0.3 * sigma[2]
        if np.linalg.norm(centre) > 1e-3:
            assert np.diag(pose.covariance)[:3].sum() > (sigma[:3] ** 2).sum()
        assert (sigma[3:] > 0.2).all()


def test_segments_without_a_pose_are_named_and_the_others_go_on(world, three):
    rgb, truths, segments = world.picture(three[:1])
    height, width = rgb.shape[:2]
    tiny = np.zeros((height, width), bool)
    tiny[100, 100:105] = True
    bad = [
        Segment("teapot", 1.0, segments[0].mask),
        Segment("cone", 1.0, np.zeros((height, width), bool)),
        Segment("cone", 1.0, tiny),
        Segment("cone", 1.0, np.ones((240, 320), bool)),
    ]
    result = world.estimator().estimate(rgb, PINHOLE, [*bad[:2], segments[0], *bad[2:]])
    assert [pose.segment for pose in result.poses] == [2]
    check(result.poses[0], truths[0].T_cam_obj, 0.1, 0.0005)
    reasons = dict(result.skipped)
    assert list(reasons) == [0, 1, 3, 4]
    assert "'teapot'" in reasons[0] and "bracket, cone" in reasons[0]
    assert "empty" in reasons[1]
    assert "5 pixels" in reasons[3] and "32" in reasons[3]
    assert "320x240" in reasons[4] and "640x480" in reasons[4]


def test_no_segments_no_poses(world):
    result = world.estimator().estimate(np.zeros((480, 640, 3), np.uint8), PINHOLE, [])
    assert result.poses == [] and result.skipped == []


def test_a_mask_at_the_border_has_a_pose(world):
    T = pose_at(world.meshes["bracket"], (0.4, -0.8, 0.5), (-0.3, 0.21, 0.6))
    rgb, truths, segments = world.picture([("bracket", T)])
    mask = segments[0].mask
    assert mask[-1].any() or mask[:, 0].any()
    (pose,) = world.estimator(hypotheses=1).estimate(rgb, PINHOLE, segments).poses
    check(pose, truths[0].T_cam_obj, 0.5, 0.002)


def test_an_alias_finds_its_object(world, three):
    rgb, truths, segments = world.picture(three[1:2])
    settings = EstimatorSettings(refinements=0)
    estimator = PoseEstimator(world.model, world.banks, settings, aliases={"5": "cone"})
    (pose,) = estimator.estimate(rgb, PINHOLE, [replace(segments[0], class_id="5")]).poses
    assert pose.class_id == "cone"
    check(pose, truths[0].T_cam_obj, 0.1, 0.0005)


def test_pairs_that_err_together_widen_the_covariance(world, three):
    rgb, _, segments = world.picture(three[:1])
    covariances = [
        world.estimator(hypotheses=1, correlated_pairs=n).estimate(rgb, PINHOLE, segments).poses[0].covariance
        for n in (1.0, 50.0)
    ]
    np.testing.assert_allclose(covariances[1], 50 * covariances[0], rtol=1e-9)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((480, 640), np.uint8), r"\(480, 640\)"),
        (np.zeros((480, 640, 4), np.uint8), r"\(480, 640, 4\)"),
        (np.zeros((480, 640, 3), np.float32), "float32"),
        (np.zeros((0, 640, 3), np.uint8), r"\(0, 640, 3\)"),
        ("image.png", "str"),
    ],
)
def test_an_image_of_another_form_is_refused(world, image, message):
    with pytest.raises(ImageError, match=message):
        world.estimator().estimate(image, PINHOLE, [])


def test_a_camera_that_does_not_fit_is_refused(world):
    rgb = np.zeros((480, 640, 3), np.uint8)
    with pytest.raises(CameraError, match="320x240.*640x480"):
        world.estimator().estimate(rgb, CameraModel(K, 320, 240), [])
    with pytest.raises(CameraError, match="uncalibrated"):
        world.estimator().estimate(rgb, CameraModel(np.zeros((3, 3)), *SIZE), [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"hypotheses": 0},
        {"decode": "best"},
        {"ransac_threshold_px": 0.0},
        {"correlated_pairs": -1.0},
        {"max_batch": -1},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EstimatorSettings(**wrong)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An untrained network: from_mesh_dir doesn't ask how good it is."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_model(PicoPose(PRESETS["tiny"]), path)
    return path


def test_from_mesh_dir_tells_how_far_it_is_and_knows_aliases(tmp_path, weights, meshes):
    folder = tmp_path / "meshes"
    folder.mkdir()
    for name, mesh in meshes.items():
        (folder / f"{name}.ply").write_bytes(mesh.spec.path.read_bytes())
    (folder / "broken.ply").write_text("no mesh")
    (folder / "objects.yaml").write_text('cone: {class_ids: ["5"]}\n')
    told = []
    options = {"weights": weights, "viewpoints": 42, "cache_dir": tmp_path / "cache"}
    options |= {"hypotheses": 2, "refinements": 0}
    estimator = PoseEstimator.from_mesh_dir(folder, progress=lambda *step: told.append(step), **options)
    assert sorted(estimator.banks) == ["bracket", "cone"]
    assert told == [(n, k + i, 3) for k, n in enumerate(("bracket", "broken", "cone")) for i in (0, 1)]
    assert estimator.settings.hypotheses == 2

    # A real network, untrained: whatever comes out is a pose of the class, within its bounds.
    mask = np.zeros((480, 640), bool)
    mask[200:300, 250:400] = True
    rgb = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    result = estimator.estimate(rgb, PINHOLE, [Segment("5", 1.0, mask), Segment("bracket", 1.0, mask)])
    assert [pose.class_id for pose in result.poses] == ["cone", "bracket"]
    for pose in result.poses:
        R = pose.T_cam_obj[:3, :3]
        np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-6)
        assert np.linalg.det(R) > 0 and 0 <= pose.confidence <= 1
        assert (np.linalg.eigvalsh(pose.covariance) > 0).all()

    # From the cache, with the bar's form of progress, the same banks come back.
    again = PoseEstimator.from_mesh_dir(folder, progress=False, **options)
    for name, bank in estimator.banks.items():
        np.testing.assert_array_equal(bank.descriptors, again.banks[name].descriptors)

    class Stop(Exception):
        pass

    def stop(*step):
        raise Stop

    with pytest.raises(Stop):
        PoseEstimator.from_mesh_dir(folder, progress=stop, **options)


def test_from_mesh_dir_without_a_usable_mesh_says_why(tmp_path, weights):
    (tmp_path / "broken.ply").write_text("no mesh")
    for progress in (False, lambda *step: None):
        with pytest.raises(MeshError, match="broken.ply"):
            PoseEstimator.from_mesh_dir(
                tmp_path, weights=weights, cache_dir=tmp_path / "c", progress=progress
            )


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ConfigError, match=device):
        torch_device(device)


def test_a_trace_tells_what_each_stage_did_and_changes_nothing(world, three):
    rgb, truths, segments = world.picture(three)
    estimator = world.estimator(hypotheses=3)
    plain = estimator.estimate(rgb, PINHOLE, segments)
    result = estimator.estimate(
        rgb, PINHOLE, [*segments, Segment("teapot", 1.0, segments[0].mask)], trace=True
    )
    assert plain.traces == [] and len(result.traces) == 3
    for pose, same, trace, truth in zip(plain.poses, result.poses, result.traces, truths):
        np.testing.assert_array_equal(pose.T_cam_obj, same.T_cam_obj)
        np.testing.assert_array_equal(pose.T_cam_obj, trace.answers[2].T_cam_obj)
        assert trace.query.segment.class_id == pose.class_id
        scores = [h.hypothesis.match_score for h in trace.hypotheses]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        for one in trace.hypotheses:
            assert one.hypothesis.flow.shape == (2, 64, 64) and one.hypothesis.matches.shape == (2, 16, 16)
            check(one.answer, truth.T_cam_obj, 0.3, 0.001)
            np.testing.assert_array_equal(one.answer.T_cam_obj, one.T_offsets)
            # Stage 2 here knows where the object is; of its rotation only the template's.
            check(replace(one.answer, T_cam_obj=one.T_affine), truth.T_cam_obj, 180, 0.002)
            # Stage 1 has the template as it is: its crop becomes the segment's crop.
            bank, index = trace.query.bank, one.hypothesis.template
            np.testing.assert_allclose(one.T_match[:3, :3], bank.T_cam_ctr[index, :3, :3], atol=1e-6)
            centre = PINHOLE.project((one.T_match @ np.append(bank.centre, 1.0))[None, :3])[0]
            np.testing.assert_allclose(
                (trace.query.M_crop_img @ np.append(centre, 1.0))[:2], bank.centres[index], atol=0.01
            )
    (first,) = world.estimator(hypotheses=1).estimate(rgb, PINHOLE, segments[:1]).poses
    np.testing.assert_allclose(first.T_cam_obj, result.traces[0].answers[0].T_cam_obj, atol=1e-4)


def test_later_stages_can_be_given_a_template_or_other_correspondences(world, three):
    rgb, truths, segments = world.picture(three[:1])
    estimator = world.estimator(hypotheses=1)
    far = int(np.argmin(truths[0].bank.T_cam_ctr[:, :3, 2] @ truths[0].T_cam_obj[:3, 2]))
    (trace, nothing) = estimator.examine(
        rgb, PINHOLE, [*segments, Segment("cone", 1.0, segments[0].mask & False)], [[far, 3], [0]]
    )
    assert nothing is None and [h.hypothesis.template for h in trace.hypotheses] == [far, 3]
    one = trace.hypotheses[1]
    check(estimator.answer(trace.query, one.hypothesis, PINHOLE), truths[0].T_cam_obj, 0.3, 0.001)
    blind = replace(one.hypothesis, certainty=np.full((64, 64), -5.0))
    assert estimator.answer(trace.query, blind, PINHOLE).source == "affine"


def test_the_background_is_left_where_it_is_asked_for(world, three):
    rgb, _, segments = world.picture(three[:1])
    rgb = np.where(segments[0].mask[..., None], rgb, 200)
    crops = [world.estimator(keep_background=keep)._crop(rgb, segments)[0][0].crop for keep in (False, True)]
    outside = crops[0] != crops[1]
    assert outside.any() and (crops[0].min() < crops[1].min())
    assert not outside.all()


def test_given_affines_start_stage_three(tmp_path, weights):
    """Given what stage 2 said, stage 3 says what it said; given another, something else."""
    trimesh.creation.box((0.1, 0.06, 0.03)).export(tmp_path / "box.ply")
    estimator = PoseEstimator.from_mesh_dir(
        tmp_path, weights=weights, cache_dir=tmp_path / "c", viewpoints=42, hypotheses=2, refinements=0
    )
    rgb = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    mask = np.zeros((480, 640), bool)
    mask[100:220, 200:380] = True
    segments = [Segment("box", 1.0, mask)]
    (trace,) = estimator.estimate(rgb, PINHOLE, segments, trace=True).traces
    assert [len(h.hypothesis.coarse) for h in trace.hypotheses] == [2, 2]
    ids = [h.hypothesis.template for h in trace.hypotheses]
    affines = [trace.hypotheses[0].hypothesis.affine, np.diag([0.5, 0.5, 1.0])]
    (again,) = estimator.examine(rgb, PINHOLE, segments, [ids], [affines])
    same, other = (h.hypothesis for h in again.hypotheses)
    np.testing.assert_allclose(same.flow, trace.hypotheses[0].hypothesis.flow, atol=1e-3)
    assert np.abs(other.flow - trace.hypotheses[1].hypothesis.flow).max() > 0.1
    np.testing.assert_array_equal(other.affine, affines[1].astype(np.float32))
    (mixed,) = estimator.examine(rgb, PINHOLE, segments, [ids], [[affines[0], None]])
    np.testing.assert_allclose(
        mixed.hypotheses[1].hypothesis.flow, trace.hypotheses[1].hypothesis.flow, atol=1e-3
    )


def test_calibrated_weights_give_calibrated_confidences(world, three):
    rgb, _, segments = world.picture(three)
    raw = world.estimator(hypotheses=1).estimate(rgb, PINHOLE, segments).poses
    world.model.calibration = (0.5, -1.0)
    mapped = world.estimator(hypotheses=1).estimate(rgb, PINHOLE, segments).poses
    for before, after in zip(raw, mapped):
        sure = min(before.confidence, 0.999)
        logit = np.log(sure / (1 - sure))
        assert after.confidence == pytest.approx(1 / (1 + np.exp(1 - 0.5 * logit)))
        np.testing.assert_array_equal(before.T_cam_obj, after.T_cam_obj)
    # What it was measured on is stage 3; the other poses keep theirs.
    world.model.scrambled = True
    for pose in world.estimator(hypotheses=1).estimate(rgb, PINHOLE, segments).poses:
        assert pose.source == "affine" and 0 < pose.confidence <= 0.1


def test_a_calibration_lives_in_the_weights_file(tmp_path, weights):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(weights.read_bytes())
    assert load_model("tiny", path).calibration == (1.0, 0.0)
    save_calibration(path, 0.8, -0.25)
    model = load_model("tiny", path)
    assert model.calibration == (0.8, -0.25)
    for key, value in load_model("tiny", weights).state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)
    save_model(model, path)
    assert load_model("tiny", path).calibration == (0.8, -0.25)
    save_calibration(path, -1.0, 0.0)
    with pytest.raises(CheckpointError, match="tiny.safetensors has a calibration that can't be used"):
        load_model("tiny", path)
