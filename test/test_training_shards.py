"""Pairs from BOP/MegaPose shards that the test itself writes: labels, filters, broken samples, mixing."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
import webdataset
from PIL import Image

from picopose_ros.errors import ConfigError, MeshError, PicoPoseError
from picopose_ros.geometry.correspondences import decode_correspondences
from picopose_ros.geometry.pnp import solve_pose
from picopose_ros.geometry.poses import rotation_angle_deg
from picopose_ros.segmentation import rle_encode
from picopose_ros.synthetic.objects import build_object
from picopose_ros.templates.bank import TEMPLATE_K
from picopose_ros.templates.renderer import MeshRenderer
from picopose_ros.templates.viewpoints import viewpoint_rotations
from picopose_ros.training import shards as shards_module
from picopose_ros.training.config import TrainConfig
from picopose_ros.training.data import Batch
from picopose_ros.training.losses import flow_labels
from picopose_ros.training.pairs import Difficulty, Sample
from picopose_ros.training.shard_files import decode_sample, index_shard, list_shards, read_sample
from picopose_ros.training.shard_source import ShardSource
from picopose_ros.training.shards import Mixed, ShardPairs
from picopose_ros.training.template_sources import MeshTemplates
from picopose_ros.training.views import template_pose

K = np.array([[520.0, 0, 235.0], [0, 525.0, 180.0], [0, 0, 1]])
SIZE = (480, 360)
PLAIN = Difficulty(occlusion=0, keep_background=1, degrade=0, photometric=0)
NUMBERS = (1, 2, 5)
OFFSET = np.array([0.03, -0.02, 0.05])
"""Where the centre of each mesh's bounding box lies in its file: the poses are those of the file's frame."""


@pytest.fixture(scope="module")
def objects() -> dict[int, list[trimesh.Trimesh]]:
    """Parts of three objects, about 20 cm across, off their origin."""
    made = {}
    for number in NUMBERS:
        parts = build_object(100 + number, 64).centred()
        bounds = np.array([part.bounds for part in parts])
        size = np.linalg.norm(bounds[:, 1].max(0) - bounds[:, 0].min(0))
        for part in parts:
            part.apply_scale(0.2 / size)
            part.apply_translation(OFFSET)
        made[number] = parts
    return made


@pytest.fixture(scope="module")
def models(objects: dict[int, list[trimesh.Trimesh]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number, parts in objects.items():
        trimesh.Scene(parts).export(folder / f"obj_{number:06d}.glb")
    return folder


def _near(view: int, seed: int, aside: tuple[float, float, float]) -> np.ndarray:
    """A pose of a file's frame that shows nearly what template `view` shows, turned in the image plane."""
    rng = np.random.default_rng(seed)
    turn = trimesh.transformations.rotation_matrix(rng.uniform(-3, 3), (0, 0, 1))
    turn = turn @ trimesh.transformations.rotation_matrix(0.08, rng.normal(size=3))
    pose = np.eye(4)
    pose[:3, :3] = turn[:3, :3] @ viewpoint_rotations(162)[view]
    pose[:3, 3] = np.array(aside) - pose[:3, :3] @ OFFSET
    return pose


