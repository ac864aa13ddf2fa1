"""Where the templates of a data set's objects come from: rendered from its meshes, or read from a folder.

Both give the views by object number, as BOP numbers objects, in a *centred* frame ``ctr`` whose origin is the
point that the template camera looks at, in metres, in the scale in which the data set's scenes show the
object.
"""

from __future__ import annotations

import atexit
import functools
import io
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import cv2
import numpy as np
import trimesh
from PIL import Image

from picopose_ros.errors import ConfigError, MeshError, PicoPoseError, SegmentError
from picopose_ros.geometry.crops import CROP_SIZE, crop_box_from_mask, crop_mask, crop_points_consistent
from picopose_ros.templates.bank import TEMPLATE_K
from picopose_ros.templates.meshes import ObjectSpec, discover_objects, load_object
from picopose_ros.templates.renderer import MeshRenderer
from picopose_ros.templates.viewpoints import viewpoint_rotations
from picopose_ros.training.views import TemplateView, render_template, template_pose

MEGAPOSE_SCALE = 0.1
"""MegaPose's scenes show its normalised meshes at this scale, metres per unit."""
MeshUp = Literal["z", "y", "-y"]
"""Which axis of a mesh file is the data set's z: see `MeshTemplates`."""
_TURNS: dict[str, np.ndarray] = {
    "z": np.eye(3),
    "y": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]),
    "-y": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
}
MESH_UPS: tuple[str, ...] = tuple(_TURNS)
_KEPT_MESHES = 16
_KEPT_FAILURES = 10_000
T = TypeVar("T")


class TemplateSource(Protocol):
    """The templates of many objects, by number."""

    def __contains__(self, number: int) -> bool:
        """Whether there is anything to make this object's templates from."""

    def centre(self, number: int) -> np.ndarray:
        """(3,) the centred frame's origin in the frame of the data set's poses, metres."""

    def diagonal(self, number: int) -> float:
        """Of the object's bounding box, metres."""

    def poses(self, number: int) -> np.ndarray:
        """(N, 4, 4) T_cam_ctr of all its templates.

        Raises:
            PicoPoseError: they can't be had; names the file. Also from `centre`, `diagonal` and `view`.
        """

    def view(self, number: int, index: int) -> TemplateView:
        """One template."""


class _Recent:
    """The last few results by number; a failure is kept, too, and raised again."""

    def __init__(
        self, make: Callable[[int], T], keep: int, drop: Callable[[T], None] = lambda _: None
    ) -> None:
        self._make, self._keep, self._drop = make, keep, drop
        self._kept: OrderedDict[int, T] = OrderedDict()
        # Not the exception itself: its traceback would keep whatever was being made.
        self._failed: OrderedDict[int, tuple[type[PicoPoseError], str]] = OrderedDict()

    def __call__(self, number: int) -> T:
        if number in self._failed:
            kind, message = self._failed[number]
            raise kind(message)
        if number not in self._kept:
            try:
                self._kept[number] = self._make(number)
            except PicoPoseError as error:
                self._failed[number] = (type(error), str(error))
                if len(self._failed) > _KEPT_FAILURES:
                    self._failed.popitem(last=False)
                raise
            if len(self._kept) > self._keep:
                self._drop(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(number)
        return self._kept[number]


@dataclass(frozen=True)
class _Prepared:
    """A mesh in the scenes' scale, moved to its centre."""

    parts: list[trimesh.Trimesh]
    centre: np.ndarray
    diagonal: float


@functools.cache
def _renderer(process: int) -> MeshRenderer:
    """The process's renderer: all sources share it, and it is never closed while another one draws."""
    renderer = MeshRenderer(antialias=True)
    atexit.register(renderer.close)  # while OpenGL can still be spoken to
    return renderer


def find_meshes(models: Path, near: Path) -> tuple[dict[int, ObjectSpec], Literal["gso", "shapenet", "bop"]]:
    """The meshes of a data set by object number.

    A `gso_models.json` or `shapenet_models.json` (BOP's lists of what its numbers mean) in the folder, above
    it, or where the shards are, tells that the folder has the layout of Google Scanned Objects
    (``<gso_id>/meshes/model.obj``) or ShapeNetCore (``<synset>/<source>/models/model_normalized.obj``).
    Otherwise it is a BOP models folder: the number at the end of a mesh's name.

    Args:
        near: the folder of the shards.
    Raises:
        ConfigError: no such folder, or an unreadable list. MeshError: nothing there that has a number.
    """
    if not models.is_dir():
        raise ConfigError(f"models folder {models} does not exist; set it to the data set's meshes")
    for folder in (models, models.parent, near, near.parent):
        gso, shapenet = folder / "gso_models.json", folder / "shapenet_models.json"
        try:
            if gso.is_file():
                found = {
                    int(entry["obj_id"]): models / str(entry["gso_id"]) / "meshes" / "model.obj"
                    for entry in json.loads(gso.read_text())
                }
                return {n: ObjectSpec(p.parent.parent.name, p) for n, p in found.items()}, "gso"
            if shapenet.is_file():
                found = {
                    int(e["obj_id"]): models / str(e["shapenet_synset_id"]) / str(e["shapenet_source_id"])
                    for e in json.loads(shapenet.read_text())
                }
                place = Path("models") / "model_normalized.obj"
                return {n: ObjectSpec(p.name, p / place) for n, p in found.items()}, "shapenet"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder}: the list of models is not BOP's ({type(error).__name__}: {error}); download it "
                "again"
            ) from error
    numbered = {}
    for spec in discover_objects(models):
        if match := re.search(r"(\d+)$", spec.class_id):
            numbered[int(match[1])] = spec
    if not numbered:
        raise MeshError(
            f"models folder {models} has no mesh with a number at the end of its name (obj_000005.ply), nor "
            "a gso_models.json or shapenet_models.json; add the list of the data set"
        )
    return numbered, "bop"


