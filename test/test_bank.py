"""Template banks: made like the released network's templates, and a cache that trusts nothing."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from parity import assert_matches, load_parity

from picopose_ros.errors import ConfigError, MeshError
from picopose_ros.geometry.crops import crop_box_from_mask, crop_rgb
from picopose_ros.model import PicoPose, model_fingerprint, preset
from picopose_ros.templates import bank as bank_module
from picopose_ros.templates.bank import (
    TemplateBank,
    build_bank,
    crop_template,
    default_cache_dir,
    load_or_build,
    loading,
    onboard,
)
from picopose_ros.templates.bank import cache as cache_module
from picopose_ros.templates.bank.templates import ARRAYS
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer, Rendering
from picopose_ros.templates.viewpoints import viewpoint_rotations

VIEWS = 42
OFFSET = np.array([0.3, -0.2, 1.5])
"""How far the test object lies from its mesh's origin, metres."""


def make_model(seed: int = 0) -> PicoPose:
    torch.manual_seed(seed)
    return PicoPose(preset("tiny")).eval()


@pytest.fixture(scope="module")
def model() -> PicoPose:
    return make_model()


def write_object(path: Path, scale: float = 1.0, shade: int = 0, offset: np.ndarray = OFFSET) -> None:
    """An egg whose colours tell its sides apart, away from its mesh's origin."""
    egg = trimesh.creation.icosphere(subdivisions=3, radius=1.0)
    colours = np.clip(127 * egg.vertices + 128 - shade, 0, 255)
    egg.apply_scale(np.array([0.05, 0.03, 0.08]) * scale)
    egg.apply_translation(offset)
    colours = np.hstack([colours, 255 + 0 * colours[:, :1]]).astype(np.uint8)  # floats would be 0..1
    egg.visual = trimesh.visual.ColorVisuals(egg, vertex_colors=colours)
    egg.export(path)


@pytest.fixture(scope="module")
def mesh_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meshes")
    write_object(folder / "egg.ply")
    return folder


@pytest.fixture(scope="module")
def mesh(mesh_dir: Path) -> ObjectMesh:
    return load_object(discover_objects(mesh_dir)[0])


@pytest.fixture(scope="module")
def bank(mesh: ObjectMesh, model: PicoPose) -> TemplateBank:
    return build_bank(mesh, model, VIEWS)


def test_shapes_and_types(bank: TemplateBank) -> None:
    side = bank.sides.max()
    expected = {
        "images": ((VIEWS, side, side, 3), np.uint8),
        "boxes": ((VIEWS, 3), np.int32),
        "masks": ((VIEWS, 224, 224), np.bool_),
        "points_nearest": ((VIEWS, 64, 64, 3), np.float32),
        "points_consistent": ((VIEWS, 64, 64, 3), np.float32),
        "T_cam_ctr": ((VIEWS, 4, 4), np.float32),
        "M_crop_img": ((VIEWS, 3, 3), np.float32),
        "descriptors": ((VIEWS, 128, 256), np.float16),
        "K": ((3, 3), np.float64),
        "centre": ((3,), np.float64),
        "extents": ((3,), np.float64),
    }
    for name, (shape, dtype) in expected.items():
        array = getattr(bank, name)
        assert (array.shape, array.dtype) == (shape, dtype), name
    assert len(bank) == VIEWS and bank.class_id == "egg"
    assert bank.diameter == pytest.approx(0.16, rel=1e-3)


def test_rendering_beside_the_network_changes_nothing(
    bank: TemplateBank, mesh: ObjectMesh, model: PicoPose
) -> None:
    K = bank_module.TEMPLATE_K.copy()
    K[:2, 2] -= 160, 80
    crops, inputs = [], []
    with MeshRenderer(antialias=True) as renderer:
        for index, R in enumerate(viewpoint_rotations(VIEWS)):
            T_cam_obj, T_ctr_obj = np.eye(4), np.eye(4)
            T_cam_obj[:3, :3], T_cam_obj[2, 3], T_ctr_obj[:3, 3] = R, 2 * mesh.diagonal, -mesh.centre
            view = renderer.render(mesh, T_cam_obj @ T_ctr_obj, K, 320, 320)
            crops.append(crop_template(view, K))
            inputs.append(crop_rgb(view.rgb, crops[-1].box))
            side = crops[-1].box.side
            assert np.array_equal(bank.images[index, :side, :side], crops[-1].pixels)
    assert np.array_equal(bank.masks, np.stack([crop.mask for crop in crops]))
    assert np.array_equal(bank.points_consistent, np.stack([crop.points_consistent for crop in crops]))
    with torch.inference_mode():
        parts = torch.from_numpy(np.stack(inputs)).split(bank_module.ENCODE_BATCH)
        describe = model.describer()
        descriptors = torch.cat([describe(part).half() for part in parts])
    assert np.array_equal(bank.descriptors, descriptors.numpy())


