"""PLY, ASCII and binary: colours under all usual names and in all types, several textures, any polygons.

trimesh's reader knows colours called red, green and blue alone, and the last of several textures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import trimesh

from picopose_ros.templates.meshes.colours import unit_range
from picopose_ros.templates.meshes.obj import decode_text
from picopose_ros.templates.meshes.parts import Source, make_part
from picopose_ros.templates.meshes.polygons import split

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8", "int64": "i8", "uint64": "u8", "long": "i8",
}  # fmt: skip
_COLOURS = (
    ("red", "green", "blue"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
    ("r", "g", "b"),
    ("f_dc_0", "f_dc_1", "f_dc_2"),
)
_COORDINATES = (
    ("texture_u", "texture_v"),
    ("u", "v"),
    ("s", "t"),
    ("texture_s", "texture_t"),
    ("tu", "tv"),
    ("texcoord_u", "texcoord_v"),
)
_INDICES = ("vertex_indices", "vertex_index", "vertices", "indices")


@dataclass
class _Element:
    """Values of one element: numbers (n,) by name, lists as their sizes (n,) and all values in a row."""

    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Name, type, and for a list the type of its length."""
    values: dict[str, np.ndarray] = field(default_factory=dict)
    lists: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def columns(self, names: tuple[str, ...]) -> np.ndarray | None:
        if not all(name in self.values for name in names):
            return None
        kinds = {self.values[name].dtype for name in names}
        stacked = np.stack([self.values[name] for name in names], axis=1)
        return stacked if len(kinds) == 1 else stacked.astype(np.float64)


def read(source: Source) -> list[trimesh.Trimesh]:
    """One part, or one per texture.

    Raises:
        ValueError: it isn't PLY, is cut short, or a face refers to a vertex that isn't there.
    """
    elements, textures = _elements(source.path.read_bytes())
    vertex = elements.get("vertex", _Element(0))
    vertices = vertex.columns(("x", "y", "z"))
    if vertices is None:
        raise ValueError("it has no vertices with x, y and z")
    vertices = vertices.astype(np.float64)
    sizes, flat, face = _polygons(elements)
    faces, owners, places = split(vertices, sizes, flat)
    if not len(faces):
        return []
    normals = vertex.columns(("nx", "ny", "nz"))
    look = _colours(source, vertex, face, owners)
    parts = []
    rest = np.ones(len(faces), bool)
    for chosen, uv, name in _mapped(source, vertex, face, sizes, faces, owners, places, textures, bool(look)):
        image = source.picture(name, "in its vertex colours" if look else "in plain grey")
        if image is None:
            continue
        corners = faces[chosen].ravel()
        parts.append(
            make_part(
                vertices[corners],
                np.arange(len(corners)).reshape(-1, 3),
                normals=None if normals is None else normals[corners],
                uv=uv.reshape(-1, 2),
                image=image,
            )
        )
        rest &= ~chosen
    if rest.any():
        if "face_colours" in look:
            look["face_colours"] = look["face_colours"][rest]
        parts.append(make_part(vertices, faces[rest], normals=normals, **look))
    return parts


def texture_names(data: bytes) -> list[str]:
    """Pictures that the comments of a file name."""
    head = data.split(b"end_header", 1)[0]
    found = re.findall(r"(?im)^comment\s+texturefile\s+(.+?)\s*$", decode_text(head))
    return list(dict.fromkeys(found))


def _elements(data: bytes) -> tuple[dict[str, _Element], list[str]]:
    match = re.search(rb"end_header[ \t]*(\r\n|\n|\r)", data[: 1 << 20])
    if not re.match(rb"\s*ply\s", data) or match is None:
        raise ValueError("it does not begin with a PLY header")
    elements: dict[str, _Element] = {}
    kind, element = "", None
    for line in decode_text(data[: match.start()]).split("\n"):
        words = line.split()
        if words[:1] == ["format"]:
            kind = words[1].lower()
        elif words[:1] == ["element"]:
            element = elements[words[1].lower()] = _Element(int(words[2]))
        elif words[:1] == ["property"] and element is not None:
            if words[1] == "list":
                element.properties.append((words[4].lower(), _TYPES[words[3]], _TYPES[words[2]]))
            else:
                element.properties.append((words[2].lower(), _TYPES[words[1]], None))
    body = data[match.end() :]
    if kind == "ascii":
        tokens, position = body.split(), 0
        for element in elements.values():
            position = _read_ascii(element, tokens, position)
    elif kind in ("binary_little_endian", "binary_big_endian"):
        position = 0
        for element in elements.values():
            position = _read_binary(element, body, position, "<" if "little" in kind else ">")
    else:
        raise ValueError(f"its format is '{kind}'")
    return elements, texture_names(data)


