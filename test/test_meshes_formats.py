"""OBJ, PLY, OFF, STL, COLLADA, their pictures, paths: what is named arrives, or is refused or warned of."""

from __future__ import annotations

import io
import re
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import trimesh
from mesh_files import (
    COLOURS,
    FACES,
    HIGH,
    UV,
    VERTEX_COLOURS,
    VERTICES,
    atlas,
    differences,
    write_obj,
    write_ply,
)
from PIL import Image

from picopose_ros.errors import MeshError
from picopose_ros.templates.meshes import (
    ObjectSpec,
    discover_objects,
    load_object,
    mesh_digest,
    referenced_files,
    resolve_path,
)
from picopose_ros.templates.meshes.diameter import diameter
from picopose_ros.templates.meshes.polygons import split
from picopose_ros.templates.meshes.textures import LARGEST_SIDE, TextureError, decode
from picopose_ros.templates.renderer import MeshRenderer

Writer = Callable[[Path], None]
FACE_COLOURS = np.repeat(COLOURS, 2, axis=0)


@pytest.fixture(scope="module")
def renderer() -> Iterator[MeshRenderer]:
    with MeshRenderer() as renderer:
        yield renderer


def skin(path: Path, image: Image.Image | None = None, name: str = "skin.png") -> None:
    target = path.parent / name
    target.parent.mkdir(parents=True, exist_ok=True)
    (atlas() if image is None else image).save(target)


def obj(
    mtl: str | bytes, name: str = "skin.png", head: bytes = b"", image: Image.Image | None = None
) -> Writer:
    def write(path: Path) -> None:
        skin(path, image, name)
        write_obj(path, mtl, head=head)

    return write


def obj_colours(scale: float) -> Writer:
    return lambda path: write_obj(path, colours=VERTEX_COLOURS.astype(float) * scale)


def obj_materials(path: Path) -> None:
    """Six materials with Kd alone, and indices that count back from each face."""
    lines, mtl = ["mtllib my colours.mtl"], []
    for side in range(6):
        lines += [f"v {x} {y} {z}" for x, y, z in VERTICES[4 * side : 4 * side + 4]]
        lines += [f"usemtl colour {side}"]
        lines += [
            "f " + " ".join(str(i - 4 * side - 4) for i in face) for face in FACES[2 * side : 2 * side + 2]
        ]
        mtl += [f"newmtl colour {side}", "Kd {} {} {}".format(*(COLOURS[side] / 255))]
    path.write_text("\n".join(lines) + "\n")
    path.with_name("my colours.mtl").write_text("\n".join(mtl) + "\n")


def half_width(path: Path) -> None:
    """A picture that begins at a quarter: -o and -s bring the coordinates there."""
    wide = Image.new("RGB", (96, 16))
    wide.paste(atlas(), (24, 0))
    obj("newmtl skin\nmap_Kd -s 0.5 1 1 -o 0.25 0 -bm 0.3 skin.png\n", image=wide)(path)


def half_gain(path: Path) -> None:
    pixels = np.asarray(atlas()).astype(float)
    given = np.clip((pixels / 255 - 0.05) / 0.9 * 255, 0, 255).round().astype(np.uint8)
    obj("newmtl skin\nmap_Kd -mm 0.05 0.9 -clamp on skin.png\n", image=Image.fromarray(given))(path)


def ply_vertices(names: str, kind: str, scale: float) -> Writer:
    lines = [f"property {kind} {name}" for name in names.split()]
    return lambda path: write_ply(path, lines, VERTEX_COLOURS.astype(float) * scale)


def ply_faces(kind: str, scale: float) -> Writer:
    lines = [f"property {kind} {name}" for name in ("red", "green", "blue")]
    rows = [" ".join(f"{value:.6g}" for value in row * scale) for row in FACE_COLOURS.astype(float)]
    return lambda path: write_ply(path, [], np.zeros((24, 0)), lines, rows)


