"""Procedural objects: unlike families of shapes, textured, made from one integer seed.

Seeds below :data:`VALIDATION_SEED` are for training. From there to :data:`UNSEEN_FAMILY_SEED` come
validation objects of the same families, and from there on validation objects whose shape and texture
families training never sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh

from picopose_ros.synthetic.shapes import HELD_OUT_SHAPES, TRAINING_SHAPES, Family, Shape, triangle_mesh
from picopose_ros.synthetic.textures import paint, project_box, project_cylinder

#: Seeds from here on are held out: they must never be trained on.
VALIDATION_SEED = 1_000_000
#: Seeds from here on also use only the shape and texture families that training never sees.
UNSEEN_FAMILY_SEED = 2_000_000
#: Longest-lived bounds of the size draw: bounding-box diagonal in metres, log-uniform.
SIZE_RANGE = (0.02, 1.0)


@dataclass(frozen=True)
class ProceduralObject:
    """One object made from a seed."""

    seed: int
    parts: list[trimesh.Trimesh]  # textured, metres; the origin is anywhere near the object, not its centre
    shape_families: tuple[str, ...]  # one name per part
    texture_families: tuple[str, ...]  # one name per part

    @property
    def bounds(self) -> np.ndarray:
        """Bounding box ``(2, 3)`` in metres."""
        return _bounds(self.parts)

    @property
    def diagonal(self) -> float:
        """Length of the bounding box's diagonal in metres."""
        return float(np.linalg.norm(np.ptp(self.bounds, axis=0)))

    def centred(self) -> list[trimesh.Trimesh]:
        """Copies of the parts with the bounding-box centre at the origin."""
        centre = self.bounds.mean(axis=0)
        return [_moved(part, -centre) for part in self.parts]


def _bounds(parts: list[trimesh.Trimesh]) -> np.ndarray:
    return np.array(
        [np.min([p.bounds[0] for p in parts], axis=0), np.max([p.bounds[1] for p in parts], axis=0)]
    )


def _moved(part: trimesh.Trimesh, shift: np.ndarray) -> trimesh.Trimesh:
    moved = part.copy()
    moved.apply_translation(shift)
    return moved