def _read_ascii(element: _Element, tokens: list[bytes], position: int) -> int:
    if not element.count:
        return position
    widths = []
    if any(length for _, _, length in element.properties):
        rows = []
        for _ in range(element.count):
            row, sizes = [], []
            for _, _, length in element.properties:
                size = 1
                if length:
                    size = int(tokens[position])
                    position += 1
                row.append(tokens[position : position + size])
                sizes.append(size)
                position += size
            rows.append(row)
            widths.append(sizes)
        for index, (name, dtype, length) in enumerate(element.properties):
            values = np.array([value for row in rows for value in row[index]], np.float64).astype(dtype)
            sizes = np.array([row[index] for row in widths], np.int64)
            if len(values) != sizes.sum():
                raise ValueError("it is cut short")
            if length:
                element.lists[name] = (sizes, values)
            else:
                element.values[name] = values
        return position
    width = len(element.properties)
    block = tokens[position : position + width * element.count]
    if len(block) < width * element.count:
        raise ValueError("it is cut short")
    table = np.array(block).reshape(element.count, width).astype(np.float64)
    for column, (name, dtype, _) in enumerate(element.properties):
        element.values[name] = table[:, column].astype(dtype)
    return position + width * element.count


def _read_binary(element: _Element, body: bytes, position: int, order: str) -> int:
    if not element.count or not element.properties:
        return position
    sizes = [1] * len(element.properties)
    fields, offset = [], position
    for index, (_, dtype, length) in enumerate(element.properties):
        if length:
            head = np.dtype(order + length)
            if offset + head.itemsize > len(body):
                raise ValueError("it is cut short")
            sizes[index] = int(np.frombuffer(body, head, 1, offset)[0])
            fields.append((f"n{index}", head))
            offset += head.itemsize
        fields.append((f"p{index}", np.dtype(order + dtype), (sizes[index],)))
        offset += sizes[index] * np.dtype(dtype).itemsize
    record = np.dtype(fields)
    if position + record.itemsize * element.count <= len(body):
        table = np.frombuffer(body, record, element.count, position)
        even = all(
            (table[f"n{index}"] == sizes[index]).all()
            for index, (_, _, length) in enumerate(element.properties)
            if length
        )
        if even:
            for index, (name, _, length) in enumerate(element.properties):
                values = table[f"p{index}"]
                if length:
                    element.lists[name] = (np.full(element.count, sizes[index], np.int64), values.ravel())
                else:
                    element.values[name] = values[:, 0]
            return position + record.itemsize * element.count
    return _read_uneven(element, body, position, order)


def _read_uneven(element: _Element, body: bytes, position: int, order: str) -> int:
    """Records of different lengths, one after another."""
    kinds = [
        (np.dtype(order + dtype), np.dtype(order + length) if length else None)
        for _, dtype, length in element.properties
    ]
    columns: list[list[np.ndarray]] = [[] for _ in kinds]
    for _ in range(element.count):
        for column, (dtype, length) in zip(columns, kinds):
            size = 1
            if length is not None:
                if position + length.itemsize > len(body):
                    raise ValueError("it is cut short")
                size = int(np.frombuffer(body, length, 1, position)[0])
                position += length.itemsize
            if size < 0 or position + size * dtype.itemsize > len(body):
                raise ValueError("it is cut short")
            column.append(np.frombuffer(body, dtype, size, position))
            position += size * dtype.itemsize
    for column, (name, _, length) in zip(columns, element.properties):
        values = np.concatenate(column)
        if length:
            element.lists[name] = (np.array([len(one) for one in column], np.int64), values)
        else:
            element.values[name] = values
    return position