def ply_textures(path: Path) -> None:
    """Two pictures, and per face its coordinates and which of them it has."""
    white = np.full((16, 48, 3), 255, np.uint8)
    for name, half in (("a b.png", slice(0, 24)), ("c.png", slice(24, 48))):
        pixels = white.copy()
        pixels[:, half] = np.asarray(atlas())[:, half]
        Image.fromarray(pixels).save(path.with_name(name))
    rows = []
    for index, face in enumerate(FACES):
        uv = " ".join(f"{u} {1 - v}" for u, v in UV[face])
        rows.append(f"6 {uv} {int(index >= 6)}")
    lines = ["property list uchar float texcoord", "property int texnumber"]
    head = ["comment TextureFile a b.png", "comment TextureFile c.png"]
    write_ply(path, [], np.zeros((24, 0)), lines, rows, head)


def ply_binary(order: str, quads: bool) -> Writer:
    def write(path: Path) -> None:
        sign = "<" if order == "little" else ">"
        kind = np.dtype([("p", sign + "f4", 3), ("c", "u1", 3)])
        table = np.zeros(24, kind)
        table["p"], table["c"] = VERTICES, VERTEX_COLOURS
        polygons = [face.tolist() for face in FACES]
        if quads:  # the first side as one polygon
            polygons[:2] = [[FACES[0][0], FACES[0][1], FACES[0][2], FACES[1][2]]]
        head = f"ply\nformat binary_{order}_endian 1.0\nelement vertex 24\n"
        head += "".join(f"property float {axis}\n" for axis in "xyz")
        head += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
        head += f"element face {len(polygons)}\nproperty list uchar int vertex_index\nend_header\n"
        body = b"".join(struct.pack(f"{sign}B{len(p)}i", len(p), *p) for p in polygons)
        path.write_bytes(head.encode() + table.tobytes() + body)

    return write


def off(header: str, vertex: str = "", face: str = "") -> Writer:
    def write(path: Path) -> None:
        def tail(form: str, colour: np.ndarray) -> str:
            values = colour / 255 if form.startswith("f") else colour
            return (
                ""
                if not form
                else " " + " ".join(f"{v:.6g}" for v in values) + (" 255" if "a" in form else "")
            )

        lines = [header, "24 12 0"]
        lines += [f"{x} {y} {z}" + tail(vertex, c) for (x, y, z), c in zip(VERTICES, VERTEX_COLOURS)]
        lines += [f"3 {a} {b} {c}" + tail(face, colour) for (a, b, c), colour in zip(FACES, FACE_COLOURS)]
        path.write_text("\n".join(lines) + "\n")

    return write


def stl(magics: bool, trailing: bytes = b"") -> Writer:
    def write(path: Path) -> None:
        five = np.round(FACE_COLOURS / 255 * 31).astype(int)
        red, green, blue = five.T
        bits = red | green << 5 | blue << 10 if magics else 0x8000 | blue | green << 5 | red << 10
        header = (b"COLOR=\x80\x80\x80\xff" if magics else b"solid is how many binary ones begin").ljust(80)
        facets = b"".join(
            struct.pack("<12fH", 0, 0, 0, *VERTICES[face].ravel(), bit) for face, bit in zip(FACES, bits)
        )
        path.write_bytes(header + struct.pack("<I", 12) + facets + trailing)

    return write


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("Kd of six materials.obj", obj_materials),
        ("relative folder.obj", obj("newmtl skin\nmap_Kd sub/more/skin.png\n", "sub/more/skin.png")),
        ("backslashes.obj", obj("newmtl skin\nmap_Kd sub\\skin.png\n", "sub/skin.png")),
        ("spaces.obj", obj("newmtl skin\nmap_Kd my skin 1.png\n", "my skin 1.png")),
        ("quotes.obj", obj('newmtl skin\nmap_Kd "my skin.png"\n', "my skin.png")),
        ("another disk.obj", obj("newmtl skin\nmap_Kd C:\\Users\\me\\SKIN.png\n")),
        ("latin-1 everywhere.obj", obj(b"# Gr\xfcn\nnewmtl skin\nmap_Kd skin.png\n", head=b"# Geh\xe4use\n")),
        ("offset and scale.obj", half_width),
        ("base and gain.obj", half_gain),
        ("colours 0 to 1.obj", obj_colours(1 / 255)),
        ("colours 0 to 255.obj", obj_colours(1)),
        ("red.ply", ply_vertices("red green blue", "uchar", 1)),
        ("diffuse.ply", ply_vertices("diffuse_red diffuse_green diffuse_blue", "uchar", 1)),
        ("float.ply", ply_vertices("red green blue", "float", 1 / 255)),
        ("float255.ply", ply_vertices("red green blue", "float", 1)),
        ("ushort.ply", ply_vertices("red green blue", "ushort", 257)),
        ("int.ply", ply_vertices("r g b", "int", 1)),
        ("faces.ply", ply_faces("uchar", 1)),
        ("float faces.ply", ply_faces("float", 1 / 255)),
        ("textures.ply", ply_textures),
        ("little.ply", ply_binary("little", False)),
        ("big with a quad.ply", ply_binary("big", True)),
        ("faces.off", off("OFF", face="i")),
        ("float faces.off", off("OFF", face="fa")),
        ("coff.off", off("COFF", vertex="ia")),
        ("float coff.off", off("COFF", vertex="f")),
        ("viscam.stl", stl(False)),
        ("magics with more bytes.stl", stl(True, b"\0\n")),
    ],
)
def test_looks_arrive(renderer: MeshRenderer, tmp_path: Path, name: str, write: Writer) -> None:
    (tmp_path / "thing").mkdir()
    write(tmp_path / "thing" / name)
    mesh = load_object(discover_objects(tmp_path)[0])
    assert mesh.warnings == []
    assert np.allclose(mesh.bounds, [[0, 0, 0], HIGH], atol=1e-6)
    outline, colour = differences(renderer, mesh)
    assert outline < 0.002 and colour < (5 if name.endswith("stl") else 2.5)  # an STL's colours have 5 bits


