"""The demo's world: objects on a cluttered table, a camera around it, and the recording of what it sees.

The recording is a rosbag2 file as a robot would make it: images at 10 Hz, masks that come 300 ms late and are
not perfect, and the true poses on ``/tf`` under ``gt/``. Light, shadows and noise make the images unlike the
unlit templates. Everything follows from one seed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import trimesh

from picopose_ros.demo import objects as demo_objects
from picopose_ros.demo.objects import OBJECTS, can, from_seed, textured, write_meshes
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.messages import bags
from picopose_ros.segmentation import Segment
from picopose_ros.synthetic import objects, shapes, textures
from picopose_ros.synthetic.objects import VALIDATION_SEED
from picopose_ros.templates.renderer import MeshRenderer

IMAGE_TOPIC = "/camera/image"
CAMERA_INFO_TOPIC = "/camera/camera_info"
SEGMENTATION_TOPIC = "/segmentation"
CAMERA_FRAME = "camera_optical_frame"
TRUTH_PREFIX = "gt/"
SEGMENTATION_DELAY = 300_000_000
"""How much later than its image a segmentation is recorded, ns."""
FRAME_PERIOD = 100_000_000
START = 1_700_000_000_000_000_000
CAMERA = CameraModel(np.array([[600.0, 0, 319.5], [0, 600.0, 239.5], [0, 0, 1]]), 640, 480)
SMALLEST_MASK = 100
"""A segmenter finds nothing of an object with fewer visible pixels."""

# Class, place on the table (x, y in metres), turn about the vertical and about x before it, degrees.
_PLACES: tuple[tuple[str, float, float, float, float], ...] = (
    ("cereal_box", -0.06, 0.17, -18.0, 0.0),
    ("drill", -0.27, 0.02, 40.0, 0.0),
    ("parcel", 0.04, -0.05, 200.0, 0.0),
    ("parcel", 0.29, 0.16, -60.0, 90.0),
    ("mug", 0.2, -0.12, 130.0, 0.0),
    ("cluster", -0.13, -0.17, 65.0, 0.0),
    ("stack", 0.12, 0.28, 20.0, 0.0),
)


@dataclass(frozen=True)
class Instance:
    """One object of the demo in its place."""

    class_id: str
    name: str  # <class>_<n>
    T_world_obj: np.ndarray  # (4, 4) mesh's own frame -> world (z up), metres


@dataclass(frozen=True)
class Frame:
    """What the camera sees at one moment."""

    rgb: np.ndarray  # (480, 640, 3) uint8 RGB
    T_cam_world: np.ndarray  # (4, 4), OpenCV optical frame
    masks: dict[str, np.ndarray]  # instance name -> (480, 640) bool, its visible pixels
    visible: dict[str, float]  # instance name -> share of its pixels that nothing hides


@dataclass(frozen=True)
class DemoFiles:
    """Where the demo's world lies on disk."""

    meshes: Path  # folder with one mesh per class
    bag: Path  # rosbag2 folder
    frames: int
    visible: list[dict[str, float]]  # per frame: instance name -> share of its pixels that nothing hides


def _rotation(degrees: float, axis: tuple[float, float, float]) -> np.ndarray:
    return trimesh.transformations.rotation_matrix(np.deg2rad(degrees), axis)


def _on_table(parts: list[trimesh.Trimesh], x: float, y: float, turn: float, tip: float) -> np.ndarray:
    """(4, 4) that stands an object on the plane z = 0 at (x, y)."""
    T = _rotation(turn, (0, 0, 1)) @ _rotation(tip, (1, 0, 0))
    points = np.concatenate([part.vertices for part in parts]) @ T[:3, :3].T
    low, high = points.min(axis=0), points.max(axis=0)
    T[:3, 3] = x - (low[0] + high[0]) / 2, y - (low[1] + high[1]) / 2, -low[2]
    return T


def _moved(parts: list[trimesh.Trimesh], T: np.ndarray) -> list[trimesh.Trimesh]:
    moved = [part.copy() for part in parts]
    for part in moved:
        part.apply_transform(T)
    return moved