class MeshTemplates:
    """Templates rendered from meshes when asked for, exactly as onboarding renders them.

    Meshes of Google Scanned Objects are centred and scaled so that their longest side is 2 x 0.1 m, as
    MegaPose has them (the originals and the normalised ones give the same); ShapeNetCore's are only scaled by
    0.1.

    Args:
        models: folder of meshes; see `find_meshes`.
        near: folder of the shards.
        up: how a mesh file's axes become the data set's: "z" as they are; "y" turned as Blender's OBJ import
            does, (x, y, z) -> (x, -z, y); "-y" the other way round, (x, z, -y).
    """

    def __init__(self, models: Path, near: Path, up: MeshUp = "z") -> None:
        self._specs, self._layout = find_meshes(models, near)
        self._up = up
        self._rotations = viewpoint_rotations(162)
        self._prepared = _Recent(self._prepare, _KEPT_MESHES, self._release)
        self._present: dict[int, bool] = {}

    def __contains__(self, number: int) -> bool:
        if number not in self._present:
            self._present[number] = number in self._specs and self._specs[number].path.is_file()
        return self._present[number]

    def centre(self, number: int) -> np.ndarray:
        return self._prepared(number).centre

    def diagonal(self, number: int) -> float:
        return self._prepared(number).diagonal

    def poses(self, number: int) -> np.ndarray:
        diagonal = self.diagonal(number)
        return np.stack([template_pose(rotation, diagonal) for rotation in self._rotations])

    def view(self, number: int, index: int) -> TemplateView:
        prepared = self._prepared(number)
        pose = template_pose(self._rotations[index], prepared.diagonal)
        try:
            return render_template(_renderer(os.getpid()), prepared.parts, pose, index)
        except SegmentError as error:
            raise MeshError(
                f"mesh {self._specs[number].path} cannot be seen from viewpoint {index}"
            ) from error

    def turned(self, up: MeshUp) -> MeshTemplates:
        """The same meshes, turned otherwise."""
        other = object.__new__(MeshTemplates)
        other.__dict__.update(self.__dict__)
        other._up = up
        other._prepared = _Recent(other._prepare, _KEPT_MESHES, other._release)
        return other

    def _prepare(self, number: int) -> _Prepared:
        if number not in self._specs:
            raise MeshError(f"no mesh has the number {number}")
        mesh = load_object(self._specs[number])
        turn = np.eye(4)
        turn[:3, :3] = _TURNS[self._up]
        if self._layout == "gso":
            turn[:3] *= MEGAPOSE_SCALE / (mesh.extents.max() / 2)
            turn[:3, 3] = -turn[:3, :3] @ mesh.centre
        elif self._layout == "shapenet":
            turn[:3] *= MEGAPOSE_SCALE
        for part in mesh.parts:
            part.apply_transform(turn)
        corners = np.array([part.bounds for part in mesh.parts])
        low, high = corners[:, 0].min(0), corners[:, 1].max(0)
        centre = (low + high) / 2
        for part in mesh.parts:
            part.apply_translation(-centre)
        return _Prepared(mesh.parts, centre, float(np.linalg.norm(high - low)))

    def _release(self, prepared: _Prepared) -> None:
        _renderer(os.getpid()).release(prepared.parts)