def _polygons(elements: dict[str, _Element]) -> tuple[np.ndarray, np.ndarray, _Element]:
    """Sizes (P,) and indices of all polygons, and the element that holds more about them."""
    face = elements.get("face", _Element(0))
    for name in _INDICES:
        if name in face.lists:
            sizes, flat = face.lists[name]
            return sizes, flat.astype(np.int64), face
    strips = elements.get("tristrips")
    if strips is not None and strips.lists:
        _, flat = next(iter(strips.lists.values()))
        triangles, run = [], []
        for index in (*flat.tolist(), -1):
            if index < 0:
                run = []
                continue
            run.append(index)
            if len(run) >= 3:
                a, b, c = run[-3:]
                triangles.append((a, b, c) if len(run) % 2 else (b, a, c))
        flat = np.array([one for one in triangles if len(set(one)) == 3], np.int64).ravel()
        return np.full(len(flat) // 3, 3, np.int64), flat, _Element(len(flat) // 3)
    return np.zeros(0, np.int64), np.zeros(0, np.int64), face


def _colours(source: Source, vertex: _Element, face: _Element, owners: np.ndarray) -> dict[str, np.ndarray]:
    """Arguments of `make_part`."""
    found = {}
    for element, key in ((vertex, "vertex_colours"), (face, "face_colours")):
        for names in _COLOURS[:3]:
            colours = element.columns(names)
            if colours is not None:
                if (
                    colours.dtype.itemsize > 1
                    and colours.dtype.kind in "ui"
                    and colours.max(initial=0) <= 255
                ):
                    colours = colours.astype(np.float64) / 255.0  # bytes in a larger type
                found[key] = unit_range(colours)
                break
        else:
            said = [name for name in element.values if re.search(r"red|colou?r|f_dc_0|rgb", name)]
            if said:
                source.warn(
                    f"it has the property {said[0]}, which isn't known as a colour: it is shown without"
                )
        alpha = element.values.get("alpha")
        if alpha is not None and len(alpha) and key in found and unit_range(alpha[:, None]).min() < 0.98:
            source.warn("its colours are transparent in part: they are shown opaque")
    if len(found) == 2:
        even = {key: np.ptp(colours, axis=0).max() < 0.01 for key, colours in found.items()}
        if not any(even.values()):
            source.warn("it has colours of vertices and of faces: those of the vertices are shown")
        del found["face_colours" if even["face_colours"] or not even["vertex_colours"] else "vertex_colours"]
    if "face_colours" in found:
        found["face_colours"] = found["face_colours"][owners]
    return found


def _mapped(
    source: Source,
    vertex: _Element,
    face: _Element,
    sizes: np.ndarray,
    faces: np.ndarray,
    owners: np.ndarray,
    places: np.ndarray,
    textures: list[str],
    coloured: bool,
) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Which faces (F,) have a texture, their coordinates (n, 3, 2), and its name."""
    uv = None
    for names in _COORDINATES:
        columns = vertex.columns(names)
        if columns is not None:
            uv = columns.astype(np.float64)[faces]
            break
    if "texcoord" in face.lists:
        counts, flat = face.lists["texcoord"]
        if (counts == 2 * sizes).all():
            uv = flat.reshape(-1, 2).astype(np.float64)[places]
        elif textures:
            source.warn("its texture coordinates don't fit its faces: its texture isn't shown")
            return []
    if not textures:
        return []
    if uv is None:
        how = "in its vertex colours" if coloured else "in plain grey"
        source.warn(f"it names the texture {textures[0]}, but has no texture coordinates: it is shown {how}")
        return []
    numbers = face.values.get("texnumber")
    if len(textures) == 1 or numbers is None:
        if len(textures) > 1:
            source.warn(
                f"it names {len(textures)} textures, but not which face has which: {textures[0]} is shown"
            )
        return [(np.ones(len(faces), bool), uv, textures[0])]
    numbers = numbers[owners]
    result = []
    for number, name in enumerate(textures):
        chosen = numbers == number
        if chosen.any():
            result.append((chosen, uv[chosen], name))
    return result
