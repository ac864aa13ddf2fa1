"""Meshes: which objects a directory holds, and each of them in metres with its look.

One module per concern: `discovery` (directories, ``objects.yaml``), `load` (a file as a mesh), one reader per
format (`gltf`, `obj`, `ply`, `stl`, `off`, `dae`) over `parts` and `textures`, `references` (which files
belong to a mesh), `units` and `diameter`.
"""

from picopose_ros.templates.meshes.discovery import (
    MESH_SUFFIXES,
    MODELS_INFO_FILE,
    OBJECTS_FILE,
    discover_objects,
    resolve_path,
)
from picopose_ros.templates.meshes.load import load_object, unit_advice
from picopose_ros.templates.meshes.objects import ObjectMesh, ObjectSpec, Symmetries
from picopose_ros.templates.meshes.parts import shown
from picopose_ros.templates.meshes.references import mesh_digest, referenced_files
from picopose_ros.templates.meshes.units import (
    UNITS,
    USUAL_DIAMETER,
    collada_unit,
    metres_per_unit,
    stated_unit,
)

__all__ = [
    "MESH_SUFFIXES",
    "MODELS_INFO_FILE",
    "OBJECTS_FILE",
    "UNITS",
    "USUAL_DIAMETER",
    "ObjectMesh",
    "ObjectSpec",
    "Symmetries",
    "collada_unit",
    "discover_objects",
    "load_object",
    "mesh_digest",
    "metres_per_unit",
    "referenced_files",
    "resolve_path",
    "shown",
    "stated_unit",
    "unit_advice",
]