def test_some_templates_are_a_bank_too(bank: TemplateBank) -> None:
    ids = [7, 0, 41, 7]
    part = bank.select(ids)
    assert len(part) == 4 and part.class_id == "egg" and part.diameter == bank.diameter
    for name in ARRAYS:
        whole, some = getattr(bank, name), getattr(part, name)
        expected = whole[ids] if len(whole) == VIEWS else whole
        assert some.dtype == whole.dtype and np.array_equal(some, expected), name
    assert np.array_equal(part.centres, bank.centres[ids])
    assert torch.equal(part.crops([2, 3]), bank.crops([41, 7]))
    assert not np.shares_memory(part.descriptors, bank.descriptors), "the large bank can be forgotten"
    with pytest.raises(IndexError):
        bank.select([VIEWS])


def test_object_is_centred_whatever_its_origin(bank: TemplateBank, mesh: ObjectMesh) -> None:
    assert np.allclose(bank.centre, OFFSET, atol=1e-6)
    assert np.allclose(bank.T_ctr_obj @ [*OFFSET, 1], [0, 0, 0, 1], atol=1e-6)
    assert np.allclose(bank.T_cam_ctr[:, :3, 3], [0, 0, 2 * mesh.diagonal], atol=1e-6)
    assert np.allclose(bank.T_cam_ctr[:, :3, :3], viewpoint_rotations(VIEWS), atol=1e-6)
    middles = bank.boxes[:, :2] + bank.boxes[:, 2:] / 2
    assert np.abs(middles - [320, 240]).max() < 12, "only perspective moves the outline off the middle"
    assert np.abs(bank.centres - 112).max() < 15


def test_origin_of_the_mesh_does_not_show(tmp_path: Path, bank: TemplateBank, model: PicoPose) -> None:
    write_object(tmp_path / "egg.ply", offset=np.zeros(3))
    other = build_bank(load_object(discover_objects(tmp_path)[0]), model, VIEWS)
    assert np.allclose(other.centre, 0, atol=1e-7)
    assert np.mean(other.masks != bank.masks) < 1e-3
    assert np.allclose(other.boxes, bank.boxes, atol=2)


def test_points_lie_on_the_object_and_project_into_their_cell(bank: TemplateBank, mesh: ObjectMesh) -> None:
    for name, tolerance in (("points_nearest", 0.51), ("points_consistent", 1e-3)):
        points = getattr(bank, name)
        for index in range(0, VIEWS, 5):
            known = points[index][..., 2] > 0
            assert known.sum() > 500
            T_ctr_cam = np.linalg.inv(bank.T_cam_ctr[index].astype(np.float64))
            in_object = points[index][known] @ T_ctr_cam[:3, :3].T + T_ctr_cam[:3, 3]
            radius = np.linalg.norm(in_object / (mesh.extents / 2), axis=1)
            assert 0.97 < radius.min() and radius.max() < 1.02, name

            rows, cols = np.nonzero(known)
            pixels = points[index][known] @ bank.K.T
            pixels = pixels[:, :2] / pixels[:, 2:]
            crop_px = pixels @ bank.M_crop_img[index][:2, :2].T + bank.M_crop_img[index][:2, 2]
            at = 3.5 * np.stack([cols, rows], 1)
            if name == "points_consistent":
                at = np.floor(at + 1.75)
            scale = 224 / bank.sides[index]
            assert np.abs(crop_px - at).max() <= scale * (tolerance + 0.5), name