def _jpeg(rgb: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def _png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


VIEWS = ((20, 60, 100), (30, 90, 140), (75, 110, 50))
PLACES = ((-0.12, 0.0, 0.7), (0.12, 0.03, 0.75), (0.0, -0.08, 1.0))


@pytest.fixture(scope="module")
def samples(objects: dict[int, list[trimesh.Trimesh]]) -> list[dict[str, Any]]:
    """Three images of the three objects, in BOP-webdataset form."""
    made = []
    with MeshRenderer() as renderer:
        for scene, views in enumerate(VIEWS):
            poses = [_near(view, 10 * scene + i, PLACES[i]) for i, view in enumerate(views)]
            items = list(zip(objects.values(), poses, strict=True))
            whole = renderer.render_scene(items, K, *SIZE)
            alone = [renderer.render(parts, pose, K, *SIZE).depth for parts, pose in items]
            rgb = np.where(whole.mask[..., None], whole.rgb, np.uint8(90))
            visible = [(d > 0) & (d <= whole.depth + 1e-5) for d in alone]
            truth = [
                {
                    "obj_id": number,
                    "cam_R_m2c": pose[:3, :3].ravel().tolist(),
                    "cam_t_m2c": (1000 * pose[:3, 3]).tolist(),
                }
                for number, pose in zip(NUMBERS, poses, strict=True)
            ]
            infos = [
                {
                    "px_count_valid": int((d > 0).sum()),
                    "px_count_all": int((d > 0).sum()),
                    "px_count_visib": int(v.sum()),
                    "visib_fract": float(v.sum() / max((d > 0).sum(), 1)),
                }
                for d, v in zip(alone, visible, strict=True)
            ]
            masks = {
                str(i): {"size": [SIZE[1], SIZE[0]], "counts": rle_encode(v)} for i, v in enumerate(visible)
            }
            made.append(
                {
                    "__key__": f"{scene:06d}_000000",
                    "rgb.jpg": _jpeg(rgb),
                    "depth.png": _png(np.rint(whole.depth * 10000).astype(np.uint16)),
                    "camera.json": {"cam_K": K.ravel().tolist(), "depth_scale": 0.1},
                    "gt.json": truth,
                    "gt_info.json": infos,
                    "mask_visib.json": masks,
                }
            )
    return made


def _write(path: Path, samples: list[dict[str, Any]]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            # Bytes as they are, everything else by its suffix.
            writer.write({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in sample.items()})
    return path


@pytest.fixture(scope="module")
def shard(samples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("train_pbr_web") / "shard-000000.tar", samples)


@pytest.fixture(scope="module")
def pairs(shard: Path, models: Path) -> ShardPairs:
    return ShardPairs(ShardSource(shards=str(shard.parent), models=str(models)), PLAIN)


def _pose_error(sample: Sample, which: int) -> tuple[float, float]:
    """What decode and PnP make of the labels: degrees, and metres at 0.7 m."""
    query, template = sample.queries[0], sample.templates[which]
    labels = (sample.labels, sample.cross)[which][0]
    flow = flow_labels(torch.from_numpy(labels.position)[None], 64)[0].numpy()
    pairs = decode_correspondences(
        flow,
        np.where(labels.valid > 0, 9.0, -9.0),
        query.M_crop_img,
        template.points_consistent,
        template.T_cam_ctr,
    )
    solution = solve_pose(pairs, query.K)
    assert solution is not None
    shift = np.linalg.norm(solution.T_cam_obj[:3, 3] - query.T_cam_ctr[:3, 3]) / query.T_cam_ctr[2, 3] * 0.7
    return rotation_angle_deg(solution.T_cam_obj[:3, :3], query.T_cam_ctr[:3, :3]), float(shift)


def _each(pairs: ShardPairs, shard: Path, seeds: int) -> list[Sample]:
    index, _ = index_shard(shard)
    return [pairs.sample(shard, p, np.random.default_rng(s)) for p in index.values() for s in range(seeds)]


def test_labels_through_decode_and_pnp_give_the_true_pose(pairs: ShardPairs, shard: Path) -> None:
    used = [s for s in _each(pairs, shard, 4) if s.labels[0].valid.sum() > 200]
    assert len(used) >= 8
    for sample in used:
        rotation, shift = _pose_error(sample, 0)
        assert rotation < 0.1
        assert shift < 0.0002


def test_a_query_is_what_its_pose_says(
    pairs: ShardPairs, shard: Path, objects: dict[int, list[trimesh.Trimesh]]
) -> None:
    """The crop shows the object where pose, camera and crop affine put it, and no other image's."""
    index, _ = index_shard(shard)
    with MeshRenderer() as renderer:
        for seed, places in enumerate(index.values()):
            sample = pairs.sample(shard, places, np.random.default_rng(seed))
            query = sample.queries[0]
            camera = query.M_crop_img @ query.K
            overlaps = []
            for parts in objects.values():
                T_obj_ctr = np.eye(4)
                T_obj_ctr[:3, 3] = -OFFSET
                mask = renderer.render(parts, query.T_cam_ctr @ T_obj_ctr, camera, 224, 224).mask
                overlaps.append((mask & (query.mask > 0)).sum() / (query.mask > 0).sum())
            assert max(overlaps) > 0.97


def test_templates_are_among_the_nearest(pairs: ShardPairs, shard: Path) -> None:
    for sample in _each(pairs, shard, 3):
        directions = [
            -p[:3, :3].T @ p[:3, 3] / np.linalg.norm(p[:3, 3])
            for p in (
                sample.queries[0].T_cam_ctr,
                sample.templates[0].T_cam_ctr,
                sample.templates[1].T_cam_ctr,
            )
        ]
        all_views = -np.einsum("nji,j->ni", viewpoint_rotations(162), [0.0, 0, 1])
        ranks = [(all_views @ directions[0] > directions[0] @ d + 1e-6).sum() for d in directions[1:]]
        assert ranks[0] < 5 <= ranks[1]


def test_only_instances_that_pass_the_filters_are_drawn(
    samples: list[dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    small, hidden, unknown = (json.loads(json.dumps(samples[0][k])) for k in ("gt_info.json",) * 3)
    small[0]["px_count_valid"] = 1023
    hidden[1]["visib_fract"] = 0.29
    other = json.loads(json.dumps(samples[0]["gt.json"]))
    other[2]["obj_id"] = 77  # has no mesh
    for name, change, left in (
        ("small", {"gt_info.json": small}, {2, 5}),
        ("hidden", {"gt_info.json": hidden}, {1, 5}),
        ("unknown", {"gt_info.json": unknown, "gt.json": other}, {1, 2}),
    ):
        path = _write(tmp_path / f"{name}.tar", [samples[0] | change])
        source = ShardPairs(ShardSource(shards=str(path), models=str(models)), PLAIN)
        (places,) = index_shard(path)[0].values()
        content = read_sample(path, places)
        rngs = [np.random.default_rng(seed) for seed in range(24)]
        drawn = [
            decode_sample(content, rng, source.templates.__contains__).instance.number
            for rng in rngs
        ]
        assert set(drawn) == left, name


def test_a_batch_is_a_function_of_its_arguments(pairs: ShardPairs, shard: Path, models: Path) -> None:
    hard = ShardPairs(ShardSource(shards=str(shard), models=str(models)), Difficulty())
    first, other = hard(3, 700, 1, 2), hard(3, 701, 1, 2)
    again = pickle.loads(pickle.dumps(hard))  # as a DataLoader's worker gets it
    again(3, 5, 0, 1)
    second = again(3, 700, 1, 2)
    for name in (
        "template_rgb",
        "query_rgb",
        "query_mask",
        "position",
        "valid",
        "cross_valid",
        "translation",
    ):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert not torch.equal(first.query_rgb, other.query_rgb)
    assert not torch.equal(first.query_rgb, hard(3, 700, 0, 2).query_rgb)
    assert len(first.own) == 2 and len(first.template_rgb) == 4
    assert first.pose_affine is not None and first.pose_affine.shape == (2, 4)
    assert first.skipped == ()


def _template_folder(folder: Path, objects: dict[int, list[trimesh.Trimesh]], views: list[int]) -> Path:
    """As the released scripts write it: tenths of millimetres here, so that scale is 1e-4."""
    (folder / "object_poses").mkdir(parents=True)
    with MeshRenderer() as renderer:
        for number, parts in objects.items():
            (folder / f"{number:06d}").mkdir()
            poses = []
            for index, view in enumerate(views):
                pose = template_pose(viewpoint_rotations(162)[view], 0.2)
                pose[:3, 3] -= pose[:3, :3] @ OFFSET  # the box's centre on the optical axis
                image = renderer.render(parts, pose, TEMPLATE_K, 640, 480)
                rgba = np.concatenate([image.rgb, 255 * image.mask[..., None].astype(np.uint8)], -1)
                base = folder / f"{number:06d}" / f"{index:06d}"
                base.with_suffix(".png").write_bytes(_png(rgba))
                depth = np.rint(image.depth * 10000).astype(np.uint16)
                base.with_name(f"{base.name}_depth.png").write_bytes(_png(depth))
                pose[:3, 3] *= 10000
                poses.append(pose)
            np.save(folder / "object_poses" / f"{number:06d}.npy", np.stack(poses))
    return folder


@pytest.fixture(scope="module")
def templates(objects: dict[int, list[trimesh.Trimesh]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    views = [*{view for scene in VIEWS for view in scene}, 3, 158]
    return _template_folder(tmp_path_factory.mktemp("templates"), objects, views)


def test_template_folders_give_the_same_labels(templates: Path, shard: Path) -> None:
    pairs = ShardPairs(ShardSource(shards=str(shard), templates=str(templates)), PLAIN)
    assert pairs.templates.diagonal(2) == pytest.approx(0.2, rel=0.3)
    good = [s for s in _each(pairs, shard, 6) if s.labels[0].valid.sum() > 300]
    assert len(good) >= 4
    errors = np.array([_pose_error(sample, 0) for sample in good])
    assert errors[:, 0].max() < 0.3 and errors[:, 1].max() < 0.0005
    for sample in good:
        # 0.1 mm steps in depth: the label is where the template's pixel is seen.
        assert sample.templates[0].mask.any() and sample.templates[0].rgb.any()


def test_a_broken_template_is_named(templates: Path, shard: Path, tmp_path: Path) -> None:
    pairs = ShardPairs(ShardSource(shards=str(shard), templates=str(templates)), PLAIN)
    kept = {}
    try:
        for path in sorted(templates.glob("0*/*_depth.png")):
            kept[path] = path.read_bytes()
            path.write_bytes(kept[path][: len(kept[path]) // 2])
        with pytest.raises(PicoPoseError, match=r"100 samples in a row.*_depth\.png cannot be read"):
            pairs(0, 0, 0, 1)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    with pytest.raises(ConfigError, match="has no folder object_poses"):
        ShardPairs(ShardSource(shards=str(shard), templates=str(tmp_path)), PLAIN)


def _changed(sample: dict[str, Any], key: str, **changes: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps({k: v for k, v in sample.items() if not isinstance(v, bytes)}))
    copy |= {k: v for k, v in sample.items() if isinstance(v, bytes)}
    for name, change in changes.items():
        suffix = name.replace("__", ".")
        copy[suffix] = change(copy[suffix])
    return copy | {"__key__": key}


def _set(field: str, value: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    return lambda entries: [entry | {field: value} for entry in entries]


BREAKS: dict[str, tuple[dict[str, Any], str]] = {
    "jpeg": ({"rgb__jpg": lambda b: b[: len(b) // 2]}, "rgb.jpg: image file is truncated"),
    "depth": ({"depth__png": lambda b: b[: len(b) // 2]}, "depth.png: "),
    "noimage": ({"rgb__jpg": lambda b: b"<html>"}, "rgb.jpg: cannot identify image"),
    "size": ({"depth__png": lambda b: _png(np.ones((10, 20), np.uint16))}, "its depth (10, 20)"),
    "rle": (
        {"mask_visib__json": lambda m: {k: {"size": [8, 9], "counts": [72]} for k in m}},
        "a mask is [8, 9], the image [360, 480]",
    ),
    "counts": (
        {"mask_visib__json": lambda m: {k: v | {"counts": [5]} for k, v in m.items()}},
        "add up to 5 pixels",
    ),
    "nomask": ({"mask_visib__json": lambda m: {}}, "mask_visib.json: lacks"),
    "pose": ({"gt__json": _set("cam_t_m2c", [0, float("nan"), 1])}, "cam_t_m2c is not finite"),
    "short": ({"gt__json": _set("cam_t_m2c", [0, 1])}, "cam_t_m2c is not 3 numbers"),
    "rotation": ({"gt__json": _set("cam_R_m2c", [2, 0, 0, 0, 1, 0, 0, 0, 1])}, "is not a rotation"),
    "behind": ({"gt__json": _set("cam_t_m2c", [0, 0, -500])}, "behind the camera"),
    "info": ({"gt_info__json": lambda i: [{"visib_fract": 1.0}] * 3}, "lacks 'px_count_valid'"),
    "list": ({"gt_info__json": lambda i: i[:2]}, "3 instances, gt_info.json 2"),
    "json": ({"camera__json": lambda c: b'{"cam_K": ['}, "camera.json: "),
    "camera": ({"camera__json": lambda c: {"cam_K": c["cam_K"]}}, "camera.json: lacks 'depth_scale'"),
}


def test_broken_samples_are_skipped_and_named(
    samples: list[dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    missing = {k: v for k, v in samples[1].items() if k != "gt_info.json"} | {"__key__": "missing"}
    broken = [_changed(samples[1], key, **change) for key, (change, _) in BREAKS.items()]
    path = _write(tmp_path / "shard-000003.tar", [samples[0], *broken, missing])
    pairs = ShardPairs(ShardSource(shards=str(path), models=str(models)), PLAIN)
    expected = {key: reason for key, (_, reason) in BREAKS.items()} | {"missing": "gt_info.json is missing"}
    named: dict[str, str] = {}
    good = pairs.sample(path, index_shard(path)[0][samples[0]["__key__"]], np.random.default_rng(0))
    for step in range(0, 400, 7):
        batch = pairs(0, step, 0, 1)
        assert torch.isfinite(batch.query_rgb).all()
        # Whatever was drawn, the pair is of the one good image: its poses are no other's.
        for entry in batch.skipped:
            where, key, reason = entry.split(": ", 2)
            assert where == str(path)
            named[key] = reason
        if set(named) == set(expected):
            break
    assert set(named) == set(expected)
    for key, reason in expected.items():
        assert reason in named[key], key
    assert good.labels[0].valid.any()


def test_samples_that_are_all_broken_end_with_the_last_reason(
    samples: list[dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    path = _write(tmp_path / "bad.tar", [_changed(samples[1], "k1", **BREAKS["pose"][0])])
    with pytest.raises(PicoPoseError, match=r"100 samples in a row .*bad\.tar: k1: gt\.json: cam_t_m2c"):
        ShardPairs(ShardSource(shards=str(path), models=str(models)), PLAIN)(0, 0, 0, 1)


def test_what_is_not_a_shard_is_refused_by_name(shard: Path, models: Path, tmp_path: Path) -> None:
    def opened(shards: Path | str) -> list[Path]:
        return ShardPairs(ShardSource(shards=str(shards), models=str(models)), PLAIN).paths

    page = tmp_path / "page" / "shard-000001.tar"
    page.parent.mkdir()
    page.write_text("<html>404 Not Found</html>" * 100)
    (page.parent / "shard-000000.tar").write_bytes(shard.read_bytes())
    with pytest.raises(ConfigError, match=r"shard-000001\.tar is not an uncompressed tar archive"):
        opened(page.parent)
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(shard.read_bytes(), 1))
    with pytest.raises(ConfigError, match=r"packed\.tar is not an uncompressed tar archive"):
        opened(packed)
    with pytest.raises(ConfigError, match=r"shard-000007\.tar does not exist \(2 of 2 are missing\)"):
        opened(f"{tmp_path}/shard-{{000007..000008}}.tar")
    with pytest.raises(ConfigError, match="no .tar file"):
        opened(models)
    assert list_shards(f"{shard.parent}/shard-{{000000..000000}}.tar") == [shard]


def test_a_shard_that_is_cut_short_gives_its_whole_samples(shard: Path, models: Path, tmp_path: Path) -> None:
    index, problems = index_shard(shard)
    assert list(index) == ["000000_000000", "000001_000000", "000002_000000"] and not problems
    places = sorted(index["000002_000000"].values())
    cut = tmp_path / "cut.tar"
    for length in (places[0][0] - 512, places[0][0] + 3, places[1][0] - 100, sum(places[2]) - 1):
        cut.write_bytes(shard.read_bytes()[:length])
        index, problems = index_shard(cut)
        assert len(problems) == 1 and "cut short" in problems[0]
        assert all(len(index[key]) == 6 for key in ("000000_000000", "000001_000000"))
    pairs = ShardPairs(ShardSource(shards=str(cut), models=str(models)), PLAIN)
    skipped = [entry for step in range(12) for entry in pairs(0, step, 0, 1).skipped]
    assert "cut.tar: the shard is" in skipped[0] and "cut short" in skipped[0]
    assert all("000002_000000: rgb.jpg is missing" in entry for entry in skipped[1:])


def test_meshes_in_another_frame_than_the_poses_are_noticed(
    shard: Path, models: Path, templates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_CHECKED_PAIRS", 6)
    source = ShardSource(shards=str(shard), models=str(models), models_up="y")
    with pytest.raises(ConfigError, match=r"do not fit together.*models_up: z (9\d|100)%"):
        ShardPairs(source, PLAIN)(0, 0, 0, 6)
    source = ShardSource(shards=str(shard), templates=str(templates), template_scale=1e-3)
    with pytest.raises(ConfigError, match="check template_scale"):
        ShardPairs(source, PLAIN)(0, 0, 0, 6)


def test_models_of_the_training_sets_are_brought_to_the_scale_of_their_scenes(tmp_path: Path) -> None:
    box = trimesh.creation.box((0.4, 0.1, 0.2))
    box.apply_translation((1, 2, 3))
    for mesh in (Path("gso/Mug") / "meshes" / "model.obj", Path("sn/029/ab/models/model_normalized.obj")):
        (tmp_path / mesh).parent.mkdir(parents=True)
        box.export(tmp_path / mesh)
    (tmp_path / "gso" / "gso_models.json").write_text('[{"obj_id": 4, "gso_id": "Mug"}]')
    listed = '[{"obj_id": 7, "shapenet_synset_id": "029", "shapenet_source_id": "ab"}]'
    (tmp_path / "sn" / "shapenet_models.json").write_text(listed)
    gso = MeshTemplates(tmp_path / "gso", tmp_path)
    assert 4 in gso and 7 not in gso
    np.testing.assert_allclose(gso.centre(4), 0, atol=1e-9)
    assert gso.diagonal(4) == pytest.approx(0.1 * np.linalg.norm((2, 0.5, 1)))
    shapenet = MeshTemplates(tmp_path / "sn", tmp_path, "y")
    np.testing.assert_allclose(shapenet.centre(7), 0.1 * np.array([1, -3, 2]), atol=1e-9)
    assert shapenet.diagonal(7) == pytest.approx(0.1 * np.linalg.norm((0.4, 0.1, 0.2)))
    (tmp_path / "sn" / "029" / "ab" / "models" / "model_normalized.obj").unlink()
    assert 7 not in MeshTemplates(tmp_path / "sn", tmp_path)
    (tmp_path / "sn" / "shapenet_models.json").write_text('[{"obj_id": 7}]')
    with pytest.raises(ConfigError, match="list of models is not BOP's"):
        MeshTemplates(tmp_path / "sn", tmp_path)
    with pytest.raises(MeshError, match="no mesh with a number"):
        MeshTemplates(tmp_path / "gso" / "Mug" / "meshes", tmp_path / "none")


def test_sources_are_mixed_by_weight(pairs: ShardPairs) -> None:
    one = pairs(0, 0, 0, 1)
    asked: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    def source(name: str) -> Callable[[int, int, int, int], Batch]:
        def make(seed: int, step: int, share: int, count: int) -> Batch:
            asked[name].append(count)
            return replace(one, own=one.own.repeat(count), angle=torch.full((count,), ord(name) * 1.0))

        return make

    mixed = Mixed([(source("a"), 3.0), (source("b"), 1.0), (source("c"), 0.0)])
    drawn = [mixed(0, step, 0, 8).angle for step in range(60)]
    assert all(len(angle) == 8 for angle in drawn)
    assert 0.69 < float((torch.cat(drawn) == ord("a")).float().mean()) < 0.81
    assert asked["c"] == [] and len(asked["a"]) > 55
    assert torch.equal(mixed(0, 7, 0, 8).angle, drawn[7])
    assert any(not torch.equal(mixed(0, step, 1, 8).angle, drawn[step]) for step in range(9))
    both = Mixed([(pairs, 1.0), (pairs, 1.0)])(0, 1, 0, 3)
    assert len(both.own) == 3 and both.own.max() < len(both.template_rgb)
    for weights in ([], [(pairs, 0.0)], [(pairs, -1.0), (pairs, 2.0)]):
        with pytest.raises(ConfigError, match="weights"):
            Mixed(weights)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shards": "a", "models": "b", "modles": "c"}, "unknown key 'modles'"),
        ({"models": "b"}, "shards is missing"),
        ({"shards": "a"}, "either models"),
        ({"shards": "a", "models": "b", "templates": "c"}, "either models"),
        ({"shards": "a", "models": "b", "weight": -1}, "weight must not be negative"),
        ({"shards": "a", "models": "b", "weight": "much"}, "weight must be a number"),
        ({"shards": ["a"], "models": "b"}, "shards must be a text"),
        ({"shards": "a", "models": "b", "models_up": "x"}, "models_up is 'x'"),
        ("a", "must be a mapping"),
    ],
)
def test_an_entry_that_cannot_work_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"run.yaml: shards 1.*{message}"):
        ShardSource.from_dict(entry, "run.yaml: shards 1")


def test_an_entry_is_read() -> None:
    source = ShardSource.from_dict({"shards": "a", "templates": "t", "weight": 2}, "here")
    assert source == ShardSource("a", templates="t", weight=2)


def test_the_config_of_the_papers_training_is_valid() -> None:
    config = TrainConfig.load(Path(__file__).parent.parent / "config" / "train_vitl.yaml")
    assert [source.weight for source in config.shards] == [1.0, 1.0]
    assert config.pairs_per_step == 64 and config.losses == "released"
