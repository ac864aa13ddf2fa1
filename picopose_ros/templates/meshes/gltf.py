"""glTF 2.0 (.glb, .gltf): geometry and looks exactly as the specification has them, or refused by name.

trimesh's reader leaves out sparse accessors, morph targets, skins, instances and most of the looks, silently.
Source: the glTF 2.0 specification and the extensions named here (Khronos Group).
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import trimesh

from picopose_ros.templates.meshes.gltf_looks import Looks
from picopose_ros.templates.meshes.parts import Source, make_part

APPLIED = {
    "EXT_mesh_gpu_instancing",
    "EXT_texture_avif",
    "EXT_texture_webp",
    "KHR_materials_emissive_strength",
    "KHR_materials_pbrSpecularGlossiness",
    "KHR_materials_unlit",
    "KHR_mesh_quantization",
    "KHR_node_visibility",
    "KHR_texture_transform",
}
"""Extensions that are done."""

HARMLESS = re.compile(
    r"KHR_(lights_punctual|xmp.*|audio.*|animation_pointer|materials_(variants|specular|ior|clearcoat|sheen"
    r"|anisotropy|iridescence|dispersion|emissive_strength|transmission|volume|diffuse_transmission))"
    r"|KHR_texture_basisu|MSFT_texture_dds|MSFT_lod|EXT_lights.*|VRM.*|CESIUM.*|EXT_(mesh_features"
    r"|structural_metadata|instance_features)|ADOBE_materials_thin_transparency"
)
"""Extensions that change neither shape nor albedo, or of which the looks say themselves what is lost."""

_TYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_COMPRESSED = ("EXT_meshopt_compression", "KHR_meshopt_compression", "MESHOPT_compression")
_DRACO = "KHR_draco_mesh_compression"


def read(source: Source) -> list[trimesh.Trimesh]:
    """The triangles of a file's scene, in metres as glTF has it, in the file's own axes (y is up).

    Raises:
        ValueError, KeyError, IndexError, TypeError, struct.error: the file is not glTF 2.0, or it has
            something that can't be done exactly.
    """
    document = Document(source)
    looks = Looks(document)
    parts = []
    for node, transforms in document.shapes():
        mesh = document.entry("meshes", node["mesh"])
        weights = node.get("weights", mesh.get("weights"))
        joints = document.joints(node)
        for primitive in mesh["primitives"]:
            part = _part(document, looks, primitive, weights, joints)
            if part is None:
                continue
            for transform in transforms:
                copy = part.copy(include_cache=True)
                copy.apply_transform(transform)
                parts.append(copy)
    return parts


class Document:
    """A parsed file and the arrays behind it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        data = source.path.read_bytes()
        self._chunk: bytes | None = None
        if data[:4] == b"glTF":
            data = self._unpack(data)
        self.tree: dict[str, Any] = json.loads(data.decode("utf-8-sig"))
        if not isinstance(self.tree, dict) or "asset" not in self.tree:
            raise ValueError("it is no glTF (no asset)")
        version = str(self.tree["asset"].get("version", ""))
        if not version.startswith("2"):
            raise ValueError(f"it is glTF {version or 'without a version'}, not 2.0; convert it")
        self._buffers: dict[int, bytes] = {}
        self._check_extensions()

    def _unpack(self, data: bytes) -> bytes:
        """The JSON of a binary file; keeps its buffer."""
        _, version, _ = struct.unpack_from("<4sII", data)
        if version != 2:
            raise ValueError(f"it is binary glTF {version}, not 2.0; convert it")
        start, text = 12, None
        while start + 8 <= len(data):
            length, kind = struct.unpack_from("<I4s", data, start)
            chunk = data[start + 8 : start + 8 + length]
            if len(chunk) < length:
                raise ValueError("it is cut short")
            if kind == b"JSON" and text is None:
                text = chunk
            elif kind == b"BIN\0" and self._chunk is None:
                self._chunk = chunk
            start += 8 + length + -length % 4
        if text is None:
            raise ValueError("it holds no JSON")
        return text

    def _check_extensions(self) -> None:
        for name in self.tree.get("extensionsRequired", ()):
            if name not in APPLIED and not HARMLESS.fullmatch(name):
                raise ValueError(f"it requires the extension {name}, which isn't done; export it without")
        for name in self.tree.get("extensionsUsed", ()):
            known = name in APPLIED or name in _COMPRESSED or name == _DRACO or HARMLESS.fullmatch(name)
            if not known:
                self.source.warn(f"the extension {name} isn't done: the object is shown without it")
        if self.tree.get("animations"):
            self.source.warn("it has animations, which aren't played: the object is shown at rest")
        if len(self.tree.get("scenes", ())) > 1:
            self.source.warn(
                f"it has {len(self.tree['scenes'])} scenes: number {self.tree.get('scene', 0)} is shown"
            )

    def entry(self, kind: str, index: int) -> dict[str, Any]:
        """An entry of one of the file's lists."""
        entries = self.tree.get(kind, [])
        if not isinstance(index, int) or not 0 <= index < len(entries):
            raise ValueError(f"it refers to number {index} of its {len(entries)} {kind}")
        return entries[index]

    def uri(self, uri: str) -> bytes:
        """What a URI of the file means."""
        if uri.startswith("data:"):
            head, _, body = uri.partition(",")
            return base64.b64decode(unquote_to_bytes(body)) if ";base64" in head else unquote_to_bytes(body)
        return self.source.file(uri, uri=True)

    def view(self, index: int) -> tuple[memoryview, int]:
        """The bytes of a buffer view, and its stride (0: none)."""
        view = self.entry("bufferViews", index)
        number = view["buffer"]
        for name in _COMPRESSED:
            extension = view.get("extensions", {}).get(name)
            if extension is not None and "uri" not in self.entry("buffers", number):
                raise ValueError(f"it is compressed ({name}), which isn't read; export it without")
        if number not in self._buffers:
            buffer = self.entry("buffers", number)
            if "uri" in buffer:
                self._buffers[number] = self.uri(buffer["uri"])
            elif number == 0 and self._chunk is not None:
                self._buffers[number] = self._chunk
            else:
                raise ValueError(f"its buffer {number} has no data")
            if len(self._buffers[number]) < buffer["byteLength"]:
                raise ValueError(f"its buffer {number} is cut short")
        start, length = view.get("byteOffset", 0), view["byteLength"]
        data = memoryview(self._buffers[number])[start : start + length]
        if start < 0 or len(data) < length:
            raise ValueError(f"buffer view {index} reaches beyond its buffer")
        return data, view.get("byteStride", 0)

    def array(self, index: int) -> np.ndarray:
        """(count, components) of an accessor, in the file's type; sparse ones are filled in."""
        accessor = self.entry("accessors", index)
        count, components = accessor["count"], _COMPONENTS.get(accessor["type"])
        if accessor["componentType"] not in _TYPES or components is None or count < 1:
            raise ValueError(f"accessor {index} is of an unknown type")
        dtype = np.dtype(_TYPES[accessor["componentType"]])
        if "bufferView" in accessor:
            values = self._strided(
                accessor["bufferView"], accessor.get("byteOffset", 0), count, components, dtype
            )
        else:
            values = np.zeros((count, components), dtype)
        sparse = accessor.get("sparse")
        if sparse is not None:
            where, what, changed = sparse["indices"], sparse["values"], sparse["count"]
            kind = np.dtype(_TYPES[where["componentType"]])
            rows = self._strided(where["bufferView"], where.get("byteOffset", 0), changed, 1, kind)[:, 0]
            if rows.max() >= count:
                raise ValueError(f"sparse accessor {index} changes entry {rows.max()} of {count}")
            values = values.copy()
            values[rows] = self._strided(
                what["bufferView"], what.get("byteOffset", 0), changed, components, dtype
            )
        return values

    def _strided(self, view: int, offset: int, count: int, components: int, dtype: np.dtype) -> np.ndarray:
        data, stride = self.view(view)
        size = components * dtype.itemsize
        stride = stride or size
        if offset < 0 or stride < size or offset + (count - 1) * stride + size > len(data):
            raise ValueError(f"an accessor reaches beyond buffer view {view}")
        return np.ndarray(
            (count, components), dtype, buffer=data, offset=offset, strides=(stride, dtype.itemsize)
        )

    def floats(self, index: int) -> np.ndarray:
        """(count, components) float64 of an accessor; normalised integers become 0..1 or -1..1."""
        values = self.array(index)
        if self.entry("accessors", index).get("normalized") and values.dtype.kind in "ui":
            return np.maximum(values / float(np.iinfo(values.dtype).max), -1.0)
        return values.astype(np.float64)

    def shapes(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """The nodes of the scene that have a mesh, and where each is drawn: (n, 4, 4)."""
        nodes = self.tree.get("nodes", [])
        if self.tree.get("scenes"):
            roots = self.entry("scenes", self.tree.get("scene", 0)).get("nodes", [])
        else:
            roots = sorted(set(range(len(nodes))) - {c for node in nodes for c in node.get("children", ())})
        self._global: dict[int, np.ndarray] = {}
        drawn, waiting = [], [(index, np.eye(4), True) for index in reversed(roots)]
        while waiting:
            index, above, visible = waiting.pop()
            node = self.entry("nodes", index)
            if index in self._global:
                raise ValueError(f"node {index} has more than one place in the scene")
            self._global[index] = here = above @ _local(node)
            extensions = node.get("extensions", {})
            visible = visible and extensions.get("KHR_node_visibility", {}).get("visible", True)
            if "mesh" in node and visible:
                drawn.append((node, index))
            waiting += [(child, here, visible) for child in reversed(node.get("children", []))]
        for node, index in drawn:
            # The place of a skinned mesh is that of its joints.
            transform = np.eye(4) if "skin" in node else self._global[index]
            yield node, transform @ self._instances(node)

    def _instances(self, node: dict[str, Any]) -> np.ndarray:
        instancing = node.get("extensions", {}).get("EXT_mesh_gpu_instancing")
        if instancing is None:
            return np.eye(4)[None]
        arrays = {name: self.floats(index) for name, index in instancing["attributes"].items()}
        count = len(next(iter(arrays.values())))
        return np.stack(
            [
                _compose(*(arrays[name][i] if name in arrays else None for name in _PLACES))
                for i in range(count)
            ]
        )

    def joints(self, node: dict[str, Any]) -> np.ndarray | None:
        """(J, 4, 4) from the mesh to the scene, per joint of the node's skin; None without one."""
        if "skin" not in node:
            return None
        skin = self.entry("skins", node["skin"])
        missing = [joint for joint in skin["joints"] if joint not in self._global]
        if missing:
            raise ValueError(f"joint {missing[0]} of a skin is not in the scene")
        places = np.stack([self._global[joint] for joint in skin["joints"]])
        if "inverseBindMatrices" not in skin:
            return places
        inverse = self.floats(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
        return places @ inverse[: len(places)]


_PLACES = ("TRANSLATION", "ROTATION", "SCALE")


def _local(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    return _compose(*(node.get(name.lower()) for name in _PLACES))


def _compose(translation: Any = None, rotation: Any = None, scale: Any = None) -> np.ndarray:
    """(4, 4) of a translation, a quaternion x y z w and a scale."""
    transform = np.eye(4)
    if rotation is not None:
        x, y, z, w = np.asarray(rotation, np.float64) / np.linalg.norm(rotation)
        transform = trimesh.transformations.quaternion_matrix([w, x, y, z])
    if scale is not None:
        transform[:3, :3] *= np.asarray(scale, np.float64)
    if translation is not None:
        transform[:3, 3] = translation
    return transform


def _part(
    document: Document,
    looks: Looks,
    primitive: dict[str, Any],
    weights: list[float] | None,
    joints: np.ndarray | None,
) -> trimesh.Trimesh | None:
    """A primitive in the frame of its mesh; None if it has no triangles."""
    mode = primitive.get("mode", 4)
    if mode not in (4, 5, 6):
        document.source.warn("it has points or lines, which aren't shown")
        return None
    attributes = primitive["attributes"]
    if "POSITION" not in attributes:
        document.source.warn("it has a primitive without positions, which isn't shown")
        return None
    if _DRACO in primitive.get("extensions", {}):
        accessor = document.entry("accessors", attributes["POSITION"])
        if "bufferView" not in accessor and "sparse" not in accessor:
            raise ValueError(f"it is compressed ({_DRACO}), which isn't read; export it without")
    vertices = document.floats(attributes["POSITION"])
    normals = document.floats(attributes["NORMAL"]) if "NORMAL" in attributes else None
    targets = primitive.get("targets", [])
    for target, weight in zip(targets, weights or []):
        if weight and "POSITION" in target:
            vertices = vertices + weight * document.floats(target["POSITION"])
        if weight and "NORMAL" in target and normals is not None:
            normals = normals + weight * document.floats(target["NORMAL"])
    if joints is not None and "JOINTS_0" in attributes:
        vertices, normals = _skinned(document, attributes, joints, vertices, normals)

    if "indices" in primitive:
        indices = document.array(primitive["indices"])[:, 0].astype(np.int64)
    else:
        indices = np.arange(len(vertices))
    faces = _triangles(indices, mode)
    look = looks.of(primitive, len(vertices))
    return make_part(vertices, faces, normals=normals, **look)


def _skinned(
    document: Document,
    attributes: dict[str, int],
    joints: np.ndarray,
    vertices: np.ndarray,
    normals: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    blend = np.zeros((len(vertices), 4, 4))
    for number in range(len(attributes)):
        if f"JOINTS_{number}" not in attributes:
            break
        ids = document.array(attributes[f"JOINTS_{number}"]).astype(np.int64)
        weights = document.floats(attributes[f"WEIGHTS_{number}"])
        if ids.max() >= len(joints):
            raise ValueError(f"a vertex hangs on joint {ids.max()} of {len(joints)}")
        for column in range(4):
            blend += weights[:, column, None, None] * joints[ids[:, column]]
    total = blend[:, 3, 3]
    if (np.abs(total) < 1e-6).any():
        raise ValueError("a skinned vertex hangs on no joint")
    blend /= total[:, None, None]
    vertices = np.einsum("nij,nj->ni", blend[:, :3, :3], vertices) + blend[:, :3, 3]
    if normals is not None:
        normals = np.einsum("nij,nj->ni", blend[:, :3, :3], normals)
    return vertices, normals


def _triangles(indices: np.ndarray, mode: int) -> np.ndarray:
    """(F, 3) of a list, strip or fan."""
    if mode == 4:
        if len(indices) % 3:
            raise ValueError(f"{len(indices)} indices are no whole number of triangles")
        return indices.reshape(-1, 3)
    if len(indices) < 3:
        return np.zeros((0, 3), np.int64)
    if mode == 6:
        first = np.full(len(indices) - 2, indices[0])
        return np.column_stack([first, indices[1:-1], indices[2:]])
    faces = np.column_stack([indices[:-2], indices[1:-1], indices[2:]])
    faces[1::2] = faces[1::2][:, [1, 0, 2]]
    # Strips are joined by triangles without area.
    repeated = (faces[:, 0] == faces[:, 1]) | (faces[:, 1] == faces[:, 2]) | (faces[:, 0] == faces[:, 2])
    return faces[~repeated]


def named_files(path: Path) -> list[str]:
    """URIs of the buffers and pictures that are files of their own.

    Raises:
        ValueError: the file is not valid glTF.
    """
    data = path.read_bytes()
    if data[:4] == b"glTF":
        length, _ = struct.unpack_from("<I4s", data, 12) if len(data) >= 20 else (0, b"")
        data = data[20 : 20 + length]
    tree = json.loads(data.decode("utf-8-sig"))
    if not isinstance(tree, dict):
        raise ValueError("it is no glTF")
    entries = [*tree.get("buffers", ()), *tree.get("images", ())]
    uris = [entry.get("uri", "data:") for entry in entries if isinstance(entry, dict)]
    return [uri for uri in uris if not uri.startswith("data:")]