def test_crops_are_the_crops_of_the_whole_template_image(
    bank: TemplateBank, mesh: ObjectMesh, model: PicoPose
) -> None:
    ids = [0, 17, VIEWS - 1]
    crops = bank.crops(ids)
    assert crops.shape == (3, 3, 224, 224) and crops.dtype == torch.float32
    with MeshRenderer(antialias=True) as renderer:
        for crop, index in zip(crops, ids):
            T_cam_obj = bank.T_cam_ctr[index].astype(np.float64) @ bank.T_ctr_obj
            view = renderer.render(mesh, T_cam_obj, bank.K, 640, 480)
            box = crop_box_from_mask(view.mask)
            assert [box.left, box.top, box.side] == bank.boxes[index].tolist()
            assert np.allclose(box.affine(), bank.M_crop_img[index])
            difference = np.abs(crop.numpy() - crop_rgb(view.rgb, box))
            assert np.mean(difference > 0.02) < 1e-3, "the window is rendered like the whole image"
            theirs = crop_template(view, bank.K)
            assert np.mean(theirs.mask != bank.masks[index]) < 1e-3
            off = np.abs(theirs.points_consistent - bank.points_consistent[index]).max(axis=-1)
            assert np.mean(off > 1e-5) < 2e-3
    with torch.inference_mode():
        descriptors = model.encode(crops).descriptors
    assert np.abs(descriptors.numpy() - bank.descriptors[ids].astype(np.float32)).max() < 2e-3
    assert bank.crops([]).shape == (0, 3, 224, 224)


def test_crops_masks_and_points_equal_the_released_networks() -> None:
    parity = load_parity()
    rgba, K = parity.tensor("raw/template_rgba"), parity.tensor("raw/template_K")
    depth = (parity.tensor("raw/template_depth_mm") / 1000.0).astype(np.float32)
    crops = [crop_template(Rendering(image[..., :3], z), K) for image, z in zip(rgba, depth)]
    boxes = [crop.box for crop in crops]
    assert_matches(
        "provider/tem_bbox",
        np.array([[b.top, b.top + b.side, b.left, b.left + b.side] for b in boxes], np.float32),
        0.0,
    )
    assert_matches("provider/tem_M", np.stack([box.affine() for box in boxes]), 0.0)
    assert_matches("provider/tem_mask", np.stack([crop.mask for crop in crops]).astype(np.float32), 0.0)
    assert_matches("provider/tem_pts3d", np.stack([crop.points_nearest for crop in crops]), 1e-6)
    inputs = np.stack([crop_rgb(image[..., :3], box) for image, box in zip(rgba, boxes)])
    assert_matches("provider/tem_rgb", inputs, 1e-6)
    for crop in crops:
        assert (crop.pixels.shape[0], crop.pixels.shape[1]) == (crop.box.side, crop.box.side)


@pytest.mark.parametrize("scale", [0.0625, 18.75], ids=["1 cm", "3 m"])
def test_small_and_large_objects_look_the_same(
    tmp_path: Path, bank: TemplateBank, model: PicoPose, scale: float
) -> None:
    write_object(tmp_path / "egg.ply", scale)
    other = build_bank(load_object(discover_objects(tmp_path)[0]), model, VIEWS)
    assert other.diameter == pytest.approx(0.16 * scale, rel=1e-3)
    assert np.mean(other.masks != bank.masks) < 2e-3, "nothing is clipped"
    known = (other.points_consistent[..., 2] > 0) & (bank.points_consistent[..., 2] > 0)
    error = np.abs(other.points_consistent / scale - bank.points_consistent)[known]
    assert np.median(error) < 1e-5


def test_object_without_thickness_is_refused(tmp_path: Path, model: PicoPose) -> None:
    (tmp_path / "card.obj").write_text("v 0 0 0\nv 0 0.3 0\nv 0 0.3 0.2\nv 0 0 0.2\nf 1 2 3 4\n")
    with pytest.raises(MeshError, match="thickness"):
        build_bank(load_object(discover_objects(tmp_path)[0]), model, VIEWS)


def test_impossible_number_of_views_is_refused(mesh: ObjectMesh, model: PicoPose) -> None:
    with pytest.raises(ConfigError, match="viewpoints"):
        build_bank(mesh, model, 100)


# --- the cache ---


def same(a: TemplateBank, b: TemplateBank) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