class FolderTemplates:
    """Templates from a folder as the released code's rendering scripts write it.

    ``<number:06d>/<view:06d>.png`` (640x480 RGBA), ``<number:06d>/<view:06d>_depth.png`` (uint16) and
    ``object_poses/<number:06d>.npy`` (N x 4 x 4, object -> camera), all with the camera of the templates.

    Args:
        folder: the folder of one data set.
        scale: metres per unit of depth and translation: 0.0001 for the training sets (millimetres of the
            normalised mesh, which the scenes show at 0.1), 0.001 for BOP's objects.
    Raises:
        ConfigError: no such folder.
    """

    def __init__(self, folder: Path, scale: float) -> None:
        if not (folder / "object_poses").is_dir():
            raise ConfigError(
                f"template folder {folder} has no folder object_poses; give the folder of one data set, as "
                "the released rendering scripts write it"
            )
        self._folder, self._scale = folder, scale
        self._poses = _Recent(self._read_poses, 64)

    def __contains__(self, number: int) -> bool:
        return self._pose_file(number).is_file()

    def centre(self, number: int) -> np.ndarray:
        return np.zeros(3)

    def diagonal(self, number: int) -> float:
        # The camera stands two diagonals away.
        return float(self._poses(number)[:, 2, 3].mean() / 2)

    def poses(self, number: int) -> np.ndarray:
        return self._poses(number)

    def view(self, number: int, index: int) -> TemplateView:
        base = self._folder / f"{number:06d}" / f"{index:06d}"
        rgba = self._read(base.with_suffix(".png"))
        depth_file = base.with_name(f"{base.name}_depth.png")
        depth = self._read(depth_file)
        if rgba.ndim != 3 or rgba.shape[2] != 4 or depth.shape != rgba.shape[:2]:
            raise PicoPoseError(
                f"template {base}.png is {rgba.shape} and its depth {depth.shape}; they must be RGBA and "
                "depth of one size: render it again"
            )
        try:
            box = crop_box_from_mask(rgba[..., 3] > 0)
        except SegmentError as error:
            raise PicoPoseError(f"template {base}.png shows nothing: render it again") from error
        size = (CROP_SIZE, CROP_SIZE)
        return TemplateView(
            rgb=cv2.resize(rgba[box.slices][..., :3], size, interpolation=cv2.INTER_LINEAR),
            # Anti-aliased borders do not count as the object, as in the released code.
            mask=crop_mask(rgba[..., 3] == 255, box) > 0,
            points_consistent=crop_points_consistent(depth * np.float32(self._scale), TEMPLATE_K, box),
            T_cam_ctr=self._poses(number)[index].astype(np.float32),
            M_crop_img=box.affine(),
            K=TEMPLATE_K.astype(np.float32),
            viewpoint=index,
        )

    def _pose_file(self, number: int) -> Path:
        return self._folder / "object_poses" / f"{number:06d}.npy"

    def _read_poses(self, number: int) -> np.ndarray:
        path = self._pose_file(number)
        try:
            poses = np.array(np.load(path, allow_pickle=False), np.float64)
        except (OSError, ValueError, EOFError) as error:
            raise PicoPoseError(
                f"template poses {path} cannot be read ({error}): render them again"
            ) from error
        if poses.ndim != 3 or poses.shape[1:] != (4, 4) or len(poses) < 7 or not np.isfinite(poses).all():
            raise PicoPoseError(f"template poses {path} are {poses.shape}, not finite N x 4 x 4 with N > 6")
        poses[:, :3, 3] *= self._scale
        return poses

    @staticmethod
    def _read(path: Path) -> np.ndarray:
        try:
            return read_image(path.read_bytes())
        except (OSError, ValueError) as error:
            raise PicoPoseError(f"template {path} cannot be read ({error}): render it again") from error


def read_image(data: bytes) -> np.ndarray:
    """Decode a PNG or JPEG, channels in the file's order.

    Raises:
        ValueError: it is none, or is cut short (OpenCV would fill it up and say nothing).
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
