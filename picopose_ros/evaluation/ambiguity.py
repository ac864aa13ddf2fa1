"""Which objects look the same in two poses: a rule on shape and texture alone, made before any evaluation.

An object is turned about the centre of its surface by a fixed set of rotations of 30 degrees and more, and
rendered without light from 12 directions. A pixel of the two silhouettes *differs* where only one of them has
it, where the colours are more than :data:`COLOUR_STEP` apart, or the surfaces more than :data:`DEPTH_STEP` of
the object's size. The share of pixels that differ, averaged over the directions, measures how visible the
rotation is; the smallest such share over all rotations is the object's *margin*.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import trimesh
from scipy.spatial import cKDTree

from picopose_ros.templates.meshes import Symmetries
from picopose_ros.templates.renderer import MeshRenderer, Rendering
from picopose_ros.templates.viewpoints import icosphere

#: An object with a smaller margin is ambiguous. Chosen by looking at some 20 objects with margins of .02 to
#: .35, 16 of other seeds than the benchmark's and 7 of its own: below it, one sees no difference in several
#: of the directions; above it, print or marks distinguish the two poses in nearly all. No network was used.
#: On the benchmark's objects any value from .11 to .21 says the same.
AMBIGUOUS_MARGIN = 0.15
#: A rotation that changes less than this share of the pixels in each of six directions is a symmetry.
SYMMETRY_SHARE = 0.04
#: Colours this far apart (largest channel, 8 bit, after a slight blur) are seen as different.
COLOUR_STEP = 25.0
#: Surfaces this far apart (share of twice the object's radius) are seen as different.
DEPTH_STEP = 0.03
#: Smaller rotations do not count: where nothing else is alike, they are a small error and not another pose.
SMALLEST_ANGLE = 30.0

_SIDE = 96
_DISTANCE, _TILE = 40.0, 2.25  # of the camera, and the side of a tile, in radii of the object
_SAMPLES = 4000
_ALL = tuple(range(12))
_FEW, _MORE = (0, 4, 8), (2, 6, 10)  # directions: to choose candidates by, and to settle symmetries with
_FINALISTS = 16
_SAME_ANGLE = 7.0  # degrees; less than half a step of the rotations that are tried
_WHOLE_TURN = 19  # of the 21 steps of 15 degrees from 30 to 330
_MOST_SYMMETRIES = 60
_WORTH_LOOKING = 0.12  # mean gap of the surfaces in radii


@dataclass(frozen=True)
class Ambiguity:
    """How similar an object looks after a rotation."""

    margin: float
    """Smallest share of differing pixels over the rotations, mean over the directions; 1 if no rotation
    even keeps the shape."""
    rotation: np.ndarray
    """(4, 4) the rotation of the margin, in the mesh's frame, metres; the identity if there is none."""
    symmetries: Symmetries
    """The rotations after which the object looks the same, in the mesh's frame."""

    @property
    def ambiguous(self) -> bool:
        """Whether the margin is below :data:`AMBIGUOUS_MARGIN`."""
        return self.margin < AMBIGUOUS_MARGIN

    @property
    def symmetric(self) -> bool:
        """Whether a rotation is a symmetry of shape and texture (BOP: ADD-S is for these)."""
        return bool(self.symmetries.discrete or self.symmetries.continuous)


def _about(axis: np.ndarray, degrees: float) -> np.ndarray:
    return trimesh.transformations.rotation_matrix(np.deg2rad(degrees), axis)[:3, :3]


def _angles() -> list[float]:
    """Every 15 degrees, and the steps of the regular pentagon and heptagon, which these do not contain."""
    angles = {15.0 * k for k in range(1, 24)}
    for corners in (5, 7):
        angles |= {360.0 * k / corners for k in range(1, corners)}
    return sorted(a for a in angles if SMALLEST_ANGLE <= a <= 360 - SMALLEST_ANGLE)


def _cube() -> list[np.ndarray]:
    """The 23 rotations other than the identity that take a cube to itself."""
    turns = []
    for first, second in itertools.permutations(range(3), 2):
        for a, b in itertools.product((-1.0, 1.0), repeat=2):
            x, y = a * np.eye(3)[first], b * np.eye(3)[second]
            turns.append(np.stack([x, y, np.cross(x, y)]))
    return [turn for turn in turns if not np.allclose(turn, np.eye(3))]