class Builds:
    """Counts how often a bank is really built, and hands out one that was made before."""

    def __init__(self, bank: TemplateBank) -> None:
        self.bank, self.count = bank, 0

    def __call__(self, *arguments: object) -> TemplateBank:
        self.count += 1
        return self.bank


@pytest.fixture
def builds(bank: TemplateBank, monkeypatch: pytest.MonkeyPatch) -> Builds:
    builds = Builds(bank)
    monkeypatch.setattr(cache_module, "build_bank", builds)
    return builds


@pytest.fixture
def spec(tmp_path: Path) -> ObjectSpec:
    (tmp_path / "meshes").mkdir()
    write_object(tmp_path / "meshes" / "egg.ply")
    return discover_objects(tmp_path / "meshes")[0]


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def test_second_time_comes_from_the_cache(
    spec: ObjectSpec, model: PicoPose, bank: TemplateBank, builds: Builds, tmp_path: Path
) -> None:
    first = load_or_build(spec, model, VIEWS, tmp_path / "cache")
    second = load_or_build(spec, model, VIEWS, tmp_path / "cache", fingerprint=model_fingerprint(model))
    assert builds.count == 1
    assert first is bank and same(second, bank)
    assert (second.class_id, second.diameter, second.warnings) == ("egg", bank.diameter, ())
    assert len(entries(tmp_path / "cache")) == 1


def change_mesh(spec: ObjectSpec, model: PicoPose) -> tuple[ObjectSpec, PicoPose]:
    write_object(spec.path, shade=20)
    return spec, model


def change_unit(spec: ObjectSpec, model: PicoPose) -> tuple[ObjectSpec, PicoPose]:
    return ObjectSpec(spec.class_id, spec.path, "in"), model


def change_weights(spec: ObjectSpec, model: PicoPose) -> tuple[ObjectSpec, PicoPose]:
    return spec, make_model(seed=1)


@pytest.mark.parametrize(
    ("change", "name"), [(change_mesh, "mesh"), (change_unit, "unit"), (change_weights, "weights")]
)
def test_stale_entry_is_replaced_and_the_log_says_why(
    spec: ObjectSpec,
    model: PicoPose,
    builds: Builds,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: object,
    name: str,
) -> None:
    load_or_build(spec, model, VIEWS, tmp_path / "cache")
    spec, model = change(spec, model)
    load_or_build(spec, model, VIEWS, tmp_path / "cache")
    assert builds.count == 2
    assert caplog.text.count(f"stale: {name} changed") == 1
    load_or_build(spec, model, VIEWS, tmp_path / "cache")
    assert builds.count == 2
    assert len(entries(tmp_path / "cache")) == 1, "the stale one is gone"


