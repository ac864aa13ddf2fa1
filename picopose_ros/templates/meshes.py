"""Meshes: which objects a directory holds, and each of them in metres with its colours."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import trimesh
import yaml
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import cdist

from picopose_ros.errors import MeshError
from picopose_ros.templates.renderer import SMOOTH_NORMALS

MESH_SUFFIXES: tuple[str, ...] = (".ply", ".obj", ".stl", ".glb", ".gltf", ".dae", ".off")
"""File types that are read, lower case."""

UNITS: dict[str, float] = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254}
"""Metres per unit."""

USUAL_DIAMETER: tuple[float, float] = (0.01, 3.0)
"""An object outside this range (metres) is almost certainly in another unit than it was read in."""

OBJECTS_FILE = "objects.yaml"
MODELS_INFO_FILE = "models_info.json"


@dataclass(frozen=True, eq=False)
class Symmetries:
    """Motions that leave an object looking the same, in its own frame, in metres."""

    discrete: tuple[np.ndarray, ...] = ()
    """(4, 4) float64 transforms without the identity."""
    continuous: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    """Rotations by any angle: (axis (3,) unit vector, offset (3,) a point on the axis)."""

    def transforms(self, step_deg: float = 5.0) -> np.ndarray:
        """All symmetries (S, 4, 4) float64, identity first; continuous ones every ``step_deg`` degrees."""
        result = [np.eye(4), *self.discrete]
        for axis, offset in self.continuous:
            turns = []
            for angle in np.arange(0.0, 360.0, step_deg)[1:]:
                turn = trimesh.transformations.rotation_matrix(np.deg2rad(angle), axis, offset)
                turns.append(turn)
            result += [turn @ other for other in list(result) for turn in turns]
        return np.stack(result)


@dataclass(frozen=True)
class ObjectSpec:
    """One object of a mesh directory: where its mesh is and how to read it."""

    class_id: str
    """Name of the mesh file without suffix, or of the folder that holds it."""
    path: Path
    unit: str = "m"
    """Of the numbers in the file: a key of `UNITS`."""
    symmetries: Symmetries = field(default_factory=Symmetries, compare=False)
    frame_id: str | None = None
    """TF frame to publish; None: made from the class."""
    aliases: tuple[str, ...] = ()
    """Further class ids under which a segmenter may send this object."""


@dataclass(frozen=True, eq=False)
class ObjectMesh:
    """A mesh in metres, in the frame of its file."""

    spec: ObjectSpec
    parts: list[trimesh.Trimesh]
    """Its geometries, transforms applied; each with its own vertex colours, face colours or material."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong but can be used, one sentence each."""

    @cached_property
    def vertices(self) -> np.ndarray:
        """(V, 3) float64, all parts."""
        return np.concatenate([np.asarray(part.vertices, dtype=np.float64) for part in self.parts])

    @cached_property
    def faces(self) -> np.ndarray:
        """(F, 3) int64 indices into `vertices`."""
        starts = np.cumsum([0] + [len(part.vertices) for part in self.parts[:-1]])
        return np.concatenate([part.faces + start for part, start in zip(self.parts, starts, strict=True)])

    @cached_property
    def bounds(self) -> np.ndarray:
        """(2, 3) lowest and highest corner of the axis-aligned bounding box."""
        return np.stack([self.vertices.min(axis=0), self.vertices.max(axis=0)])

    @property
    def centre(self) -> np.ndarray:
        """(3,) centre of the bounding box."""
        return self.bounds.mean(axis=0)

    @property
    def extents(self) -> np.ndarray:
        """(3,) sides of the bounding box."""
        return self.bounds[1] - self.bounds[0]

    @property
    def diagonal(self) -> float:
        """Length of the bounding box's diagonal."""
        return float(np.linalg.norm(self.extents))

    @cached_property
    def diameter(self) -> float:
        """Largest distance between two vertices."""
        return _diameter(self.vertices)


