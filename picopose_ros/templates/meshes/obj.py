"""Wavefront OBJ and MTL, in UTF-8 or Latin-1: materials with options, colours of vertices, any polygons.

trimesh's reader guesses encodings with a library that may be missing, knows no options of ``map_Kd``, counts
relative indices from the end of the file and takes colours 0..255 for 0..1.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

from picopose_ros.templates.meshes.colours import unit_range
from picopose_ros.templates.meshes.parts import Source, make_part, said, shown
from picopose_ros.templates.meshes.polygons import Uneven, numbers, split
from picopose_ros.templates.meshes.textures import find_file

_CLAMP_TO_EDGE = 33071

_OPTION_VALUES = {
    "-blendu": 1, "-blendv": 1, "-bm": 1, "-boost": 1, "-cc": 1, "-clamp": 1, "-imfchan": 1,
    "-texres": 1, "-type": 1, "-mm": 2, "-colorspace": 1,
}  # fmt: skip
"""Numbers of values of the options of a texture statement; -o, -s and -t have one to three."""


def decode_text(data: bytes) -> str:
    """Text of a file that says nothing of its encoding: UTF-8, else Latin-1, with joined lines."""
    for encoding in ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "latin-1"):
        try:
            text = data.decode(encoding)
            break
        except UnicodeDecodeError:
            continue
    return re.sub(r"\\[ \t]*\r?\n", " ", text).replace("\r\n", "\n").replace("\r", "\n")


@dataclass
class TextureStatement:
    """``map_Kd`` with its options."""

    name: str
    offset: np.ndarray = field(default_factory=lambda: np.zeros(2))
    scale: np.ndarray = field(default_factory=lambda: np.ones(2))
    base: float = 0.0
    gain: float = 1.0
    clamp: bool = False
    ignored: list[str] = field(default_factory=list)


@dataclass
class _Material:
    colour: np.ndarray | None = None
    texture: TextureStatement | None = None
    opacity: float = 1.0
    unread: list[str] = field(default_factory=list)


@dataclass
class _Shape:
    """Lines of one material's faces, as indices from 0 where the file counts from 1 or from the end."""

    material: str | None
    lines: list[str] = field(default_factory=list)


def read(source: Source) -> list[trimesh.Trimesh]:
    """One part per material.

    Raises:
        ValueError: numbers are missing or broken, or a face refers to what isn't there.
    """
    v: list[str] = []
    vt: list[str] = []
    vn: list[str] = []
    shapes: dict[str | None, _Shape] = {None: _Shape(None)}
    shape, libraries, curves = shapes[None], [], False
    for line in decode_text(source.path.read_bytes()).split("\n"):
        line = line.lstrip()
        key = line[:2]
        if key in ("v ", "v\t"):
            v.append(line[2:])
        elif key in ("f ", "f\t"):
            line = line[2:].split("#", 1)[0]
            shape.lines.append(_absolute(line, len(v), len(vt), len(vn)) if "-" in line else line)
        elif key == "vt":
            vt.append(line[2:])
        elif key == "vn":
            vn.append(line[2:])
        elif key == "us" and line.startswith("usemtl"):
            name = line[6:].strip() or None
            shape = shapes.setdefault(name, _Shape(name))
        elif key == "mt" and line.startswith("mtllib"):
            libraries.append(line[6:].strip())
        elif line.startswith(("curv", "surf", "bzp", "bsp")):
            curves = True
    if curves:
        source.warn("it has free-form curves or surfaces, which aren't shown: export it as triangles")
    vertices, colours = _vertices(source, v)
    uv = _columns(vt, 2, "texture coordinates")
    normals = _columns(vn, 3, "normals")
    materials = _materials(source, libraries)
    parts = []
    for shape in shapes.values():
        if shape.lines:
            parts += _parts(source, shape, vertices, colours, uv, normals, materials)
    return parts


