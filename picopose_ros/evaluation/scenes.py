"""The benchmark's images: rendered scenes whose poses, masks and depth are known exactly.

Two kinds. ``single`` shows one object with the disturbances of training (light, occluders, background, camera)
in a full-size image, from anywhere and at any turn. ``cluttered`` is a table with several objects of the
folder and strange ones between them, with lamps, shadows and highlights that training never renders.

How hard they are is fixed by the constants below. It was fixed before any network was measured and is never
tuned to one: figures of different :data:`BENCHMARK_VERSION` cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import trimesh
from scipy.spatial import ConvexHull, QhullError

from picopose_ros.errors import ConfigError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.crops import CROP_SIZE
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer
from picopose_ros.training.augment import background as plain_background
from picopose_ros.training.augment import occluder, relight
from picopose_ros.training.objects import VALIDATION_SEED, build_object
from picopose_ros.training.textures import paint

BENCHMARK_VERSION = 1
"""Changes with everything that changes the images of a seed."""

WIDTH, HEIGHT = 640, 480
FOCAL_RANGE = (500.0, 800.0)
"""Focal length in pixels, log-uniform per scene: 64 to 44 degrees across."""
PRINCIPAL_POINT_SHIFT = 12.0
"""Largest distance of the principal point from the image's middle, px, per axis."""

DISTANCE_RANGE = (2.5, 8.0)
"""single: distance of the object's centre in bounding-box diagonals, log-uniform: about 60 to 320 px."""
BORDER_INSET = 0.35
"""single: the centre keeps this share of the object's apparent size from the image's border, so that some
objects are cut off by it, but none by more than a seventh."""
OCCLUSION = 0.5
"""single: share of the scenes with an occluder in front of the object."""
LEAST_LEFT = 0.4
"""single: an occluder that leaves less of the object is drawn again."""

INSTANCES = (4, 6)
"""cluttered: how many objects of the folder stand on the table."""
DISTRACTORS = (2, 4)
"""cluttered: how many strange objects stand between them."""
ELEVATION_RANGE = (20.0, 70.0)
"""cluttered: of the camera above the table, degrees."""
TABLE_DISTANCE_RANGE = (3.5, 7.0)
"""cluttered: of the camera from the middle of the objects, in their mean diameter, log-uniform."""

LEAST_VISIBLE = 0.1
"""Instances that are less visible than this are left out, as in BOP."""
LEAST_PIXELS = 100
"""Instances with fewer visible pixels are left out: no segmenter would find them."""

Kind = Literal["single", "cluttered"]
KINDS: tuple[Kind, ...] = ("single", "cluttered")


@dataclass(frozen=True)
class SceneInstance:
    """One object in a scene."""

    class_id: str
    T_cam_obj: np.ndarray
    """(4, 4) mesh's frame -> camera, metres."""
    visible: np.ndarray
    """(h, w) bool, the pixels that show it."""
    visib_fract: float
    """Visible pixels / pixels of the whole silhouette, those outside the image included."""


@dataclass(frozen=True)
class Scene:
    """An image and the truth about it."""

    name: str
    rgb: np.ndarray
    """(h, w, 3) uint8."""
    depth: np.ndarray
    """(h, w) float32 metres of what is seen; 0 where nothing is known to be."""
    camera: CameraModel
    instances: tuple[SceneInstance, ...]


def make_scenes(
    objects: Sequence[ObjectMesh],
    count: int,
    seed: int,
    kind: Kind = "single",
    background: bool = True,
    start: int = 0,
) -> Iterator[Scene]:
    """Render scenes ``start`` to ``start + count - 1`` of a seed.

    Scene ``i`` depends on the objects, the seed and ``i`` only, so a run can be split. Objects are dealt
    evenly: ``single`` shows object ``i % n``; ``cluttered`` deals all objects out before it shows one again,
    those of about the same size together.

    Args:
        objects: as the mesh reader gives them.
        count: number of scenes.
        seed: of everything random.
        kind: "single" or "cluttered".
        background: False leaves everything black that is no object (single only: a table stays a table).
        start: number of the first scene.
    Raises:
        ConfigError: no objects, another kind, or a negative number.
        RenderError: there is no OpenGL.
    """
    if kind not in KINDS:
        raise ConfigError(f"scenes of kind {kind!r} do not exist: use one of {', '.join(KINDS)}")
    if not objects or count < 0 or start < 0 or seed < 0:
        raise ConfigError(
            f"cannot make {count} scenes from number {start}, seed {seed}, with {len(objects)} objects: "
            "numbers must not be negative, and there must be an object"
        )
    with MeshRenderer() as renderer:
        studio = _Single(renderer, objects, background) if kind == "single" else _Table(renderer, objects)
        for index in range(start, start + count):
            yield studio.scene(seed, index)