def _frames(points: np.ndarray) -> list[np.ndarray]:
    """Axes of possible symmetries, (3, 3) with one per row: the box's, the inertia's, the tightest box's."""
    _, axes = np.linalg.eigh(np.cov(points.T))
    tight = trimesh.bounds.oriented_bounds(points)[0][:3, :3]
    return [np.eye(3), axes.T * np.linalg.det(axes), tight]


def candidate_rotations(points: np.ndarray) -> np.ndarray:
    """The rotations (R, 3, 3) that are tried on an object with these surface points (n, 3).

    About the axes of its box, of its inertia and of its tightest box by every 15 degrees, by the steps of
    regular pentagons and heptagons, and what takes a cube to itself.
    """
    found = []
    for axes in _frames(points):
        found += [axes.T @ turn @ axes for turn in _cube()]
        found += [_about(axis, angle) for axis in axes for angle in _angles()]
    kept = np.array(found[:1])
    for rotation in found[1:]:
        if (np.einsum("nij,ij->n", kept, rotation).max() - 1) / 2 < np.cos(np.deg2rad(1.0)):
            kept = np.concatenate([kept, rotation[None]])
    return kept


class _Booth:
    """Renderings of one object from the 12 directions, from so far away that perspective is negligible."""

    def __init__(self, renderer: MeshRenderer, parts: Sequence[trimesh.Trimesh]) -> None:
        self._renderer, self._parts = renderer, parts
        shape = trimesh.util.concatenate([trimesh.Trimesh(p.vertices, p.faces, process=False) for p in parts])
        self.points = trimesh.sample.sample_surface(shape, _SAMPLES, seed=0)[0]
        # The centre of the surface stays where it is under every symmetry; the box's centre does not.
        self.centre = np.average(shape.triangles_center, axis=0, weights=shape.area_faces)
        self.radius = float(np.linalg.norm(shape.vertices - self.centre, axis=1).max())
        # Aslant, so that no direction looks along an axis of a box, where two sides would be all there is.
        slant = _about(np.array([0.3, 0.5, 0.81]), 23.0)
        self._views = []  # R_cam_obj
        for direction in icosphere(0) @ slant.T:
            x = np.cross(direction, [0.13, 0.37, 0.92])
            x /= np.linalg.norm(x)
            self._views.append(np.stack([x, np.cross(-direction, x), -direction]))
        self._plain: dict[tuple[int, ...], Rendering] = {}

    def about_centre(self, rotation: np.ndarray) -> np.ndarray:
        """(4, 4) the rotation (3, 3) about the object's centre, in the mesh's frame."""
        T = np.eye(4)
        T[:3, :3], T[:3, 3] = rotation, self.centre - rotation @ self.centre
        return T

    def look(self, rotation: np.ndarray, directions: tuple[int, ...]) -> Rendering:
        """The turned object from some directions, side by side in one picture of square tiles."""
        count = len(directions)
        items = []
        for tile, direction in enumerate(directions):
            T = np.eye(4)
            T[:3, :3] = self._views[direction] @ rotation
            aside = (tile - (count - 1) / 2) * _TILE
            T[:3, 3] = self.radius * np.array([aside, 0, _DISTANCE]) - T[:3, :3] @ self.centre
            items.append((self._parts, T))
        focal = _DISTANCE * _SIDE / _TILE
        K = np.array([[focal, 0, (count * _SIDE - 1) / 2], [0, focal, (_SIDE - 1) / 2], [0, 0, 1.0]])
        view = self._renderer.render_scene(items, K, count * _SIDE, _SIDE)
        return Rendering(cv2.GaussianBlur(view.rgb, (0, 0), 0.8), view.depth)

    def differing(self, rotation: np.ndarray, directions: tuple[int, ...]) -> np.ndarray:
        """Share of the pixels that differ when the object is turned, per direction."""
        if directions not in self._plain:
            self._plain[directions] = self.look(np.eye(3), directions)
        return differing_shares(
            self._plain[directions], self.look(rotation, directions), 2 * self.radius, len(directions)
        )