def discover_objects(mesh_dir: str | Path, default_unit: str = "m") -> list[ObjectSpec]:
    """Find the objects of a mesh directory.

    Every mesh file is one object, named by the file, and so is every folder that holds one mesh file, named
    by the folder. A ``models_info.json`` beside them marks a BOP models folder: millimetres, symmetries, and
    the number as an alias (``obj_000005.ply`` is also "5"). An ``objects.yaml`` decides over it, per object::

        mug:
          unit: mm                        # m, cm, mm or in
          frame_id: mug_frame
          class_ids: [cup, "41"]          # further names that a segmenter may send
          symmetries:
            discrete: [[1, 0, 0, 0,  ...]]           # 4x4, row by row; lengths in the mesh's unit
            continuous: [{axis: [0, 0, 1], offset: [0, 0, 0]}]

    Args:
        mesh_dir: the directory.
        default_unit: unit of the meshes that nothing says more about.

    Returns:
        the objects by class id.

    Raises:
        MeshError: no such directory, no mesh in it, two meshes of one class, one name for two classes, or an
            ``objects.yaml`` or ``models_info.json`` that cannot be used.
    """
    mesh_dir = Path(mesh_dir)
    _check_unit(default_unit, "the unit")
    if not mesh_dir.is_dir():
        raise MeshError(f"mesh directory {mesh_dir} does not exist: give a folder with one mesh per object")
    found: dict[str, list[Path]] = {}
    for entry in sorted(mesh_dir.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found.setdefault(entry.name, []).extend(
                path for path in sorted(entry.iterdir()) if _is_mesh(path)
            )
        elif _is_mesh(entry):
            found.setdefault(entry.stem, []).append(entry)
    found = {class_id: paths for class_id, paths in found.items() if paths}
    if not found:
        kinds = " ".join(MESH_SUFFIXES)
        raise MeshError(f"mesh directory {mesh_dir} holds no mesh ({kinds}); put one per object in it")
    for class_id, paths in found.items():
        if len(paths) > 1:
            names = " and ".join(str(path) for path in paths)
            raise MeshError(
                f"object '{class_id}' has more than one mesh: {names}; keep one, move the others away"
            )

    infos = _read_models_info(mesh_dir / MODELS_INFO_FILE)
    settings = _read_objects_file(mesh_dir / OBJECTS_FILE, known=found)
    specs = []
    for class_id, (path,) in sorted(found.items()):
        options: dict[str, Any] = {"unit": default_unit}
        number = re.fullmatch(r"(?:.*_)?0*(\d+)", class_id)
        if number and number[1] in infos:
            info = infos[number[1]]
            options = {"unit": "mm", "aliases": (number[1],)}
            options["symmetries"] = _symmetries(
                info.get("symmetries_discrete"),
                info.get("symmetries_continuous"),
                "mm",
                mesh_dir / MODELS_INFO_FILE,
            )
        options |= _object_options(
            settings.get(class_id, {}), options["unit"], mesh_dir / OBJECTS_FILE, class_id
        )
        specs.append(ObjectSpec(class_id, path, **options))
    _check_names(specs)
    return specs


def load_object(spec: ObjectSpec) -> ObjectMesh:
    """Read a mesh and bring it to metres.

    Scenes become a list of parts with their transforms applied; vertex colours, face colours, materials and
    textures stay with their part.

    Raises:
        MeshError: the file cannot be read, has no faces or no extent, or a coordinate is not finite.
    """
    path = spec.path
    if not path.is_file():
        raise MeshError(f"mesh {path} does not exist")
    try:
        # No processing: it would drop non-finite vertices silently and merge vertices across texture seams.
        scene = trimesh.load_scene(path, process=False)
    except Exception as error:  # the readers raise anything from KeyError to XML errors
        reason = str(error).strip() or type(error).__name__
        raise MeshError(
            f"mesh {path} cannot be read as {path.suffix[1:]}: {reason}; export it again"
        ) from error

    parts = []
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces):
            smooth = "vertex_normals" in geometry._cache.cache  # of the file; nothing was computed yet
            part = geometry.copy()
            part.metadata[SMOOTH_NORMALS] = smooth
            part.remove_unreferenced_vertices()
            part.apply_transform(transform)
            part.apply_scale(UNITS[spec.unit])
            parts.append(part)
    if not parts:
        raise MeshError(f"mesh {path} has no faces; export it as a triangle mesh, not as points or curves")
    if not all(np.isfinite(part.vertices).all() for part in parts):
        raise MeshError(
            f"mesh {path} has vertices that are not finite numbers; clean the mesh and export it again"
        )
    _fix_colours(path, parts)

    mesh = ObjectMesh(spec, parts)
    if not 0.0 < mesh.diagonal < 1e9:
        raise MeshError(f"mesh {path} has an extent of {mesh.diagonal:g} m; its vertices are degenerate")
    for missing in (file for file in referenced_files(path) if not file.is_file()):
        mesh.warnings.append(f"{path} refers to {missing}, which does not exist: its colours are missing")
    low, high = USUAL_DIAMETER
    if not low <= mesh.diameter <= high:
        mesh.warnings.append(f"{unit_advice(mesh)}: set it in {OBJECTS_FILE} or for the whole folder")
    return mesh