def test_other_version_and_settings_make_an_entry_stale(
    spec: ObjectSpec,
    model: PicoPose,
    builds: Builds,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_or_build(spec, model, VIEWS, tmp_path / "cache")
    monkeypatch.setattr(cache_module, "__version__", "99.0")
    monkeypatch.setattr(cache_module, "DISTANCE", 3.0)
    load_or_build(spec, model, VIEWS, tmp_path / "cache")
    assert builds.count == 2
    assert "stale: render settings, package version changed" in caplog.text


def test_another_shading_makes_an_entry_stale(
    spec: ObjectSpec, model: PicoPose, builds: Builds, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for shading, count in ((None, 1), ("auto", 1), ("flat", 2), ("flat", 2)):
        load_or_build(spec, model, VIEWS, tmp_path / "cache", shading=shading)
        assert builds.count == count
    assert "stale: shading changed" in caplog.text


def test_an_entry_is_anybodys_and_found_again_when_the_meshes_have_moved(
    spec: ObjectSpec, model: PicoPose, builds: Builds, tmp_path: Path
) -> None:
    load_or_build(spec, model, VIEWS, tmp_path / "cache")
    entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    mask = os.umask(0)
    os.umask(mask)
    assert entries and all(path.stat().st_mode & 0o666 == 0o666 & ~mask for path in entries)
    shutil.copytree(spec.path.parent, tmp_path / "elsewhere")
    (moved,) = discover_objects(tmp_path / "elsewhere")
    load_or_build(moved, model, VIEWS, tmp_path / "cache")
    assert builds.count == 1


def test_templates_of_a_mesh_without_colours_are_shaded(model: PicoPose, tmp_path: Path) -> None:
    trimesh.creation.box((0.06, 0.08, 0.1)).export(tmp_path / "box.ply")
    spec = discover_objects(tmp_path)[0]
    bank = load_or_build(spec, model, VIEWS, tmp_path / "cache")
    assert bank.shading == load_or_build(spec, model, VIEWS, tmp_path / "cache").shading == "auto"
    with MeshRenderer(antialias=True, shading="headlight") as renderer:
        T_cam_obj = bank.T_cam_ctr[5].astype(np.float64) @ bank.T_ctr_obj
        view = renderer.render(load_object(spec), T_cam_obj, bank.K, 640, 480)
    left, top, side = bank.boxes[5]
    theirs = view.rgb[top : top + side, left : left + side]
    assert np.mean(np.abs(theirs.astype(int) - bank.images[5, :side, :side]) > 2) < 2e-3
    assert theirs[bank.images[5, :side, :side].any(axis=-1)].std() > 10


def test_the_released_network_has_flat_templates() -> None:
    assert preset("vitl").template_shading == "flat" and preset("tiny").template_shading == "auto"


def test_presets_and_view_counts_have_entries_of_their_own(
    spec: ObjectSpec, model: PicoPose, builds: Builds, tmp_path: Path
) -> None:
    load_or_build(spec, model, VIEWS, tmp_path / "cache")
    load_or_build(spec, model, 162, tmp_path / "cache")
    load_or_build(spec, model, VIEWS, tmp_path / "cache")
    assert builds.count == 2
    assert len(entries(tmp_path / "cache")) == 2


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte_in_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def flip_a_byte_in_the_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b'"diameter') + 2 if b'"diameter' in content else content.index(b"diameter")] ^= (
        0x01
    )
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_file(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"images": np.zeros(3)}, path)


