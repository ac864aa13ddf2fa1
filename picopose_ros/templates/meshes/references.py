"""The files that a mesh file names: materials, textures, buffers; and a digest over all of them."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from picopose_ros.errors import MeshError
from picopose_ros.templates.meshes import dae, gltf, ply
from picopose_ros.templates.meshes.obj import decode_text, library_files, texture_statement
from picopose_ros.templates.meshes.objects import ObjectSpec
from picopose_ros.templates.meshes.parts import shown
from picopose_ros.templates.meshes.textures import find_file


def mesh_digest(spec: ObjectSpec) -> str:
    """sha256 (hex) over the mesh file and every file it refers to: materials, textures, buffers.

    Raises:
        MeshError: the mesh file cannot be read.
    """
    digest = hashlib.sha256()
    for path in (spec.path, *referenced_files(spec.path)):
        digest.update(os.fsencode(path.name) + b"\0")
        if path == spec.path or path.is_file():
            digest.update(hashlib.sha256(_read_bytes(path)).digest())
    return digest.hexdigest()


def referenced_files(path: Path) -> list[Path]:
    """Files that a mesh file names, whether they exist or not: materials, textures, buffers. Sorted.

    Raises:
        MeshError: the mesh file cannot be read.
    """
    suffix, data = path.suffix.lower(), _read_bytes(path)
    files: set[Path] = set()
    if suffix == ".obj":
        lines = re.findall(rb"^[ \t]*mtllib[ \t]+(.+?)\s*$", data, flags=re.MULTILINE)
        for library in library_files(path.parent, [decode_text(line) for line in lines]):
            files.add(library)
            if library.is_file():
                pattern = r"(?m)^\s*(?:map_\w+|bump|disp|decal|refl)\s+(.+?)\s*$"
                for statement in re.findall(pattern, decode_text(_read_bytes(library))):
                    name = texture_statement(statement, library.parent).name
                    if name:
                        files.add(find_file(library.parent, name))
    elif suffix == ".ply":
        files = {find_file(path.parent, name) for name in ply.texture_names(data)}
    elif suffix == ".dae":
        files = {find_file(path.parent, name, uri=True) for name in dae.named_files(data)}
    elif suffix in (".gltf", ".glb"):
        try:
            files = {find_file(path.parent, name, uri=True) for name in gltf.named_files(path)}
        except (ValueError, AttributeError, TypeError) as error:
            raise MeshError(f"mesh {shown(path)} is not valid glTF ({error}); export it again") from error
    return sorted(files)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MeshError(f"{shown(path)} cannot be read: {error.strerror}") from error
