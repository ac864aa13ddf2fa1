"""Mesh directories and mesh files: every format with its colours, units, and what is said about bad ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial, SimpleMaterial

from picopose_ros.errors import MeshError
from picopose_ros.templates.meshes import (
    ObjectSpec,
    discover_objects,
    load_object,
    mesh_digest,
    referenced_files,
)
from picopose_ros.templates.renderer import NEUTRAL_GREY, MeshRenderer

EXTENTS = (0.1, 0.2, 0.3)
RED = (200, 60, 30)
GREEN = (30, 180, 60)

Writer = Callable[[Path], None]


def box() -> trimesh.Trimesh:
    return trimesh.creation.box(EXTENTS)


def red_box() -> trimesh.Trimesh:
    mesh = box()
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=[[*RED, 255]] * len(mesh.vertices))
    return mesh


def textured_box(material: SimpleMaterial | PBRMaterial | None = None) -> trimesh.Trimesh:
    mesh = box()
    mesh.unmerge_vertices()
    if material is None:
        material = SimpleMaterial(image=Image.new("RGB", (16, 16), GREEN))
    uv = np.random.default_rng(0).uniform(0.1, 0.9, (len(mesh.vertices), 2))
    mesh.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return mesh


def write_gltf(mesh: trimesh.Trimesh, path: Path) -> None:
    for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene([mesh])).items():
        (path if name.endswith(".gltf") else path.with_name(name)).write_bytes(content)


def write_textured_ply(path: Path) -> None:
    """As MeshLab and the BOP data sets do: a comment names the texture."""
    Image.new("RGB", (16, 16), GREEN).save(path.with_name("skin.png"))
    mesh = textured_box()
    rows = np.hstack([mesh.vertices, mesh.visual.uv])
    header = ["ply", "format ascii 1.0", "comment TextureFile skin.png", f"element vertex {len(rows)}"]
    header += [f"property float {name}" for name in ("x", "y", "z", "texture_u", "texture_v")]
    header += [f"element face {len(mesh.faces)}", "property list uchar int vertex_indices", "end_header"]
    body = [" ".join(f"{value:.6f}" for value in row) for row in rows]
    path.write_text("\n".join(header + body + [f"3 {a} {b} {c}" for a, b, c in mesh.faces]) + "\n")


def write_coff(path: Path) -> None:
    mesh = box()
    lines = ["COFF", f"{len(mesh.vertices)} {len(mesh.faces)} 0"]
    lines += [f"{x} {y} {z} {RED[0]} {RED[1]} {RED[2]} 255" for x, y, z in mesh.vertices]
    path.write_text("\n".join(lines + [f"3 {a} {b} {c}" for a, b, c in mesh.faces]) + "\n")


def write_textured_dae(path: Path) -> None:
    """trimesh writes no textures into COLLADA files, so a file with a plain colour gets one by hand."""
    Image.new("RGB", (16, 16), GREEN).save(path.with_name("skin.png"))
    mesh = textured_box(PBRMaterial(baseColorFactor=[9, 9, 9, 255]))
    text = trimesh.exchange.dae.export_collada(mesh).decode()
    image = '<image id="skin"><init_from>skin.png</init_from></image>'
    text = text.replace("<library_effects>", f"<library_images>{image}</library_images><library_effects>", 1)
    sampler = (
        '<newparam sid="surface"><surface type="2D"><init_from>skin</init_from></surface></newparam>'
        '<newparam sid="sampler"><sampler2D><source>surface</source></sampler2D></newparam>'
    )
    text = text.replace("<profile_COMMON>", f"<profile_COMMON>{sampler}", 1)
    texture = '<diffuse><texture texture="sampler" texcoord="UVMAP"/></diffuse>'
    text, count = re.subn(r"<diffuse>.*?</diffuse>", texture, text, count=1, flags=re.DOTALL)
    assert count == 1
    path.write_text(text)


@pytest.mark.parametrize(
    ("name", "write", "colour"),
    [
        ("thing.ply", lambda path: red_box().export(path), RED),
        ("thing.obj", lambda path: red_box().export(path), RED),
        ("thing.stl", lambda path: box().export(path), NEUTRAL_GREY),
        ("thing.STL", lambda path: box().export(path, file_type="stl_ascii"), NEUTRAL_GREY),
        ("thing.glb", lambda path: red_box().export(path), RED),
        ("thing.gltf", lambda path: write_gltf(red_box(), path), RED),
        ("thing.dae", lambda path: red_box().export(path), RED),
        ("thing.off", lambda path: box().export(path), NEUTRAL_GREY),
        ("thing.off", write_coff, RED),
        ("thing.ply", write_textured_ply, GREEN),
        ("thing.obj", lambda path: textured_box().export(path), GREEN),
        ("thing.glb", lambda path: textured_box().export(path), GREEN),
        ("thing.gltf", lambda path: write_gltf(textured_box(), path), GREEN),
        ("thing.dae", write_textured_dae, GREEN),
    ],
)
def test_every_format_keeps_its_shape_and_colours(
    tmp_path: Path, name: str, write: Writer, colour: tuple[int, int, int]
) -> None:
    write(tmp_path / name)
    (spec,) = discover_objects(tmp_path)
    assert (spec.class_id, spec.path, spec.unit) == ("thing", tmp_path / name, "m")
    mesh = load_object(spec)
    assert np.allclose(sorted(mesh.extents), EXTENTS, atol=1e-6)
    assert mesh.diameter == pytest.approx(np.linalg.norm(EXTENTS), abs=1e-6)
    assert mesh.warnings == []

    T_cam_obj = trimesh.transformations.euler_matrix(0.4, 0.5, 0.6)
    T_cam_obj[2, 3] = 0.8
    K = np.array([[200.0, 0, 50], [0, 200, 50], [0, 0, 1]])
    with MeshRenderer() as renderer:
        view = renderer.render(mesh, T_cam_obj, K, 101, 101)
    assert view.mask.sum() > 1000
    assert np.abs(view.rgb[view.mask].astype(int) - colour).max() <= 2


def test_scene_with_transforms_becomes_parts_in_place(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    lift, turn = np.eye(4), trimesh.transformations.rotation_matrix(np.pi / 2, (0, 0, 1))
    lift[2, 3] = 0.5
    scene.add_geometry(red_box(), node_name="low", geom_name="box", transform=turn)
    scene.graph.update("high", geometry="box", matrix=lift @ turn)  # the same geometry twice
    scene.add_geometry(textured_box(), node_name="deep", transform=trimesh.transformations.scale_matrix(0.5))
    scene.export(tmp_path / "pile.glb")
    mesh = load_object(discover_objects(tmp_path)[0])
    assert len(mesh.parts) == 3
    assert np.allclose(mesh.bounds, [[-0.1, -0.05, -0.15], [0.1, 0.05, 0.65]], atol=1e-6)
    assert np.allclose(mesh.centre, [0, 0, 0.25], atol=1e-6)
    assert mesh.diagonal == pytest.approx(np.linalg.norm([0.2, 0.1, 0.8]), abs=1e-6)
    assert len(mesh.faces) == 36 and mesh.faces.max() == len(mesh.vertices) - 1
    assert {part.visual.kind for part in mesh.parts} == {"vertex", "texture"}


def test_gltf_colour_factors_are_linear(tmp_path: Path) -> None:
    """glTF 2.0, 3.9.2: base colour factors are linear, pictures are sRGB. 0.2158 linear is 0.502 sRGB."""
    textured_box(PBRMaterial(baseColorFactor=[55, 55, 55, 255])).export(tmp_path / "grey.glb")
    (part,) = load_object(discover_objects(tmp_path)[0]).parts
    assert np.abs(part.visual.material.diffuse[:3].astype(int) - 128).max() <= 1


@pytest.mark.parametrize(("unit", "metres"), [("m", 1.0), ("cm", 0.01), ("mm", 0.001), ("in", 0.0254)])
def test_units_become_metres(tmp_path: Path, unit: str, metres: float) -> None:
    box().apply_scale(1 / metres).export(tmp_path / "thing.stl")
    (spec,) = discover_objects(tmp_path, unit)
    mesh = load_object(spec)
    assert np.allclose(sorted(mesh.extents), EXTENTS, rtol=1e-5)
    assert mesh.warnings == []


@pytest.mark.parametrize(
    ("scale", "unit", "advice"),
    [
        (1000.0, "m", "unit mm would make it"),
        (1.0, "mm", "unit m would make it"),
        (1e7, "m", "no unit"),
    ],
)
def test_implausible_size_warns(tmp_path: Path, scale: float, unit: str, advice: str) -> None:
    box().apply_scale(scale).export(tmp_path / "thing.stl")
    mesh = load_object(discover_objects(tmp_path, unit)[0])
    (warning,) = mesh.warnings
    assert str(tmp_path / "thing.stl") in warning and advice in warning


def test_missing_texture_warns_and_is_left_out(tmp_path: Path) -> None:
    textured_box().export(tmp_path / "thing.obj")
    (tmp_path / "material_0.png").unlink()
    (warning,) = load_object(discover_objects(tmp_path)[0]).warnings
    assert "material_0.png" in warning and "does not exist" in warning


def test_folder_of_folders_and_hidden_or_other_files(tmp_path: Path) -> None:
    for name in ("mug", "drill"):
        (tmp_path / name).mkdir()
        textured_box().export(tmp_path / name / "textured.obj")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no mesh")
    (tmp_path / ".hidden.ply").write_text("")
    box().export(tmp_path / "part.01.stl")
    specs = discover_objects(tmp_path)
    assert [spec.class_id for spec in specs] == ["drill", "mug", "part.01"]
    assert specs[0].path == tmp_path / "drill" / "textured.obj"


def test_bop_models_folder_works_as_it_is(tmp_path: Path) -> None:
    box().apply_scale(1000).export(tmp_path / "obj_000005.ply")
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    turn[0, 3] = 20.0
    info = {
        "diameter": 374.2,
        "symmetries_discrete": [turn.ravel().tolist()],
        "symmetries_continuous": [{"axis": [0, 0, 2], "offset": [10, 0, 0]}],
    }
    (tmp_path / "models_info.json").write_text(json.dumps({"5": info, "17": {"diameter": 1.0}}))
    (spec,) = discover_objects(tmp_path)
    assert (spec.class_id, spec.unit, spec.aliases) == ("obj_000005", "mm", ("5",))
    assert load_object(spec).diameter == pytest.approx(np.linalg.norm(EXTENTS), abs=1e-6)

    assert np.allclose(spec.symmetries.discrete[0][:3, 3], [0.02, 0, 0])
    axis, offset = spec.symmetries.continuous[0]
    assert np.allclose(axis, [0, 0, 1]) and np.allclose(offset, [0.01, 0, 0])
    transforms = spec.symmetries.transforms(step_deg=90.0)
    assert transforms.shape == (8, 4, 4)
    assert np.allclose(transforms[0], np.eye(4))
    assert np.allclose(transforms @ [0.01, 0, 0.3, 1], [0.01, 0, 0.3, 1]), "the axis stays where it is"


def test_objects_file_decides(tmp_path: Path) -> None:
    box().export(tmp_path / "mug.stl")
    box().export(tmp_path / "can.stl")
    (tmp_path / "objects.yaml").write_text(
        """
