"""What the readers of all formats share: the parts they make, the pictures and the warnings of one file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from trimesh.visual.material import SimpleMaterial

from picopose_ros.templates.meshes.colours import to_bytes
from picopose_ros.templates.meshes.textures import TextureError, decode, find_file
from picopose_ros.templates.renderer import SMOOTH_NORMALS, TINT, WRAP


def shown(path: Path | str) -> str:
    """A path or name as text that can be printed: bytes that are no UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Source:
    """One mesh file while it is read: its bytes, the pictures it names, and what is to be said about it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warnings: list[str] = []
        self._pictures: dict[str, Image.Image | None] = {}

    def warn(self, what: str) -> None:
        """Say something about the file, once."""
        text = f"{shown(self.path)}: {what}"
        if text not in self.warnings:
            self.warnings.append(text)

    def file(self, name: str, uri: bool = False) -> bytes:
        """The content of a file that the mesh needs.

        Raises:
            ValueError: it is missing or can't be read.
        """
        path = find_file(self.path.parent, name, uri)
        try:
            return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"it needs '{shown(path)}', which can't be read ({reason})") from error

    def picture(self, name: str, instead: str, uri: bool = False) -> Image.Image | None:
        """The picture of a name, 8-bit RGB; None, and a warning, if it can't be had.

        Args:
            name: as the mesh file says it. uri: it is percent-encoded.
            instead: what the object looks like without it.
        """
        if name not in self._pictures:
            path = find_file(self.path.parent, name, uri)
            if not path.is_file():
                self.warn(
                    f"texture {shown(path)} does not exist: its colours are missing, and what has it is "
                    f"shown {instead}"
                )
                self._pictures[name] = None
            else:
                try:
                    data = path.read_bytes()
                except OSError as error:
                    self.warn(f"texture {shown(path)} can't be read ({error.strerror}): {instead}")
                    self._pictures[name] = None
                else:
                    self._pictures[name] = self.decoded(data, shown(path), instead)
        return self._pictures[name]

    def decoded(self, data: bytes, name: str, instead: str) -> Image.Image | None:
        """The picture of bytes, 8-bit RGB; None, and a warning, if it can't be read."""
        try:
            image, transparent = decode(data)
        except TextureError as error:
            self.warn(f"texture {name} {error}: what has it is shown {instead}")
            return None
        if transparent:
            self.warn(f"texture {name} is transparent in part: it is shown opaque")
        return image


def said(colour: np.ndarray | None) -> str:
    """How a warning speaks of an sRGB colour (3,) 0..1; None for the neutral grey."""
    if colour is None:
        return "in plain grey"
    return "in the plain colour ({}, {}, {})".format(*to_bytes(colour)[:3])


def make_part(
    vertices: np.ndarray,
    faces: np.ndarray,
    normals: np.ndarray | None = None,
    uv: np.ndarray | None = None,
    image: Image.Image | None = None,
    colour: np.ndarray | None = None,
    vertex_colours: np.ndarray | None = None,
    face_colours: np.ndarray | None = None,
    wrap: tuple[int, int] | None = None,
) -> trimesh.Trimesh:
    """A part with its look. Without any it is grey.

    Args:
        vertices: (V, 3). faces: (F, 3) indices. normals: (V, 3), if the file has them.
        uv: (V, 2), origin bottom left; needed for ``image``, an RGB picture. wrap: OpenGL's names for what
            lies outside of it, in both directions.
        colour: (3,) sRGB 0..1 of all of it, where there is no picture.
        vertex_colours: (V, 3) sRGB 0..1; beside a picture they are multiplied with it.
        face_colours: (F, 3) sRGB 0..1.

    Raises:
        ValueError: a face refers to a vertex that isn't there, or an array is of another length.
    """
    vertices = np.asarray(vertices, np.float64).reshape(-1, 3)
    faces = np.asarray(faces, np.int64).reshape(-1, 3)
    bad = np.flatnonzero((faces < 0).any(axis=1) | (faces >= len(vertices)).any(axis=1))
    if len(bad):
        raise ValueError(
            f"face {bad[0]} refers to vertex {faces[bad[0]].max()}, but there are {len(vertices)} vertices"
        )
    for name, array, count in (
        ("normals", normals, len(vertices)),
        ("texture coordinates", uv, len(vertices)),
        ("vertex colours", vertex_colours, len(vertices)),
        ("face colours", face_colours, len(faces)),
    ):
        if array is not None and len(array) != count:
            raise ValueError(f"there are {len(array)} {name}, but it takes {count}")

    used = np.zeros(len(vertices), bool)
    used[faces] = True
    if not used.all():
        index = np.cumsum(used) - 1
        faces, vertices = index[faces], vertices[used]
        normals, uv, vertex_colours = (
            None if array is None else np.asarray(array)[used] for array in (normals, uv, vertex_colours)
        )
    smooth = normals is not None and bool(np.isfinite(normals).all()) and bool(np.any(normals))
    part = trimesh.Trimesh(
        vertices=vertices,
        faces=faces,
        vertex_normals=np.asarray(normals, np.float64) if smooth else None,
        process=False,
        validate=False,
    )
    part.metadata[SMOOTH_NORMALS] = smooth
    if image is not None and uv is not None:
        part.visual = trimesh.visual.TextureVisuals(uv=np.asarray(uv), material=SimpleMaterial(image=image))
        if wrap is not None:
            part.metadata[WRAP] = wrap
        if vertex_colours is not None:
            part.vertex_attributes[TINT] = np.asarray(vertex_colours, np.float64)
    elif vertex_colours is not None:
        part.visual = trimesh.visual.ColorVisuals(part, vertex_colors=_opaque(vertex_colours))
    elif face_colours is not None:
        part.visual = trimesh.visual.ColorVisuals(part, face_colors=_opaque(face_colours))
    elif colour is not None:
        material = SimpleMaterial(diffuse=_opaque(np.asarray(colour)[None])[0])
        part.visual = trimesh.visual.TextureVisuals(material=material)
    return part


def _opaque(colours: np.ndarray) -> np.ndarray:
    colours = to_bytes(np.asarray(colours)[:, :3])
    return np.concatenate([colours, np.full((len(colours), 1), 255, np.uint8)], axis=1)
