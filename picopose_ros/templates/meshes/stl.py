"""STL, binary and ASCII, with the colours that VisCAM, SolidView and Materialise Magics put into it."""

from __future__ import annotations

import re

import numpy as np
import trimesh

from picopose_ros.templates.meshes.parts import Source, make_part

_FACET = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_NUMBER = rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf)\w*"


def read(source: Source) -> list[trimesh.Trimesh]:
    """The one part of the file, three vertices per triangle.

    Raises:
        ValueError: it is neither kind of STL, or cut short.
    """
    data = source.path.read_bytes()
    count = int(np.frombuffer(data[80:84], "<u4")[0]) if len(data) >= 84 else -1
    size = 84 + _FACET.itemsize * count
    if count > 0 and (len(data) == size or (len(data) > size and not _is_text(data))):
        facets = np.frombuffer(data, _FACET, count, 84)
        corners = facets["corners"].reshape(-1, 3).astype(np.float64)
        look = _colours(data[:80], facets["attribute"])
        if len(data) > size + 1024:
            source.warn(f"{len(data) - size} bytes follow its {count} triangles: they aren't shown")
        return [_part(corners, look)]
    if _is_text(data):
        found = re.findall(rb"(?i)\bvertex\s+(%b)\s+(%b)\s+(%b)" % ((_NUMBER,) * 3), data)
        corners = np.array([[float(value) for value in row] for row in found], np.float64).reshape(-1, 3)
        facets = len(re.findall(rb"(?i)\bendfacet\b", data))
        if len(corners) % 3 or (facets and len(corners) != 3 * facets):
            raise ValueError(
                f"it has {len(corners)} corners for {facets} triangles: it is cut short or broken"
            )
        return [_part(corners, {})]
    if count > 0:
        raise ValueError(
            f"it is cut short: it speaks of {count} triangles and has {max(len(data) - 84, 0) // 50}"
        )
    raise ValueError("it has no triangles" if count == 0 else "it is neither binary nor ASCII STL")


def _is_text(data: bytes) -> bool:
    return data.lstrip()[:5].lower() == b"solid" and re.search(rb"(?i)\bfacet\b", data[:4096]) is not None


def _part(corners: np.ndarray, look: dict[str, np.ndarray]) -> trimesh.Trimesh:
    return make_part(corners, np.arange(len(corners)).reshape(-1, 3), **look)


def _colours(header: bytes, attribute: np.ndarray) -> dict[str, np.ndarray]:
    """5 bits a channel: red is highest where bit 15 says that there is a colour; Magics has it the other way
    round and its header names the colour of the others."""
    bits = np.stack([(attribute >> shift) & 31 for shift in (0, 5, 10)], axis=1) / 31.0
    own = attribute >> 15 == 1
    start = header.find(b"COLOR=")
    if start >= 0 and len(header) >= start + 10:
        default = np.frombuffer(header[start + 6 : start + 9], np.uint8) / 255.0
        if own.all() or not attribute.any():
            return {"colour": default}
        return {"face_colours": np.where(own[:, None], default, bits)}
    if not own.any():
        return {}
    return {"face_colours": np.where(own[:, None], bits[:, ::-1], 0.6)}
