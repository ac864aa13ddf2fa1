"""A mesh file as a mesh in metres, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import trimesh

from picopose_ros.errors import MeshError
from picopose_ros.templates.meshes import dae, gltf, obj, off, ply, stl
from picopose_ros.templates.meshes.discovery import OBJECTS_FILE
from picopose_ros.templates.meshes.objects import ObjectMesh, ObjectSpec
from picopose_ros.templates.meshes.parts import Source, shown
from picopose_ros.templates.meshes.units import (
    UNITS,
    USUAL_DIAMETER,
    fitting_units,
    metres_per_unit,
    stated_unit,
)

_READERS: dict[str, Callable[[Source], list[trimesh.Trimesh]]] = {
    ".ply": ply.read,
    ".obj": obj.read,
    ".stl": stl.read,
    ".glb": gltf.read,
    ".gltf": gltf.read,
    ".dae": dae.read,
    ".off": off.read,
}


def load_object(spec: ObjectSpec) -> ObjectMesh:
    """Read a mesh and bring it to metres.

    Scenes become a list of parts with their transforms applied; vertex colours, face colours, materials and
    textures stay with their part. What a file names of its look and can't be shown becomes a warning that
    says what the object looks like now; what would misplace its shape is refused.

    Raises:
        MeshError: the file cannot be read, has no faces or no extent, or a coordinate is not finite.
    """
    path = spec.path
    if not path.is_file():
        raise MeshError(f"mesh {shown(path)} does not exist")
    source = Source(path)
    kind = path.suffix[1:].lower()
    try:
        with path.open("rb") as file:
            if file.read(23) == b"version https://git-lfs":
                raise ValueError("it is a Git LFS pointer, not the mesh (run: git lfs pull)")
        parts = [part for part in _READERS[path.suffix.lower()](source) if len(part.faces)]
    except Exception as error:  # readers raise anything from KeyError to XML errors on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (KeyError, IndexError, TypeError, AttributeError)):
            reason = f"{type(error).__name__}: {reason}"
        raise MeshError(f"mesh {shown(path)} cannot be read as {kind}: {reason}; export it again") from error
    if not parts:
        raise MeshError(
            f"mesh {shown(path)} has no faces; export it as a triangle mesh, not as points or curves"
        )
    if not all(np.isfinite(part.vertices).all() for part in parts):
        raise MeshError(
            f"mesh {shown(path)} has vertices that are not finite numbers; clean the mesh and export it again"
        )
    for part in parts:
        part.apply_scale(spec.metres_per_unit)
    mesh = ObjectMesh(spec, parts, source.warnings)
    if not 0.0 < mesh.diagonal < 1e9:
        raise MeshError(
            f"mesh {shown(path)} has an extent of {mesh.diagonal:g} m; its vertices are degenerate"
        )
    stated = stated_unit(path)
    if (
        path.suffix.lower() == ".dae"
        and stated is not None
        and metres_per_unit(stated) != spec.metres_per_unit
    ):
        source.warn(f"it states its unit as {stated}, but is read in {spec.unit}, as the settings have it")
    low, high = USUAL_DIAMETER
    if not low <= mesh.diameter <= high:
        mesh.warnings.append(f"{unit_advice(mesh)}: set it in {OBJECTS_FILE} or for the whole folder")
    return mesh


def unit_advice(mesh: ObjectMesh) -> str:
    """What is odd about the size of a mesh outside `USUAL_DIAMETER`, and the unit that would fit."""
    spec = mesh.spec
    raw = mesh.diameter / spec.metres_per_unit
    fitting = fitting_units(raw)
    said = (
        f"{shown(spec.path)}: read in {spec.unit}, object '{spec.class_id}' is {mesh.diameter:.3g} m across"
    )
    if not fitting:
        return f"{said}, and no unit ({', '.join(UNITS)}) makes it between 1 cm and 3 m"
    size = raw * UNITS[fitting[0]]
    return f"{said}; unit {fitting[0]} would make it {size:.3g} m"