def _taper_and_bend(rng: np.random.Generator, mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Taper along the longest axis, twist around it, or bend it into an arc; most shapes are left alone."""
    if rng.uniform() > 0.4:
        return mesh
    axis = int(mesh.extents.argmax())
    points = np.roll(mesh.vertices - mesh.bounds.mean(axis=0), 2 - axis, axis=1)
    length = np.ptp(points[:, 2])
    along = points[:, 2] / length
    kind = rng.integers(3)
    if kind == 0:
        points[:, :2] *= (1 + rng.uniform(-0.7, 0.7) * along)[:, None]
    elif kind == 1:
        twist = rng.uniform(-1.2, 1.2) * along
        x, y = points[:, 0].copy(), points[:, 1].copy()
        points[:, 0], points[:, 1] = (
            np.cos(twist) * x - np.sin(twist) * y,
            np.sin(twist) * x + np.cos(twist) * y,
        )
    else:
        angle = rng.uniform(0.4, 1.6)
        radius = length / angle
        if np.abs(points[:, 0]).max() < 0.8 * radius:
            turn = along * angle
            ray = radius - points[:, 0]
            points[:, 0], points[:, 2] = radius - ray * np.cos(turn), ray * np.sin(turn)
    return triangle_mesh(np.roll(points, axis - 2, axis=1), mesh.faces)


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    return trimesh.transformations.random_rotation_matrix(rng.uniform(0, 1, 3))[:3, :3]


def _align(source: np.ndarray, target: np.ndarray, roll: float) -> np.ndarray:
    """Rotation that takes one unit vector to another, rolled about the target."""
    swing = trimesh.geometry.align_vectors(source, target)[:3, :3]
    return trimesh.transformations.rotation_matrix(roll, target)[:3, :3] @ swing


def _surface_point(rng: np.random.Generator, mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray]:
    face = rng.choice(len(mesh.faces), p=mesh.area_faces / mesh.area)
    weight = rng.dirichlet(np.ones(3))
    return weight @ mesh.triangles[face], mesh.face_normals[face]


def _attach(rng: np.random.Generator, body: trimesh.Trimesh, part: trimesh.Trimesh) -> trimesh.Trimesh:
    """Turn and move a part so that a point of its surface lies sunk into a point of the body's surface."""
    at, normal = _surface_point(rng, body)
    own, own_normal = _surface_point(rng, part)
    rotation = _align(own_normal, -normal, rng.uniform(0, 2 * np.pi))
    depth = rng.uniform(0.04, 0.15) * part.extents.min()
    vertices = (part.vertices - own) @ rotation.T + at - depth * normal
    return triangle_mesh(vertices, part.faces)


def _draw(rng: np.random.Generator, families: dict[str, tuple[Family, float]]) -> str:
    share = np.array([weight for _, weight in families.values()])
    return list(families)[rng.choice(len(families), p=share / share.sum())]


def build_object(
    seed: int,
    texture_size: int = 512,
    unseen_shapes: bool | None = None,
    unseen_textures: bool | None = None,
) -> ProceduralObject:
    """Make the object of a seed, with the names of its families.

    :param seed: any non-negative integer; see the module's text for what its range means.
    :param texture_size: side of the texture images in pixels.
    :param unseen_shapes: draw from the shape families that training never sees; None: as the seed's range
        says.
    :param unseen_textures: the same for the texture families.
    :raises ValueError: on a negative seed.
    """
    if seed < 0:
        raise ValueError(f"object seed {seed} is negative: use 0 or more")
    rng = np.random.default_rng([seed, 0x91C0])
    unseen = seed >= UNSEEN_FAMILY_SEED
    if unseen_shapes is None:
        unseen_shapes = unseen
    if unseen_textures is None:
        unseen_textures = unseen
    families = HELD_OUT_SHAPES if unseen_shapes else TRAINING_SHAPES
    count = int(rng.choice([1, 2, 3, 4, 5], p=[0.5, 0.2, 0.15, 0.1, 0.05]))
    names, shapes = [], []
    for index in range(count):
        name = _draw(rng, families)
        shape = families[name][0](rng)
        mesh = _taper_and_bend(rng, shape.mesh)
        mesh = triangle_mesh(mesh.vertices / np.linalg.norm(mesh.extents), mesh.faces)
        if index:
            mesh = triangle_mesh(mesh.vertices * rng.uniform(0.35, 0.95), mesh.faces)
            mesh = _attach(rng, shapes[int(rng.integers(index))].mesh, mesh)
        names.append(name)
        # the wrap follows the z axis, which only the first part still has
        shapes.append(Shape(mesh, shape.smooth, shape.wrap and index == 0))
    whole = _bounds([shape.mesh for shape in shapes])
    diagonal = np.exp(rng.uniform(*np.log(SIZE_RANGE)))
    factor = diagonal / np.linalg.norm(np.ptp(whole, axis=0))
    turn = np.eye(3) if rng.uniform() < 0.7 else _random_rotation(rng)

    shared = paint(rng, texture_size, unseen_textures)
    parts, textures = [], []
    for shape in shapes:
        name, image = shared if rng.uniform() < 0.4 else paint(rng, texture_size, unseen_textures)
        mesh = triangle_mesh(shape.mesh.vertices * factor, shape.mesh.faces)
        scale = float(mesh.extents.max() * rng.uniform(1.1, 2.0))
        project = project_cylinder if shape.wrap and rng.uniform() < 0.7 else project_box
        textured = project(mesh, image, rng, scale, shape.smooth)
        rotation = np.eye(4)
        rotation[:3, :3] = turn
        textured.apply_transform(rotation)
        parts.append(textured)
        textures.append(name)
    spread = _bounds(parts)
    rescale = diagonal / np.linalg.norm(np.ptp(spread, axis=0))  # a turned box has another diagonal
    for part in parts:
        part.apply_scale(rescale)
    return ProceduralObject(seed, parts, tuple(names), tuple(textures))