def _vertices(source: Source, lines: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions (V, 3) and colours (V, 3) 0..1 or None."""
    if any("#" in line for line in lines[:1]):
        lines = [line.split("#", 1)[0] for line in lines]
    try:
        values = numbers(lines, "vertices")
    except Uneven:  # some have a colour or a weight, some have none
        rows = [line.split("#", 1)[0].split() for line in lines]
        values = np.array([(row + ["1"] * 7)[:3] for row in rows], np.float64)
        source.warn("some of its vertices have colours and some have none: they aren't shown")
    if values.size and values.shape[1] < 3:
        raise ValueError(f"its vertices have {values.shape[1]} coordinates")
    if values.size and values.shape[1] in (6, 7, 8):
        # x y z r g b, or x y z w r g b; an alpha may follow the first.
        first = 4 if values.shape[1] == 8 or (values.shape[1] == 7 and (values[:, 3] == 1).all()) else 3
        colours = values[:, first : first + 3]
        return values[:, :3], unit_range(colours)
    return values[:, :3].reshape(-1, 3), None


def _columns(lines: list[str], count: int, what: str) -> np.ndarray:
    try:
        values = numbers(lines, what)
    except Uneven:
        values = np.array(
            [(line.split("#", 1)[0].split() + ["0"] * count)[:count] for line in lines], np.float64
        )
    if values.size and values.shape[1] < count:
        values = np.pad(values, ((0, 0), (0, count - values.shape[1])))
    return values[:, :count].reshape(-1, count)


def _absolute(line: str, v: int, vt: int, vn: int) -> str:
    """A face with indices that count back from the line it stands in, as the format has them."""
    corners = []
    for corner in line.split():
        values = corner.split("/")
        for place, total in zip(range(len(values)), (v, vt, vn)):
            if values[place].startswith("-"):
                index = total + int(values[place]) + 1
                if index < 1:
                    raise ValueError(f"a face refers to number {values[place]} of {total}")
                values[place] = str(index)
        corners.append("/".join(values))
    return " ".join(corners)


def _parts(
    source: Source,
    shape: _Shape,
    vertices: np.ndarray,
    colours: np.ndarray | None,
    uv: np.ndarray,
    normals: np.ndarray,
    materials: dict[str, _Material],
) -> list[trimesh.Trimesh]:
    groups: dict[tuple[int, str], list[str]] = {}
    for line in shape.lines:
        first = line.split(None, 1)[0] if line.strip() else ""
        form = "/" * first.count("/") if "//" not in first else "//n"
        groups.setdefault((len(line.split()), form), []).append(line)
    corners, sizes = [], []
    for (count, form), lines in groups.items():
        if count < 3:
            continue
        columns = {"": 1, "/": 2, "//": 3, "//n": 2}[form]
        text = " ".join(lines).replace("//", " ").replace("/", " ")
        values = np.array(text.split(), np.int64)
        if len(values) != count * columns * len(lines):
            raise ValueError("it has faces whose corners differ in form")
        values = values.reshape(-1, columns) - 1
        full = np.full((len(values), 3), -1)
        full[:, {"": [0], "/": [0, 1], "//": [0, 1, 2], "//n": [0, 2]}[form]] = values
        corners.append(full)
        sizes.append(np.full(len(lines), count))
    if not corners:
        return []
    corner, size = np.concatenate(corners), np.concatenate(sizes)
    _, _, places = split(vertices, size, corner[:, 0])
    corner = corner[places.ravel()]
    for column, what, total in ((1, "texture coordinate", len(uv)), (2, "normal", len(normals))):
        if corner[:, column].max(initial=-1) >= total:
            if total:
                raise ValueError(f"a face refers to {what} {corner[:, column].max() + 1} of {total}")
            corner[:, column] = -1
    # One vertex per combination of position, texture coordinate and normal.
    key = (corner[:, 0] * (len(uv) + 1) + corner[:, 1] + 1) * (len(normals) + 1) + corner[:, 2] + 1
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    chosen = corner[first]
    look = _look(source, shape.material, materials, colours is not None, bool((chosen[:, 1] >= 0).all()))
    if look.pop("by_vertex", False):
        look["vertex_colours"] = colours[chosen[:, 0]]
    if "image" in look:
        statement = look.pop("statement")
        look["uv"] = uv[chosen[:, 1]] * statement.scale + statement.offset
    return [
        make_part(
            vertices[chosen[:, 0]],
            inverse.reshape(-1, 3),
            normals=normals[chosen[:, 2]] if (chosen[:, 2] >= 0).all() and len(normals) else None,
            **look,
        )
    ]


def _look(
    source: Source, name: str | None, materials: dict[str, _Material], coloured: bool, mapped: bool
) -> dict[str, object]:
    """Arguments of `make_part`; ``by_vertex`` stands for the colours of vertices."""
    plain: dict[str, object] = {"by_vertex": True} if coloured else {}
    if name is None:
        return plain
    material = materials.get(name)
    if material is None:
        if not coloured:
            source.warn(f"material '{name}' is in no material file: what has it is shown in plain grey")
        return plain
    if material.opacity < 0.98:
        source.warn(f"material '{name}' is transparent: it is shown opaque")
    for unread in material.unread:
        source.warn(f"material '{name}': {unread} isn't shown")
    if not coloured and material.colour is not None:
        plain = {"colour": material.colour}
    statement = material.texture
    if statement is None:
        return plain
    instead = "in its vertex colours" if coloured else said(material.colour)
    image = source.picture(statement.name, instead)
    if image is None:
        return plain
    if not mapped:
        source.warn(
            f"material '{name}' has the texture {statement.name}, but its faces have no texture "
            f"coordinates: they are shown {instead}"
        )
        return plain
    if coloured:
        source.warn(f"material '{name}' has a texture and vertex colours: the texture is shown")
    for option in statement.ignored:
        source.warn(f"option {option} of the texture {statement.name} isn't applied")
    image = _adjusted(image, statement, material.colour)
    wrap = (_CLAMP_TO_EDGE, _CLAMP_TO_EDGE) if statement.clamp else None
    return {"image": image, "statement": statement, "wrap": wrap}


def _adjusted(image: Image.Image, statement: TextureStatement, colour: np.ndarray | None) -> Image.Image:
    """The picture with ``-mm base gain``, and with a tint: of Kd, beside a texture, only that counts, because
    exporters write their default grey there, or black."""
    tint = np.ones(3)
    if colour is not None and colour.max() > 0:
        tint = colour / colour.max()
    if statement.base == 0.0 and statement.gain == 1.0 and np.allclose(tint, 1.0):
        return image
    pixels = (statement.base + statement.gain * np.asarray(image) / 255.0) * tint
    return Image.fromarray(np.round(255.0 * np.clip(pixels, 0.0, 1.0)).astype(np.uint8))


def _materials(source: Source, libraries: list[str]) -> dict[str, _Material]:
    materials: dict[str, _Material] = {}
    for path in library_files(source.path.parent, libraries):
        if not path.is_file():
            source.warn(f"it refers to {shown(path)}, which does not exist: its colours are missing")
            continue
        material = _Material()
        for line in decode_text(path.read_bytes()).split("\n"):
            words = line.split("#", 1)[0].strip().split(None, 1)
            if len(words) < 2:
                continue
            key, rest = words[0].lower(), words[1].strip()
            if key == "newmtl":
                material = materials[rest] = _Material()
            elif key == "kd":
                material.colour = _colour(rest, material)
            elif key == "map_kd":
                material.texture = texture_statement(rest, path.parent)
            elif key in ("d", "tr"):
                value = rest.split()[-1]
                number = float(value) if re.fullmatch(r"[-+.\deE]+", value) else 1.0
                material.opacity = number if key == "d" else 1.0 - number
            elif key == "map_d":
                material.unread.append("the transparency map_d")
            elif key == "map_ke":
                material.unread.append("the emissive texture map_Ke")
        for one in materials.values():
            if one.texture is not None:
                # A texture lies beside its material file.
                found = find_file(path.parent, one.texture.name)
                one.texture.name = str(found.absolute()) if found.is_file() else one.texture.name
    return materials


def _colour(text: str, material: _Material) -> np.ndarray | None:
    try:
        values = np.array(text.split()[:3], np.float64)
    except ValueError:
        material.unread.append(f"its colour '{text}'")
        return None
    values = np.repeat(values, 3) if len(values) == 1 else values
    return unit_range(values[None])[0] if len(values) == 3 else None


def library_files(folder: Path, libraries: list[str]) -> list[Path]:
    """The files that ``mtllib`` lines mean: one name with spaces, or several names."""
    files = []
    for text in libraries:
        whole = find_file(folder, text)
        names = [text] if whole.is_file() or len(text.split()) == 1 else text.split()
        if len(names) > 1 and not any(find_file(folder, name).is_file() for name in names):
            names = [text]
        files += [find_file(folder, name) for name in names]
    return files


def texture_statement(text: str, folder: Path) -> TextureStatement:
    """What stands after ``map_Kd``: options, and a name that may have spaces."""
    statement = TextureStatement("")
    words = text.split()
    while words and words[0].startswith("-") and not find_file(folder, " ".join(words)).is_file():
        option = words.pop(0).lower()
        if option in ("-o", "-s", "-t"):
            values = []
            while (
                words and len(values) < 3 and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", words[0])
            ):
                values.append(float(words.pop(0)))
            pair = np.array((values + [0.0 if option != "-s" else 1.0] * 2)[:2])
            if option == "-o":
                statement.offset = pair
            elif option == "-s":
                statement.scale = pair
            elif any(values):
                statement.ignored.append("-t")
        elif option == "-mm":
            statement.base, statement.gain = (float(value) for value in words[:2])
            del words[:2]
        else:
            values = words[: _OPTION_VALUES.get(option, 0)]
            del words[: len(values)]
            if option == "-clamp":
                statement.clamp = values[:1] == ["on"]
            elif option not in _OPTION_VALUES:
                statement.ignored.append(option)
    name = " ".join(words)
    if name.startswith('"'):
        name = shlex.split(name)[0] if name.count('"') == 2 else name.strip('"')
    statement.name = name
    return statement
