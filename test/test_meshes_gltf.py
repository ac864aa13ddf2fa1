"""glTF: whatever a file says of shape and look arrives exactly, or is refused or warned of by name."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from mesh_files import COLOURS, FACES, HIGH, UV, VERTEX_COLOURS, VERTICES, Gltf, atlas, differences, linear
from PIL import Image

from picopose_ros.errors import MeshError
from picopose_ros.templates.meshes import ObjectMesh, discover_objects, load_object, referenced_files
from picopose_ros.templates.renderer import MeshRenderer

Change = Callable[[Gltf], None]


@pytest.fixture(scope="module")
def renderer() -> Iterator[MeshRenderer]:
    with MeshRenderer() as renderer:
        yield renderer


def loaded(gltf: Gltf, folder: Path, name: str = "box.glb") -> ObjectMesh:
    gltf.save(folder / name)
    return load_object(discover_objects(folder)[0])


def coloured(dtype: type, width: int, normalized: bool, material: bool) -> Change:
    def change(g: Gltf) -> None:
        values = np.column_stack([linear(VERTEX_COLOURS), np.ones(24)])[:, :width]
        if np.dtype(dtype).kind == "u":
            values = np.round(values * np.iinfo(dtype).max)
        g.attributes["COLOR_0"] = g.accessor(values.astype(dtype), normalized)
        if material:
            g.material({"pbrMetallicRoughness": {"metallicFactor": 0}})

    return change


def coordinates(dtype: type) -> Change:
    def change(g: Gltf) -> None:
        top = np.iinfo(dtype).max
        g.attributes["TEXCOORD_0"] = g.accessor(np.round(UV * top).astype(dtype), normalized=True)
        g.textured()

    return change


def second_set(g: Gltf) -> None:
    g.attributes["TEXCOORD_1"] = g.accessor(UV.astype(np.float32))
    g.attributes["TEXCOORD_0"] = g.accessor(np.zeros((24, 2), np.float32))
    g.textured(texCoord=1)


def transformed(g: Gltf) -> None:
    """uv = offset + R(angle) (scale * given), a turn against the clock where v points down."""
    angle, scale, offset = 0.7, np.array([0.5, 0.25]), np.array([0.1, 0.3])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    given = (UV - offset) @ turn / scale
    transform = {"offset": offset.tolist(), "rotation": angle, "scale": scale.tolist(), "texCoord": 1}
    g.attributes["TEXCOORD_1"] = g.accessor(given.astype(np.float32))
    g.textured(extensions={"KHR_texture_transform": transform})
    g.tree["extensionsUsed"] = g.tree["extensionsRequired"] = ["KHR_texture_transform"]


def glossy(g: Gltf) -> None:
    g.textured()
    extension = {"KHR_materials_pbrSpecularGlossiness": {"diffuseTexture": {"index": 0}}}
    g.tree["materials"] = [{"extensions": extension}]
    g.tree["extensionsUsed"] = list(extension)


def emissive(g: Gltf) -> None:
    g.textured()
    material = {"emissiveTexture": {"index": 0}, "emissiveFactor": [1, 1, 1]}
    g.tree["materials"] = [{**material, "pbrMetallicRoughness": {"baseColorFactor": [0, 0, 0, 1]}}]


def factor_and_texture(g: Gltf) -> None:
    """The picture is as much brighter as the factor is darker."""
    brighter = np.clip(linear(np.asarray(atlas())) * 1.25, 0, 1)
    srgb = np.where(brighter <= 0.0031308, 12.92 * brighter, 1.055 * brighter ** (1 / 2.4) - 0.055)
    g.textured(Image.fromarray(np.round(255 * srgb).astype(np.uint8)))
    g.tree["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"] = [0.8, 0.8, 0.8, 1]


def tint_and_texture(g: Gltf) -> None:
    """Half of the colours from the texture, the other half from the vertices."""
    white = np.full((24, 3), 255)
    halves = np.where(np.arange(24)[:, None] < 12, VERTEX_COLOURS, white)
    g.attributes["COLOR_0"] = g.accessor(linear(halves).astype(np.float32))
    pixels = np.asarray(atlas()).copy()
    pixels[:, :24] = 255
    g.textured(Image.fromarray(pixels))


def mirrored(g: Gltf) -> None:
    """Texture coordinates beyond the picture, which is to go on mirrored."""
    g.attributes["TEXCOORD_0"] = g.accessor(np.column_stack([2 - UV[:, 0], UV[:, 1]]).astype(np.float32))
    g.textured()
    g.tree["samplers"] = [{"wrapS": 33648, "wrapT": 10497}]
    g.tree["textures"][0]["sampler"] = 0


def webp(g: Gltf) -> None:
    stream = io.BytesIO()
    atlas().save(stream, "WEBP", lossless=True)
    g.textured(stream.getvalue())
    g.tree["textures"] = [{"extensions": {"EXT_texture_webp": {"source": 0}}}]
    g.tree["extensionsUsed"] = g.tree["extensionsRequired"] = ["EXT_texture_webp"]


LOOKS: dict[str, Change] = {
    **{
        f"COLOR_0 {np.dtype(dtype)} {width}{' norm' * norm}{' material' * material}": coloured(
            dtype, width, norm, material
        )
        for dtype, width, norm, material in [
            (np.uint8, 4, True, True),
            (np.uint8, 4, False, False),
            (np.uint16, 4, True, True),
            (np.uint16, 4, False, True),
            (np.float32, 3, False, False),
            (np.float32, 4, False, True),
        ]
    },
    "texture": lambda g: g.textured(),
    "TEXCOORD_0 ubyte": coordinates(np.uint8),
    "TEXCOORD_0 ushort": coordinates(np.uint16),
    "texCoord 1": second_set,
    "KHR_texture_transform": transformed,
    "specular-glossiness": glossy,
    "emissive": emissive,
    "factor and texture": factor_and_texture,
    "vertex colours and texture": tint_and_texture,
    "mirrored repeat": mirrored,
    "WebP": webp,
}


@pytest.mark.parametrize("change", LOOKS.values(), ids=LOOKS.keys())
def test_looks_arrive(renderer: MeshRenderer, tmp_path: Path, change: Change) -> None:
    gltf = Gltf()
    change(gltf)
    mesh = loaded(gltf, tmp_path)
    assert mesh.warnings == []
    outline, colour = differences(renderer, mesh)
    # Half a level for rounding, three for ubyte coordinates and linear bytes in the dark.
    assert outline < 0.002 and colour < 3.5


def vertex_coloured() -> Gltf:
    gltf = Gltf()
    coloured(np.float32, 3, False, False)(gltf)
    return gltf


def set_positions(g: Gltf, values: np.ndarray, **more: object) -> None:
    g.attributes["POSITION"] = g.accessor(values, **more)


def sparse(g: Gltf) -> None:
    wrong = VERTICES.astype(np.float32)
    wrong[[1, 7]] += 0.5
    rows = g.view(np.array([1, 7], np.uint16).tobytes())
    values = g.view(VERTICES[[1, 7]].astype(np.float32).tobytes())
    changes = {
        "count": 2,
        "indices": {"bufferView": rows, "componentType": 5123},
        "values": {"bufferView": values},
    }
    set_positions(g, wrong, sparse=changes)


def morphed(where: str) -> Change:
    def change(g: Gltf) -> None:
        shift = np.random.default_rng(0).normal(0, 0.05, (24, 3)).astype(np.float32)
        set_positions(g, (VERTICES - 0.5 * shift).astype(np.float32))
        g.primitive["targets"] = [{"POSITION": g.accessor(shift)}]
        g.tree[where][0]["weights"] = [0.5]

    return change


def quantized(g: Gltf) -> None:
    set_positions(g, np.round(VERTICES / 0.2 * 32767).astype(np.int16), normalized=True)
    g.tree["nodes"][0]["scale"] = [0.2, 0.2, 0.2]
    g.tree["extensionsUsed"] = g.tree["extensionsRequired"] = ["KHR_mesh_quantization"]


def instanced(g: Gltf) -> None:
    """Two instances of the half of the box."""
    set_positions(g, (VERTICES * [1, 1, 0.5]).astype(np.float32))
    quarter = np.array([[0, 0, 0, 1], [0, 0, 0, 1]], np.float32)
    attributes = {
        "TRANSLATION": g.accessor(np.array([[0, 0, 0], [0, 0, 0.07]], np.float32)),
        "ROTATION": g.accessor(quarter),
        "SCALE": g.accessor(np.ones((2, 3), np.float32)),
    }
    g.tree["nodes"][0]["extensions"] = {"EXT_mesh_gpu_instancing": {"attributes": attributes}}
    g.tree["extensionsUsed"] = ["EXT_mesh_gpu_instancing"]


def skinned(g: Gltf) -> None:
    """The upper half hangs on a joint that lifts it to where it should be."""
    lifted = VERTICES[:, 2] > 0.01
    set_positions(g, (VERTICES - 0.03 * lifted[:, None]).astype(np.float32))
    joints = np.zeros((24, 4), np.uint8)
    joints[lifted, 0] = 1
    g.attributes["JOINTS_0"] = g.accessor(joints)
    g.attributes["WEIGHTS_0"] = g.accessor(np.tile(np.float32([1, 0, 0, 0]), (24, 1)))
    g.tree["nodes"] = [
        {"mesh": 0, "skin": 0, "translation": [9, 9, 9]},
        {"children": [2]},
        {"translation": [0.03, 0.03, 0.03]},
    ]
    g.tree["scenes"][0]["nodes"] = [0, 1]
    g.tree["skins"] = [{"joints": [1, 2]}]


def strip(g: Gltf) -> None:
    quads = [face[[0, 1, 2]].tolist() + [FACES[i + 1][2]] for i, face in enumerate(FACES) if i % 2 == 0]
    strips = [index for a, b, c, d in quads for index in (b, b, c, a, d, d)]
    g.primitive.update(mode=5, indices=g.accessor(np.array(strips, np.uint16)))


def fans(g: Gltf) -> None:
    first = g.tree["meshes"][0]["primitives"].pop()
    for a, b in zip(FACES[::2], FACES[1::2]):
        corners = g.accessor(np.array([a[0], a[1], a[2], b[2]], np.uint32))
        g.tree["meshes"][0]["primitives"].append({**first, "mode": 6, "indices": corners})


def bare(g: Gltf) -> None:
    set_positions(g, VERTICES[FACES.ravel()].astype(np.float32))
    g.attributes["COLOR_0"] = g.accessor(linear(VERTEX_COLOURS)[FACES.ravel()].astype(np.float32))
    del g.primitive["indices"]


def interleaved(g: Gltf) -> None:
    rows = np.column_stack([VERTICES, linear(VERTEX_COLOURS)]).astype(np.float32)
    view = g.view(rows.tobytes())
    g.tree["bufferViews"][view]["byteStride"] = 24
    set_positions(g, VERTICES.astype(np.float32), view=False, bufferView=view)
    g.attributes["COLOR_0"] = g.accessor(
        VERTICES.astype(np.float32), view=False, bufferView=view, byteOffset=12
    )


def nested(g: Gltf) -> None:
    turn = trimesh.transformations.rotation_matrix(0.8, (1, 2, 3), (0.1, 0, 0))
    x, y, z, w = trimesh.transformations.quaternion_from_matrix(np.linalg.inv(turn))[[1, 2, 3, 0]]
    back = np.linalg.inv(turn)[:3, 3]
    g.tree["nodes"] = [
        {"children": [1], "matrix": turn.T.ravel().tolist()},
        {"mesh": 0, "rotation": [x, y, z, w], "translation": back.tolist()},
        {"mesh": 0, "translation": [5, 0, 0]},
    ]


GEOMETRY: dict[str, Change] = {
    "sparse": sparse,
    "morph weights of the mesh": morphed("meshes"),
    "morph weights of the node": morphed("nodes"),
    "normalised positions": quantized,
    "instances": instanced,
    "skin": skinned,
    "strip": strip,
    "fans": fans,
    "no indices": bare,
    "interleaved": interleaved,
    "nodes": nested,
}


@pytest.mark.parametrize("change", GEOMETRY.values(), ids=GEOMETRY.keys())
def test_geometry_arrives(renderer: MeshRenderer, tmp_path: Path, change: Change) -> None:
    gltf = vertex_coloured()
    change(gltf)
    mesh = loaded(gltf, tmp_path)
    assert mesh.warnings == []
    assert np.allclose(mesh.bounds, [[0, 0, 0], HIGH], atol=1e-5)
    outline, colour = differences(renderer, mesh)
    assert outline < 0.002
    assert change is instanced or colour < 2


def draco(g: Gltf) -> None:
    del g.tree["accessors"][g.attributes["POSITION"]]["bufferView"]
    g.primitive["extensions"] = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {}}}


def meshopt(g: Gltf) -> None:
    g.tree["bufferViews"][0]["extensions"] = {"EXT_meshopt_compression": {"buffer": 0}}


def require(name: str) -> Change:
    def change(g: Gltf) -> None:
        g.tree["extensionsRequired"] = g.tree["extensionsUsed"] = [name]

    return change


def bad_index(g: Gltf) -> None:
    g.primitive["indices"] = g.accessor(np.array([0, 1, 99], np.uint16))


def cycle(g: Gltf) -> None:
    g.tree["nodes"] = [{"mesh": 0, "children": [1]}, {"children": [0]}]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (draco, "KHR_draco_mesh_compression"),
        (meshopt, "EXT_meshopt_compression"),
        (require("KHR_draco_mesh_compression"), "KHR_draco_mesh_compression"),
        (require("XYZ_wobbly_space"), "XYZ_wobbly_space"),
        (bad_index, "vertex 99"),
        (cycle, "more than one place"),
        (lambda g: g.tree["buffers"][0].update(uri="no%20such.bin"), "no such.bin"),
        (lambda g: g.tree["asset"].update(version="1.0"), "glTF 1.0"),
        (lambda g: g.tree["bufferViews"][0].update(byteLength=10**6), "beyond its buffer"),
        (lambda g: g.tree["accessors"][0].update(count=10**6), "beyond buffer view"),
    ],
)
def test_what_would_misplace_the_shape_is_refused_by_name(tmp_path: Path, change: Change, said: str) -> None:
    gltf = vertex_coloured()
    change(gltf)
    with pytest.raises(MeshError, match=said) as caught:
        loaded(gltf, tmp_path)
    assert str(tmp_path / "box.glb") in str(caught.value)


def ktx2(g: Gltf) -> None:
    g.textured(b"\xabKTX 20\xbb\r\n\x1a\n")
    g.tree["textures"] = [{"extensions": {"KHR_texture_basisu": {"source": 0}}}]
    g.tree["extensionsUsed"] = ["KHR_texture_basisu"]


def without_coordinates(g: Gltf) -> None:
    g.textured(texCoord=3)


def clear(g: Gltf) -> None:
    g.material(
        {"name": "glass", "alphaMode": "BLEND", "pbrMetallicRoughness": {"baseColorFactor": [1, 0, 0, 0.3]}}
    )


def other_colours(g: Gltf) -> None:
    g.attributes["COLOR_1"] = g.accessor(linear(VERTEX_COLOURS).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (ktx2, "KHR_texture_basisu.*plain colour"),
        (without_coordinates, "TEXCOORD_3.*plain colour"),
        (clear, "glass.*transparent.*opaque"),
        (other_colours, "COLOR_1.*aren't shown"),
        (lambda g: g.tree.update(extensionsUsed=["XYZ_paint"]), "XYZ_paint"),
        (lambda g: g.tree.update(animations=[{}]), "animations"),
        (lambda g: g.textured(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda g: g.primitive.update(mode=1) or g.tree["meshes"][0]["primitives"].append(
            {"attributes": g.attributes, "indices": g.primitive["indices"]}), "points or lines"),
    ],
)  # fmt: skip
def test_what_is_lost_is_named(tmp_path: Path, change: Change, said: str) -> None:
    gltf = Gltf()
    change(gltf)
    (warning,) = loaded(gltf, tmp_path).warnings
    assert warning.startswith(str(tmp_path / "box.glb")) and re.search(said, warning)


def test_a_picture_that_can_be_read_stands_in_for_one_that_cannot(
    renderer: MeshRenderer, tmp_path: Path
) -> None:
    gltf = Gltf()
    gltf.textured()
    gltf.tree["textures"][0]["extensions"] = {"KHR_texture_basisu": {"source": 0}}
    mesh = loaded(gltf, tmp_path)
    assert mesh.warnings == [] and differences(renderer, mesh)[1] < 2


@pytest.mark.parametrize("inline", [True, False])
def test_buffers_and_pictures_beside_the_file(renderer: MeshRenderer, tmp_path: Path, inline: bool) -> None:
    gltf = Gltf()
    gltf.textured()
    (tmp_path / "my data").mkdir()
    atlas().save(tmp_path / "my data" / "skin 1.png")
    (tmp_path / "my data" / "b ü.bin").write_bytes(gltf.blob)
    gltf.tree["images"] = [{"uri": "my%20data/skin%201.png"}]
    uri = "data:application/octet-stream;base64," + base64.b64encode(gltf.blob).decode()
    gltf.tree["buffers"][0]["uri"] = uri if inline else "my%20data/b%20%C3%BC.bin"
    mesh = loaded(gltf, tmp_path, "box.gltf")
    assert mesh.warnings == [] and differences(renderer, mesh)[1] < 2
    names = [path.name for path in referenced_files(tmp_path / "box.gltf")]
    assert names == (["skin 1.png"] if inline else ["b ü.bin", "skin 1.png"])


def test_vertex_colours_of_trimesh_are_srgb(renderer: MeshRenderer, tmp_path: Path) -> None:
    """It writes the bytes that it has, and names itself as the generator."""
    box = trimesh.Trimesh(VERTICES, FACES, process=False)
    box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=VERTEX_COLOURS)
    box.export(tmp_path / "box.glb")
    mesh = load_object(discover_objects(tmp_path)[0])
    assert differences(renderer, mesh)[1] < 2 and len(COLOURS) == 6
