"""Scenes of several objects on a table, with strange ones between them, under a sun, the sky and a lamp.

Nothing of the picture is made as training makes its own: normals are interpolated over the surface, shadows
come from a shadow map, highlights from the objects' gloss, and things hide each other. The constants are part
of the benchmark's difficulty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import trimesh
from PIL import Image
from scipy.spatial import ConvexHull, QhullError

from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.synthetic.objects import VALIDATION_SEED, build_object
from picopose_ros.synthetic.studio import (
    HEIGHT,
    WIDTH,
    Scene,
    camera_effects,
    doubled,
    draw_camera,
    halved,
    instance_of,
    window_of,
)
from picopose_ros.synthetic.textures import paint, project_box
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

INSTANCES = (4, 6)
"""How many objects of the folder stand on the table."""
DISTRACTORS = (2, 4)
"""How many strange objects stand between them."""
DISTRACTOR_SIZE = (0.4, 1.1)
"""Diagonal of a strange object in the mean diameter of the others."""
ELEVATION_RANGE = (15.0, 60.0)
"""Of the camera above the table, degrees."""
DISTANCE_RANGE = (3.5, 7.0)
"""Of the camera from the middle of the objects, in their mean diameter, log-uniform."""
LARGEST_GAP = 0.12
"""Between things that were pushed together, in their mean diameter."""
SIZE_SPREAD = 0.35
"""Objects of like size share a table; this much noise on the logarithm of the size mixes them."""

_SHELF = 20  # strange objects that there are
_SHELF_SEED = VALIDATION_SEED + 700_000
_SHADOW_MAP = 1024


@dataclass(frozen=True)
class _Solid:
    """Something on the table, in its own frame."""

    parts: Sequence[trimesh.Trimesh]
    normals: list[trimesh.Trimesh]  # the same with its normals as colours
    corners: np.ndarray  # (n, 3) of the convex hull
    rests: np.ndarray  # (k, 3, 3) rotations in which it lies or stands still, z up
    likely: np.ndarray  # (k,) their shares


@dataclass(frozen=True)
class _Setting:
    """A laid table and a camera."""

    camera: CameraModel
    T_cam_world: np.ndarray  # (4, 4), world z up, the table's top at z = 0
    solids: list[_Solid]
    poses: list[np.ndarray]  # T_world_obj (4, 4) of each, strange ones with a scale
    flat: list[trimesh.Trimesh]  # table and floor
    size: float  # mean diameter of the folder's objects, metres

    @property
    def seen(self) -> list[np.ndarray]:
        """T_cam_obj of each solid."""
        return [self.T_cam_world @ T for T in self.poses]


class TableScenes:
    """Makes scenes of several objects each.

    Args:
        renderer: without antialiasing.
        objects: all of them are dealt out before one is shown again, those of like size together.
    """

    def __init__(self, renderer: MeshRenderer, objects: Sequence[ObjectMesh]) -> None:
        self._renderer, self._objects = renderer, objects
        self._solids: dict[int, _Solid] = {}
        self._shelf: dict[int, _Solid] = {}

    def scene(self, seed: int, index: int) -> Scene:
        """Scene ``index`` of a seed."""
        rng = np.random.default_rng([seed, index, 0x7AB1E])
        chosen = self._deal(seed, index)
        setting = self._set(rng, chosen)
        K, seen = setting.camera.K, setting.seen
        drawn = [(solid.parts, T) for solid, T in zip(setting.solids, seen, strict=True)]
        view = self._renderer.render_scene(
            [*drawn, (setting.flat, setting.T_cam_world)], doubled(K), 2 * WIDTH, 2 * HEIGHT
        )
        albedo, depth = halved(view.rgb), np.ascontiguousarray(view.depth[::2, ::2])
        label, wholes = self._who_is_where(setting, depth)
        lit = self._light(rng, setting, albedo, depth, label)
        apparent = K[0, 0] * setting.size / np.mean([T[2, 3] for T in seen])
        rgb = camera_effects(lit, float(apparent), rng)
        instances = [
            instance_of(self._objects[which], seen[number], label == number, wholes[number])
            for number, which in enumerate(chosen)
        ]
        kept = tuple(instance for instance in instances if instance is not None)
        return Scene(f"cluttered-{seed}-{index:05d}", rgb, depth, setting.camera, kept)

    def _deal(self, seed: int, index: int) -> list[int]:
        """Which objects scene ``index`` shows: each once per round, those of about the same size together."""
        n = len(self._objects)
        groups = max(1, round(n / np.mean(INSTANCES)))
        rng = np.random.default_rng([seed, index // groups, 0xDEA1])
        size = np.log([mesh.diameter for mesh in self._objects]) + rng.normal(0, SIZE_SPREAD, n)
        chosen = [int(which) for which in np.array_split(np.argsort(size), groups)[index % groups]]
        # A folder with few objects shows some of them more than once.
        while len(chosen) < INSTANCES[0]:
            chosen.append(int(rng.integers(n)))
        return chosen

    def _set(self, rng: np.random.Generator, chosen: list[int]) -> _Setting:
        for which in chosen:
            if which not in self._solids:
                self._solids[which] = _solid(self._objects[which].parts)
        size = float(np.exp(np.mean(np.log([self._objects[which].diameter for which in chosen]))))
        solids, scales = [self._solids[which] for which in chosen], [1.0] * len(chosen)
        for _ in range(int(rng.integers(DISTRACTORS[0], DISTRACTORS[1] + 1))):
            which = int(rng.integers(_SHELF))
            if which not in self._shelf:
                self._shelf[which] = _solid(_strange_parts(which))
            solids.append(self._shelf[which])
            scales.append(size * rng.uniform(*DISTRACTOR_SIZE))
        poses = _arrange(rng, solids, scales, size)
        return _Setting(
            draw_camera(rng), _draw_view(rng, solids, poses, size), solids, poses, _flat(rng, size), size
        )

    def _who_is_where(self, setting: _Setting, depth: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """The number of the solid that each pixel (h, w) shows or -1, and every silhouette's whole pixels."""
        K = setting.camera.K
        label = np.full(depth.shape, -1)
        # What is behind the picture's own depth is hidden by the table; the rest is a matter of rounding.
        nearest = np.where(depth > 0, depth, np.inf) + 1e-3 * setting.size
        wholes = []
        for number, (solid, T) in enumerate(zip(setting.solids, setting.seen, strict=True)):
            window = window_of(solid.corners, T, K)
            alone = self._renderer.render(
                solid.parts, T, window.intrinsics(K), window.width, window.height
            ).depth
            wholes.append(int((alone > 0).sum()))
            image, own = window.overlap()
            closer = (alone[own] > 0) & (alone[own] < nearest[image])
            nearest[image][closer] = alone[own][closer]
            label[image][closer] = number
        return label, wholes

    def _light(
        self,
        rng: np.random.Generator,
        setting: _Setting,
        albedo: np.ndarray,
        depth: np.ndarray,
        label: np.ndarray,
    ) -> np.ndarray:
        """The albedo (h, w, 3) lit and exposed; float32."""
        normal = self._normals(setting, label)
        gloss, shine = np.zeros(depth.shape, np.float32), np.full(depth.shape, 20.0, np.float32)
        for number in range(len(setting.solids)):
            if rng.uniform() < 0.5:
                gloss[label == number], shine[label == number] = rng.uniform(0.05, 0.5), rng.uniform(8, 80)

        # OpenCV moves the points: BLAS rounds by where an array lies in memory, and shadows end in steps.
        T_world_cam = np.linalg.inv(setting.T_cam_world).astype(np.float32)
        rows, columns = np.indices(depth.shape, np.float32)
        rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
        rays = cv2.transform(rays, np.linalg.inv(setting.camera.K).astype(np.float32))
        points = cv2.transform(rays * depth[..., None], T_world_cam[:3])
        towards = _unit(T_world_cam[:3, 3] - points)
        normal = np.where((normal * towards).sum(-1, keepdims=True) < 0, -normal, normal)

        sun = _direction(rng.uniform(25, 75), rng.uniform(0, 360)).astype(np.float32)
        shadow = self._shadow(rng, setting, points, normal, sun)
        to_lamp = setting.size * np.array([*rng.uniform(-5, 5, 2), rng.uniform(2.5, 6)], np.float32) - points
        far = np.linalg.norm(to_lamp, axis=-1, keepdims=True)
        to_lamp /= far

        warm, lamp_warm = rng.uniform(-0.12, 0.12, 2)
        sun_colour = np.array([1 + warm, 1.0, 1 - warm], np.float32) * rng.uniform(0.4, 1.1)
        sky_colour = np.array([1 - warm / 2, 1.0, 1 + warm / 2], np.float32) * rng.uniform(0.25, 0.6)
        lamp_colour = np.array([1 + lamp_warm, 1.0, 1 - lamp_warm], np.float32) * rng.uniform(0, 0.5)
        fall = np.minimum((4 * setting.size / far) ** 2, 2)
        light = sky_colour * (0.65 + 0.35 * normal[..., 2:])
        light = light + sun_colour * (np.clip(cv2.transform(normal, sun[None]), 0, None) * shadow)[..., None]
        light = light + lamp_colour * fall * np.clip((normal * to_lamp).sum(-1, keepdims=True), 0, None)
        glint = gloss * shadow * np.clip((normal * _unit(towards + sun)).sum(-1), 0, None) ** shine
        image = albedo * light + 255 * glint[..., None] * sun_colour

        nothing = depth == 0
        if nothing.any():  # beyond the floor
            wall = cv2.resize(paint(rng, 128)[1], (WIDTH, WIDTH), interpolation=cv2.INTER_LINEAR)[:HEIGHT]
            image[nothing] = cv2.GaussianBlur(wall, (0, 0), 6.0)[nothing]
        exposure = rng.uniform(80, 140) / max(float(image.mean(dtype=np.float64)), 1.0)
        return (image * exposure).astype(np.float32)

    def _normals(self, setting: _Setting, label: np.ndarray) -> np.ndarray:
        """(h, w, 3) float32 unit normals in the world; up where the table or the floor is."""
        coloured = [(solid.normals, T) for solid, T in zip(setting.solids, setting.seen, strict=True)]
        raw = (
            self._renderer.render_scene(coloured, setting.camera.K, WIDTH, HEIGHT).rgb / np.float32(127.5) - 1
        )
        normal = np.zeros_like(raw)
        normal[..., 2] = 1.0
        for number, T in enumerate(setting.poses):
            here = label == number
            normal[here] = cv2.transform(raw, T[:3, :3].astype(np.float32))[here]
        return _unit(normal)

    def _shadow(
        self,
        rng: np.random.Generator,
        setting: _Setting,
        points: np.ndarray,
        normal: np.ndarray,
        sun: np.ndarray,
    ) -> np.ndarray:
        """(h, w) float32 0..1: how much of the sun reaches points (h, w, 3) of the world."""
        placed = zip(setting.solids, setting.poses, strict=True)
        reach = max(float(np.linalg.norm(_moved(s.corners, T), axis=1).max()) for s, T in placed)
        T_sun_world = _look_at(40 * reach * sun.astype(np.float64), np.zeros(3))
        middle = (_SHADOW_MAP - 1) / 2
        focal = 0.96 * middle * 40
        K = np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1.0]])
        lit_first = [(s.parts, T_sun_world @ T) for s, T in zip(setting.solids, setting.poses, strict=True)]
        first = self._renderer.render_scene(lit_first, K, _SHADOW_MAP, _SHADOW_MAP).depth
        first[first == 0] = np.inf
        texel = reach / middle
        start = points + np.float32(1.5 * texel) * normal  # off the surface, or it would shade itself
        T = T_sun_world.astype(np.float32)
        seen = cv2.transform(start, T[:3])
        uv = seen[..., :2] / seen[..., 2:] * np.float32(focal) + np.float32(middle)
        spread = rng.uniform(0.5, 4.0)  # of the penumbra, texels
        lit = np.zeros(points.shape[:2], np.float32)
        for dx in (-spread, 0.0, spread):
            for dy in (-spread, 0.0, spread):
                x, y = uv[..., 0] + np.float32(dx), uv[..., 1] + np.float32(dy)
                ahead = cv2.remap(first, x, y, cv2.INTER_NEAREST, borderValue=float("inf"))
                lit += seen[..., 2] < ahead + np.float32((1.5 + spread) * texel)
        return lit / 9


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def _moved(points: np.ndarray, T: np.ndarray) -> np.ndarray:
    return points @ T[:3, :3].T + T[:3, 3]


