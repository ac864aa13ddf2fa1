"""The benchmark's objects: a folder of procedural meshes that training never sees; facts about any folder.

The facts (group, families, ambiguous or not) are made from shape and texture alone, before anything is
evaluated, and for the procedural objects they are kept beside the meshes in ``benchmark.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
import yaml

from picopose_ros.errors import ConfigError, MeshError, PicoPoseError
from picopose_ros.evaluation.ambiguity import Ambiguity, measure_ambiguity
from picopose_ros.evaluation.report import write_atomically
from picopose_ros.progress import progress_bar
from picopose_ros.synthetic.objects import UNSEEN_FAMILY_SEED, VALIDATION_SEED, ProceduralObject, build_object
from picopose_ros.templates.meshes import (
    MESH_SUFFIXES,
    OBJECTS_FILE,
    ObjectMesh,
    ObjectSpec,
    Symmetries,
    load_object,
    mesh_digest,
)
from picopose_ros.templates.renderer import MeshRenderer

BENCHMARK_FILE = "benchmark.json"
OTHER_MESHES = "meshes"
"""Group of objects that this package did not make."""

_SEEN, _SHAPES, _TEXTURES, _BOTH = "seen families", "unseen shapes", "unseen textures", "unseen both"
GROUPS: tuple[str, ...] = (_SEEN, _SHAPES, _TEXTURES, _BOTH)
"""What training has seen of an object's families; it has seen none of the objects."""
# One round of objects: half of them of families that training knows, a sixth of each other kind.
_ROUND = (_SEEN, _SHAPES, _SEEN, _TEXTURES, _SEEN, _BOTH)
_FORMAT = 1
_ENTRY = {"group", "families", "textures", "ambiguous", "symmetric", "ambiguity", "diameter", "digest"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ObjectFacts:
    """What is known about an object before it is evaluated."""

    class_id: str
    group: str
    """One of :data:`GROUPS`, or :data:`OTHER_MESHES`."""
    ambiguous: bool
    """Some other pose looks nearly the same (:mod:`picopose_ros.evaluation.ambiguity`), or the folder
    declares symmetries."""
    ambiguity: float
    """The rule's margin: the smallest share of pixels by which another pose differs, 0..1."""
    diameter: float
    """Metres."""
    symmetric: bool
    """Another pose looks exactly the same: ADD-S instead of ADD, as in BOP."""
    families: tuple[str, ...] = ()
    """Shape families, one per part; empty for other meshes."""
    textures: tuple[str, ...] = ()
    """Texture families, one per part; empty for other meshes."""


def make_heldout(index: int, first_seed: int = UNSEEN_FAMILY_SEED) -> tuple[str, ProceduralObject]:
    """The benchmark's object at ``index``: its group and itself."""
    group = _ROUND[index % len(_ROUND)]
    made = build_object(
        first_seed + index,
        unseen_shapes=group in (_SHAPES, _BOTH),
        unseen_textures=group in (_TEXTURES, _BOTH),
    )
    return group, made


def write_heldout(
    folder: str | Path, objects: int = 48, first_seed: int = UNSEEN_FAMILY_SEED, progress: bool = False
) -> None:
    """Export procedural held-out objects as a mesh folder.

    Half of them are of shape and texture families that training knows, a sixth each has unseen shapes, unseen
    textures, or both. Writes one GLB per object, in metres, ``objects.yaml`` and ``benchmark.json``. Called
    again, it goes on where it was cut off and leaves whole objects alone.

    Args:
        folder: made if needed; must hold no other meshes.
        objects: how many.
        first_seed: seed of the first one.
        progress: show a bar.
    Raises:
        ConfigError: the seeds are trained on, or the folder holds other objects.
        PicoPoseError: a file cannot be written.
        RenderError: there is no OpenGL for the ambiguity rule.
    """
    folder = Path(folder)
    if objects < 1 or first_seed < VALIDATION_SEED:
        raise ConfigError(
            f"cannot export {objects} objects from seed {first_seed}: use at least 1 object and seeds from "
            f"{VALIDATION_SEED} on; smaller ones are trained on"
        )
    done, complete = _resume(folder, objects, first_seed)
    missing = [index for index in range(objects) if not _is_whole(folder, _class_id(index), done)]
    if complete and not missing:
        return
    # First of all, so that a folder whose export is cut off says so.
    _write_benchmark(folder, objects, first_seed, done)
    with MeshRenderer() as renderer:
        for index in progress_bar(missing, description="objects", hidden=not progress):
            class_id = _class_id(index)
            spec = ObjectSpec(class_id, folder / f"{class_id}.glb")
            group, made = make_heldout(index, first_seed)
            write_atomically(spec.path, glb_bytes(made.parts))
            done[class_id] = _entry(group, made, load_object(spec), renderer)
            _write_benchmark(folder, objects, first_seed, done)
    done = dict(sorted(done.items()))
    settings: dict[str, dict[str, Any]] = {class_id: {"unit": "m"} for class_id in done}
    for class_id, entry in done.items():
        if entry["symmetric"]:
            settings[class_id]["symmetries"] = entry["symmetries"]
    write_atomically(folder / OBJECTS_FILE, yaml.safe_dump(settings).encode())
    _write_benchmark(folder, objects, first_seed, done, complete=True)


def _class_id(index: int) -> str:
    return f"heldout_{index:03d}"


def _is_whole(folder: Path, class_id: str, done: dict[str, dict[str, Any]]) -> bool:
    path = folder / f"{class_id}.glb"
    if class_id not in done or not path.is_file():
        return False
    try:
        return mesh_digest(ObjectSpec(class_id, path)) == done[class_id]["digest"]
    except MeshError:  # half a file
        return False


def glb_bytes(parts: Sequence[trimesh.Trimesh]) -> bytes:
    """The parts as a binary glTF file, textures inside."""
    scene = trimesh.Scene()
    for index, part in enumerate(parts):
        scene.add_geometry(part, node_name=f"part_{index}", geom_name=f"part_{index}")
    return scene.export(file_type="glb")


def object_facts(folder: str | Path, specs: Iterable[ObjectSpec]) -> dict[str, ObjectFacts]:
    """Facts about the objects of a mesh folder, by class id.

    They come from ``benchmark.json`` where it lies in the folder and knows the mesh as it is; else the
    ambiguity rule is applied here, in seconds per object. An object whose mesh cannot be read is left out
    with a warning, as onboarding leaves it out.

    Raises:
        MeshError: ``benchmark.json`` cannot be used, or the export that writes it was cut off.
        RenderError: there is no OpenGL.
    """
    folder = Path(folder)
    known = _read_benchmark(folder)
    if known is not None and not known["complete"]:
        raise MeshError(
            f"{folder} holds {len(known['objects'])} of {known['wanted']} objects: their export was cut off; "
            "run picopose eval objects again"
        )
    facts: dict[str, ObjectFacts] = {}
    renderer: MeshRenderer | None = None
    try:
        for spec in specs:
            entry = known["objects"].get(spec.class_id) if known else None
            try:
                if entry is not None and mesh_digest(spec) == entry["digest"]:
                    facts[spec.class_id] = _facts(spec, entry)
                    continue
                mesh = load_object(spec)
            except MeshError as error:
                _log.warning("no facts about '%s': %s", spec.class_id, error)
                continue
            renderer = renderer or MeshRenderer()
            ambiguity = measure_ambiguity(renderer, mesh.parts)
            facts[spec.class_id] = _measured_facts(spec, mesh, ambiguity)
    finally:
        if renderer is not None:
            renderer.close()
    return facts


def load_objects(specs: Iterable[ObjectSpec]) -> tuple[list[ObjectMesh], dict[str, str]]:
    """Read all meshes; those that cannot be read are returned as class id -> reason."""
    meshes, failed = [], {}
    for spec in specs:
        try:
            meshes.append(load_object(spec))
        except MeshError as error:
            failed[spec.class_id] = str(error)
    return meshes, failed


def _facts(spec: ObjectSpec, entry: dict[str, Any]) -> ObjectFacts:
    declared = bool(spec.symmetries.discrete or spec.symmetries.continuous)
    return ObjectFacts(
        spec.class_id,
        entry["group"],
        entry["ambiguous"] or declared,
        entry["ambiguity"]["margin"],
        entry["diameter"],
        entry["symmetric"] or declared,
        tuple(entry["families"]),
        tuple(entry["textures"]),
    )


def _measured_facts(spec: ObjectSpec, mesh: ObjectMesh, ambiguity: Ambiguity) -> ObjectFacts:
    declared = bool(spec.symmetries.discrete or spec.symmetries.continuous)
    return ObjectFacts(
        spec.class_id,
        OTHER_MESHES,
        ambiguity.ambiguous or declared,
        ambiguity.margin,
        mesh.diameter,
        ambiguity.symmetric or declared,
    )


def _entry(group: str, made: ProceduralObject, mesh: ObjectMesh, renderer: MeshRenderer) -> dict[str, Any]:
    ambiguity = measure_ambiguity(renderer, mesh.parts)
    angle = np.rad2deg(np.arccos(np.clip((np.trace(ambiguity.rotation[:3, :3]) - 1) / 2, -1, 1)))
    return {
        "seed": made.seed,
        "group": group,
        "families": list(made.shape_families),
        "textures": list(made.texture_families),
        "ambiguous": ambiguity.ambiguous,
        "symmetric": ambiguity.symmetric,
        "ambiguity": {"margin": round(ambiguity.margin, 4), "angle_deg": round(float(angle), 1)},
        "symmetries": _bop_symmetries(ambiguity.symmetries),
        "diameter": mesh.diameter,
        "digest": mesh_digest(mesh.spec),
    }


def _bop_symmetries(symmetries: Symmetries) -> dict[str, list[Any]]:
    return {
        "discrete": [T.reshape(-1).tolist() for T in symmetries.discrete],
        "continuous": [
            {"axis": axis.tolist(), "offset": offset.tolist()} for axis, offset in symmetries.continuous
        ],
    }


def _resume(folder: Path, objects: int, first_seed: int) -> tuple[dict[str, dict[str, Any]], bool]:
    """Entries that an earlier call has finished, and whether they are all there are; makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PicoPoseError(f"cannot use {folder} ({error.strerror}): choose another folder") from error
    known = _read_benchmark(folder)
    if known is None:
        others = [path.name for path in sorted(folder.rglob("*")) if path.suffix.lower() in MESH_SUFFIXES]
        if others:
            raise ConfigError(f"{folder} already holds other meshes ({others[0]}): choose another folder")
        return {}, False
    if known["first_seed"] != first_seed or known["wanted"] > objects:
        raise ConfigError(
            f"{folder} is for {known['wanted']} objects from seed {known['first_seed']}, asked for are "
            f"{objects} from seed {first_seed}: choose another folder or delete this one"
        )
    return known["objects"], known["complete"] and known["wanted"] == objects


def _read_benchmark(folder: Path) -> dict[str, Any] | None:
    path = folder / BENCHMARK_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        version = content["format"]
        if version == _FORMAT:
            for entry in content["objects"].values():
                if missing := _ENTRY - set(entry):
                    raise KeyError(sorted(missing)[0])
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise MeshError(
            f"{path} cannot be read ({error!r}): delete it and export the objects again"
        ) from error
    if version != _FORMAT:
        raise MeshError(
            f"{path} has format {version}, this version reads {_FORMAT}: export the objects again"
        )
    return content


def _write_benchmark(
    folder: Path, objects: int, first_seed: int, done: dict[str, dict[str, Any]], complete: bool = False
) -> None:
    content = {
        "format": _FORMAT,
        "first_seed": first_seed,
        "wanted": objects,
        "complete": complete,
        "objects": done,
    }
    write_atomically(folder / BENCHMARK_FILE, json.dumps(content, indent=1).encode())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `picopose eval objects`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the meshes")
    parser.add_argument("--objects", type=int, default=48, metavar="N", help="how many (48)")
    parser.add_argument(
        "--first-seed",
        type=int,
        default=UNSEEN_FAMILY_SEED,
        metavar="S",
        help=f"seed of the first one ({UNSEEN_FAMILY_SEED}); those below {VALIDATION_SEED} are trained on",
    )


def run(args: argparse.Namespace) -> int:
    """`picopose eval objects`."""
    write_heldout(args.out, args.objects, args.first_seed, progress=True)
    entries = _read_benchmark(args.out)["objects"].values()
    for group in GROUPS:
        members = [entry for entry in entries if entry["group"] == group]
        if members:
            print(f"{group}: {len(members)} objects, {sum(e['ambiguous'] for e in members)} ambiguous")
    return 0
