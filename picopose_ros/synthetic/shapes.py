"""Shapes of procedural objects: random solids of unlike families, without textures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import trimesh


@dataclass(frozen=True)
class Shape:
    """A random solid and how it is textured."""

    mesh: trimesh.Trimesh  # before texturing, unit-ish size
    smooth: bool  # shaded with the vertex normals of the whole shape
    wrap: bool = False  # a cylindrical projection suits it


def triangle_mesh(vertices: np.ndarray, faces: np.ndarray) -> trimesh.Trimesh:
    """A mesh of vertices (n, 3) and faces (m, 3) exactly as given."""
    return trimesh.Trimesh(vertices, faces, process=False)


def _lattice(rows: int, columns: int, close_rows: bool, close_columns: bool) -> np.ndarray:
    """Triangles of a grid of ``rows x columns`` vertices, joined to itself where asked."""
    row = np.arange(rows if close_rows else rows - 1)
    column = np.arange(columns if close_columns else columns - 1)
    r, c = (a.reshape(-1) for a in np.meshgrid(row, column, indexing="ij"))
    r1, c1 = (r + 1) % rows, (c + 1) % columns
    a, b, d, e = r * columns + c, r * columns + c1, r1 * columns + c, r1 * columns + c1
    return np.concatenate([np.stack([a, b, e], -1), np.stack([a, e, d], -1)])


def _outward(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    if mesh.volume < 0:
        mesh.invert()
    return mesh


def _triangulate(outline: np.ndarray) -> np.ndarray:
    """Ear clipping of a simple counter-clockwise polygon ``(n, 2)``; returns ``(n - 2, 3)`` indices."""
    rest = list(range(len(outline)))
    triangles = []
    while len(rest) > 3:
        for at in range(len(rest)):
            i, j, k = rest[at - 1], rest[at], rest[(at + 1) % len(rest)]
            a, b, c = outline[i], outline[j], outline[k]
            if (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]) <= 1e-12:
                continue
            others = outline[[v for v in rest if v not in (i, j, k)]]
            inside = np.ones(len(others), bool)
            for p, q in ((a, b), (b, c), (c, a)):
                inside &= (q[0] - p[0]) * (others[:, 1] - p[1]) - (q[1] - p[1]) * (others[:, 0] - p[0]) >= 0
            if not inside.any():
                triangles.append((i, j, k))
                rest.pop(at)
                break
        else:  # only collinear corners are left: any fan closes the outline
            triangles.extend((rest[0], rest[n], rest[n + 1]) for n in range(1, len(rest) - 1))
            return np.array(triangles)
    triangles.append(tuple(rest))
    return np.array(triangles)


def extrude(outline: np.ndarray, height: float, layers: int, bevel: float = 0.0) -> trimesh.Trimesh:
    """Prism over an outline; with a bevel the rims are drawn in towards the outline's mean."""
    levels = [(z, 1.0) for z in np.linspace(-height / 2, height / 2, layers + 1)]
    if bevel:
        rim = min(bevel, height / 4)
        levels = [(z * (1 - 2 * rim / height), s) for z, s in levels]
        levels = [(-height / 2, 1 - bevel), *levels, (height / 2, 1 - bevel)]
    centre = outline.mean(axis=0)
    rings = [np.column_stack([centre + (outline - centre) * s, np.full(len(outline), z)]) for z, s in levels]
    count = len(outline)
    side = _lattice(len(rings), count, False, True)
    cap = _triangulate(outline)
    faces = np.concatenate([side, cap[:, ::-1], cap + count * (len(rings) - 1)])
    return triangle_mesh(np.concatenate(rings), faces)