def _draw_camera(rng: np.random.Generator) -> CameraModel:
    focal = np.exp(rng.uniform(*np.log(FOCAL_RANGE)))
    cx, cy = rng.uniform(-PRINCIPAL_POINT_SHIFT, PRINCIPAL_POINT_SHIFT, 2) + [(WIDTH - 1) / 2, (HEIGHT - 1) / 2]
    return CameraModel(np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]]), WIDTH, HEIGHT)


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    """Uniform over all rotations: the viewpoint over the sphere, the turn in the image over the circle."""
    return trimesh.transformations.random_rotation_matrix(rng.uniform(0, 1, 3))[:3, :3]


@dataclass(frozen=True)
class _Window:
    """A part of the image plane around one object; it may reach beyond the image."""

    left: int
    top: int
    width: int
    height: int

    def intrinsics(self, K: np.ndarray) -> np.ndarray:
        shifted = K.copy()
        shifted[:2, 2] -= self.left, self.top
        return shifted

    def paste(self, target: np.ndarray, picture: np.ndarray) -> None:
        """Write the part of a picture of this window that lies in the image."""
        inside = self.inside(target.shape)
        if inside is not None:
            target[inside[0]] = picture[inside[1]]

    def inside(self, shape: tuple[int, ...]) -> tuple[tuple[slice, slice], tuple[slice, slice]] | None:
        """Slices of the image and of the window where they overlap; None where they don't."""
        x0, y0 = max(self.left, 0), max(self.top, 0)
        x1, y1 = min(self.left + self.width, shape[1]), min(self.top + self.height, shape[0])
        if x0 >= x1 or y0 >= y1:
            return None
        own = slice(y0 - self.top, y1 - self.top), slice(x0 - self.left, x1 - self.left)
        return (slice(y0, y1), slice(x0, x1)), own


