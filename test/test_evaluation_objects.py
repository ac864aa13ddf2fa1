"""The benchmark's objects: the exported folder, facts about any folder, and the ambiguity rule."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
import yaml

from picopose_ros.errors import ConfigError, MeshError, PicoPoseError
from picopose_ros.evaluation import objects as objects_module
from picopose_ros.evaluation.ambiguity import measure_ambiguity
from picopose_ros.evaluation.objects import (
    GROUPS,
    glb_bytes,
    load_objects,
    make_heldout,
    object_facts,
    write_heldout,
)
from picopose_ros.synthetic.objects import (
    HELD_OUT_SHAPES,
    UNSEEN_FAMILY_SEED,
    VALIDATION_SEED,
    build_object,
)
from picopose_ros.synthetic.textures import HELD_OUT_TEXTURES, collage, project_box
from picopose_ros.templates.meshes import discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer

COLOURS = [(230, 40, 40), (40, 220, 40), (50, 50, 230), (230, 220, 40), (220, 50, 220), (40, 220, 220)]


@pytest.fixture(scope="module")
def renderer() -> Iterator[MeshRenderer]:
    with MeshRenderer() as renderer:
        yield renderer


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout")
    write_heldout(folder, objects=2)
    return folder


def _coloured_box(size: tuple[float, float, float], colours: list[tuple[int, int, int]]) -> trimesh.Trimesh:
    """A box with a colour per side, in the order +x -x +y -y +z -z."""
    box = trimesh.creation.box(size)
    axis = np.abs(box.face_normals).argmax(axis=1)
    side = 2 * axis + (box.face_normals[np.arange(len(axis)), axis] < 0)
    box.visual.face_colors = np.column_stack([np.array(colours)[side], np.full(len(side), 255)])
    return box


def _printed(shape: trimesh.Trimesh) -> trimesh.Trimesh:
    return project_box(shape, collage(np.random.default_rng(3), 128), np.random.default_rng(0), 0.1, False)


def _wedge() -> trimesh.Trimesh:
    corners = [(0, 0, 0), (0.1, 0, 0), (0.02, 0.07, 0), (0, 0.03, 0), (0.01, 0, 0.05), (0.04, 0.04, 0.03)]
    return trimesh.convex.convex_hull(np.array(corners))


@pytest.mark.parametrize(
    ("shape", "discrete", "continuous"),
    [
        # A cuboid's half turns; a regular prism's five turns and its half turns over the side.
        (_coloured_box((0.1, 0.07, 0.04), COLOURS[:1] * 6), 3, 0),
        (trimesh.creation.cylinder(0.05, 0.04, sections=6), 11, 0),
        (trimesh.creation.cone(0.03, 0.1, sections=48), 0, 1),
        (trimesh.creation.cylinder(0.03, 0.1, sections=32), 1, 1),
        (trimesh.creation.icosphere(2, 0.05), 1, 1),
    ],
    ids=["cuboid", "hexagonal prism", "cone", "cylinder", "sphere"],
)
def test_plain_regular_shapes_are_ambiguous_and_symmetric(
    renderer: MeshRenderer, shape: trimesh.Trimesh, discrete: int, continuous: int
) -> None:
    shape.apply_translation([0.3, -0.2, 0.1])  # the origin must not matter
    found = measure_ambiguity(renderer, [shape])
    assert found.ambiguous and found.symmetric
    assert len(found.symmetries.continuous) == continuous
    assert len(found.symmetries.discrete) == discrete
    for T in found.symmetries.transforms(30.0):
        moved = shape.vertices @ T[:3, :3].T + T[:3, 3]
        _, gap, _ = trimesh.proximity.closest_point_naive(shape, moved[::5])
        assert gap.max() < 0.006 * shape.scale  # 48 corners are no circle


@pytest.mark.parametrize(
    "parts",
    [
        [_coloured_box((0.1, 0.1, 0.1), COLOURS)],
        [_printed(_wedge())],
        [_wedge()],  # no two sides alike: the shape alone tells
    ],
    ids=["six colours", "printed wedge", "plain wedge"],
)
def test_what_tells_its_sides_apart_is_not_ambiguous(
    renderer: MeshRenderer, parts: list[trimesh.Trimesh]
) -> None:
    found = measure_ambiguity(renderer, parts)
    assert not found.ambiguous and not found.symmetric


def test_a_small_mark_leaves_an_object_ambiguous_but_not_symmetric(renderer: MeshRenderer) -> None:
    box = _coloured_box((0.1, 0.07, 0.04), COLOURS[:1] * 6)
    mark = _coloured_box((0.02, 0.02, 0.001), COLOURS[1:2] * 6)
    mark.apply_translation([0.03, 0.02, 0.02])
    found = measure_ambiguity(renderer, [box, mark])
    assert found.ambiguous and not found.symmetric
    assert found.margin > 0


def test_groups_are_what_they_say() -> None:
    groups = []
    for index in range(6):
        group, made = make_heldout(index)
        groups.append(group)
        new_shapes = set(made.shape_families) <= set(HELD_OUT_SHAPES)
        new_textures = set(made.texture_families) <= set(HELD_OUT_TEXTURES)
        assert new_shapes == (group in ("unseen shapes", "unseen both"))
        assert new_textures == (group in ("unseen textures", "unseen both"))
    assert sorted(groups) == sorted([GROUPS[0]] * 3 + list(GROUPS[1:]))


@pytest.mark.parametrize("seed", [5, VALIDATION_SEED + 5, UNSEEN_FAMILY_SEED + 5])
def test_asking_for_the_families_of_a_seed_s_range_changes_nothing(seed: int) -> None:
    unseen = seed >= UNSEEN_FAMILY_SEED
    plain, asked = build_object(seed, 32), build_object(seed, 32, unseen, unseen)
    assert plain.shape_families == asked.shape_families
    for a, b in zip(plain.parts, asked.parts, strict=True):
        np.testing.assert_array_equal(a.vertices, b.vertices)


def test_an_exported_mesh_renders_as_the_object_that_was_made(heldout: Path, renderer: MeshRenderer) -> None:
    specs = discover_objects(heldout)
    assert [spec.class_id for spec in specs] == ["heldout_000", "heldout_001"]
    for index, spec in enumerate(specs):
        mesh, (_, made) = load_object(spec), make_heldout(index)
        assert not mesh.warnings
        np.testing.assert_allclose(mesh.bounds, made.bounds, atol=1e-6 * made.diagonal)
        T = np.eye(4)
        T[:3, :3] = trimesh.transformations.euler_matrix(0.4, 0.5, 0.6)[:3, :3]
        T[:3, 3] = [0, 0, 2.5 * made.diagonal] - T[:3, :3] @ mesh.centre
        K = np.array([[300.0, 0, 79.5], [0, 300.0, 79.5], [0, 0, 1]])
        read, original = renderer.render(mesh, T, K, 160, 160), renderer.render(made.parts, T, K, 160, 160)
        assert original.rgb[original.mask].std() > 5
        assert (read.mask != original.mask).sum() <= 3
        assert np.abs(read.rgb.astype(int) - original.rgb).mean() < 0.1
        np.testing.assert_allclose(np.median(read.depth[read.mask]), np.median(original.depth[original.mask]))


def test_the_folder_says_what_it_holds(heldout: Path) -> None:
    content = json.loads((heldout / "benchmark.json").read_text())
    entry = content["objects"]["heldout_001"]
    assert content["complete"] and entry["seed"] == UNSEEN_FAMILY_SEED + 1 and entry["group"] == GROUPS[1]
    assert set(yaml.safe_load((heldout / "objects.yaml").read_text())) == {"heldout_000", "heldout_001"}
    specs = discover_objects(heldout)
    facts = object_facts(heldout, specs)
    for spec in specs:
        fact, mesh = facts[spec.class_id], load_object(spec)
        assert fact.diameter == pytest.approx(mesh.diameter)
        assert fact.ambiguity == content["objects"][spec.class_id]["ambiguity"]["margin"]
        assert fact.families and fact.textures


def test_an_export_goes_on_where_it_was_cut_off(
    heldout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in heldout.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "heldout_001.glb").write_bytes(b"half a fi")
    touched = (tmp_path / "heldout_000.glb").stat().st_mtime_ns

    class Killed(Exception):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(objects_module, "measure_ambiguity", killed)
        with pytest.raises(Killed):
            write_heldout(tmp_path, objects=2)
    with pytest.raises(MeshError, match="cut off"):
        object_facts(tmp_path, discover_objects(tmp_path))

    write_heldout(tmp_path, objects=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (tmp_path / "heldout_000.glb").stat().st_mtime_ns == touched


def test_a_full_disk_is_reported_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PicoPoseError, match=r"benchmark.json cannot be written: No space left on device"):
        write_heldout(tmp_path, objects=1)
    assert not list(tmp_path.iterdir())


def test_impossible_exports_are_refused(heldout: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained on"):
        write_heldout(tmp_path, objects=2, first_seed=7)
    with pytest.raises(ConfigError, match="at least 1"):
        write_heldout(tmp_path, objects=0)
    with pytest.raises(ConfigError, match="choose another folder"):
        write_heldout(heldout, objects=2, first_seed=VALIDATION_SEED)
    (tmp_path / "mug.ply").write_text("ply")
    with pytest.raises(ConfigError, match="mug.ply"):
        write_heldout(tmp_path, objects=1)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "objects": {"a": {}}}', '{"format": 99}'])
def test_an_unusable_description_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "benchmark.json").write_text(text)
    with pytest.raises(MeshError, match=r"benchmark.json .*export"):
        object_facts(tmp_path, [])


def test_facts_about_any_folder_leave_out_what_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "die.glb").write_bytes(glb_bytes([_coloured_box((0.1, 0.1, 0.1), COLOURS)]))
    (tmp_path / "said.glb").write_bytes(glb_bytes([_printed(_wedge())]))
    (tmp_path / "torn.glb").write_bytes(b"glTF and then nothing")
    half_turn = np.diag([-1.0, -1, 1, 1]).reshape(-1).tolist()
    settings = {"said": {"symmetries": {"discrete": [half_turn]}}}
    (tmp_path / "objects.yaml").write_text(yaml.safe_dump(settings))
    specs = discover_objects(tmp_path)
    with caplog.at_level(logging.WARNING):
        facts = object_facts(tmp_path, specs)
    assert set(facts) == {"die", "said"} and "torn" in caplog.text
    assert {fact.group for fact in facts.values()} == {"meshes"}
    assert not facts["die"].ambiguous
    assert facts["said"].ambiguous and facts["said"].symmetric and facts["said"].ambiguity > 0.15
    meshes, failed = load_objects(specs)
    assert [mesh.spec.class_id for mesh in meshes] == ["die", "said"] and set(failed) == {"torn"}


def test_a_mesh_that_was_changed_after_the_export_is_measured_anew(heldout: Path, tmp_path: Path) -> None:
    for path in heldout.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "heldout_001.glb").write_bytes(glb_bytes([_coloured_box((0.1, 0.07, 0.04), COLOURS[:1] * 6)]))
    facts = object_facts(tmp_path, discover_objects(tmp_path))
    assert facts["heldout_000"].group == GROUPS[0]
    assert facts["heldout_001"].group == "meshes" and facts["heldout_001"].symmetric
