"""Procedural textures from unlike families, and the box projection that lays them on a mesh.

Every painter takes a seeded generator and returns an RGB image ``(size, size, 3) uint8``. Most families
break the symmetry of the shape that they cover; ``plain_marks`` hardly does, so that a minority of objects
stays ambiguous.
"""

from __future__ import annotations

import string
from collections.abc import Callable

import cv2
import numpy as np
import trimesh
from PIL import Image

Painter = Callable[[np.random.Generator, int], np.ndarray]

_FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
)


def palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw ``count`` colours, ``(count, 3)`` float32 RGB in 0..255: vivid, muted, pale, dark or grey sets."""
    low_s, high_s, low_v, high_v = (
        (0.6, 1.0, 0.5, 1.0),
        (0.15, 0.5, 0.35, 0.8),
        (0.1, 0.4, 0.75, 1.0),
        (0.3, 1.0, 0.25, 0.7),
        (0.0, 0.12, 0.15, 1.0),
        (0.0, 1.0, 0.2, 1.0),
    )[rng.integers(6)]
    hue = (rng.uniform() + rng.uniform(0.03, 0.6) * rng.standard_normal(count)) % 1.0
    hsv = np.stack(
        [hue * 360.0, rng.uniform(low_s, high_s, count), rng.uniform(low_v, high_v, count)], axis=-1
    )
    colours = cv2.cvtColor(hsv[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0] * 255.0
    if rng.uniform() < 0.5:
        colours[rng.integers(count)] = rng.choice([245.0, 25.0])
    return colours


def value_noise(
    rng: np.random.Generator, size: int, cells: int, octaves: int, gain: float = 0.5
) -> np.ndarray:
    """Tileable multi-octave value noise, ``(size, size)`` float32 scaled to 0..1."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        count = min(cells * 2**octave, size)
        grid = np.pad(rng.uniform(0, 1, (count, count)).astype(np.float32), 2, mode="wrap")
        step = size / count
        x = (np.arange(size, dtype=np.float32) / step) + 2.0
        layer = cv2.remap(grid, np.tile(x, (size, 1)), np.tile(x[:, None], (1, size)), cv2.INTER_CUBIC)
        total += gain**octave * layer
    total -= total.min()
    return total / max(float(total.max()), 1e-6)