def _direction(elevation: float, azimuth: float) -> np.ndarray:
    e, a = np.deg2rad([elevation, azimuth])
    return np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])


def _look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """T_cam_world (4, 4) of a camera that looks at a point, its image's up near the world's z."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    T = np.eye(4)
    T[:3, :3] = right, np.cross(forward, right), forward
    T[:3, 3] = -T[:3, :3] @ eye
    return T


def _solid(parts: Sequence[trimesh.Trimesh]) -> _Solid:
    vertices = np.concatenate([np.asarray(part.vertices) for part in parts])
    normals = [_normal_coloured(part) for part in parts]
    try:
        hull = ConvexHull(vertices)
    except QhullError:  # flat: it stands as it was modelled
        return _Solid(parts, normals, vertices, np.eye(3)[None], np.ones(1))
    return _Solid(parts, normals, vertices[hull.vertices], *_resting(hull))


def _normal_coloured(part: trimesh.Trimesh) -> trimesh.Trimesh:
    """The part with its normals as colours, (n + 1) / 2; smooth but for edges of more than 35 degrees."""
    merged = trimesh.Trimesh(part.vertices, part.faces, process=False)
    merged.merge_vertices()  # the texture's seams are no edges
    smooth = trimesh.graph.smooth_shade(merged, angle=np.deg2rad(35.0), facet_minarea=None)
    rgb = np.rint((np.nan_to_num(smooth.vertex_normals) + 1) * 127.5).astype(np.uint8)
    plain = trimesh.Trimesh(smooth.vertices, smooth.faces, process=False)
    plain.visual.vertex_colors = np.column_stack([rgb, np.full(len(rgb), 255, np.uint8)])
    return plain


def _resting(hull: ConvexHull) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (k, 3, 3) that put a solid onto a side of its hull that carries it, and their shares.

    The centre of mass is taken to be the hull's.
    """
    corners = hull.points[hull.simplices]
    inside = hull.points[hull.vertices].mean(axis=0)
    volume = np.abs(np.linalg.det(corners - inside))
    centre = (volume[:, None] * (corners.sum(axis=1) + inside) / 4).sum(axis=0) / volume.sum()
    planes, side = np.unique(np.round(hull.equations[:, :3], 3), axis=0, return_inverse=True)
    side = side.reshape(-1)
    rests, firm, heights = [], [], []
    for number in range(len(planes)):
        faces = np.flatnonzero(side == number)
        onto = trimesh.geometry.align_vectors(hull.equations[faces[0], :3], [0, 0, -1.0])[:3, :3]
        outline = (corners[faces].reshape(-1, 3) - centre) @ onto.T
        base = cv2.convexHull(outline[:, :2].astype(np.float32))
        reach = cv2.pointPolygonTest(base, (0.0, 0.0), True)  # of the centre from the base's rim
        if reach >= 0:
            rests.append(onto)
            heights.append(np.abs(outline[:, 2]).max())
            firm.append(np.arctan2(reach, heights[-1]))  # how far it can be tipped
    if not rests:
        return np.eye(3)[None], np.ones(1)
    firm, heights = np.array(firm), np.array(heights)
    steady = firm > np.deg2rad(5.0)
    if not steady.any():  # a round thing: it rolls until its centre is low
        steady, firm = heights < 1.05 * heights.min(), np.ones(len(rests))
    return np.array(rests)[steady], firm[steady] / firm[steady].sum()


