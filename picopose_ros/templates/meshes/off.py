"""OFF with any prefix: colours of vertices and of faces, texture coordinates and normals passed over."""

from __future__ import annotations

import re

import numpy as np
import trimesh

from picopose_ros.templates.meshes.colours import unit_range
from picopose_ros.templates.meshes.obj import decode_text
from picopose_ros.templates.meshes.parts import Source, make_part
from picopose_ros.templates.meshes.polygons import split

_HEADER = re.compile(r"(ST)?(C)?(N)?(4)?(n)?OFF(?:\s+BINARY)?", re.IGNORECASE)


def read(source: Source) -> list[trimesh.Trimesh]:
    """The one part of the file.

    Raises:
        ValueError: it isn't OFF, or numbers are missing or broken.
    """
    data = source.path.read_bytes()
    if re.match(rb"\s*\w*OFF\s+BINARY", data):
        raise ValueError("it is binary OFF, which isn't read; export it as PLY")
    lines = [line.split("#", 1)[0].split() for line in decode_text(data).split("\n")]
    lines = [line for line in lines if line]
    header = _HEADER.fullmatch(lines[0][0]) if lines else None
    if header is None:
        raise ValueError("it does not begin with OFF")
    mapped, coloured, normals, four, _ = (bool(group) for group in header.groups())
    if four or header.group(5):
        raise ValueError("its vertices have four coordinates or more; export it as PLY")
    counts = lines[0][1:] or lines[1]
    start = 1 if lines[0][1:] else 2
    vertex_count, face_count = int(counts[0]), int(counts[1])
    rows, polygons = lines[start : start + vertex_count], lines[start + vertex_count :][:face_count]
    if len(rows) < vertex_count or len(polygons) < face_count:
        raise ValueError("it is cut short")
    width = 3 + 3 * normals
    vertices = np.array([row[:3] for row in rows], np.float64)
    vertex_normals = np.array([row[3:6] for row in rows], np.float64) if normals else None
    # Some write colours without saying so: three or four numbers more than it takes.
    extra = [row[width : len(row) - 2 * mapped] for row in rows]
    vertex_colours = _colours([row[:4] for row in extra], not coloured and not mapped) if extra else None
    if coloured and vertex_colours is None:
        source.warn("its vertex colours can't be read: it is shown in plain grey")

    sizes = np.array([int(row[0]) for row in polygons], np.int64)
    if any(len(row) <= size for row, size in zip(polygons, sizes)):
        raise ValueError("it has a face with missing corners")
    flat = np.array([index for row, size in zip(polygons, sizes) for index in row[1 : 1 + size]], np.int64)
    faces, owners, _ = split(vertices, sizes, flat)
    face_colours = None
    after = [row[1 + size :] for row, size in zip(polygons, sizes)]
    if any(after):
        face_colours = _colours(after, True)
        if face_colours is None:
            source.warn(
                "the colours of its faces can't be read (maybe numbers of a colour map): it is shown without"
            )
        else:
            face_colours = face_colours[owners]
    if vertex_colours is not None and face_colours is not None:
        source.warn("it has colours of vertices and of faces: those of the faces are shown")
        vertex_colours = None
    return [
        make_part(vertices, faces, vertex_normals, vertex_colours=vertex_colours, face_colours=face_colours)
    ]


def _colours(rows: list[list[str]], uneven: bool) -> np.ndarray | None:
    """(n, 3) 0..1 of rows of three or four numbers; None if they are something else.

    Args:
        uneven: rows without a colour are grey, if others have one.
    """
    sizes = {len(row) for row in rows}
    if not sizes <= ({0, 3, 4} if uneven else {3, 4}) or sizes == {0}:
        return None
    floats = any("." in value or "e" in value.lower() for row in rows for value in row[:3])
    try:
        values = np.array([row[:3] or ["nan"] * 3 for row in rows], np.float64)
    except ValueError:
        return None
    values = unit_range(values) if floats else np.clip(values / 255.0, 0.0, 1.0)
    missing = np.array([not row for row in rows])
    values[missing] = 0.6
    return values