def _sheet(
    image: np.ndarray, width: float, depth: float, T: np.ndarray, repeat: float = 1.0
) -> trimesh.Trimesh:
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    vertices = np.column_stack([corners * [width / 2, depth / 2], np.zeros(4)])
    sheet = textured(vertices, np.array([[0, 1, 2], [0, 2, 3]]), (corners + 1) / 2 * repeat, image)
    sheet.apply_transform(T)
    return sheet


class World:
    """The scene, ready to be looked at.

    Args:
        seed: of the clutter, the camera's wobble, the noise and the masks' errors.
    """

    def __init__(self, seed: int = 7) -> None:
        self._rng = np.random.default_rng([seed, 0xDE30])
        self.instances: list[Instance] = []
        counts: dict[str, int] = {}
        self._solids: list[tuple[str, list[trimesh.Trimesh]]] = []  # instance name or "", parts in the world
        for class_id, x, y, turn, tip in _PLACES:
            parts = OBJECTS[class_id].make()
            name = f"{class_id}_{counts.get(class_id, 0)}"
            counts[class_id] = counts.get(class_id, 0) + 1
            T = _on_table(parts, x, y, turn, tip)
            self.instances.append(Instance(class_id, name, T))
            self._solids.append((name, _moved(parts, T)))
        self._add_clutter()

        albedo = [part for _, parts in self._solids for part in parts]
        self._albedo, self._normals = albedo, [_normal_coloured(part) for part in albedo]
        self._labels = [
            _plain_coloured(part, self._label(name)) for name, parts in self._solids for part in parts
        ]
        self._alone = {name: parts for name, parts in self._solids if name}
        self._sharp = MeshRenderer(antialias=False)
        self._smooth = MeshRenderer(antialias=True)
        self._sun = np.array([0.45, -0.35, 0.82]) / np.linalg.norm([0.45, -0.35, 0.82])
        self._T_sun_world = _look_at(3.0 * self._sun, np.zeros(3))
        self._K_sun = np.array([[2200.0, 0, 767.5], [0, 2200.0, 767.5], [0, 0, 1]])
        self._sun_depth = self._sharp.render(albedo, self._T_sun_world, self._K_sun, 1536, 1536).depth

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sharp.close()
        self._smooth.close()

    def _label(self, name: str) -> int:
        names = [instance.name for instance in self.instances]
        return 16 * (names.index(name) + 1) if name else 0

    def _add_clutter(self) -> None:
        rng = self._rng
        table = textures.noise(np.random.default_rng(5), 512)
        table = (0.35 * table + 0.65 * np.array([150, 120, 95])).astype(np.uint8)
        floor = textures.checks(np.random.default_rng(8), 512)
        flat = [
            _sheet(table, 1.5, 1.3, trimesh.transformations.translation_matrix([0, 0.1, -0.002])),
            _sheet((0.5 * floor + 60).astype(np.uint8), 40, 40, _translation(0, 0, -0.75), 12.0),
        ]
        for index, (x, y, turn) in enumerate(
            ((-0.3, -0.15, 20), (0.35, -0.2, -35), (0.05, 0.3, 10), (-0.45, 0.3, 70), (0.5, 0.35, 5))
        ):
            paper = textures.decals(np.random.default_rng(100 + index), 512)
            place = _translation(x, y, -0.0015 + 0.0002 * index) @ _rotation(turn, (0, 0, 1))
            flat.append(_sheet(paper, 0.3, 0.21, place))
        self._solids += [("", [sheet]) for sheet in flat]
        tin = can()
        self._solids.append(("", _moved(tin, _on_table(tin, 0.15, -0.235, 30.0, 0.0))))
        around = (
            (-0.48, 0.1),
            (-0.36, 0.3),
            (-0.2, 0.42),
            (0.1, 0.5),
            (0.34, 0.4),
            (0.5, 0.12),
            (0.42, -0.12),
        )
        for index, (x, y) in enumerate((*around, (-0.42, -0.2), (-0.02, -0.38))):
            parts = from_seed(VALIDATION_SEED + 500_000 + index, rng.uniform(0.08, 0.16))
            T = _on_table(parts, x, y, rng.uniform(0, 360), rng.choice([0.0, 90.0]))
            self._solids.append(("", _moved(parts, T)))

    def camera_pose(self, progress: float) -> np.ndarray:
        """T_cam_world (4, 4) on the camera's path, ``progress`` from 0 to 1."""
        azimuth = np.deg2rad(-155.0 + 130.0 * progress)
        elevation = np.deg2rad(40.0 + 9.0 * np.sin(2 * np.pi * 1.3 * progress))
        distance = 0.92 + 0.12 * np.sin(2 * np.pi * 0.9 * progress + 0.6)
        target = np.array([0.0, 0.05, 0.06])
        ray = np.array(
            [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
        )
        T = _look_at(target + distance * ray, target)
        return _rotation(6.0 * np.sin(2 * np.pi * progress), (0, 0, 1)) @ T

    def look(self, T_cam_world: np.ndarray) -> Frame:
        """Render one frame: albedo, light, shadow, blur and noise, and who is where."""
        K, width, height = CAMERA.K, CAMERA.width, CAMERA.height
        scene = self._smooth.render(self._albedo, T_cam_world, K, width, height)
        normals = self._smooth.render(self._normals, T_cam_world, K, width, height).rgb / 127.5 - 1.0
        labels = self._sharp.render(self._labels, T_cam_world, K, width, height).rgb[..., 0]

        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        normals = normals / np.maximum(length, 1e-3)
        facing = np.abs(normals @ T_cam_world[2, :3])[..., None]
        sun = np.clip(normals @ self._sun, 0, 1)[..., None] * self._lit(scene.depth, T_cam_world)[..., None]
        sky = 0.5 + 0.5 * normals[..., 2:]
        light = 0.42 + 0.16 * sky + 0.08 * facing + 0.52 * sun * np.array([1.0, 0.97, 0.9])
        image = scene.rgb.astype(np.float64) * light + 6.0
        image = cv2.GaussianBlur(image, (0, 0), 0.5) + self._rng.normal(0, 2.0, image.shape)

        masks, visible = {}, {}
        for instance in self.instances:
            masks[instance.name] = labels == self._label(instance.name)
            alone = self._sharp.render(self._alone[instance.name], T_cam_world, K, width, height).mask
            visible[instance.name] = float(masks[instance.name].sum() / max(int(alone.sum()), 1))
        return Frame(np.clip(np.rint(image), 0, 255).astype(np.uint8), T_cam_world, masks, visible)

    def _lit(self, depth: np.ndarray, T_cam_world: np.ndarray) -> np.ndarray:
        """(H, W) 0..1: how much of the sun reaches each pixel."""
        rows, columns = np.indices(depth.shape)
        rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(CAMERA.K).T
        points = rays * depth[..., None]
        T = self._T_sun_world @ np.linalg.inv(T_cam_world)
        seen = points @ T[:3, :3].T + T[:3, 3]
        uv = seen @ self._K_sun.T
        uv = (uv[..., :2] / uv[..., 2:]).astype(np.float32)
        nearest = cv2.remap(self._sun_depth, uv[..., 0], uv[..., 1], cv2.INTER_NEAREST, borderValue=0)
        lit = (nearest == 0) | (seen[..., 2] < nearest + 0.006)
        return cv2.GaussianBlur(lit.astype(np.float64), (0, 0), 1.2)

    def segment(self, frame: Frame) -> list[Segment]:
        """What an instance segmenter would say: the visible masks, some a pixel too small or too large."""
        segments = []
        kernel = np.ones((3, 3), np.uint8)
        for instance in self.instances:
            mask = frame.masks[instance.name].astype(np.uint8)
            kind = self._rng.integers(3)
            if kind == 1:
                mask = cv2.erode(mask, kernel)
            elif kind == 2:
                mask = cv2.dilate(mask, kernel)
            if mask.sum() >= SMALLEST_MASK:
                segments.append(Segment(instance.class_id, float(self._rng.uniform(0.6, 0.99)), mask > 0))
        return segments


def _translation(x: float, y: float, z: float) -> np.ndarray:
    return trimesh.transformations.translation_matrix([x, y, z])


def _look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """T_cam_world (4, 4) of a camera that looks at a point, its image's up near the world's z."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    T = np.eye(4)
    T[:3, :3] = right, np.cross(forward, right), forward
    T[:3, 3] = -T[:3, :3] @ eye
    return T


def _normal_coloured(part: trimesh.Trimesh) -> trimesh.Trimesh:
    """The part with its normals as colours: (n + 1) / 2."""
    plain = trimesh.Trimesh(part.vertices, part.faces, process=False)
    if len(part.faces) < 1500:  # flat facets: a normal per face
        plain.visual.face_colors = _as_colours(part.face_normals)
    else:
        plain.visual.vertex_colors = _as_colours(part.vertex_normals)
    return plain


def _as_colours(normals: np.ndarray) -> np.ndarray:
    rgb = np.rint((np.asarray(normals) + 1) * 127.5).astype(np.uint8)
    return np.column_stack([rgb, np.full(len(rgb), 255, np.uint8)])


def _plain_coloured(part: trimesh.Trimesh, value: int) -> trimesh.Trimesh:
    plain = trimesh.Trimesh(part.vertices, part.faces, process=False)
    plain.visual.vertex_colors = np.tile(
        np.array([value, value, value, 255], np.uint8), (len(plain.vertices), 1)
    )
    return plain


def record(
    world: World, path: Path, frames: int, storage: str, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, float]]:
    """Drive the camera along its path and record a bag.

    Args:
        world: the scene.
        path: rosbag2 folder to make.
        frames: number of images.
        storage: "mcap" or "sqlite3".
        progress: called as ``progress(done, frames)``.

    Returns:
        Per frame: instance name -> share of its pixels that nothing hides.
    """
    visible: list[dict[str, float]] = []
    late: list[tuple[int, object]] = []
    with bags.BagWriter(path, storage) as writer:

        def write_late(until: int) -> None:
            while late and late[0][0] <= until:
                writer.write(SEGMENTATION_TOPIC, bags.SEGMENTS, *late.pop(0))

        for index in range(frames):
            stamp = START + index * FRAME_PERIOD
            write_late(stamp)
            T_cam_world = world.camera_pose(index / max(frames - 1, 1))
            frame = world.look(T_cam_world)
            visible.append(frame.visible)
            head = bags.header(stamp, CAMERA_FRAME)
            transforms = [
                bags.transform_message(T_cam_world @ instance.T_world_obj, head, TRUTH_PREFIX + instance.name)
                for instance in world.instances
            ]
            writer.write("/tf", bags.TF, stamp, bags.message(bags.TF, transforms=transforms))
            writer.write(IMAGE_TOPIC, bags.IMAGE, stamp, bags.image_message(frame.rgb, head))
            writer.write(CAMERA_INFO_TOPIC, bags.CAMERA_INFO, stamp, bags.camera_message(CAMERA, head))
            message = bags.segments_message(world.segment(frame), head, CAMERA.height, CAMERA.width)
            late.append((stamp + SEGMENTATION_DELAY, message))
            if progress is not None:
                progress(index + 1, frames)
        write_late(sys.maxsize)
    return visible


def _fingerprint(frames: int, seed: int, storage: str) -> str:
    """Changes with whatever the world is made from, so that an old recording is never taken for a new one."""
    digest = hashlib.sha256(f"{frames} {seed} {storage}".encode())
    for module in (sys.modules[__name__], demo_objects, objects, shapes, textures):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def build_world(
    folder: str | Path,
    frames: int = 60,
    seed: int = 7,
    storage: str = "mcap",
    progress: Callable[[int, int], None] | None = None,
) -> DemoFiles:
    """Write the demo's meshes and recording into a folder, or find them there from last time.

    Args:
        folder: made if needed; holds ``meshes/``, ``input/`` (the bag) and ``world.json``.
        frames: images in the bag.
        seed: of the world.
        storage: "mcap" or "sqlite3".
        progress: called as ``progress(done, frames)`` while the recording is made.
    """
    folder = Path(folder)
    meshes, bag, about = folder / "meshes", folder / "input", folder / "world.json"
    fingerprint = _fingerprint(frames, seed, storage)
    if about.exists():
        content = json.loads(about.read_text())
        if content["fingerprint"] == fingerprint and bag.is_dir() and meshes.is_dir():
            return DemoFiles(meshes, bag, frames, content["visible"])
        about.unlink()
    shutil.rmtree(meshes, ignore_errors=True)
    shutil.rmtree(bag, ignore_errors=True)
    write_meshes(meshes)
    with World(seed) as world:
        visible = record(world, bag, frames, storage, progress)
    about.write_text(
        json.dumps({"fingerprint": fingerprint, "visible": visible})
    )  # last: only a whole world has it
    return DemoFiles(meshes, bag, frames, visible)