def _ramp(values: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Map values in 0..1 onto a piecewise-linear colour ramp."""
    at = np.clip(values, 0, 1) * (len(colours) - 1)
    low = np.minimum(at.astype(int), len(colours) - 2)
    weight = (at - low)[..., None]
    return (colours[low] * (1 - weight) + colours[low + 1] * weight).astype(np.uint8)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.linspace(0, 1, size, endpoint=False, dtype=np.float32)
    return np.meshgrid(axis, axis)


def _rotated(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = _grid(size)
    angle = rng.choice([0.0, np.pi / 2, np.pi / 4, rng.uniform(0, np.pi)])
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _point(rng: np.random.Generator, size: int) -> tuple[int, int]:
    x, y = rng.integers(0, size, 2)
    return int(x), int(y)


def _colour(colour: np.ndarray) -> tuple[int, int, int]:
    return tuple(int(c) for c in colour)


def noise(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cloudy multi-octave noise, smooth or in hard levels."""
    field = value_noise(rng, size, int(rng.integers(2, 7)), int(rng.integers(2, 5)), rng.uniform(0.35, 0.7))
    colours = palette(rng, int(rng.integers(2, 6)))
    if rng.uniform() < 0.4:
        return colours[(np.clip(field, 0, 0.999) * len(colours)).astype(int)].astype(np.uint8)
    return _ramp(field, colours)


def stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Bands of uneven width, straight or wavy."""
    u, v = _rotated(rng, size)
    if rng.uniform() < 0.5:
        u = u + rng.uniform(0.02, 0.12) * np.sin(2 * np.pi * rng.integers(1, 4) * v + rng.uniform(0, 6))
    edges = np.sort(rng.uniform(-1.2, 1.6, int(rng.integers(12, 40))))
    colours = palette(rng, int(rng.integers(3, 7)))
    band = rng.integers(0, len(colours), len(edges) + 1)
    return colours[band[np.searchsorted(edges, u)]].astype(np.uint8)


def checks(rng: np.random.Generator, size: int) -> np.ndarray:
    """A checkerboard whose cells have several colours, so that it rarely repeats itself."""
    u, v = _rotated(rng, size)
    count = int(rng.integers(3, 9))
    a, b = np.floor(u * count).astype(int), np.floor(v * count * rng.uniform(0.6, 1.6)).astype(int)
    colours = palette(rng, int(rng.integers(2, 6)))
    table = rng.integers(0, len(colours), (64, 64))
    index = (a + b) % 2 if rng.uniform() < 0.2 else table[a % 64, b % 64]
    return colours[index % len(colours)].astype(np.uint8)


def dots(rng: np.random.Generator, size: int) -> np.ndarray:
    """Discs and rings of several sizes on a plain or cloudy ground."""
    colours = palette(rng, int(rng.integers(3, 8)))
    image = np.full((size, size, 3), colours[0], np.uint8)
    top = rng.uniform(0.06, 0.22)
    for _ in range(int(rng.integers(10, 70))):
        radius = int(max(3, size * rng.uniform(0.02, top)))
        thickness = -1 if rng.uniform() < 0.7 else max(2, radius // 4)
        colour = _colour(colours[rng.integers(1, len(colours))])
        cv2.circle(image, _point(rng, size), radius, colour, thickness, cv2.LINE_AA)
    return image


def _word(rng: np.random.Generator) -> str:
    letters = string.ascii_uppercase + string.digits if rng.uniform() < 0.6 else string.ascii_letters
    return "".join(rng.choice(list(letters), int(rng.integers(2, 9))))


def decals(rng: np.random.Generator, size: int) -> np.ndarray:
    """Print as on a package: words, paragraphs of small print, bar codes, badges and logo-like marks."""
    colours = palette(rng, int(rng.integers(3, 6)))
    image = np.full((size, size, 3), colours[0], np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        x, y = _point(rng, size)
        width, height = rng.integers(size // 8, size // 2, 2)
        ink = _colour(colours[rng.integers(1, len(colours))])
        cv2.rectangle(image, (x, y), (x + int(width), y + int(height)), ink, -1)
    for _ in range(int(rng.integers(8, 22))):
        x, y = _point(rng, size)
        ink = _colour(colours[rng.integers(1, len(colours))] if rng.uniform() < 0.7 else palette(rng, 1)[0])
        kind = rng.integers(5)
        if kind <= 1:
            scale = size / 512 * rng.uniform(0.8, 4.0)
            thickness = max(1, int(scale * rng.uniform(1, 3)))
            font = _FONTS[rng.integers(len(_FONTS))]
            cv2.putText(image, _word(rng), (x - size // 8, y), font, scale, ink, thickness, cv2.LINE_AA)
        elif kind == 2:
            scale = size / 512 * rng.uniform(0.35, 0.6)
            for line in range(int(rng.integers(3, 8))):
                text = " ".join(_word(rng) for _ in range(int(rng.integers(2, 4))))
                at = (x - size // 8, y + int(line * scale * 34))
                cv2.putText(image, text, at, _FONTS[0], scale, ink, 1, cv2.LINE_AA)
        elif kind == 3:
            height, column = int(size * rng.uniform(0.05, 0.2)), x
            for _ in range(int(rng.integers(8, 24))):
                bar = int(rng.integers(1, max(2, size // 64)))
                cv2.rectangle(image, (column, y), (column + bar, y + height), ink, -1)
                column += bar + int(rng.integers(2, max(3, size // 50)))
        else:
            corners = int(rng.integers(3, 8))
            angle = np.arange(corners) * 2 * np.pi / corners + rng.uniform(0, 6)
            radius = (
                size * rng.uniform(0.04, 0.14) * np.where(np.arange(corners) % 2, rng.uniform(0.4, 1.0), 1.0)
            )
            badge = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=-1).astype(
                np.int32
            )
            cv2.fillPoly(image, [badge], ink, cv2.LINE_AA)
            cv2.circle(
                image, (x, y), max(2, int(radius.min() * 0.5)), _colour(palette(rng, 1)[0]), -1, cv2.LINE_AA
            )
    return image


def voronoi(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cells of the nearest of random points, with or without joints between them."""
    count = int(rng.integers(12, 70))
    points = rng.uniform(0, 1, (count, 2)).astype(np.float32)
    small = min(size, 256)
    x, y = _grid(small)
    gaps = [np.abs(g[..., None] - points[None, None, :, i]) for i, g in enumerate((x, y))]
    distance = sum(np.minimum(gap, 1 - gap) ** 2 for gap in gaps)
    nearest = np.argmin(distance, axis=-1)
    base = palette(rng, int(rng.integers(3, 9)))
    colours = base[rng.integers(0, len(base), count)] + rng.normal(0, 12, (count, 3))
    image = np.clip(colours, 0, 255)[nearest]
    if rng.uniform() < 0.4:
        two = np.sqrt(np.partition(distance, 1, axis=-1)[..., :2])
        image = np.where((two[..., 1:] - two[..., :1]) < rng.uniform(0.01, 0.03), palette(rng, 1)[0], image)
    return cv2.resize(image.astype(np.uint8), (size, size), interpolation=cv2.INTER_LINEAR)


def collage(rng: np.random.Generator, size: int) -> np.ndarray:
    """Rectangles, lines and triangles thrown on each other."""
    colours = palette(rng, int(rng.integers(4, 9)))
    image = np.full((size, size, 3), colours[0], np.uint8)
    for _ in range(int(rng.integers(10, 36))):
        colour = _colour(colours[rng.integers(len(colours))])
        kind = rng.integers(3)
        if kind == 0:
            x, y = _point(rng, size)
            w, h = (size * rng.uniform(0.04, 0.4, 2)).astype(int)
            cv2.rectangle(image, (x, y), (x + int(w), y + int(h)), colour, -1)
        elif kind == 1:
            thickness = int(max(2, size * rng.uniform(0.005, 0.03)))
            cv2.line(image, _point(rng, size), _point(rng, size), colour, thickness, cv2.LINE_AA)
        else:
            centre = np.array(_point(rng, size))
            corners = (centre + size * rng.uniform(-0.18, 0.18, (3, 2))).astype(np.int32)
            cv2.fillPoly(image, [corners], colour, cv2.LINE_AA)
    return image


def gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    """Colour ramps, straight or round, with a few soft spots."""
    u, v = _rotated(rng, size)
    field = u if rng.uniform() < 0.5 else np.hypot(u - rng.uniform(0, 1), v - rng.uniform(0, 1))
    image = _ramp((field - field.min()) / np.ptp(field), palette(rng, int(rng.integers(2, 5)))).astype(
        np.float32
    )
    x, y = _grid(size)
    for colour in palette(rng, int(rng.integers(2, 7))):
        cx, cy, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.04, 0.2)
        weight = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * radius**2))[..., None]
        image = image * (1 - weight) + colour * weight
    return image.astype(np.uint8)