def texture(data: bytes | None) -> Writer:
    def write(path: Path) -> None:
        write_obj(path, "newmtl skin\nKd 1 0 0\nmap_Kd skin.png\n")
        if data is not None:
            path.with_name("skin.png").write_bytes(data)

    return write


def png(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def huge() -> bytes:
    """A PNG that says it has 10^10 pixels, and has none."""
    data = bytearray(png(Image.new("L", (4, 4))))
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (texture(None), r"skin\.png does not exist.*plain colour \(255, 0, 0\)"),
        (texture(b""), "is empty"),
        (texture(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        (texture(png(atlas())[:-40]), "can't be read as a picture"),
        (texture(b"\x76\x2f\x31\x01" + b"x" * 50), "OpenEXR"),
        (texture(b"<!DOCTYPE html><html>"), "web page"),
        (texture(b"no picture at all"), "no known picture format"),
        (texture(huge()), "too large|more than"),
        (lambda path: write_obj(path, "newmtl other\nKd 1 0 0\n"), "material 'skin' is in no material file"),
        (obj("newmtl skin\nd 0.3\nmap_Kd skin.png\n"), "transparent.*opaque"),
        (obj("newmtl skin\nmap_Kd skin.png\nmap_d skin.png\n"), "map_d"),
        (obj("newmtl skin\nmap_Kd -t 1 1 1 skin.png\n"), "option -t"),
    ],
)
def test_what_is_lost_is_named_with_what_is_shown(tmp_path: Path, write: Writer, said: str) -> None:
    write(tmp_path / "box.obj")
    (warning,) = load_object(discover_objects(tmp_path)[0]).warnings
    assert warning.startswith(str(tmp_path / "box.obj")) and re.search(said, warning), warning


def test_a_missing_material_file_is_named(tmp_path: Path) -> None:
    write_obj(tmp_path / "box.obj", "")
    (tmp_path / "m.mtl").unlink()
    said = " ".join(load_object(discover_objects(tmp_path)[0]).warnings)
    assert "m.mtl, which does not exist" in said and "plain grey" in said


def test_unknown_colours_of_ply_and_textures_without_coordinates_are_named(tmp_path: Path) -> None:
    ply_vertices("specular_red g2 b2", "uchar", 1)(tmp_path / "a.ply")
    write_ply(tmp_path / "b.ply", [], np.zeros((24, 0)), head=["comment TextureFile skin.png"])
    a, b = (load_object(spec).warnings for spec in discover_objects(tmp_path))
    assert "specular_red" in a[0] and "no texture coordinates" in b[0] and len(a) == len(b) == 1


@pytest.mark.parametrize(
    ("data", "expected", "tolerance"),
    [
        (png(Image.new("P", (4, 4), 1), "PNG"), None, 0),
        (png(Image.new("L", (4, 4), 90)), (90, 90, 90), 0),
        (png(Image.new("1", (4, 4), 1)), (255, 255, 255), 0),
        (png(Image.fromarray(np.full((4, 4), 90 * 257, np.uint16))), (90, 90, 90), 1),
        (png(Image.new("RGBA", (4, 4), (9, 80, 70, 0))), (9, 80, 70), 0),
        (png(Image.new("LA", (4, 4), (90, 3))), (90, 90, 90), 0),
        (png(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"), (255, 0, 0), 6),
        (png(Image.fromarray(np.full((4, 4), 90 / 255, np.float32)), "TIFF"), (90, 90, 90), 1),
        (png(Image.new("RGB", (4, 4), (1, 2, 3)), "BMP"), (1, 2, 3), 0),
        (png(Image.new("RGB", (4, 4), (1, 2, 3)), "TGA"), (1, 2, 3), 0),
    ],
)
def test_pictures_of_every_kind_become_rgb(data: bytes, expected: tuple | None, tolerance: int) -> None:
    image, transparent = decode(data)
    assert image.mode == "RGB"
    if expected is not None:
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance
        assert transparent == (image.size == (4, 4) and expected in ((9, 80, 70),) or data[25:26] == b"\x04")


def test_pictures_that_are_too_large_are_not_decoded() -> None:
    began = time.process_time()
    with pytest.raises(TextureError, match="more than|too large"):
        decode(huge())
    assert time.process_time() - began < 5 and LARGEST_SIDE >= 8192


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "vertex 8"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 -9\n", "-9"),
        ("a.obj", "v 0 0 zero\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "no number"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "vertex 7"),
        ("a.stl", "solid a\nfacet\nvertex 0 0 0\nvertex 1 0 0\nendfacet\n", "cut short"),
        (
            "a.ply",
            "ply\nformat ascii 1.0\nelement vertex 3\n"
            "property float x\nproperty float y\nproperty float z\n"
            "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
            "0 0 0\n1 0 0\n0 1 0\n3 0 1 5\n",
            "vertex 5",
        ),
    ],
)
def test_faces_of_vertices_that_are_not_there_are_refused(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(MeshError, match=said) as caught:
        load_object(discover_objects(tmp_path)[0])
    assert str(tmp_path / name) in str(caught.value)


def write_dae(path: Path, asset: str, look: str = "<color>1 0 0 1</color>") -> None:
    text = trimesh.exchange.dae.export_collada(trimesh.Trimesh(VERTICES, FACES, process=False)).decode()
    text = re.sub(
        r"<asset>.*?</asset>|<asset\s*/>", f"<asset>{asset}</asset>", text, count=1, flags=re.DOTALL
    )
    assert asset in text
    path.write_text(text)


@pytest.mark.parametrize(
    ("unit", "default", "metres"),
    [
        ('<unit name="centimeter" meter="0.01"/>', None, 0.01),
        ('<unit meter="0.3048"/>', "m", 0.3048),
        ("", None, 1.0),
        ('<unit meter="0.01"/>', "mm", 0.001),
    ],
)
def test_a_stated_unit_holds_unless_the_settings_say_another(
    tmp_path: Path, unit: str, default: str | None, metres: float
) -> None:
    write_dae(tmp_path / "box.dae", unit + "<up_axis>Y_UP</up_axis>")
    (spec,) = discover_objects(tmp_path, default)
    mesh = load_object(spec)
    assert spec.metres_per_unit == pytest.approx(metres)
    # The axes are those of the file's numbers, as RViz shows them, whichever is up.
    assert np.allclose(mesh.extents, HIGH * metres, rtol=1e-5)
    assert any("states its unit as cm" in warning for warning in mesh.warnings) == (default == "mm")
    (tmp_path / "objects.yaml").write_text("box: {unit: in}\n")
    assert discover_objects(tmp_path, default)[0].unit == "in"


def test_a_skin_of_collada_is_refused(tmp_path: Path) -> None:
    write_dae(tmp_path / "box.dae", "")
    text = (tmp_path / "box.dae").read_text()
    text = re.sub(
        r"<instance_geometry.*?</instance_geometry>", '<instance_controller url="#c"/>', text, flags=re.DOTALL
    )
    (tmp_path / "box.dae").write_text(text)
    with pytest.raises(MeshError, match=r"box\.dae"):
        load_object(discover_objects(tmp_path)[0])


def test_polygons_that_are_not_convex_keep_their_shape() -> None:
    """An L of area 3, a quad like an arrow of area 1, and a triangle."""
    points = np.array(
        [(0, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0, 2), (1, 0.5), (4, 0), (6, 1), (4, 2), (5, 1)]
    )
    points = np.column_stack([points, np.zeros(len(points))])
    faces, owners, _ = split(
        points, np.array([6, 4, 3, 2]), np.array([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 0, 1, 2, 0, 1])
    )
    areas = (
        np.cross(points[faces[:, 1]] - points[faces[:, 0]], points[faces[:, 2]] - points[faces[:, 0]])[:, 2]
        / 2
    )
    assert (areas > 0).all()
    assert [areas[owners == one].sum() for one in range(4)] == pytest.approx([3, 1, 1, 0])


def test_the_diameter_of_many_points() -> None:
    """A sphere of 160 000 points: comparing each with each would take minutes and 200 GB."""
    rng = np.random.default_rng(0)
    ball = rng.normal(size=(160_000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    assert 2.0 - 1e-3 < diameter(ball) <= 2.0
    egg = ball * [1.0, 0.9, 1.3]
    egg[5] = [0.4, 0.1, -2.0]
    far = np.linalg.norm(egg - egg[5], axis=1).max()
    assert diameter(egg) == pytest.approx(far, abs=1e-9)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = tmp_path / "ws" / "share" / "my_robot"
    (share / "meshes").mkdir(parents=True)
    trimesh.Trimesh(VERTICES, FACES).export(share / "meshes" / "box.ply")
    monkeypatch.setenv("AMENT_PREFIX_PATH", f"/none:{tmp_path / 'ws'}")
    for text in (
        "package://my_robot/meshes",
        "file://" + str(share / "meshes"),
        Path("package://my_robot/meshes"),
    ):
        assert resolve_path(text) == share / "meshes"
        assert [spec.class_id for spec in discover_objects(text)] == ["box"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/ws") == tmp_path / "ws"
    for bad, said in (
        ("package://no_robot/x", "no package 'no_robot'"),
        ("~nobody_of_that_name/x", "home folder is unknown"),
        ("https://example.invalid/x", "unknown kind"),
    ):
        with pytest.raises(MeshError, match=said):
            discover_objects(bad)


def test_a_mesh_file_alone_is_an_object(tmp_path: Path) -> None:
    for name in ("box", "other"):
        trimesh.Trimesh(VERTICES * 1000, FACES).export(tmp_path / f"{name}.ply")
    (tmp_path / "objects.yaml").write_text("box: {unit: mm}\nother: {unit: cm}\n")
    (spec,) = discover_objects(tmp_path / "box.ply")
    assert (spec.class_id, spec.unit) == ("box", "mm")
    (tmp_path / "notes.txt").write_text("no mesh")
    with pytest.raises(MeshError, match="no mesh"):
        discover_objects(tmp_path / "notes.txt")


def test_a_name_that_is_no_utf8_is_shown_escaped(tmp_path: Path) -> None:
    trimesh.Trimesh(VERTICES, FACES).export(tmp_path / "x.ply")
    odd = Path(str(tmp_path)) / "Geh\udce4use.ply"
    (tmp_path / "x.ply").rename(odd)
    (spec,) = discover_objects(tmp_path)
    assert spec.class_id == r"Geh\xe4use" and spec.path == odd
    assert load_object(spec).warnings == [] and len(mesh_digest(spec)) == 64
    with pytest.raises(MeshError, match=r"Geh\\xe4use"):
        load_object(ObjectSpec("x", odd.with_suffix(".off")))


def test_referenced_files_understand_options_and_encodings(tmp_path: Path) -> None:
    obj(b"# \xfc\nnewmtl skin\nmap_Kd -s 1 1 1 -o 0 0 sub\\my skin.png\n", "sub/my skin.png")(
        tmp_path / "box.obj"
    )
    names = [str(path.relative_to(tmp_path)) for path in referenced_files(tmp_path / "box.obj")]
    assert names == ["m.mtl", "sub/my skin.png"]
