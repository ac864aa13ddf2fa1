"""Mesh files of one object, a box with a colour per side, in many forms; and what it should look like."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image

from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

COLOURS = np.array(
    [(210, 40, 60), (40, 190, 80), (50, 80, 220), (230, 200, 40), (160, 60, 190), (60, 200, 210)], np.uint8
)
LOW, HIGH = np.zeros(3), np.array([0.1, 0.06, 0.14])


def _box() -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = [], []
    for axis in range(3):
        a, b = [(1, 2), (2, 0), (0, 1)][axis]
        for side in (0, 1):
            start = len(vertices)
            for s, t in ((0, 0), (1, 0), (1, 1), (0, 1)):
                point = np.zeros(3)
                point[axis], point[a], point[b] = (LOW, HIGH)[side][axis], s * HIGH[a], t * HIGH[b]
                vertices.append(point)
            loop = [start, start + 1, start + 2, start + 3][:: 1 if side else -1]
            faces += [[loop[0], loop[1], loop[2]], [loop[0], loop[2], loop[3]]]
    return np.array(vertices), np.array(faces)


VERTICES, FACES = _box()
"""(24, 3) metres and (12, 3): four vertices and two faces a side."""
VERTEX_COLOURS = np.repeat(COLOURS, 4, axis=0)
UV = np.array(
    [((k + s) / 6, t) for k in range(6) for s, t in ((0.3, 0.2), (0.7, 0.2), (0.7, 0.8), (0.3, 0.8))]
)
"""(24, 2) into `atlas`, origin top left as in glTF."""
K = np.array([[250.0, 0, 40], [0, 250.0, 40], [0, 0, 1]])


def atlas() -> Image.Image:
    """Six stripes of 8 pixels."""
    return Image.fromarray(np.tile(np.repeat(COLOURS, 8, axis=0)[None], (16, 1, 1)))


def linear(srgb: np.ndarray) -> np.ndarray:
    c = np.asarray(srgb, float) / 255.0
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def differences(
    renderer: MeshRenderer, mesh: ObjectMesh, colours: np.ndarray = VERTEX_COLOURS
) -> tuple[float, float]:
    """Share of pixels whose mask differs from the true box's, and mean difference of colours, 0..255."""
    box = trimesh.Trimesh(VERTICES, FACES, process=False)
    rgba = np.column_stack([colours, np.full(len(colours), 255)]).astype(np.uint8)
    box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=rgba)
    outline, colour = [], []
    for angle, axis in ((0.6, (1, 0, 0)), (2.4, (1, 1, 0)), (4.2, (0.3, 1, 0.5))):
        T = trimesh.transformations.rotation_matrix(angle, axis)
        T[:3, 3] = [0, 0, 0.6] - T[:3, :3] @ (HIGH / 2)
        want, got = (renderer.render(one, T, K, 80, 80) for one in ([box], mesh))
        both = want.mask & got.mask
        outline.append(np.mean(want.mask != got.mask))
        colour.append(np.abs(want.rgb[both].astype(int) - got.rgb[both]).mean() if both.any() else 255.0)
    renderer.release([box])
    return float(np.max(outline)), float(np.max(colour))