def differing_shares(one: Rendering, other: Rendering, size: float, tiles: int = 1) -> np.ndarray:
    """Share of the pixels of two silhouettes in which they, the colours or the surfaces differ visibly.

    Args:
        one, other: pictures of the same shape. size: of the object in metres, for the depth's step.
        tiles: how many pictures lie side by side in either.
    Returns:
        (tiles,)
    """
    either, both = one.mask | other.mask, one.mask & other.mask
    red, green, blue = cv2.split(cv2.absdiff(one.rgb, other.rgb))
    colour = cv2.max(cv2.max(red, green), blue) > COLOUR_STEP
    surface = np.abs(one.depth - other.depth) > DEPTH_STEP * size
    # A silhouette's last pixel is a matter of rounding.
    edge = cv2.morphologyEx((either & ~both).astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2), np.uint8)) > 0
    differ = edge | (both & (colour | surface))
    counts, areas = (m.reshape(m.shape[0], tiles, -1).sum(axis=(0, 2)) for m in (differ, either))
    return counts / np.maximum(areas, 1)


def _shape_gap(points: np.ndarray, tree: cKDTree, rotation: np.ndarray) -> float:
    """Mean distance of the turned surface points (n, 3) to the surface's own."""
    return float(tree.query(points @ rotation.T)[0].mean())


def measure_ambiguity(renderer: MeshRenderer, parts: Sequence[trimesh.Trimesh]) -> Ambiguity:
    """Apply the rule to an object.

    Args:
        renderer: without antialiasing. parts: metres, as the mesh reader gives them.
    Raises:
        RenderError: OpenGL fails.
    """
    booth = _Booth(renderer, parts)
    centred = booth.points - booth.centre
    tree, probe = cKDTree(centred), centred[:: _SAMPLES // 400]
    # Where the shapes lie this far apart most pixels differ in depth or silhouette: not worth a picture.
    rotations = [
        R for R in candidate_rotations(centred) if _shape_gap(probe, tree, R) < _WORTH_LOOKING * booth.radius
    ]
    few = [booth.differing(R, _FEW) for R in rotations]
    finalists = np.argsort([shares.mean() for shares in few], kind="stable")[:_FINALISTS]
    margin, best = 1.0, np.eye(3)
    for R in (rotations[i] for i in finalists):
        share = booth.differing(R, _ALL).mean()
        if share < margin:
            margin, best = float(share), R
    alike = [R for R, shares in zip(rotations, few, strict=True) if shares.max() < SYMMETRY_SHARE]
    exact = sorted(((booth.differing(R, _MORE).max(), R) for R in alike), key=lambda pair: pair[0])
    renderer.release(parts)
    symmetries = _as_symmetries([R for share, R in exact if share < SYMMETRY_SHARE], booth)
    return Ambiguity(margin, booth.about_centre(best), symmetries)


def _as_symmetries(rotations: list[np.ndarray], booth: _Booth) -> Symmetries:
    """Put symmetries, the exactest first, into BOP's form: a whole turn about an axis is continuous.

    One continuous axis at most: a sphere's three would be hundreds of thousands of motions.
    """
    kept: list[np.ndarray] = []
    for R in rotations:
        if _is_new(R, kept):
            kept.append(R)
    axes = [trimesh.transformations.rotation_from_matrix(_homogeneous(R))[1] for R in kept]
    for axis in axes:
        if sum(abs(other @ axis) > np.cos(np.deg2rad(2.0)) for other in axes) >= _WHOLE_TURN:
            flips = [R for R in kept if (R @ axis) @ axis < -0.999]
            return Symmetries(tuple(booth.about_centre(R) for R in flips[:1]), ((axis, booth.centre),))
    return Symmetries(tuple(booth.about_centre(R) for R in _closed(kept)))


def _is_new(rotation: np.ndarray, others: Sequence[np.ndarray]) -> bool:
    """Whether a rotation is no other one seen from slightly different axes."""
    return all((np.trace(rotation.T @ R) - 1) / 2 < np.cos(np.deg2rad(_SAME_ANGLE)) for R in others)


def _closed(rotations: list[np.ndarray]) -> list[np.ndarray]:
    """The rotations and what they make one after the other, without the identity.

    A prism's half turns are about more axes than are tried.
    """
    group = [np.eye(3), *rotations]
    for one in group:  # grows meanwhile
        for other in rotations:
            made = one @ other
            if len(group) <= _MOST_SYMMETRIES and _is_new(made, group):
                group.append(made)
    return group[1:]


def _homogeneous(rotation: np.ndarray) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = rotation
    return T