def _overlap(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two convex outlines (n, 2) share a point (separating axes)."""
    for outline in (one, other):
        edges = np.roll(outline, -1, axis=0) - outline
        axes = np.stack([-edges[:, 1], edges[:, 0]], axis=-1)
        a, b = one @ axes.T, other @ axes.T
        if ((a.max(axis=0) < b.min(axis=0)) | (b.max(axis=0) < a.min(axis=0))).any():
            return False
    return True


def _arrange(
    rng: np.random.Generator, solids: list[_Solid], scales: list[float], size: float
) -> list[np.ndarray]:
    """T_world_obj (4, 4, times the scale) of each: at rest on z = 0, close together, none inside another."""
    poses: list[np.ndarray] = [np.eye(4)] * len(solids)
    outlines: list[np.ndarray] = []
    for number in rng.permutation(len(solids)):
        solid = solids[number]
        rest = solid.rests[rng.choice(len(solid.rests), p=solid.likely)]
        turn = trimesh.transformations.rotation_matrix(rng.uniform(0, 2 * np.pi), [0, 0, 1])[:3, :3]
        T = np.eye(4)
        T[:3, :3] = scales[number] * turn @ rest
        points = solid.corners @ T[:3, :3].T
        low, high = points.min(axis=0), points.max(axis=0)
        middle = (low + high)[:2] / 2
        outline = cv2.convexHull((points[:, :2] - middle).astype(np.float32))[:, 0]
        way = _direction(0.0, rng.uniform(0, 360))[:2]
        at = np.zeros(2)
        while any(_overlap(outline + at, other) for other in outlines):
            at = at + 0.06 * size * way
        if outlines:
            at = at + rng.uniform(0, LARGEST_GAP) * size * way
        outlines.append(outline + at)
        T[:3, 3] = *(at - middle), -low[2]
        poses[number] = T
    return poses


def _draw_view(
    rng: np.random.Generator, solids: list[_Solid], poses: list[np.ndarray], size: float
) -> np.ndarray:
    """T_cam_world (4, 4) of a camera that looks at the middle of the table's things."""
    placed = [_moved(solid.corners, T) for solid, T in zip(solids, poses, strict=True)]
    middle = np.mean([points.mean(axis=0) for points in placed], axis=0)
    target = middle + size * np.array([*rng.uniform(-0.4, 0.4, 2), 0.0])
    ray = _direction(rng.uniform(*ELEVATION_RANGE), rng.uniform(0, 360))
    distance = size * np.exp(rng.uniform(*np.log(DISTANCE_RANGE)))
    nearness = [np.linalg.norm(points - (target + distance * ray), axis=1).min() for points in placed]
    distance += max(0.0, 1.5 * size - min(nearness))  # not with the lens against a large one
    roll = trimesh.transformations.rotation_matrix(np.deg2rad(rng.normal(0, 8.0)), [0, 0, 1])
    return roll @ _look_at(target + distance * ray, target)


def _flat(rng: np.random.Generator, size: float) -> list[trimesh.Trimesh]:
    """The table's top with sheets of print on it, and the floor below."""
    print_ = paint(rng, 512, held_out=bool(rng.uniform() < 0.2))[1].astype(np.float32)
    calm = rng.uniform(0.2, 1.0)  # most tables have less contrast than a print
    top = np.clip(calm * print_ + (1 - calm) * rng.uniform(60, 220, 3), 0, 255).astype(np.uint8)
    top = cv2.resize(top, (1024, 1024), interpolation=cv2.INTER_LINEAR)
    for _ in range(int(rng.integers(0, 4))):
        warp = cv2.getRotationMatrix2D((64, 64), rng.uniform(0, 360), rng.uniform(0.8, 2.0))
        warp[:, 2] += rng.uniform(250, 700, 2)
        cv2.warpAffine(paint(rng, 128)[1], warp, (1024, 1024), top, borderMode=cv2.BORDER_TRANSPARENT)
    wide, deep = rng.uniform(5, 14, 2) * size
    below = -rng.uniform(2, 6) * size
    return [_sheet(top, wide, deep, 0.0, 1.0), _sheet(paint(rng, 256)[1], 60 * size, 60 * size, below, 12.0)]


def _sheet(image: np.ndarray, width: float, depth: float, z: float, repeat: float) -> trimesh.Trimesh:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    vertices = np.column_stack([corners * [width / 2, depth / 2], np.full(4, z)])
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(image))
    visual = trimesh.visual.TextureVisuals(uv=(corners + 1) / 2 * repeat, material=material)
    return trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