class Gltf:
    """A glTF file that is being written."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = {
            "asset": {"version": "2.0"},
            "buffers": [{}],
            "bufferViews": [],
            "accessors": [],
            "meshes": [{"primitives": [{"attributes": {}}]}],
            "nodes": [{"mesh": 0}],
            "scenes": [{"nodes": [0]}],
            "scene": 0,
        }
        self.blob = b""
        self.attributes["POSITION"] = self.accessor(VERTICES.astype(np.float32))
        self.primitive["indices"] = self.accessor(FACES.ravel().astype(np.uint16))

    @property
    def primitive(self) -> dict[str, Any]:
        return self.tree["meshes"][0]["primitives"][0]

    @property
    def attributes(self) -> dict[str, int]:
        return self.primitive["attributes"]

    def view(self, data: bytes) -> int:
        self.blob += b"\0" * (-len(self.blob) % 4)
        self.tree["bufferViews"].append({"buffer": 0, "byteOffset": len(self.blob), "byteLength": len(data)})
        self.blob += data
        return len(self.tree["bufferViews"]) - 1

    def accessor(self, values: np.ndarray, normalized: bool = False, view: bool = True, **more: Any) -> int:
        codes = {"f4": 5126, "u4": 5125, "u2": 5123, "u1": 5121, "i2": 5122, "i1": 5120}
        width = 1 if values.ndim == 1 else int(np.prod(values.shape[1:]))
        entry = {
            "componentType": codes[values.dtype.str[1:]],
            "count": len(values),
            "type": {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}[width],
            **more,
        }
        if view:
            entry["bufferView"] = self.view(np.ascontiguousarray(values).tobytes())
        if normalized:
            entry["normalized"] = True
        self.tree["accessors"].append(entry)
        return len(self.tree["accessors"]) - 1

    def material(self, material: dict[str, Any], image: bytes | Image.Image | None = None) -> None:
        """The primitive's material, and texture 0."""
        self.tree["materials"] = [material]
        self.primitive["material"] = 0
        if image is not None:
            if isinstance(image, Image.Image):
                stream = io.BytesIO()
                image.save(stream, "PNG")
                image = stream.getvalue()
            self.tree["images"] = [{"bufferView": self.view(image), "mimeType": "image/png"}]
            self.tree["textures"] = [{"source": 0}]

    def textured(self, image: bytes | Image.Image | None = None, **texture: Any) -> None:
        """A base colour texture that makes the box what it should be."""
        rough = {"baseColorTexture": {"index": 0, **texture}, "metallicFactor": 0}
        self.material({"pbrMetallicRoughness": rough}, atlas() if image is None else image)
        self.attributes.setdefault("TEXCOORD_0", self.accessor(UV.astype(np.float32)))

    def save(self, path: Path) -> None:
        self.tree["buffers"][0]["byteLength"] = len(self.blob)
        if path.suffix == ".gltf":
            path.write_text(json.dumps(self.tree))
            return
        text = json.dumps(self.tree).encode()
        text += b" " * (-len(text) % 4)
        blob = self.blob + b"\0" * (-len(self.blob) % 4)
        head = struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(blob))
        path.write_bytes(
            head
            + struct.pack("<I4s", len(text), b"JSON")
            + text
            + struct.pack("<I4s", len(blob), b"BIN\0")
            + blob
        )


def write_obj(
    path: Path, mtl: str | bytes | None = None, colours: np.ndarray | None = None, head: bytes = b""
) -> None:
    """An OBJ with texture coordinates, its vertices maybe coloured, and a material file beside it."""
    lines = ["mtllib m.mtl"] if mtl is not None else []
    for index, (x, y, z) in enumerate(VERTICES):
        lines.append(f"v {x} {y} {z}" + ("" if colours is None else " {} {} {}".format(*colours[index])))
    lines += [f"vt {u} {1 - v}" for u, v in UV]
    lines += ["usemtl skin"] if mtl is not None else []
    lines += ["f " + " ".join(f"{index + 1}/{index + 1}" for index in face) for face in FACES]
    path.write_bytes(head + "\n".join(lines).encode() + b"\n")
    if mtl is not None:
        path.with_name("m.mtl").write_bytes(mtl.encode() if isinstance(mtl, str) else mtl)


def write_ply(
    path: Path,
    vertex: list[str],
    values: np.ndarray,
    face: list[str] | None = None,
    faces: Any = (),
    head: Any = (),
) -> None:
    """An ASCII PLY with more properties (lines of the header) and values of vertices (24, n) and faces."""
    rows = [" ".join(f"{value:.9g}" for value in row) for row in np.column_stack([VERTICES, values])]
    lines = ["ply", "format ascii 1.0", *head, "element vertex 24"]
    lines += [f"property float {axis}" for axis in "xyz"] + vertex
    lines += ["element face 12", "property list uchar int vertex_indices", *(face or [])]
    tails = list(faces) or [""] * 12
    body = [f"3 {a} {b} {c} {tail}" for (a, b, c), tail in zip(FACES, tails)]
    path.write_text("\n".join([*lines, "end_header", *rows, *body]) + "\n")