@pytest.mark.parametrize(
    "damage", [cut_in_half, flip_a_byte_in_the_middle, flip_a_byte_in_the_header, empty, other_file]
)
def test_damaged_entry_is_rebuilt(
    spec: ObjectSpec,
    model: PicoPose,
    bank: TemplateBank,
    builds: Builds,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: object,
) -> None:
    load_or_build(spec, model, VIEWS, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    damage(entry)
    again = load_or_build(spec, model, VIEWS, tmp_path / "cache")
    assert builds.count == 2 and again is bank
    assert "damaged" in caplog.text and str(entry) in caplog.text
    assert same(load_or_build(spec, model, VIEWS, tmp_path / "cache"), bank)
    assert builds.count == 2


def test_cache_folder_that_cannot_be_used_is_done_without(
    spec: ObjectSpec,
    model: PicoPose,
    bank: TemplateBank,
    builds: Builds,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load_or_build(spec, model, VIEWS, tmp_path / "cache") is bank
    assert "cannot be used" in caplog.text


def test_full_disk_is_survived(
    spec: ObjectSpec,
    model: PicoPose,
    bank: TemplateBank,
    builds: Builds,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    assert load_or_build(spec, model, VIEWS, tmp_path / "cache") is bank
    assert "No space left" in caplog.text
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/picopose_ros")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/picopose_ros")


def run_in_processes(count: int, work: Callable[[], None]) -> list[int]:
    """Run ``work`` in forked processes, which share the objects made so far; their exit codes."""
    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    return [process.exitcode for process in processes]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_process_killed_while_it_writes_leaves_nothing_behind(
    spec: ObjectSpec, model: PicoPose, builds: Builds, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    fingerprint = model_fingerprint(model)
    save_file = cache_module.save_file

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_half_written(arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
        save_file(arrays, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        die()

    def killed_while_writing() -> None:
        cache_module.save_file = die_half_written
        load_or_build(spec, model, VIEWS, cache, fingerprint=fingerprint)

    def killed_before_the_rename() -> None:
        cache_module._sync = die
        load_or_build(spec, model, VIEWS, cache, fingerprint=fingerprint)

    for work in (killed_while_writing, killed_before_the_rename):
        assert run_in_processes(1, work) == [-signal.SIGKILL]
        assert not entries(cache), "an unfinished bank is not an entry"
        assert len(list(cache.glob(".*.partial"))) == 1, "it was killed while it wrote"

    assert builds.count == 0
    load_or_build(spec, model, VIEWS, cache, fingerprint=fingerprint)
    assert builds.count == 1
    assert not list(cache.glob(".*.partial"))
    assert same(load_or_build(spec, model, VIEWS, cache, fingerprint=fingerprint), builds.bank)
    assert builds.count == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_at_once_build_it_once(
    spec: ObjectSpec, model: PicoPose, bank: TemplateBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = model_fingerprint(model)
    context = multiprocessing.get_context("fork")
    start, built = context.Barrier(3), context.Value("i", 0)

    def slow_build(*arguments: object) -> TemplateBank:
        with built:
            built.value += 1
        time.sleep(0.5)
        return bank

    def work() -> None:
        start.wait(timeout=60)
        result = load_or_build(spec, model, VIEWS, tmp_path / "cache", fingerprint=fingerprint)
        os._exit(0 if same(result, bank) else 1)

    monkeypatch.setattr(cache_module, "build_bank", slow_build)
    assert run_in_processes(3, work) == [0, 0, 0]
    assert built.value == 1
    assert len(entries(tmp_path / "cache")) == 1


# --- onboarding ---


def test_bad_meshes_do_not_stop_the_others(
    tmp_path: Path,
    model: PicoPose,
    bank: TemplateBank,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    write_object(meshes / "egg.ply")
    write_object(meshes / "giant.ply", scale=1000.0)
    (meshes / "broken.ply").write_bytes(b"ply\nnonsense")
    (meshes / "empty.obj").write_text("")
    with caplog.at_level(logging.WARNING):
        result = onboard(meshes, model, VIEWS, cache_dir=tmp_path / "cache")
    assert list(result.banks) == ["egg", "giant"]
    assert list(result.specs) == ["broken", "egg", "empty", "giant"]
    assert list(result.failed) == ["broken", "empty"]
    assert "broken.ply" in result.failed["broken"] and "empty.obj" in result.failed["empty"]
    assert same(result.banks["egg"], bank), "made beside another object, it is the same"
    (warning,) = result.warnings
    assert "giant.ply" in warning and "unit mm would make it" in warning
    assert "broken.ply" in caplog.text and warning in caplog.text
    assert "view" not in capsys.readouterr().err, "no progress bar unless asked for, and never into a log"

    told: list[tuple[str, int, int]] = []
    again = onboard(
        meshes, model, VIEWS, cache_dir=tmp_path / "cache", progress=lambda *step: told.append(step)
    )
    assert told == [(n, k + i, 4) for k, n in enumerate(("broken", "egg", "empty", "giant")) for i in (0, 1)]
    assert again.warnings == result.warnings, "a cached bank still warns"
    assert same(again.banks["egg"], result.banks["egg"])


def test_directory_of_bad_meshes_is_refused(tmp_path: Path, model: PicoPose) -> None:
    (tmp_path / "broken.ply").write_bytes(b"ply\nnonsense")
    with pytest.raises(MeshError, match=r"no object of .* can be used: .*broken\.ply"):
        onboard(tmp_path, model, VIEWS, cache_dir=tmp_path / "cache")


class _Enough(Exception):
    pass


def test_onboarding_that_is_given_up_ends_soon_and_leaves_nothing(tmp_path: Path, model: PicoPose) -> None:
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    for index in range(3):
        write_object(meshes / f"egg_{index}.ply", shade=10 * index)
    specs, cache = discover_objects(meshes), tmp_path / "cache"
    begun = threading.active_count()
    with pytest.raises(_Enough), loading(specs, model, 642, cache) as banks:
        raise _Enough
    assert banks[2].cancelled() or banks[2].exception() is not None
    assert not any(future.done() and not future.cancelled() and not future.exception() for future in banks)
    assert threading.active_count() == begun
    assert not list(cache.glob("*.safetensors")) and not list(cache.glob(".*.partial"))


def test_waiting_for_another_process_can_be_given_up(
    spec: ObjectSpec, model: PicoPose, builds: Builds, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    load_or_build(spec, model, VIEWS, cache)
    (entry,) = entries(cache)
    entry.unlink()
    with (cache / f".{entry.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process would hold it
        with pytest.raises(_Enough), loading([spec], model, VIEWS, cache) as banks:
            raise _Enough
    assert banks[0].exception() is not None and builds.count == 1