def mesh_digest(spec: ObjectSpec) -> str:
    """sha256 (hex) over the mesh file and every file it refers to: materials, textures, buffers.

    Raises:
        MeshError: the mesh file cannot be read.
    """
    digest = hashlib.sha256()
    for path in (spec.path, *referenced_files(spec.path)):
        digest.update(path.name.encode() + b"\0")
        if path == spec.path or path.is_file():
            digest.update(hashlib.sha256(_read_bytes(path)).digest())
    return digest.hexdigest()


def referenced_files(path: Path) -> list[Path]:
    """Files that a mesh file names, whether they exist or not: materials, textures, buffers. Sorted.

    Raises:
        MeshError: the mesh file cannot be read.
    """
    suffix = path.suffix.lower()
    names: set[str] = set()
    if suffix == ".obj":
        for library in _matches(rb"^\s*mtllib\s+(.+?)\s*$", path):
            names.add(library)
            if (path.parent / library).is_file():
                # Options such as "-bm 1.0" come before the file name.
                for value in _matches(
                    rb"^\s*(?:map_\w+|bump|disp|decal|refl)\s+(.+?)\s*$", path.parent / library
                ):
                    names.add(value if (path.parent / value).is_file() else value.split()[-1])
    elif suffix == ".ply":
        header = _read_bytes(path).split(b"end_header", 1)[0]
        names.update(_find(rb"(?i)^comment\s+texturefile\s+(.+?)\s*$", header))
    elif suffix == ".dae":
        names.update(_matches(rb"<init_from>\s*(?:<ref>)?\s*([^<]+?)\s*<", path))
        # Inside an effect the same tag names an image of the document, not a file.
        names = {name.removeprefix("file://") for name in names if Path(name).suffix}
    elif suffix == ".gltf":
        try:
            tree = json.loads(_read_bytes(path))
            entries = [*tree.get("buffers", ()), *tree.get("images", ())]
            names.update(
                uri for entry in entries if not (uri := entry.get("uri", "data:")).startswith("data:")
            )
        except (ValueError, AttributeError) as error:
            raise MeshError(f"mesh {path} is not valid glTF ({error}); export it again") from error
    if suffix in (".dae", ".gltf"):
        names = {unquote(name) for name in names}
    return sorted(path.parent / name.replace("\\", "/") for name in names)


