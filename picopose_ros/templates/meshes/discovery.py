"""Mesh directories: which objects they hold, and what is said about each beside its mesh."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import yaml

from picopose_ros.errors import MeshError
from picopose_ros.templates.meshes.objects import ObjectSpec, Symmetries
from picopose_ros.templates.meshes.parts import shown
from picopose_ros.templates.meshes.units import UNITS, metres_per_unit, stated_unit
from picopose_ros.tf_names import refusal

MESH_SUFFIXES: tuple[str, ...] = (".ply", ".obj", ".stl", ".glb", ".gltf", ".dae", ".off")
"""File types that are read, lower case."""

OBJECTS_FILE = "objects.yaml"
MODELS_INFO_FILE = "models_info.json"


def resolve_path(setting: str | Path) -> Path:
    """The path that a setting means: a path, ``~/folder``, ``file:///folder`` or ``package://NAME/folder``.

    Raises:
        MeshError: the package isn't in AMENT_PREFIX_PATH, or a home folder is unknown.
    """
    text = os.fspath(setting)
    if re.match(r"file:/", text):
        return Path(unquote(re.sub(r"^file:(//[^/]*)?", "", text), errors="surrogateescape"))
    # A Path has one slash where two were.
    package = re.match(r"package:/{1,2}([^/]+)/?(.*)", text)
    if package:
        name, inside = package[1], unquote(package[2], errors="surrogateescape")
        for prefix in filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)):
            share = Path(prefix) / "share" / name
            if share.is_dir():
                return share / inside
        raise MeshError(f"{shown(text)}: no package '{name}' is installed; source the workspace that has it")
    if re.match(r"[a-z]+://", text):
        raise MeshError(f"{shown(text)} is of an unknown kind; use a path, file:// or package://")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise MeshError(
            f"{shown(text)}: the home folder is unknown ({error}); write the whole path"
        ) from error


def discover_objects(mesh_dir: str | Path, default_unit: str | None = None) -> list[ObjectSpec]:
    """Find the objects of a mesh directory, or the one of a mesh file.

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
        mesh_dir: the directory, or a single mesh file; see `resolve_path`.
        default_unit: unit of the meshes of which ``objects.yaml`` and ``models_info.json`` say nothing. None
            or "m": what the file states (COLLADA's unit, glTF's metres), or metres.

    Returns:
        the objects by class id.

    Raises:
        MeshError: no such directory, no mesh in it, two meshes of one class, one name for two classes, or an
            ``objects.yaml`` or ``models_info.json`` that cannot be used.
    """
    if default_unit is not None:
        _check_unit(default_unit, "the unit")
    mesh_dir = resolve_path(mesh_dir)
    found, mesh_dir, alone = _find_meshes(mesh_dir)

    infos = _read_models_info(mesh_dir / MODELS_INFO_FILE)
    settings = _read_objects_file(mesh_dir / OBJECTS_FILE, known=None if alone else found)
    specs = []
    for class_id, (path,) in sorted(found.items()):
        unit = default_unit if default_unit not in (None, "m") else stated_unit(path) or "m"
        options: dict[str, Any] = {"unit": unit}
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


def _find_meshes(mesh_dir: Path) -> tuple[dict[str, list[Path]], Path, bool]:
    """The mesh of each class id, the folder of what is said about them, and whether it is a file alone."""
    if mesh_dir.is_file():
        if not _is_mesh(mesh_dir):
            kinds = " ".join(MESH_SUFFIXES)
            raise MeshError(f"mesh_dir {shown(mesh_dir)} is a file, but no mesh ({kinds})")
        return {shown(mesh_dir.stem): [mesh_dir]}, mesh_dir.parent, True
    if not mesh_dir.is_dir():
        raise MeshError(
            f"mesh directory {shown(mesh_dir)} does not exist: give a folder with one mesh per object"
        )
    found: dict[str, list[Path]] = {}
    try:
        for entry in sorted(mesh_dir.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                try:
                    inside = [path for path in sorted(entry.iterdir()) if _is_mesh(path)]
                except OSError:  # not ours to read
                    continue
                found.setdefault(shown(entry.name), []).extend(inside)
            elif _is_mesh(entry):
                found.setdefault(shown(entry.stem), []).append(entry)
    except OSError as error:
        raise MeshError(f"mesh directory {shown(mesh_dir)} can't be read: {error.strerror}") from error
    found = {class_id: paths for class_id, paths in found.items() if paths}
    if not found:
        kinds = " ".join(MESH_SUFFIXES)
        raise MeshError(f"mesh directory {shown(mesh_dir)} holds no mesh ({kinds}); put one per object in it")
    for class_id, paths in found.items():
        if len(paths) > 1:
            names = " and ".join(shown(path) for path in paths)
            raise MeshError(
                f"object '{class_id}' has more than one mesh: {names}; keep one, move the others away"
            )
    return found, mesh_dir, False


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


def _read_objects_file(path: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings by class id, of the ``known`` objects alone; None: of any."""
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
    unknown = sorted(set(settings) - set(known)) if known is not None else []
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
    if settings.get("frame_id") is not None:
        options["frame_id"] = str(settings["frame_id"])
        if reason := refusal(options["frame_id"]):
            raise MeshError(f"{where}: frame_id is {options['frame_id']!r}: {reason}")
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
    scale = metres_per_unit(unit)
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
    frames: dict[str, ObjectSpec] = {}
    for spec in specs:
        other = frames.setdefault(spec.tf_base, spec)
        if other is not spec:
            raise MeshError(
                f"objects '{other.class_id}' and '{spec.class_id}' would both have the TF frames "
                f"{spec.tf_base}_0, {spec.tf_base}_1, ...; change frame_id in {OBJECTS_FILE}"
            )