def _sphere_grid(rows: int = 36, columns: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latitudes and longitudes of a closed grid and its triangles."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rows)
    longitude = np.linspace(-np.pi, np.pi, columns, endpoint=False)
    lat, lon = np.meshgrid(latitude, longitude, indexing="ij")
    return lat, lon, _lattice(rows, columns, False, True)


def _clean(vertices: np.ndarray, faces: np.ndarray) -> trimesh.Trimesh:
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    mesh.merge_vertices()
    mesh.update_faces(mesh.nondegenerate_faces(height=1e-9))
    return _outward(mesh)


def revolve(profile: np.ndarray, columns: int = 48) -> trimesh.Trimesh:
    """Turn a profile of ``(radius, z)`` rows around the z axis."""
    angle = np.linspace(0, 2 * np.pi, columns, endpoint=False)
    x = profile[:, :1] * np.cos(angle)
    y = profile[:, :1] * np.sin(angle)
    z = np.repeat(profile[:, 1:], columns, axis=1)
    return _clean(np.stack([x, y, z], -1).reshape(-1, 3), _lattice(len(profile), columns, False, True))


def smooth_profile(points: np.ndarray, count: int) -> np.ndarray:
    """Round the corners of a profile by repeated corner cutting, then thin it to ``count`` points."""
    for _ in range(3):
        cut = np.concatenate(
            [0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]], axis=1
        )
        points = np.concatenate([points[:1], cut.reshape(-1, 2), points[-1:]])
    return points[np.unique(np.linspace(0, len(points) - 1, count).astype(int))]


def _box(rng: np.random.Generator) -> Shape:
    size = np.exp(rng.uniform(np.log(0.2), 0, 3))
    if rng.uniform() < 0.6:
        mesh = trimesh.creation.box(size)
        for _ in range(3):
            mesh = mesh.subdivide()
        return Shape(mesh, smooth=False)
    exponent = rng.uniform(0.06, 0.25)  # a superquadric this close to a box is a box with round edges
    return Shape(superquadric_mesh(size / 2, exponent, exponent), smooth=True)


def _polygon(rng: np.random.Generator) -> np.ndarray:
    """A counter-clockwise outline: regular, star-like, irregular, or a letter-like bracket."""
    kind = rng.integers(5)
    if kind <= 1:
        count = int(rng.integers(3, 9))
        angle = np.sort(np.arange(count) + (rng.uniform(-0.3, 0.3, count) if kind else 0)) * 2 * np.pi / count
        radius = rng.uniform(0.6, 1.0, count) if kind else np.ones(count)
    elif kind == 2:
        count = 2 * int(rng.integers(3, 8))
        angle = np.arange(count) * 2 * np.pi / count
        radius = np.where(np.arange(count) % 2, rng.uniform(0.35, 0.8), 1.0)
    elif kind == 3:
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        phase = rng.uniform(0, 2 * np.pi, 4)
        radius = 1 + sum(rng.uniform(0, 0.35) / k * np.cos(k * angle + phase[k - 1]) for k in range(1, 5))
    else:
        a, b = rng.uniform(0.2, 0.5, 2)
        c = rng.uniform(0.2, 0.6)
        brackets = (
            [(0, 0), (1, 0), (1, a), (b, a), (b, 1), (0, 1)],
            [
                (0, 0),
                (1, 0),
                (1, 1),
                (1 - a / 2, 1),
                (1 - a / 2, b),
                (a / 2, b),
                (a / 2, c + 0.35),
                (0, c + 0.35),
            ],
            [
                (c - 0.1, 0),
                (c + 0.2, 0),
                (c + 0.2, a),
                (1, a),
                (1, a + 0.25),
                (0, a + 0.25),
                (0, a),
                (c - 0.1, a),
            ],
        )
        return np.array(brackets[rng.integers(3)], float)
    stretch = rng.uniform(0.6, 1.0)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle) * stretch], axis=-1) / 2


def _prism(rng: np.random.Generator) -> Shape:
    bevel = rng.uniform(0.03, 0.12) if rng.uniform() < 0.4 else 0.0
    return Shape(
        extrude(_polygon(rng), np.exp(rng.uniform(np.log(0.12), np.log(1.8))), 10, bevel), smooth=False
    )


def _bottle(rng: np.random.Generator) -> Shape:
    body, neck = rng.uniform(0.18, 0.4), rng.uniform(0.05, 0.14)
    shoulder, top = rng.uniform(0.5, 0.75), rng.uniform(0.85, 1.1)
    waist = body * rng.uniform(0.7, 1.05)
    cap = neck * rng.uniform(1.0, 1.5)
    profile = [(0, 0), (body * 0.97, 0), (body, 0.04), (waist, shoulder / 2), (body, shoulder)]
    profile += [(neck, shoulder + 0.15), (neck, top - 0.06), (cap, top - 0.06), (cap, top), (0, top)]
    points = np.array(profile)
    if rng.uniform() < 0.6:
        points = smooth_profile(points, 44)
    return Shape(revolve(points), smooth=False, wrap=True)