def _is_mesh(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in MESH_SUFFIXES and not path.name.startswith(".")


def _check_unit(unit: Any, where: str) -> None:
    if unit not in UNITS:
        raise MeshError(f"{where} is {unit!r}; use one of {', '.join(UNITS)}")


def _read_models_info(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        infos = json.loads(path.read_text())
        return {str(int(number)): dict(info) for number, info in infos.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise MeshError(f"{path} is not a BOP models_info.json ({error}); repair or remove it") from error


def _read_objects_file(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MeshError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict) or not all(isinstance(value, dict) for value in settings.values()):
        raise MeshError(
            f"{path} must map each class id to its settings (unit, symmetries, frame_id, class_ids)"
        )
    settings = {str(class_id): value for class_id, value in settings.items()}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise MeshError(
            f"{path} speaks of '{unknown[0]}', but the objects here are {', '.join(sorted(known))}"
        )
    return settings


def _object_options(settings: dict[str, Any], unit: str, path: Path, class_id: str) -> dict[str, Any]:
    where = f"{path}, object '{class_id}'"
    unknown = sorted(set(settings) - {"unit", "symmetries", "frame_id", "class_ids"})
    if unknown:
        raise MeshError(
            f"{where}: no setting is called '{unknown[0]}'; use unit, symmetries, frame_id, class_ids"
        )
    options: dict[str, Any] = {}
    if "unit" in settings:
        options["unit"] = unit = settings["unit"]
        _check_unit(unit, f"{where}: unit")
    if "frame_id" in settings:
        options["frame_id"] = str(settings["frame_id"])
    if "class_ids" in settings:
        if not isinstance(settings["class_ids"], list):
            raise MeshError(f"{where}: class_ids must be a list of names")
        options["aliases"] = tuple(str(alias) for alias in settings["class_ids"])
    if "symmetries" in settings:
        symmetries = settings["symmetries"]
        if not isinstance(symmetries, dict) or not set(symmetries) <= {"discrete", "continuous"}:
            raise MeshError(f"{where}: symmetries must hold the lists discrete and/or continuous")
        options["symmetries"] = _symmetries(
            symmetries.get("discrete"), symmetries.get("continuous"), unit, where
        )
    return options


def _symmetries(discrete: Any, continuous: Any, unit: str, where: Path | str) -> Symmetries:
    scale = UNITS[unit]
    try:
        transforms = []
        for numbers in discrete or ():
            transform = np.array(numbers, dtype=np.float64).reshape(4, 4)
            if not np.allclose(transform[:3, :3] @ transform[:3, :3].T, np.eye(3), atol=1e-3):
                raise ValueError(f"{np.round(transform[:3, :3], 3).tolist()} is not a rotation")
            transform[:3, 3] *= scale
            transforms.append(transform)
        axes = []
        for entry in continuous or ():
            axis = np.array(entry["axis"], dtype=np.float64).reshape(3)
            offset = scale * np.array(entry.get("offset", (0, 0, 0)), dtype=np.float64).reshape(3)
            if not np.linalg.norm(axis) > 0:
                raise ValueError("the axis of a continuous symmetry is zero")
            axes.append((axis / np.linalg.norm(axis), offset))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MeshError(f"{where}: symmetries are not in BOP form: {error}") from error
    return Symmetries(tuple(transforms), tuple(axes))


def _check_names(specs: list[ObjectSpec]) -> None:
    owners: dict[str, ObjectSpec] = {}
    for spec in specs:
        for name in {spec.class_id, *spec.aliases}:
            if name in owners:
                other = owners[name]
                raise MeshError(
                    f"'{name}' names both {other.path} and {spec.path}; change class_ids in {OBJECTS_FILE}"
                )
            owners[name] = spec


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MeshError(f"{path} cannot be read: {error.strerror}") from error


def _matches(pattern: bytes, path: Path) -> list[str]:
    return _find(pattern, _read_bytes(path))


def _find(pattern: bytes, text: bytes) -> list[str]:
    return [match.decode("utf-8", "replace") for match in re.findall(pattern, text, flags=re.MULTILINE)]


def _fix_colours(path: Path, parts: list[trimesh.Trimesh]) -> None:
    """What trimesh leaves to its users: glTF's colour factors are linear, and COFF files have colours."""
    if path.suffix.lower() in (".glb", ".gltf"):
        for part in parts:
            factor = getattr(getattr(part.visual, "material", None), "baseColorFactor", None)
            if factor is not None:
                linear = np.asarray(factor)[:3] / (255.0 if np.asarray(factor).dtype.kind in "ui" else 1.0)
                srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
                part.visual.material = part.visual.material.copy()  # parts may share one
                part.visual.material.baseColorFactor = np.append(np.round(255 * srgb), 255).astype(np.uint8)
    if path.suffix.lower() == ".off":
        lines = [
            line.split("#")[0].split() for line in _read_bytes(path).decode("utf-8", "replace").splitlines()
        ]
        lines = [line for line in lines if line]
        if lines[0] == ["COFF"] and len(parts) == 1:
            count = int(lines[1][0])
            rows = [line[3:6] for line in lines[2 : 2 + count]]
            if count == len(parts[0].vertices) and all(len(row) == 3 for row in rows):
                colours = np.array(rows, dtype=np.float64)
                is_float = any("." in value for row in rows for value in row)
                colours = np.clip(np.round(colours * (255 if is_float else 1)), 0, 255).astype(np.uint8)
                parts[0].visual = trimesh.visual.ColorVisuals(parts[0], vertex_colors=colours)


def _diameter(vertices: np.ndarray) -> float:
    """Largest distance between two of (V, 3) points: it is between two corners of their convex hull."""
    try:
        corners = vertices[ConvexHull(vertices).vertices]
    except QhullError:  # flat
        corners = np.unique(vertices, axis=0)
    largest = 0.0
    for start in range(0, len(corners), 256):
        largest = max(largest, float(cdist(corners[start : start + 256], corners).max()))
    return largest


def unit_advice(mesh: ObjectMesh) -> str:
    """What is odd about the size of a mesh outside `USUAL_DIAMETER`, and the unit that would fit."""
    spec = mesh.spec
    raw = mesh.diameter / UNITS[spec.unit]
    low, high = USUAL_DIAMETER
    fitting = [unit for unit, metres in UNITS.items() if low <= raw * metres <= high]
    # Of several, the one nearest to the size of something a robot handles.
    fitting.sort(key=lambda unit: abs(np.log(raw * UNITS[unit] / 0.2)))
    said = f"{spec.path}: read in {spec.unit}, object '{spec.class_id}' is {mesh.diameter:.3g} m across"
    if not fitting:
        return f"{said}, and no unit ({', '.join(UNITS)}) makes it between 1 cm and 3 m"
    size = raw * UNITS[fitting[0]]
    return f"{said}; unit {fitting[0]} would make it {size:.3g} m"
