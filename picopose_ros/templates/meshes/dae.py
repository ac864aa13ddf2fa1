"""COLLADA by pycollada: the numbers in the file's own axes, as RViz shows them; unit in `units`.

trimesh's reader takes the first set of texture coordinates, whichever a texture wants, and leaves out
pictures, skins and what pycollada can't read, silently.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import trimesh

from picopose_ros.templates.meshes.colours import unit_range
from picopose_ros.templates.meshes.parts import Source, make_part, said


def read(source: Source) -> list[trimesh.Trimesh]:
    """One part per set of triangles.

    Raises:
        ValueError: it has geometry that can't be read. pycollada raises what it likes on broken files.
    """
    import collada

    common = collada.common
    ignore = [common.DaeError, common.DaeIncompleteError, common.DaeBrokenRefError]
    ignore += [common.DaeMalformedError, common.DaeUnsupportedError]
    document = collada.Collada(io.BytesIO(source.path.read_bytes()), ignore=ignore)
    for error in document.errors:
        text = " ".join(str(getattr(error, "msg", error)).split())[:160]
        if re.search(r"(?i)primitive|geometr|mesh|vertex|source|controller|node", text):
            raise ValueError(f"part of its shape can't be read ({text}); export it as triangles")
        source.warn(f"part of it can't be read ({text}): it is shown without")
    parts: list[trimesh.Trimesh] = []
    if document.scene is None:
        raise ValueError("it has no scene")
    for node in document.scene.nodes:
        _walk(source, collada, node, np.eye(4), parts)
    return parts


def named_files(data: bytes) -> list[str]:
    """URIs of the pictures."""
    names = re.findall(rb"<init_from>\s*(?:<ref>)?\s*([^<]+?)\s*<", data)
    # Inside an effect the same tag names an image of the document, not a file.
    names = [name.decode("utf-8", "surrogateescape") for name in names]
    return [name for name in names if "." in name.replace("\\", "/").rsplit("/", 1)[-1]]


def _walk(source: Source, collada: Any, node: Any, above: np.ndarray, parts: list[trimesh.Trimesh]) -> None:
    scene = collada.scene
    if isinstance(node, scene.ControllerNode):
        raise ValueError(
            "it is skinned (instance_controller), which isn't done; export it without an armature"
        )
    if isinstance(node, scene.GeometryNode):
        materials = {one.symbol: one for one in node.materials}
        for primitive in node.geometry.primitives:
            part = _part(source, collada, primitive, materials.get(primitive.material))
            if part is not None:
                part.apply_transform(above)
                parts.append(part)
    elif isinstance(node, scene.Node):
        here = above @ node.matrix
        for child in node.children or ():
            _walk(source, collada, child, here, parts)


def _part(source: Source, collada: Any, primitive: Any, bound: Any) -> trimesh.Trimesh | None:
    if isinstance(primitive, collada.polylist.Polylist):  # polygons are a kind of it
        primitive = primitive.triangleset()
    if not isinstance(primitive, collada.triangleset.TriangleSet):
        source.warn("it has lines, which aren't shown")
        return None
    if primitive.vertex is None or not len(primitive.vertex_index):
        return None
    corners = primitive.vertex_index.reshape(-1)
    if corners.min() < 0 or corners.max() >= len(primitive.vertex):
        raise ValueError(f"a face refers to vertex {corners.max()}, but there are {len(primitive.vertex)}")
    normals = None
    if primitive.normal is not None and primitive.normal_index is not None:
        normals = primitive.normal[primitive.normal_index].reshape(-1, 3)
    look = _look(source, collada, primitive, bound)
    faces = np.arange(len(corners)).reshape(-1, 3)
    return make_part(primitive.vertex[corners], faces, normals=normals, **look)


def _look(source: Source, collada: Any, primitive: Any, bound: Any) -> dict[str, Any]:
    """Arguments of `make_part`."""
    colours = None
    inputs = primitive.sources.get("COLOR") or ()
    if inputs:
        offset, data = inputs[0][0], np.asarray(inputs[0][4].data)
        data = data.reshape(len(data), -1)
        if data.shape[1] >= 3:
            colours = unit_range(data[primitive.index[:, :, offset].reshape(-1)])[:, :3]
    plain: dict[str, Any] = {} if colours is None else {"vertex_colours": colours}
    if bound is None:
        if primitive.material and colours is None:
            source.warn(
                f"material '{primitive.material}' isn't in the file: what has it is shown in plain grey"
            )
        return plain
    effect, name = bound.target.effect, bound.target.name or bound.target.id
    diffuse, emission = effect.diffuse, effect.emission
    _check_transparency(source, effect, name)
    is_map = (isinstance(diffuse, collada.material.Map), isinstance(emission, collada.material.Map))
    colour = None
    if not is_map[0] and diffuse is not None:
        colour = unit_range(np.array(diffuse, np.float64)[None, :3])[0]
        if not is_map[1] and emission is not None:
            colour = np.minimum(colour + np.array(emission, np.float64)[:3], 1.0)
    if not plain and colour is not None:
        plain = {"colour": colour}
    if is_map[0]:
        texture = diffuse
    elif is_map[1] and (colour is None or colour.max() < 0.04):
        texture = emission
    else:
        if is_map[1]:
            source.warn(f"the emissive texture of material '{name}' isn't shown beside its colour")
        return plain
    instead = "in its vertex colours" if colours is not None else said(colour)
    uv = _coordinates(primitive, bound, texture.texcoord)
    path = texture.sampler.surface.image.path
    image = source.picture(path, instead, uri=True)
    if image is None:
        return plain
    if uv is None:
        source.warn(
            f"texture {path} of material '{name}' has no coordinates here: what has it is shown {instead}"
        )
        return plain
    if colours is not None and colours.min() < 0.98:
        source.warn(f"material '{name}' has a texture and vertex colours: the texture is shown")
    return {"image": image, "uv": uv}


def _coordinates(primitive: Any, bound: Any, symbol: str) -> np.ndarray | None:
    """(3 F, 2) of the set that the material binds to a texture's symbol; the first set if it says nothing."""
    if not primitive.texcoordset:
        return None
    wanted = next((str(number) for name, kind, number in bound.inputs if name == symbol), None)
    sets = [str(entry[3]) for entry in primitive.sources.get("TEXCOORD", ())]
    index = sets.index(wanted) if wanted in sets else 0
    return primitive.texcoordset[index][primitive.texcoord_indexset[index]].reshape(-1, 2)


def _check_transparency(source: Source, effect: Any, name: str) -> None:
    transparency = getattr(effect, "transparency", None)
    transparent = getattr(effect, "transparent", None)
    if isinstance(transparency, (int, float)) and isinstance(transparent, (tuple, list)):
        alpha = transparent[3] if len(transparent) > 3 else 1.0
        opacity = alpha * transparency
        if 0.02 < opacity < 0.98:
            source.warn(f"material '{name}' is transparent: it is shown opaque")