def _vessel_profile(rng: np.random.Generator) -> np.ndarray:
    height, radius = rng.uniform(0.35, 1.0), rng.uniform(0.3, 0.55)
    base, wall = radius * rng.uniform(0.45, 1.05), radius * rng.uniform(0.06, 0.12)
    middle = (base + radius) / 2 * rng.uniform(0.9, 1.25)
    outer = [(0, 0), (base, 0), (middle, height / 2), (radius, height)]
    inner = [
        (radius - wall, height),
        (middle - wall, height / 2),
        (max(base - wall, 0.05), 2 * wall),
        (0, 2 * wall),
    ]
    return np.array(outer + inner)


def _bowl(rng: np.random.Generator) -> Shape:
    points = _vessel_profile(rng)
    return Shape(
        revolve(smooth_profile(points, 40) if rng.uniform() < 0.7 else points), smooth=False, wrap=True
    )


def _mug(rng: np.random.Generator) -> Shape:
    points = _vessel_profile(rng)
    body = revolve(points)
    height = points[3, 1]
    thick = rng.uniform(0.03, 0.06)
    angle = np.linspace(-np.pi / 2, np.pi / 2, 20)
    reach, rise = rng.uniform(0.18, 0.35), height * rng.uniform(0.25, 0.36)
    start = float(np.interp(height / 2, points[1:4, 1], points[1:4, 0])) - 0.03
    path = np.stack([start + reach * np.cos(angle), 0 * angle, height / 2 + rise * np.sin(angle)], axis=-1)
    handle = sweep(path, np.full(len(path), thick), 12)
    return Shape(trimesh.util.concatenate([body, handle]), smooth=False, wrap=True)


def _turned(rng: np.random.Generator) -> Shape:
    """A turned post: random radii along the axis (chess pieces, knobs, spools)."""
    count = int(rng.integers(4, 10))
    z = np.sort(rng.uniform(0, 1.2, count))
    radius = rng.uniform(0.08, 0.45, count)
    profile = np.concatenate([[(0, z[0])], np.stack([radius, z], -1), [(0, z[-1])]])
    if rng.uniform() < 0.6:
        profile = smooth_profile(profile, 44)
    return Shape(revolve(profile), smooth=False, wrap=True)


def _signed_power(value: np.ndarray, exponent: float) -> np.ndarray:
    return np.sign(value) * np.abs(value) ** exponent


def superquadric_mesh(half: np.ndarray, e1: float, e2: float) -> trimesh.Trimesh:
    """Superquadric with these half axes ``(3,)``; exponents 1 give an ellipsoid, near 0 a box."""
    lat, lon, faces = _sphere_grid()
    across = _signed_power(np.cos(lat), e1)
    x = half[0] * across * _signed_power(np.cos(lon), e2)
    y = half[1] * across * _signed_power(np.sin(lon), e2)
    z = half[2] * _signed_power(np.sin(lat), e1)
    return _clean(np.stack([x, y, z], -1).reshape(-1, 3), faces)


def _superquadric(rng: np.random.Generator) -> Shape:
    half = np.exp(rng.uniform(np.log(0.15), np.log(0.5), 3))
    return Shape(superquadric_mesh(half, rng.uniform(0.25, 2.2), rng.uniform(0.25, 2.2)), smooth=True)


def _capsule(rng: np.random.Generator) -> Shape:
    radius, length = rng.uniform(0.12, 0.35), rng.uniform(0.2, 1.0)
    arc = np.linspace(0, np.pi / 2, 10)
    low = np.stack([radius * np.sin(arc), -radius * np.cos(arc)], -1)
    high = np.stack([radius * rng.uniform(0.6, 1.0) * np.cos(arc), length + radius * np.sin(arc)], -1)
    return Shape(revolve(np.concatenate([low, high])), smooth=True, wrap=rng.uniform() < 0.5)


def _torus(rng: np.random.Generator) -> Shape:
    a, b = np.meshgrid(*[np.linspace(0, 2 * np.pi, n, endpoint=False) for n in (64, 28)], indexing="ij")
    tube, squash = rng.uniform(0.08, 0.22), rng.uniform(0.7, 2.0)
    across = 0.4 + tube * _signed_power(np.cos(b), rng.uniform(0.4, 1.2))
    z = tube * squash * _signed_power(np.sin(b), rng.uniform(0.4, 1.2))
    vertices = np.stack([across * np.cos(a), across * np.sin(a) * rng.uniform(0.6, 1.0), z], -1).reshape(
        -1, 3
    )
    return Shape(_outward(triangle_mesh(vertices, _lattice(64, 28, True, True))), smooth=True)