def plain_marks(rng: np.random.Generator, size: int) -> np.ndarray:
    """One colour with faint mottling and a handful of marks: a nearly textureless object."""
    colours = palette(rng, 3)
    mottle = value_noise(rng, size, 4, 3)[..., None]
    image = np.ascontiguousarray(np.clip(colours[0] + 24 * (mottle - 0.5), 0, 255).astype(np.uint8))
    for _ in range(int(rng.integers(0, 7))):
        x, y = _point(rng, size)
        w, h = (size * rng.uniform(0.02, 0.12, 2)).astype(int)
        colour = _colour(colours[rng.integers(1, 3)])
        if rng.uniform() < 0.5:
            cv2.rectangle(image, (x, y), (x + int(w), y + int(h)), colour, -1)
        else:
            cv2.ellipse(image, (x, y), (int(w), int(h)), rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
    return image


def marble(rng: np.random.Generator, size: int) -> np.ndarray:
    """Veins: a sine whose phase is bent by noise (held out of training)."""
    u, _ = _rotated(rng, size)
    bend = value_noise(rng, size, 3, 5)
    field = 0.5 + 0.5 * np.sin(
        2 * np.pi * (rng.uniform(1, 4) * u + rng.uniform(1.5, 4) * bend) + rng.uniform(0, 6)
    )
    return _ramp(field ** rng.uniform(0.4, 2.5), palette(rng, int(rng.integers(2, 5))))


def bricks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Courses of bricks of uneven colour with mortar (held out of training)."""
    colours = palette(rng, 5)
    image = np.full((size, size, 3), colours[0], np.uint8)
    rows, columns = int(rng.integers(5, 12)), int(rng.integers(3, 7))
    height, width = size / rows, size / columns
    joint = max(1, int(size * rng.uniform(0.004, 0.014)))
    for row in range(rows):
        for column in range(-1, columns + 1):
            x = (column + 0.5 * (row % 2)) * width
            colour = np.clip(colours[rng.integers(1, 5)] + rng.normal(0, 15, 3), 0, 255)
            first = (int(x) + joint, int(row * height) + joint)
            last = (int(x + width) - joint, int((row + 1) * height) - joint)
            cv2.rectangle(image, first, last, _colour(colour), -1)
    return image


#: Families a training object may wear, with their share. ``plain_marks`` is the ambiguous minority.
TRAINING_TEXTURES: dict[str, tuple[Painter, float]] = {
    "noise": (noise, 0.12),
    "stripes": (stripes, 0.1),
    "checks": (checks, 0.1),
    "dots": (dots, 0.12),
    "decals": (decals, 0.18),
    "voronoi": (voronoi, 0.11),
    "collage": (collage, 0.12),
    "gradient": (gradient, 0.08),
    "plain_marks": (plain_marks, 0.07),
}
#: Families that no training object ever wears.
HELD_OUT_TEXTURES: dict[str, tuple[Painter, float]] = {"marble": (marble, 0.5), "bricks": (bricks, 0.5)}


def paint(rng: np.random.Generator, size: int = 512, held_out: bool = False) -> tuple[str, np.ndarray]:
    """Draw a family and paint one texture.

    Returns the family's name and the image ``(size, size, 3) uint8`` RGB. With ``held_out`` only the
    families that training never sees are drawn.
    """
    families = HELD_OUT_TEXTURES if held_out else TRAINING_TEXTURES
    names = list(families)
    share = np.array([families[name][1] for name in names])
    name = names[rng.choice(len(names), p=share / share.sum())]
    return name, np.ascontiguousarray(families[name][0](rng, size))


def _with_texture(
    vertices: np.ndarray, faces: np.ndarray, uv: np.ndarray, normals: np.ndarray | None, image: np.ndarray
) -> trimesh.Trimesh:
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(image), metallicFactor=0.0, roughnessFactor=1.0
    )
    visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return trimesh.Trimesh(vertices, faces, vertex_normals=normals, visual=visual, process=False)


def project_box(
    mesh: trimesh.Trimesh, image: np.ndarray, rng: np.random.Generator, scale: float, smooth: bool
) -> trimesh.Trimesh:
    """Lay a texture on a mesh from the six sides of its box.

    A face takes the side its normal points to most; vertices are split between sides. Every side reads the
    image at an offset of its own, so that opposite sides differ.

    :param mesh: shape in metres.
    :param image: ``(S, S, 3) uint8`` RGB, repeated beyond its border.
    :param scale: metres of the object that one image width covers.
    :param smooth: keep the vertex normals of the unsplit shape (curved parts) instead of hard edges between
        sides.
    """
    normals = mesh.face_normals
    axis = np.abs(normals).argmax(axis=1)
    side = 2 * axis + (normals[np.arange(len(axis)), axis] < 0)
    corners = mesh.faces.reshape(-1).astype(np.int64) * 6 + np.repeat(side, 3)
    keys, inverse = np.unique(corners, return_inverse=True)
    vertex, vertex_side = keys // 6, keys % 6
    points = mesh.vertices[vertex]
    first = np.array([1, 0, 0])[vertex_side // 2]
    second = np.array([2, 2, 1])[vertex_side // 2]
    rows = np.arange(len(points))
    u, v = points[rows, first], points[rows, second]
    # seen from outside, u runs to the right on every side: print is not mirrored
    u = np.where((vertex_side % 2 == 1) != (vertex_side // 2 == 1), -u, u)
    offset = rng.uniform(0, 1, (6, 2))
    uv = np.stack([u, v], axis=-1) / scale + offset[vertex_side]
    kept = mesh.vertex_normals[vertex] if smooth else None
    return _with_texture(points, inverse.reshape(-1, 3), uv, kept, image)


def project_cylinder(
    mesh: trimesh.Trimesh, image: np.ndarray, rng: np.random.Generator, scale: float, smooth: bool
) -> trimesh.Trimesh:
    """Wrap a texture once around the z axis, as a label around a bottle; caps are projected from above and
    below.

    Parameters are those of :func:`project_box`; ``scale`` applies along the axis and to the caps.
    """
    centre = mesh.bounds.mean(axis=0)
    centroid = mesh.triangles_center - centre
    cap = np.abs(mesh.face_normals[:, 2]) > 0.85
    theta_face = np.arctan2(centroid[:, 1], centroid[:, 0])
    points = mesh.vertices[mesh.faces] - centre
    theta = np.arctan2(points[..., 1], points[..., 0])
    theta = theta_face[:, None] + (theta - theta_face[:, None] + np.pi) % (2 * np.pi) - np.pi
    theta = np.where(np.hypot(points[..., 0], points[..., 1]) < 1e-9, theta_face[:, None], theta)
    offset = rng.uniform(0, 1, (3, 2))
    turns = max(
        1.0, np.round(2 * np.pi * mesh.extents[:2].max() / 2 / scale)
    )  # whole turns: no seam in the print
    wrapped = np.stack([theta / (2 * np.pi) * turns, points[..., 2] / scale], axis=-1) + offset[0]
    flat = points[..., :2] / scale + np.where(mesh.face_normals[:, 2] > 0, 1, 2)[:, None, None] * offset[1]
    uv = np.where(cap[:, None, None], flat, wrapped).reshape(-1, 2)
    index = mesh.faces.reshape(-1)
    rounded = np.round(np.column_stack([index, uv * 4096]), 0).astype(np.int64)
    _, first, inverse = np.unique(rounded, axis=0, return_index=True, return_inverse=True)
    kept = mesh.vertex_normals[index[first]] if smooth else None
    return _with_texture(mesh.vertices[index[first]], inverse.reshape(-1, 3), uv[first], kept, image)