def _strange_parts(index: int) -> list[trimesh.Trimesh]:
    """Thing ``index`` of the shelf, diagonal 1 m: of a seed that no benchmark uses, or a primitive."""
    if index % 2:
        made = build_object(_SHELF_SEED + index, 256)
        parts = made.centred()
    else:
        rng = np.random.default_rng([_SHELF_SEED, index])
        make = trimesh.creation
        shape = (
            lambda: make.annulus(r_min=0.2, r_max=0.4, height=rng.uniform(0.1, 0.6)),
            lambda: make.cylinder(radius=0.3, height=rng.uniform(0.2, 1.2), sections=48),
            lambda: make.cylinder(radius=0.3, height=rng.uniform(0.2, 1.0), sections=6),
            lambda: make.cone(radius=0.4, height=rng.uniform(0.5, 1.2)),
            lambda: make.capsule(radius=0.2, height=rng.uniform(0.2, 0.9)),
            lambda: make.box(rng.uniform(0.3, 1.0, 3)),
            lambda: make.icosphere(subdivisions=int(rng.integers(0, 4))),
        )[index // 2 % 7]()
        parts = [project_box(shape, paint(rng, 256)[1], rng, float(shape.extents.max()) * 1.5, False)]
    low = np.min([part.bounds[0] for part in parts], axis=0)
    high = np.max([part.bounds[1] for part in parts], axis=0)
    for part in parts:
        part.apply_translation(-(low + high) / 2)
        part.apply_scale(1 / np.linalg.norm(high - low))
    return parts