def _window(vertices: np.ndarray, T_cam_obj: np.ndarray, K: np.ndarray) -> _Window:
    """The window that holds the projection of points (n, 3); sizes in steps of 32 px, so that few differ."""
    seen = vertices @ T_cam_obj[:3, :3].T + T_cam_obj[:3, 3]
    uv = seen[:, :2] / np.maximum(seen[:, 2:], 1e-3 * np.abs(seen).max()) * [K[0, 0], K[1, 1]] + K[:2, 2]
    uv = np.clip(uv, [-WIDTH, -HEIGHT], [2 * WIDTH, 2 * HEIGHT])  # right beside the camera, enough is enough
    low, high = np.floor(uv.min(axis=0)).astype(int) - 3, np.ceil(uv.max(axis=0)).astype(int) + 4
    width, height = (int(-(-n // 32) * 32) for n in high - low)
    return _Window(int(low[0]), int(low[1]), width, height)


def _halved(picture: np.ndarray) -> np.ndarray:
    """Every second pixel of a picture, averaged with its neighbours; float32."""
    soft = cv2.sepFilter2D(picture.astype(np.float32), -1, _TENT, _TENT, borderType=cv2.BORDER_REPLICATE)
    return soft[::2, ::2]


_TENT = np.array([0.25, 0.5, 0.25], np.float32)


def _double(K: np.ndarray) -> np.ndarray:
    """Intrinsics of twice the resolution whose even pixels are the pixels of ``K``, centre on centre."""
    return np.diag([2.0, 2.0, 1.0]) @ K


def _camera_effects(rgb: np.ndarray, side: float, rng: np.random.Generator) -> np.ndarray:
    """What a camera does to a picture (h, w, 3) float32, as strong as training does it to a crop.

    Training blurs crops of 224 px, so blur and lost resolution are measured in the crop of an object that is
    ``side`` px large here. Returns uint8.
    """
    zoom = side / CROP_SIZE
    if rng.uniform() < 0.4:
        rgb = cv2.GaussianBlur(rgb, (0, 0), max(rng.uniform(0.3, 1.6) * zoom, 0.2))
    if rng.uniform() < 0.35:
        shrink = min(rng.uniform(60, 200) / side, 1.0)
        size = max(int(rgb.shape[1] * shrink), 8), max(int(rgb.shape[0] * shrink), 8)
        small = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
        rgb = cv2.resize(small, rgb.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    mean = float(rgb.mean())
    rgb = (rgb - mean) * np.float32(rng.uniform(0.7, 1.25)) + np.float32(mean * rng.uniform(0.65, 1.3))
    if rng.uniform() < 0.4:
        grey = rgb.mean(-1, keepdims=True)
        rgb = grey + (rgb - grey) * np.float32(rng.uniform(0.2, 1.4))
    if rng.uniform() < 0.4:
        rgb = rgb * rng.uniform(0.85, 1.15, 3).astype(np.float32)
    if rng.uniform() < 0.6:
        rgb = rgb + rng.standard_normal(rgb.shape, dtype=np.float32) * np.float32(rng.uniform(0, 8))
    shot = np.clip(rgb, 0, 255).astype(np.uint8)
    if rng.uniform() < 0.25:
        coded = cv2.imencode(".jpg", shot, [cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(35, 95))])[1]
        shot = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    return shot


class _Single:
    """One object in front of a picture."""

    def __init__(self, renderer: MeshRenderer, objects: Sequence[ObjectMesh], background: bool) -> None:
        self._renderer, self._objects, self._background = renderer, objects, background

    def scene(self, seed: int, index: int) -> Scene:
        rng = np.random.default_rng([seed, index, 0x51])
        mesh = self._objects[index % len(self._objects)]
        camera = _draw_camera(rng)
        T_cam_obj = self._draw_pose(rng, mesh, camera.K)
        window = _window(mesh.vertices, T_cam_obj, camera.K)
        view = self._renderer.render(
            mesh, T_cam_obj, _double(window.intrinsics(camera.K)), 2 * window.width, 2 * window.height
        )
        depth = np.ascontiguousarray(view.depth[::2, ::2])
        alpha = _halved(view.mask)[..., None]
        albedo = _halved(view.rgb) / np.maximum(alpha, 0.05)
        lit = relight(albedo, depth, depth > 0, float(camera.K[0, 0]), rng)

        picture = self._backdrop(rng, index)
        place = window.inside(picture.shape)
        whole = np.zeros((HEIGHT, WIDTH), np.uint8)
        seen_depth = np.zeros((HEIGHT, WIDTH), np.float32)
        if place is not None:
            image, own = place
            picture[image] = lit[own] * alpha[own] + picture[image] * (1 - alpha[own])
            whole[image] = depth[own] > 0
            seen_depth[image] = depth[own]
        visible = whole
        if rng.uniform() < OCCLUSION and whole.any():
            cover, visible = self._cover(rng, whole)
            if cover is not None:
                filling = self._backdrop(rng, index + 1) if self._background else 0 * picture
                soft = cv2.GaussianBlur(cover.astype(np.float32), (0, 0), 0.6)[..., None]
                picture = filling * soft + picture * (1 - soft)
                seen_depth[cover > 0] = np.float32(0.9 * depth[depth > 0].min())  # it stands before the object
        rows, columns = np.nonzero(whole)
        side = max(np.ptp(rows), np.ptp(columns)) + 1 if len(rows) else CROP_SIZE
        rgb = _camera_effects(picture, float(side), rng)
        instance = _instance(mesh, T_cam_obj, visible > 0, int((depth > 0).sum()))
        return Scene(
            f"single-{seed}-{index:05d}", rgb, seen_depth, camera, () if instance is None else (instance,)
        )

    def _draw_pose(self, rng: np.random.Generator, mesh: ObjectMesh, K: np.ndarray) -> np.ndarray:
        rotation = _random_rotation(rng)
        distance = mesh.diagonal * np.exp(rng.uniform(*np.log(DISTANCE_RANGE)))
        inset = BORDER_INSET * K[0, 0] * mesh.diagonal / distance
        uv = rng.uniform([inset, inset], [WIDTH - 1 - inset, HEIGHT - 1 - inset])
        ray = np.linalg.inv(K) @ [*uv, 1.0]
        T = np.eye(4)
        T[:3, :3] = rotation
        T[:3, 3] = distance * ray / np.linalg.norm(ray) - rotation @ mesh.centre
        return T

    def _backdrop(self, rng: np.random.Generator, index: int) -> np.ndarray:
        """A picture (h, w, 3) float32: plain, soft, a painted texture, or a magnified piece of an object."""
        if not self._background:
            return np.zeros((HEIGHT, WIDTH, 3), np.float32)
        if rng.uniform() < 0.4:
            picture = paint(rng, 256, held_out=bool(rng.uniform() < 0.2))[1]
        else:
            other = self._objects[(index + 1 + int(rng.integers(len(self._objects)))) % len(self._objects)]
            T = np.eye(4)
            T[:3, :3] = _random_rotation(rng)
            T[:3, 3] = [0, 0, 1.6 * other.diagonal] - T[:3, :3] @ other.centre
            K = np.array([[300.0, 0, 127.5], [0, 300.0, 127.5], [0, 0, 1]])
            picture = plain_background(self._renderer.render(other, T, K, 256, 256).rgb, rng)
        picture = np.rot90(picture, int(rng.integers(4)))
        wide = cv2.resize(np.ascontiguousarray(picture), (WIDTH, WIDTH), interpolation=cv2.INTER_LINEAR)
        return wide[:HEIGHT].astype(np.float32)

    @staticmethod
    def _cover(rng: np.random.Generator, whole: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """An occluder (uint8), or None if none leaves enough, and what it leaves of the object."""
        for _ in range(10):
            cover = occluder(whole, rng)
            left = whole & ~cover
            if LEAST_LEFT * whole.sum() <= left.sum() < whole.sum():
                return cover, left
        return None, whole


def _instance(
    mesh: ObjectMesh, T_cam_obj: np.ndarray, visible: np.ndarray, whole: int
) -> SceneInstance | None:
    """The instance, or None if too little of it is visible; ``whole`` is its silhouette's number of pixels."""
    pixels = int(visible.sum())
    if pixels < LEAST_PIXELS or pixels < LEAST_VISIBLE * whole:
        return None
    return SceneInstance(mesh.spec.class_id, T_cam_obj, visible, pixels / whole)


# --- cluttered ---------------------------------------------------------------------------------------------

_SHELF = 20  # strange objects that there are
_SHELF_SEED = VALIDATION_SEED + 700_000
_SUN_SIZE = 1024  # of the shadow map


@dataclass(frozen=True)
class _Solid:
    """Something on the table, in its own frame."""

    parts: Sequence[trimesh.Trimesh]
    normals: list[trimesh.Trimesh]  # the same with its normals as colours
    corners: np.ndarray  # (n, 3) of the convex hull
    rests: np.ndarray  # (k, 3, 3) rotations in which it lies or stands still, z up
    likely: np.ndarray  # (k,) shares of them
    diameter: float


def _solid(parts: Sequence[trimesh.Trimesh], diameter: float | None = None) -> _Solid:
    vertices = np.concatenate([part.vertices for part in parts])
    rests, likely = _resting(vertices)
    try:
        corners = vertices[ConvexHull(vertices).vertices]
    except QhullError:  # flat
        corners = vertices
    size = float(np.linalg.norm(np.ptp(vertices, axis=0))) if diameter is None else diameter
    return _Solid(parts, [_normal_coloured(part) for part in parts], corners, rests, likely, size)


def _normal_coloured(part: trimesh.Trimesh) -> trimesh.Trimesh:
    """The part with its normals as colours, (n + 1) / 2; smooth but for edges of more than 35 degrees."""
    merged = trimesh.Trimesh(part.vertices, part.faces, process=False)
    merged.merge_vertices()  # the texture's seams are no edges
    smooth = trimesh.graph.smooth_shade(merged, angle=np.deg2rad(35.0), facet_minarea=None)
    rgb = np.rint((np.nan_to_num(smooth.vertex_normals) + 1) * 127.5).astype(np.uint8)
    plain = trimesh.Trimesh(smooth.vertices, smooth.faces, process=False)
    plain.visual.vertex_colors = np.column_stack([rgb, np.full(len(rgb), 255, np.uint8)])
    return plain


def _resting(vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (k, 3, 3) that put points (n, 3) onto a side of their hull that carries them, and shares."""
    try:
        hull = trimesh.Trimesh(vertices, ConvexHull(vertices).simplices, process=True)
        hull.fix_normals()
    except QhullError:
        return np.eye(3)[None], np.ones(1)
    centre = hull.center_mass
    rests, shares = [], []
    groups = [*hull.facets, *(np.array([f]) for f in np.setdiff1d(np.arange(len(hull.faces)), np.concatenate([*hull.facets, []])))]
    for group in groups:
        group = np.asarray(group, int)
        down = hull.face_normals[group[0]]
        onto = trimesh.geometry.align_vectors(down, [0, 0, -1.0])[:3, :3]
        outline = (hull.vertices[np.unique(hull.faces[group])] - centre) @ onto.T
        flat = cv2.convexHull(outline[:, :2].astype(np.float32))
        if cv2.pointPolygonTest(flat, (0.0, 0.0), False) < 0:
            continue
        # How often something falls onto a side grows with its area and falls with the height above it.
        rests.append(onto)
        shares.append(hull.area_faces[group].sum() / np.abs(outline[:, 2]).max() ** 2)
    if not rests:
        return np.eye(3)[None], np.ones(1)
    order = np.argsort(shares)[::-1][:64]
    likely = np.sqrt(np.array(shares)[order])
    return np.array(rests)[order], likely / likely.sum()


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two convex outlines (n, 2) share a point (separating axes)."""
    for outline in (one, other):
        edges = np.roll(outline, -1, axis=0) - outline
        axes = np.stack([-edges[:, 1], edges[:, 0]], axis=-1)
        a, b = one @ axes.T, other @ axes.T
        if ((a.max(axis=0) < b.min(axis=0)) | (b.max(axis=0) < a.min(axis=0))).any():
            return False
    return True


class _Table:
    """Objects and strange things on a table, lit by a sun with shadows, the sky and a lamp."""

    def __init__(self, renderer: MeshRenderer, objects: Sequence[ObjectMesh]) -> None:
        self._renderer, self._objects = renderer, objects
        self._solids: dict[int, _Solid] = {}
        self._shelf: dict[int, _Solid] = {}

    def _object(self, index: int) -> _Solid:
        if index not in self._solids:
            mesh = self._objects[index]
            self._solids[index] = _solid(mesh.parts, mesh.diameter)
        return self._solids[index]

    def _strange(self, index: int) -> _Solid:
        """A thing that is in no folder, scaled to a diagonal of 1 m."""
        if index not in self._shelf:
            self._shelf[index] = _solid(_strange_parts(index), 1.0)
        return self._shelf[index]

    def _deal(self, seed: int, index: int) -> list[int]:
        """Which objects scene ``index`` shows: each once per round, those of about the same size together."""
        n = len(self._objects)
        groups = max(1, round(n / np.mean(INSTANCES)))
        rng = np.random.default_rng([seed, index // groups, 0xDEA1])
        size = np.log([mesh.diameter for mesh in self._objects]) + rng.normal(0, 0.35, n)
        chosen = list(np.array_split(np.argsort(size), groups)[index % groups])
        # A folder with few objects shows some of them twice.
        while len(chosen) < INSTANCES[0]:
            chosen.append(int(rng.integers(n)))
        return [int(c) for c in chosen[: INSTANCES[1]]]

    def scene(self, seed: int, index: int) -> Scene:
        rng = np.random.default_rng([seed, index, 0x7AB1E])
        camera = _draw_camera(rng)
        chosen = self._deal(seed, index)
        size = float(np.exp(np.mean(np.log([self._object(i).diameter for i in chosen]))))
        items = [(self._object(i), 1.0) for i in chosen]
        for _ in range(int(rng.integers(DISTRACTORS[0], DISTRACTORS[1] + 1))):
            items.append((self._strange(int(rng.integers(_SHELF))), size * rng.uniform(0.5, 1.3)))
        poses = _arrange(rng, items, size)
        T_cam_world = self._draw_view(rng, poses, size)
        flat = _floor(rng, size)
        return self._shoot(f"cluttered-{seed}-{index:05d}", rng, camera, chosen, items, poses, flat, T_cam_world, size)

    @staticmethod
    def _draw_view(rng: np.random.Generator, poses: list[np.ndarray], size: float) -> np.ndarray:
        middle = np.mean([T[:3, 3] for T in poses], axis=0) * [1, 1, 0] + [0, 0, 0.3 * size]
        elevation = np.deg2rad(rng.uniform(*ELEVATION_RANGE))
        azimuth = rng.uniform(0, 2 * np.pi)
        ray = [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
        target = middle + rng.uniform(-0.4, 0.4, 3) * size * [1, 1, 0]
        eye = target + size * np.exp(rng.uniform(*np.log(TABLE_DISTANCE_RANGE))) * np.array(ray)
        roll = trimesh.transformations.rotation_matrix(np.deg2rad(rng.normal(0, 8.0)), [0, 0, 1])
        return roll @ _look_at(eye, target)

    def _shoot(
        self,
        name: str,
        rng: np.random.Generator,
        camera: CameraModel,
        chosen: list[int],
        items: list[tuple[_Solid, float]],
        poses: list[np.ndarray],
        flat: list[trimesh.Trimesh],
        T_cam_world: np.ndarray,
        size: float,
    ) -> Scene:
        K = camera.K
        seen = [T_cam_world @ T for T in poses]
        everything = [(solid.parts, T) for (solid, _), T in zip(items, seen, strict=True)]
        table = [(flat, T_cam_world)]
        view = self._renderer.render_scene(everything + table, _double(K), 2 * WIDTH, 2 * HEIGHT)
        albedo, depth = _halved(view.rgb), np.ascontiguousarray(view.depth[::2, ::2])

        # Who is where: every solid alone, and the nearest one wins.
        label = np.full(depth.shape, -1)
        nearest = np.where(depth > 0, depth, np.inf) + 1e-3 * size
        wholes = []
        for number, ((solid, _), T) in enumerate(zip(items, seen, strict=True)):
            window = _window(solid.corners, T, K)
            alone = self._renderer.render(
                solid.parts, T, window.intrinsics(K), window.width, window.height
            ).depth
            wholes.append(int((alone > 0).sum()))
            place = window.inside(depth.shape)
            if place is not None:
                image, own = place
                closer = (alone[own] > 0) & (alone[own] < nearest[image])
                nearest[image][closer] = alone[own][closer]
                label[image][closer] = number

        lit = self._light(rng, albedo, depth, label, items, poses, seen, T_cam_world, K, size)
        rgb = _camera_effects(lit, float(K[0, 0] * size / np.mean([T[2, 3] for T in seen])), rng)
        instances = [
            _instance(self._objects[index], seen[number], label == number, max(wholes[number], 1))
            for number, index in enumerate(chosen)
        ]
        return Scene(name, rgb, depth, camera, tuple(one for one in instances if one is not None))

    def _light(
        self,
        rng: np.random.Generator,
        albedo: np.ndarray,
        depth: np.ndarray,
        label: np.ndarray,
        items: list[tuple[_Solid, float]],
        poses: list[np.ndarray],
        seen: list[np.ndarray],
        T_cam_world: np.ndarray,
        K: np.ndarray,
        size: float,
    ) -> np.ndarray:
        """The albedo (h, w, 3) under sun, sky and a lamp, exposed; float32."""
        coloured = [(solid.normals, T) for (solid, _), T in zip(items, seen, strict=True)]
        raw = self._renderer.render_scene(coloured, K, WIDTH, HEIGHT).rgb.astype(np.float32) / 127.5 - 1
        normal = np.zeros_like(raw)
        normal[..., 2] = 1.0  # the table and the floor
        gloss = np.zeros(depth.shape, np.float32)
        shine = np.full(depth.shape, 20.0, np.float32)
        for number, T in enumerate(poses):
            here = label == number
            turn = T[:3, :3] / np.cbrt(np.linalg.det(T[:3, :3]))
            normal[here] = raw[here] @ turn.T.astype(np.float32)
            if rng.uniform() < 0.5:
                gloss[here], shine[here] = rng.uniform(0.05, 0.5), rng.uniform(8, 80)
        normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-3)

        rows, columns = np.indices(depth.shape, np.float32)
        rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(K).T.astype(np.float32)
        T_world_cam = np.linalg.inv(T_cam_world)
        points = (rays * depth[..., None]) @ T_world_cam[:3, :3].T.astype(np.float32) + T_world_cam[
            :3, 3
        ].astype(np.float32)
        towards = T_world_cam[:3, 3].astype(np.float32) - points
        towards /= np.maximum(np.linalg.norm(towards, axis=-1, keepdims=True), 1e-9)
        normal = np.where((normal * towards).sum(-1, keepdims=True) < 0, -normal, normal)

        height, azimuth = np.deg2rad(rng.uniform(25, 75)), rng.uniform(0, 2 * np.pi)
        sun = np.array(
            [np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.sin(height)], np.float32
        )
        shadow = self._shadow(rng, points, normal, items, poses, sun, size)
        lamp_at = size * np.array([*rng.uniform(-5, 5, 2), rng.uniform(2.5, 6)], np.float32)
        to_lamp = lamp_at - points
        far = np.linalg.norm(to_lamp, axis=-1, keepdims=True)
        to_lamp /= far

        warmth = rng.uniform(-0.12, 0.12, 2)
        sun_colour = np.array([1 + warmth[0], 1.0, 1 - warmth[0]], np.float32) * rng.uniform(0.4, 1.1)
        sky_colour = np.array([1 - warmth[0] / 2, 1.0, 1 + warmth[0] / 2], np.float32) * rng.uniform(0.25, 0.6)
        lamp_colour = np.array([1 + warmth[1], 1.0, 1 - warmth[1]], np.float32) * rng.uniform(0, 0.5)
        fall = (5 * size / far) ** 2 / 1.5
        light = sky_colour * (0.65 + 0.35 * normal[..., 2:])
        light = light + sun_colour * (np.clip((normal @ sun), 0, None) * shadow)[..., None]
        light = light + lamp_colour * np.clip((normal * to_lamp).sum(-1, keepdims=True), 0, None) * np.minimum(fall, 2)
        image = albedo * light
        half = towards + sun
        half /= np.maximum(np.linalg.norm(half, axis=-1, keepdims=True), 1e-9)
        glint = gloss * shadow * np.clip((normal * half).sum(-1), 0, None) ** shine
        image = image + 255 * glint[..., None] * sun_colour

        nothing = depth == 0
        if nothing.any():
            wall = cv2.resize(paint(rng, 128)[1], (WIDTH, WIDTH), interpolation=cv2.INTER_LINEAR)[:HEIGHT]
            image[nothing] = cv2.GaussianBlur(wall, (0, 0), 6.0)[nothing]
        # The camera's automatic exposure.
        return (image * np.float32(rng.uniform(80, 140) / max(float(image.mean()), 1.0))).astype(np.float32)

    def _shadow(
        self,
        rng: np.random.Generator,
        points: np.ndarray,
        normal: np.ndarray,
        items: list[tuple[_Solid, float]],
        poses: list[np.ndarray],
        sun: np.ndarray,
        size: float,
    ) -> np.ndarray:
        """(h, w) float32 0..1: how much of the sun reaches each point."""
        reach = max(
            float(np.linalg.norm(solid.corners @ T[:3, :3].T + T[:3, 3], axis=1).max())
            for (solid, _), T in zip(items, poses, strict=True)
        )
        T_sun_world = _look_at(40 * reach * sun.astype(np.float64), np.zeros(3))
        middle = (_SUN_SIZE - 1) / 2
        focal = 0.96 * middle * 40
        K = np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1.0]])
        solids = [(solid.parts, T_sun_world @ T) for (solid, _), T in zip(items, poses, strict=True)]
        first = self._renderer.render_scene(solids, K, _SUN_SIZE, _SUN_SIZE).depth
        first[first == 0] = np.inf
        texel = reach / middle
        start = points + (1.5 * texel) * normal  # off the surface, or it would shade itself
        seen = start @ T_sun_world[:3, :3].T.astype(np.float32) + T_sun_world[:3, 3].astype(np.float32)
        uv = seen[..., :2] / seen[..., 2:] * np.float32(focal) + np.float32(middle)
        spread = rng.uniform(0.5, 4.0)  # of the penumbra, texels
        lit = np.zeros(points.shape[:2], np.float32)
        offsets = spread * np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(-1, 2)
        for dx, dy in offsets:
            x, y = np.float32(uv[..., 0] + dx), np.float32(uv[..., 1] + dy)
            ahead = cv2.remap(first, x, y, cv2.INTER_NEAREST, borderValue=float("inf"))
            lit += seen[..., 2] < ahead + (1.5 + spread) * texel
        return lit / len(offsets)


def _look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """T_cam_world (4, 4) of a camera that looks at a point, its image's up near the world's z."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    T = np.eye(4)
    T[:3, :3] = right, np.cross(forward, right), forward
    T[:3, 3] = -T[:3, :3] @ eye
    return T


def _arrange(rng: np.random.Generator, items: list[tuple[_Solid, float]], size: float) -> list[np.ndarray]:
    """T_world_obj (4, 4, with the item's scale) per item: at rest on z = 0, close together, none in another."""
    poses: list[np.ndarray] = [np.eye(4)] * len(items)
    outlines: list[np.ndarray] = []
    for number in rng.permutation(len(items)):
        solid, scale = items[number]
        rest = solid.rests[rng.choice(len(solid.rests), p=solid.likely)]
        turn = trimesh.transformations.rotation_matrix(rng.uniform(0, 2 * np.pi), [0, 0, 1])[:3, :3]
        T = np.eye(4)
        T[:3, :3] = scale * turn @ rest
        points = solid.corners @ T[:3, :3].T
        low, high = points.min(axis=0), points.max(axis=0)
        outline = cv2.convexHull((points[:, :2] - (low + high)[:2] / 2).astype(np.float32))[:, 0]
        angle = rng.uniform(0, 2 * np.pi)
        way = np.array([np.cos(angle), np.sin(angle)])
        at = np.zeros(2)
        while any(_overlap(outline + at, other) for other in outlines):
            at = at + 0.06 * size * way
        if outlines:
            at = at + rng.uniform(0, 0.25) * size * way
        outlines.append(outline + at)
        T[:3, 3] = *(at - (low + high)[:2] / 2), -low[2]
        poses[number] = T
    return poses


def _floor(rng: np.random.Generator, size: float) -> list[trimesh.Trimesh]:
    """The table's top with sheets of paper on it, and the floor below."""
    table = paint(rng, 512, held_out=bool(rng.uniform() < 0.2))[1].astype(np.float32)
    calm = rng.uniform(0.2, 1.0)  # most tables have less contrast than a print
    top = np.clip(calm * table + (1 - calm) * rng.uniform(60, 220, 3), 0, 255).astype(np.uint8)
    top = cv2.resize(top, (1024, 1024), interpolation=cv2.INTER_LINEAR)
    for _ in range(int(rng.integers(0, 4))):
        sheet = paint(rng, 128)[1]
        angle, zoom = rng.uniform(0, 360), rng.uniform(0.8, 2.0)
        warp = cv2.getRotationMatrix2D((64, 64), angle, zoom)
        warp[:, 2] += rng.uniform(250, 700, 2)
        cv2.warpAffine(sheet, warp, (1024, 1024), top, borderMode=cv2.BORDER_TRANSPARENT)
    below = paint(rng, 256)[1]
    wide, deep = rng.uniform(5, 14, 2) * size
    return [
        _sheet(top, wide, deep, 0.0, 1.0),
        _sheet(below, 60 * size, 60 * size, -rng.uniform(2, 6) * size, 12.0),
    ]


def _sheet(image: np.ndarray, width: float, depth: float, z: float, repeat: float) -> trimesh.Trimesh:
    from PIL import Image

    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    vertices = np.column_stack([corners * [width / 2, depth / 2], np.full(4, z)])
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(image))
    visual = trimesh.visual.TextureVisuals(uv=(corners + 1) / 2 * repeat, material=material)
    return trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


def _strange_parts(index: int) -> list[trimesh.Trimesh]:
    """Thing ``index`` of the shelf: a held-out procedural object or a textured primitive, diagonal 1 m."""
    made = build_object(_SHELF_SEED + index, 256)
    parts = made.centred()
    for part in parts:
        part.apply_scale(1 / made.diagonal)
    return parts
