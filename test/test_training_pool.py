"""The procedural objects and the pool of their rendered views."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import trimesh

from picopose_ros.errors import ConfigError, PicoPoseError
from picopose_ros.geometry.crops import CROP_SIZE
from picopose_ros.model import PicoPose
from picopose_ros.model.config import preset
from picopose_ros.synthetic.objects import (
    HELD_OUT_SHAPES,
    SIZE_RANGE,
    TRAINING_SHAPES,
    UNSEEN_FAMILY_SEED,
    VALIDATION_SEED,
    build_object,
)
from picopose_ros.synthetic.textures import HELD_OUT_TEXTURES, TRAINING_TEXTURES, project_box
from picopose_ros.templates.bank import build_bank
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec
from picopose_ros.training import pool as pool_module
from picopose_ros.training.config import TrainConfig
from picopose_ros.training.data import Batch, BatchDataset, concatenate, make_batch, take
from picopose_ros.training.pairs import Difficulty
from picopose_ros.training.pool import PoolReader, build_pool, decode_depth, encode_depth
from picopose_ros.training.sources import Draw


@pytest.fixture(scope="module")
def small_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    build_pool(folder, objects=3, first_seed=4, clusters=2, queries=2)
    return folder


def _points(depth: np.ndarray, K: np.ndarray, T_cam_ctr: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(depth)
    z = depth[rows, columns].astype(np.float64)
    seen = np.stack([(columns - K[0, 2]) * z / K[0, 0], (rows - K[1, 2]) * z / K[1, 1], z], axis=-1)
    return (seen - T_cam_ctr[:3, 3]) @ T_cam_ctr[:3, :3]


def _distance_to(seed: int, points: np.ndarray) -> np.ndarray:
    whole = trimesh.util.concatenate(
        [trimesh.Trimesh(p.vertices, p.faces) for p in build_object(seed, 32).centred()]
    )
    return (
        trimesh.proximity.closest_point_naive(whole, points)[1] if len(whole.faces) < 20000 else np.zeros(1)
    )


def test_an_object_is_a_function_of_its_seed() -> None:
    first, again, other = build_object(11, 64), build_object(11, 64), build_object(12, 64)
    assert len(first.parts) == len(again.parts)
    for a, b in zip(first.parts, again.parts, strict=True):
        np.testing.assert_array_equal(a.vertices, b.vertices)
        np.testing.assert_array_equal(a.visual.uv, b.visual.uv)
    assert first.diagonal != other.diagonal


def test_objects_have_sensible_sizes_faces_and_textures() -> None:
    for seed in range(40):
        made = build_object(seed, 64)
        assert SIZE_RANGE[0] * 0.999 <= made.diagonal <= SIZE_RANGE[1] * 1.001
        assert 12 <= sum(len(part.faces) for part in made.parts) <= 16000
        for part in made.parts:
            assert np.isfinite(part.vertices).all() and part.faces.max() < len(part.vertices)
            assert part.visual.uv.shape == (len(part.vertices), 2) and np.isfinite(part.visual.uv).all()
            assert part.visual.material.baseColorTexture.size == (64, 64)
        centre = np.array([part.bounds for part in made.centred()])
        np.testing.assert_allclose(centre[:, 0].min(axis=0), -centre[:, 1].max(axis=0), atol=1e-9)


def test_parts_of_an_object_are_connected() -> None:
    """Every part but the first reaches into the bounding region of another part: none floats."""
    for seed in (s for s in range(60) if len(build_object(s, 16).parts) > 1):
        parts = build_object(seed, 16).parts
        reached, waiting = [parts[0]], list(parts[1:])
        while waiting:
            near = [
                part
                for part in waiting
                if min(_gap(part, other) for other in reached) < 0.05 * np.linalg.norm(part.extents)
            ]
            assert near, f"seed {seed}: {len(waiting)} parts float"
            reached += near
            waiting = [part for part in waiting if not any(part is other for other in near)]


def _gap(a: trimesh.Trimesh, b: trimesh.Trimesh) -> float:
    rng = np.random.default_rng(0)
    clouds = []
    for part in (a, b):
        face = rng.choice(len(part.faces), 4000, p=part.area_faces / part.area)
        weight = rng.dirichlet(np.ones(3), 4000)
        clouds.append(np.einsum("nk,nkd->nd", weight, part.triangles[face]))
    from scipy.spatial import cKDTree

    return float(cKDTree(clouds[0]).query(clouds[1])[0].min())


def test_held_out_families_never_reach_training_seeds() -> None:
    seen_shapes, seen_textures = set(), set()
    for seed in [*range(60), *range(VALIDATION_SEED, VALIDATION_SEED + 20)]:
        made = build_object(seed, 16)
        seen_shapes |= set(made.shape_families)
        seen_textures |= set(made.texture_families)
    assert seen_shapes <= set(TRAINING_SHAPES) and len(seen_shapes) >= 8
    assert seen_textures <= set(TRAINING_TEXTURES) and len(seen_textures) >= 8
    unseen = [build_object(UNSEEN_FAMILY_SEED + n, 16) for n in range(8)]
    assert {name for made in unseen for name in made.shape_families} == set(HELD_OUT_SHAPES)
    assert {name for made in unseen for name in made.texture_families} == set(HELD_OUT_TEXTURES)


def test_box_projection_gives_every_side_its_own_unmirrored_print() -> None:
    box = trimesh.creation.box((0.2, 0.1, 0.3))
    textured = project_box(
        box, np.zeros((32, 32, 3), np.uint8), np.random.default_rng(3), scale=0.4, smooth=False
    )
    assert len(textured.vertices) == 24
    for face, normal in zip(textured.faces, textured.face_normals, strict=True):
        (p, q, r), (a, b, c) = textured.vertices[face], textured.visual.uv[face]
        area = np.cross(q - p, r - p) @ normal
        turned = (b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0]
        assert turned > 0, "print is mirrored"
        assert turned == pytest.approx(area / 0.4**2)
    corner = {tuple(np.sign(v)): set() for v in textured.vertices}
    for vertex, uv in zip(textured.vertices, textured.visual.uv, strict=True):
        corner[tuple(np.sign(vertex))].add(tuple(np.round(uv, 6)))
    assert all(len(values) == 3 for values in corner.values())


def test_depth_survives_storage() -> None:
    rng = np.random.default_rng(0)
    depth = (1.7 + 0.3 * rng.uniform(-0.5, 0.5, (64, 64))).astype(np.float32)
    depth[:8] = 0
    back = decode_depth(encode_depth(depth, 1.7, 0.3), 1.7, 0.3)
    assert np.abs(back - depth).max() < 1e-4 * 0.3
    np.testing.assert_array_equal(back == 0, depth == 0)


def test_views_lie_on_the_object(small_pool: Path) -> None:
    """Depth, pose and intrinsics of templates and queries agree with the mesh itself."""
    reader = PoolReader(small_pool)
    assert len(reader) == 6
    for index in (0, 3, 5):
        item = reader[index]
        for query in item.queries:
            points = _points(query.depth, query.K, query.T_cam_ctr)
            sample = points[np.random.default_rng(0).choice(len(points), 40)]
            # a pixel at a grazing angle or a silhouette may sit one depth step off
            assert np.median(_distance_to(item.seed, sample)) < 1e-4 * item.diagonal
            rows, columns = np.nonzero(query.mask)
            assert 0.85 * 256 < max(np.ptp(rows), np.ptp(columns)) < 0.95 * 256
            np.testing.assert_array_equal(
                query.rgb[~query.mask & (query.rgb.max(-1) > 200)].shape[0] < 400, True
            )
        template = item.template
        cell = template.points_consistent[..., 2] > 0
        points = (template.points_consistent[cell] - template.T_cam_ctr[:3, 3]) @ template.T_cam_ctr[:3, :3]
        sample = points[np.random.default_rng(1).choice(len(points), 40)]
        # read at floor(position), unprojected at the position itself: off by under one pixel at 2 diagonals
        assert np.median(_distance_to(item.seed, sample)) < 2 / 286 * item.diagonal
        assert template.mask.shape == (CROP_SIZE, CROP_SIZE) and template.mask.any()
        projected = template.points_consistent[cell].astype(np.float64) @ template.K.T.astype(np.float64)
        uv = projected[:, :2] / projected[:, 2:]
        crop = uv * template.M_crop_img[0, 0] + template.M_crop_img[:2, 2]
        rows, columns = np.nonzero(cell)
        np.testing.assert_allclose(crop, np.floor((np.stack([columns, rows], -1) + 0.5) * 3.5), atol=0.01)


def test_templates_are_those_of_the_bank(small_pool: Path) -> None:
    """What the network is trained on is, to the bit, what onboarding will show it."""
    reader = PoolReader(small_pool)
    parts = build_object(reader[0].seed).centred()
    torch.manual_seed(0)
    mesh = ObjectMesh(ObjectSpec("pooled", Path("pooled.glb")), parts)
    bank = build_bank(mesh, PicoPose(preset("tiny")).eval())
    for cluster in range(reader.clusters):
        template = reader[cluster].template
        index, side = template.viewpoint, int(bank.sides[template.viewpoint])
        pixels = cv2.resize(
            bank.images[index, :side, :side], (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_LINEAR
        )
        np.testing.assert_array_equal(template.rgb, pixels)
        np.testing.assert_array_equal(template.mask, bank.masks[index])
        np.testing.assert_allclose(template.points_consistent, bank.points_consistent[index], atol=1e-6)
        np.testing.assert_allclose(template.T_cam_ctr, bank.T_cam_ctr[index], atol=1e-6)
        np.testing.assert_array_equal(template.M_crop_img, bank.M_crop_img[index])
        np.testing.assert_allclose(template.K, bank.K, rtol=1e-7)


def test_queries_look_from_near_their_template(small_pool: Path) -> None:
    reader = PoolReader(small_pool)
    for index in range(len(reader)):
        item = reader[index]
        for query in item.queries:
            directions = []
            for pose in (item.template.T_cam_ctr, query.T_cam_ctr):
                position = -pose[:3, :3].T @ pose[:3, 3]
                directions.append(position / np.linalg.norm(position))
            assert np.rad2deg(np.arccos(np.clip(directions[0] @ directions[1], -1, 1))) <= 25.01
            assert 2.49 <= np.linalg.norm(query.T_cam_ctr[:3, 3]) / item.diagonal <= 8.01


def test_an_interrupted_pool_is_readable_and_goes_on(small_pool: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_after_one(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        build_pool(tmp_path, objects=3, first_seed=4, clusters=2, queries=2, progress=stop_after_one)
    reader = PoolReader(tmp_path)
    assert len(reader) == 2 and reader[1].seed == 4
    with pytest.raises(IndexError, match="2 complete"):
        reader[2]
    calls: list[int] = []
    build_pool(
        tmp_path,
        objects=3,
        first_seed=4,
        clusters=2,
        queries=2,
        progress=lambda done, total: calls.append(done),
    )
    assert calls == [2, 3]
    assert reader.refresh() == 6
    whole = PoolReader(small_pool)
    for index in range(6):
        np.testing.assert_array_equal(reader[index].template.rgb, whole[index].template.rgb)
        np.testing.assert_array_equal(reader[index].queries[1].depth, whole[index].queries[1].depth)


def test_a_broken_object_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pool_module.build_object

    def fails_once(seed: int) -> object:
        if seed == 5:
            raise ValueError("degenerate")
        return real(seed)

    monkeypatch.setattr(pool_module, "build_object", fails_once)
    build_pool(tmp_path, objects=3, first_seed=4, clusters=1, queries=1)
    reader = PoolReader(tmp_path)
    assert [reader[n].seed for n in range(len(reader))] == [4, 6]
    assert json.loads((tmp_path / "progress.json").read_text())["broken_seeds"] == [5]


def test_pool_refuses_what_cannot_work(small_pool: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another folder"):
        build_pool(small_pool, objects=4, first_seed=4, clusters=2, queries=2)
    with pytest.raises(ConfigError, match="mix training and validation"):
        build_pool(tmp_path, objects=10, first_seed=VALIDATION_SEED - 5)
    with pytest.raises(ConfigError, match="positive"):
        build_pool(tmp_path, objects=0)
    with pytest.raises(PicoPoseError, match="no pool"):
        PoolReader(tmp_path)


def test_pool_with_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    build_pool(tmp_path, objects=1, first_seed=4, clusters=1, queries=1)
    path = tmp_path / "query_rgb.npy"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PicoPoseError, match=r"query_rgb\.npy"):
        PoolReader(tmp_path)


def test_a_disk_that_is_too_small_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool_module.os, "posix_fallocate", full)
    with pytest.raises(PicoPoseError, match="free disk space"):
        build_pool(tmp_path, objects=1)
    with pytest.raises(PicoPoseError, match="no pool"):
        PoolReader(tmp_path)


def _full_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """The disk is full after so many small files; the large ones have reserved their room before."""
    real, left = pool_module._write_json, [writes]

    def write(path: Path, content: dict[str, object]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(pool_module, "_write_json", write)


def test_a_disk_that_fills_up_leaves_a_pool_that_goes_on(
    small_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _full_after(patch, 4)  # pool.json; families and progress of the first object; families of the second
        with pytest.raises(PicoPoseError, match="No space left on device.*run it again"):
            build_pool(tmp_path, objects=3, first_seed=4, clusters=2, queries=2)
    reader = PoolReader(tmp_path)
    assert [int(index) for index in reader.objects] == [0, 1]  # their views are all there
    build_pool(tmp_path, objects=3, first_seed=4, clusters=2, queries=2)
    whole = PoolReader(small_pool)
    assert reader.refresh() == len(whole)
    for index in range(len(whole)):
        np.testing.assert_array_equal(reader[index].template.rgb, whole[index].template.rgb)
        np.testing.assert_array_equal(reader[index].queries[1].depth, whole[index].queries[1].depth)


def test_a_file_that_outgrows_its_quota_is_said_so(tmp_path: Path) -> None:
    """A real refusal by the system, in a process of its own: files of at most 10 MB."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10**7, 10**7))\n"
        "from picopose_ros.cli.main import main\n"
        "raise SystemExit(main(['pool', sys.argv[1], '--objects', '20', '--workers', '1']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 2
    assert "cannot reserve" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "pool.json").exists()