mug:
  unit: cm
  frame_id: mug_frame
  class_ids: [cup, 41]
  symmetries:
    continuous: [{axis: [0, 0, 1]}]
    discrete: [[1, 0, 0, 0,  0, -1, 0, 0,  0, 0, -1, 30,  0, 0, 0, 1]]
"""
    )
    can, mug = discover_objects(tmp_path, "in")
    assert (can.unit, can.aliases, can.frame_id) == ("in", (), None)
    assert (mug.unit, mug.aliases, mug.frame_id) == ("cm", ("cup", "41"), "mug_frame")
    assert mug.symmetries.discrete[0][2, 3] == pytest.approx(0.3)
    assert len(mug.symmetries.continuous) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mug: {unit: parsec}", "parsec"),
        ("jug: {unit: mm}", "jug"),
        ("mug: {scale: 2}", "scale"),
        ("mug: [", "not valid YAML"),
        ("- mug", "must map"),
        ("mug: {class_ids: cup}", "class_ids"),
        ("mug: {class_ids: [can]}", "names both"),
        ("mug: {frame_id: /mug}", "no leading slash"),
        ("mug: {frame_id: ' '}", "frame_id is ' ': it is empty"),
        ("mug: {frame_id: can}", "'can' and 'mug' would both have the TF frames can_0"),
        ("{mug: {frame_id: part}, can: {frame_id: part}}", "would both have the TF frames part_0"),
        ('mug: {frame_id: "a\\0b"}', "NUL"),
        ("mug: {symmetries: {discrete: [[1, 2, 3]]}}", "BOP form"),
        ("mug: {symmetries: {discrete: [[2,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1]]}}", "not a rotation"),
        ("mug: {symmetries: {continuous: [{axis: [0, 0, 0]}]}}", "is zero"),
        ("mug: {symmetries: {mirror: x}}", "discrete and/or continuous"),
    ],
)
def test_bad_objects_file_is_explained(tmp_path: Path, text: str, said: str) -> None:
    box().export(tmp_path / "mug.stl")
    box().export(tmp_path / "can.stl")
    (tmp_path / "objects.yaml").write_text(text)
    with pytest.raises(MeshError, match=said):
        discover_objects(tmp_path)


def test_bad_models_info_is_explained(tmp_path: Path) -> None:
    box().export(tmp_path / "obj_000001.ply")
    (tmp_path / "models_info.json").write_text('{"one": 1}')
    with pytest.raises(MeshError, match=r"models_info\.json"):
        discover_objects(tmp_path)


def test_directory_without_meshes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="holds no mesh"):
        discover_objects(tmp_path)
    with pytest.raises(MeshError, match="does not exist"):
        discover_objects(tmp_path / "nowhere")
    with pytest.raises(MeshError, match="parsec"):
        discover_objects(tmp_path, "parsec")


def test_two_meshes_of_one_class_are_both_named(tmp_path: Path) -> None:
    box().export(tmp_path / "mug.stl")
    box().export(tmp_path / "mug.ply")
    with pytest.raises(MeshError) as caught:
        discover_objects(tmp_path)
    assert str(tmp_path / "mug.stl") in str(caught.value) and str(tmp_path / "mug.ply") in str(caught.value)

    (tmp_path / "mug.ply").unlink()
    (tmp_path / "mug").mkdir()
    box().export(tmp_path / "mug" / "model.obj")
    with pytest.raises(MeshError, match="more than one mesh"):
        discover_objects(tmp_path)


def no_faces(path: Path) -> None:
    trimesh.PointCloud(box().vertices).export(path)


def not_finite(path: Path) -> None:
    mesh = box()
    mesh.vertices[3, 1] = np.nan
    mesh.export(path)


def one_point(path: Path) -> None:
    path.write_text("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n")


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("bad.obj", lambda path: path.write_text("this is not a mesh"), "no faces"),
        ("bad.obj", lambda path: path.write_text(""), "bad.obj"),
        ("bad.ply", lambda path: path.write_bytes(b"\x00\x01\x02" * 50), "cannot be read as ply"),
        ("bad.glb", lambda path: path.write_bytes(b"glTF" + b"\x00" * 64), "cannot be read as glb"),
        ("bad.gltf", lambda path: path.write_text("{"), "bad.gltf"),
        ("bad.dae", lambda path: path.write_text("<COLLADA>"), "cannot be read as dae"),
        ("bad.stl", lambda path: path.write_bytes(b"\x00" * 10), "bad.stl"),
        ("bad.off", lambda path: path.write_text("OFF\n3 1 0\n0 0 0\n"), "cannot be read as off"),
        ("bad.ply", no_faces, "no faces"),
        ("bad.stl", not_finite, "not finite"),
        ("bad.obj", one_point, "degenerate"),
    ],
)
def test_bad_meshes_are_refused_with_their_file(tmp_path: Path, name: str, write: Writer, said: str) -> None:
    write(tmp_path / name)
    with pytest.raises(MeshError, match=said) as caught:
        load_object(discover_objects(tmp_path)[0])
    assert str(tmp_path / name) in str(caught.value)


def test_mesh_cut_short_is_refused(tmp_path: Path) -> None:
    red_box().export(tmp_path / "thing.ply")
    whole = (tmp_path / "thing.ply").read_bytes()
    (tmp_path / "thing.ply").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MeshError, match=r"thing\.ply"):
        load_object(discover_objects(tmp_path)[0])


def test_missing_mesh_file_is_refused(tmp_path: Path) -> None:
    spec = ObjectSpec("gone", tmp_path / "gone.ply")
    with pytest.raises(MeshError, match="does not exist"):
        load_object(spec)
    with pytest.raises(MeshError, match="cannot be read"):
        mesh_digest(spec)


def test_digest_follows_the_mesh_and_what_it_refers_to(tmp_path: Path) -> None:
    textured_box().export(tmp_path / "thing.obj")
    (spec,) = discover_objects(tmp_path)
    assert [path.name for path in referenced_files(spec.path)] == ["material.mtl", "material_0.png"]
    digests = {mesh_digest(spec)}
    assert mesh_digest(spec) in digests, "nothing changed"
    Image.new("RGB", (16, 16), RED).save(tmp_path / "material_0.png")
    digests.add(mesh_digest(spec))
    (tmp_path / "material.mtl").write_text((tmp_path / "material.mtl").read_text() + "\n# edited\n")
    digests.add(mesh_digest(spec))
    (tmp_path / "thing.obj").write_text((tmp_path / "thing.obj").read_text() + "\n# edited\n")
    digests.add(mesh_digest(spec))
    (tmp_path / "material_0.png").unlink()
    digests.add(mesh_digest(spec))
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("name", "write", "names"),
    [
        ("thing.ply", write_textured_ply, ["skin.png"]),
        ("thing.dae", write_textured_dae, ["skin.png"]),
        ("thing.stl", lambda path: box().export(path), []),
    ],
)
def test_referenced_files(tmp_path: Path, name: str, write: Writer, names: list[str]) -> None:
    write(tmp_path / name)
    assert [path.name for path in referenced_files(tmp_path / name)] == names


def test_referenced_files_of_gltf_are_its_buffers(tmp_path: Path) -> None:
    write_gltf(textured_box(), tmp_path / "thing.gltf")
    files = referenced_files(tmp_path / "thing.gltf")
    assert files and all(path.suffix == ".bin" and path.is_file() for path in files)


@pytest.mark.parametrize("subdivisions", [1, 4])
def test_diameter_is_the_largest_distance(tmp_path: Path, subdivisions: int) -> None:
    ball = trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.1)
    ball.apply_scale([1.0, 0.6, 1.4])
    ball.export(tmp_path / "egg.ply")
    mesh = load_object(discover_objects(tmp_path)[0])
    distances = np.linalg.norm(mesh.vertices[:, None] - mesh.vertices[None], axis=2)
    assert mesh.diameter == pytest.approx(distances.max(), abs=1e-9)


def test_flat_mesh_has_a_diameter(tmp_path: Path) -> None:
    (tmp_path / "card.obj").write_text("v 0 0 0\nv 0.3 0 0\nv 0.3 0.4 0\nv 0 0.4 0\nf 1 2 3 4\n")
    assert load_object(discover_objects(tmp_path)[0]).diameter == pytest.approx(0.5)