def _blend(rng: np.random.Generator) -> Shape:
    """A star-shaped body whose radius mixes two superquadrics along a direction."""
    lat, lon, faces = _sphere_grid()
    ray = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)
    radii = []
    for _ in range(2):
        half, power = np.exp(rng.uniform(np.log(0.2), np.log(0.6), 3)), rng.uniform(1.0, 8.0)
        radii.append((np.abs(ray / half) ** power).sum(axis=-1) ** (-1 / power))
    direction = rng.standard_normal(3)
    weight = 1 / (1 + np.exp(-rng.uniform(2, 6) * (ray @ (direction / np.linalg.norm(direction)))))
    radius = weight * radii[0] + (1 - weight) * radii[1]
    return Shape(_clean((ray * radius[..., None]).reshape(-1, 3), faces), smooth=True)


def sweep(path: np.ndarray, radius: np.ndarray, columns: int) -> trimesh.Trimesh:
    """A closed tube of the given radii along a path ``(n, 3)``."""
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = np.cross(tangent[0], np.eye(3)[np.abs(tangent[0]).argmin()])
    rings = []
    angle = np.linspace(0, 2 * np.pi, columns, endpoint=False)[:, None]
    for point, along, r in zip(path, tangent, radius, strict=True):
        normal = normal - along * (normal @ along)  # parallel transport: the tube doesn't twist
        normal /= np.linalg.norm(normal)
        rings.append(point + r * (np.cos(angle) * normal + np.sin(angle) * np.cross(along, normal)))
    rings = [np.repeat(path[:1], columns, 0), *rings, np.repeat(path[-1:], columns, 0)]
    return _clean(np.concatenate(rings), _lattice(len(rings), columns, False, True))


def _pipe(rng: np.random.Generator) -> Shape:
    """A pipe along a random smooth curve (held out of training)."""
    knots = np.cumsum(rng.normal(0, 0.35, (5, 3)), axis=0)
    t = np.linspace(0, 4, 60)
    path = np.stack([np.interp(t, np.arange(5), knots[:, k]) for k in range(3)], axis=-1)
    for _ in range(40):
        path[1:-1] = 0.25 * path[:-2] + 0.5 * path[1:-1] + 0.25 * path[2:]
    return Shape(
        sweep(path, rng.uniform(0.07, 0.16) * np.linspace(1, rng.uniform(0.6, 1.4), 60), 24), smooth=True
    )


def _stairs(rng: np.random.Generator) -> Shape:
    """A stack of slabs of falling size, each shifted on the one below (held out of training)."""
    slabs, z, size, centre = [], 0.0, rng.uniform(0.6, 1.0, 2), np.zeros(2)
    for _ in range(int(rng.integers(3, 6))):
        height = rng.uniform(0.08, 0.3)
        slab = trimesh.creation.box([*size, height])
        slab.apply_translation([*centre, z + height / 2])
        slabs.append(slab.subdivide().subdivide())
        smaller = size * rng.uniform(0.55, 0.9, 2)
        centre = centre + rng.uniform(-0.5, 0.5, 2) * (size - smaller)
        size, z = smaller, z + height * 0.999
    return Shape(trimesh.util.concatenate(slabs), smooth=False)


Family = Callable[[np.random.Generator], Shape]
TRAINING_SHAPES: dict[str, tuple[Family, float]] = {
    "box": (_box, 0.2),
    "prism": (_prism, 0.2),
    "bottle": (_bottle, 0.08),
    "bowl": (_bowl, 0.06),
    "mug": (_mug, 0.08),
    "turned": (_turned, 0.08),
    "superquadric": (_superquadric, 0.1),
    "capsule": (_capsule, 0.05),
    "torus": (_torus, 0.05),
    "blend": (_blend, 0.1),
}
HELD_OUT_SHAPES: dict[str, tuple[Family, float]] = {"pipe": (_pipe, 0.5), "stairs": (_stairs, 0.5)}