def _nan_pose(folder: Path) -> None:
    np.load(folder / "query_pose.npy", mmap_mode="r+")[2, 1, 0, 0] = np.nan


def _empty_mask(folder: Path) -> None:
    np.load(folder / "template_mask.npy", mmap_mode="r+")[3] = 0


def _lost_pages(folder: Path) -> None:
    np.load(folder / "query_depth.npy", mmap_mode="r+")[2, 0] = 0


def _nan_points(folder: Path) -> None:
    np.load(folder / "template_points.npy", mmap_mode="r+")[2, 5, 5] = np.inf


def _no_camera(folder: Path) -> None:
    np.load(folder / "query_K.npy", mmap_mode="r+")[3] = 0


def _no_diagonal(folder: Path) -> None:
    np.load(folder / "diagonal.npy", mmap_mode="r+")[1] = 0


def _names_cut_short(folder: Path) -> None:
    (folder / "families" / "000001.json").write_text('{"seed": 5, "sha')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_nan_pose, "cluster 0, pose of query 1"),
        (_empty_mask, "cluster 1, its template's mask is empty"),
        (_lost_pages, "cluster 0, mask of query 0 is empty"),
        (_nan_points, "cluster 0, its template's points"),
        (_no_camera, "cluster 1, camera of query 0"),
        (_no_diagonal, "its diagonal is 0.0"),
        (_names_cut_short, "000001.json cannot be read"),
    ],
)
def test_a_broken_sample_is_left_out_and_named(
    small_pool: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "pool"
    shutil.copytree(small_pool, folder)
    damage(folder)
    reader = PoolReader(folder)
    batch = make_batch(reader, 0, 0, 3, Difficulty())
    assert len(batch.skipped) > 0 and len(batch.own) == 12
    assert len({name.split(": cluster")[0] for name in batch.skipped}) == 1  # any of its clusters
    assert f"{folder}: object 1 (seed 5): " in batch.skipped[0] and reason in batch.skipped[0]
    for name, value in vars(batch).items():
        assert not isinstance(value, torch.Tensor) or value.isfinite().all(), name
    assert make_batch(PoolReader(small_pool), 0, 0, 3, Difficulty()).skipped == ()


def test_a_pool_without_a_whole_sample_is_given_up(small_pool: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    shutil.copytree(small_pool, folder)
    np.load(folder / "template_pose.npy", mmap_mode="r+")[:] = 0
    with pytest.raises(PicoPoseError, match="100 samples in a row .* pose is none"):
        make_batch(PoolReader(folder), 0, 0, 1, Difficulty())


def _equal(one: Batch, other: Batch) -> None:
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name


def test_shares_are_drawn_for_themselves(small_pool: Path) -> None:
    """A process that takes only the second share draws what a process that takes both has there."""
    reader = PoolReader(small_pool)
    first, second = (make_batch(reader, 3, 7, 1, Difficulty(), share) for share in (0, 1))
    assert not torch.equal(first.query_rgb, second.query_rgb)
    _equal(first, make_batch(reader, 3, 7, 1, Difficulty()))
    config = TrainConfig(pool=str(small_pool), seed=3, objects_per_step=2, shares=2)
    both, alone = BatchDataset(Draw(config), [0, 1], 10)[7], BatchDataset(Draw(config), [1], 10)[7]
    _equal(both, concatenate([first, second]))
    _equal(alone, second)
    assert both.own.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert both.other.tolist() == [1, 1, 0, 0, 3, 3, 2, 2]


def test_some_pairs_of_a_batch_keep_their_templates(small_pool: Path) -> None:
    batch = make_batch(PoolReader(small_pool), 3, 7, 2, Difficulty())
    some = take(batch, 5)
    assert len(some.own) == len(some.query_rgb) == len(some.pose_affine) == 5
    for n in range(5):
        for index in ("own", "other"):
            a, b = getattr(some, index)[n], getattr(batch, index)[n]
            assert torch.equal(some.template_rgb[a], batch.template_rgb[b])
    config = TrainConfig(pool=str(small_pool), seed=3, pairs_per_step=5)
    _equal(Draw(config)(7, 0), some)
    assert len(take(batch, 1).template_rgb) == 2
