"""A dataset of the BOP benchmark on disk (bop_toolkit, docs/bop_datasets_format.md).

Read as it is needed, and every file that cannot be used is named. Lengths are metres here and millimetres in
the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from picopose_ros.errors import DatasetError
from picopose_ros.files import read_json
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.templates.meshes import (
    MODELS_INFO_FILE,
    ObjectSpec,
    Symmetries,
    discover_objects,
    load_object,
)

TARGETS_FILE = "test_targets_bop19.json"

CAD_DATASETS = ("tless",)
"""Datasets whose templates are made from ``models_cad``; those of the others from ``models``."""

_FOLDERS = ("rgb", "gray")
_SUFFIXES = (".jpg", ".png", ".tif", ".tiff")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Target:
    """What the benchmark asks for: so many instances of an object in an image."""

    scene_id: int
    image_id: int
    obj_id: int
    inst_count: int


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """One true instance in an image.

    Attributes:
        obj_id: which object it is.
        T_cam_obj: (4, 4) model -> camera, metres.
        visib_fract: visible pixels / pixels of the whole silhouette; None without ``scene_gt_info.json``.
        px_count_visib: visible pixels; None likewise.
        bbox_visib: (x, y, width, height) of what is visible, pixels; None likewise.
    """

    obj_id: int
    T_cam_obj: np.ndarray
    visib_fract: float | None = None
    px_count_visib: int | None = None
    bbox_visib: tuple[int, int, int, int] | None = None


class BopDataset:
    """A dataset folder: models, and scenes with images, cameras, true poses and masks.

    Args:
        root: folder of the datasets. name: the dataset's folder in it: ``lmo``, ``tless``, ...
        split: folder of the scenes; where there is none of this name, the only ``<split>_*`` is taken
            (T-LESS and HomebrewedDB have ``test_primesense``).
        targets_file: what is asked for, in the dataset's folder.

    Attributes:
        folder: of the dataset. name: of it. split_dir: folder of the scenes.

    Raises:
        DatasetError: there is no such folder.
    """

    def __init__(
        self, root: str | Path, name: str, split: str = "test", targets_file: str = TARGETS_FILE
    ) -> None:
        self.name = name
        self.folder = Path(root).expanduser() / name
        if not self.folder.is_dir():
            raise DatasetError(f"there is no folder {self.folder}; --root holds the datasets' folders")
        self.split_dir = _split_dir(self.folder, split)
        self.targets_path = self.folder / targets_file
        self._scene: tuple[int, dict[str, Any]] = (-1, {})  # the JSON files of the scene last asked for

    @cached_property
    def targets(self) -> list[Target]:
        """What the benchmark asks for, in the file's order.

        Raises:
            DatasetError: the file can't be read or an entry is no target.
        """
        entries = read_json(self.targets_path, list, DatasetError)
        return [
            _parsed(
                lambda e: Target(*(int(e[key]) for key in ("scene_id", "im_id", "obj_id", "inst_count"))),
                entry,
                f"{self.targets_path}, entry {index}",
            )
            for index, entry in enumerate(entries)
        ]

    @cached_property
    def images(self) -> list[tuple[int, int]]:
        """(scene, image) of all targets, in order, each once."""
        return sorted({(target.scene_id, target.image_id) for target in self.targets})

    def targets_of(self, scene_id: int, image_id: int) -> list[Target]:
        """What is asked for in an image, in the file's order."""
        return self._targets_by_image.get((scene_id, image_id), [])

    @cached_property
    def _targets_by_image(self) -> dict[tuple[int, int], list[Target]]:
        found: dict[tuple[int, int], list[Target]] = {}
        for target in self.targets:
            found.setdefault((target.scene_id, target.image_id), []).append(target)
        return found

    @property
    def models_dir(self) -> Path:
        """Folder of the models that templates are made from."""
        return self.folder / ("models_cad" if self.name in CAD_DATASETS else "models")

    @property
    def eval_models_dir(self) -> Path:
        """Folder of the models that errors are measured with: ``models_eval``, or ``models`` without it."""
        folder = self.folder / "models_eval"
        return folder if folder.is_dir() else self.folder / "models"

    @cached_property
    def models(self) -> dict[int, ObjectSpec]:
        """The models that templates are made from, by object id.

        Raises:
            DatasetError: there is no such folder. MeshError: it can't be used.
        """
        return _models(self.models_dir)

    @cached_property
    def eval_models(self) -> dict[int, ObjectSpec]:
        """The models that errors are measured with, by object id. Errors as `models`."""
        return _models(self.eval_models_dir)

    def symmetries(self, obj_id: int) -> Symmetries:
        """Of the evaluation model, in metres.

        Raises:
            DatasetError: there is no such object.
        """
        return _spec(self.eval_models, obj_id, self.eval_models_dir).symmetries

    def diameter(self, obj_id: int) -> float:
        """Of the evaluation model, in metres: as ``models_info.json`` has it, else measured.

        Raises:
            DatasetError: there is no such object. MeshError: its mesh can't be read.
        """
        spec = _spec(self.eval_models, obj_id, self.eval_models_dir)
        info = self._eval_info.get(str(obj_id))
        if info is None or "diameter" not in info:
            return load_object(spec).diameter
        where = f"{self.eval_models_dir / MODELS_INFO_FILE}, object {obj_id}"
        return _parsed(lambda i: float(i["diameter"]) / 1000.0, info, where)

    @cached_property
    def _eval_info(self) -> dict[str, Any]:
        path = self.eval_models_dir / MODELS_INFO_FILE
        return read_json(path, dict, DatasetError) if path.is_file() else {}

    def image_path(self, scene_id: int, image_id: int) -> Path:
        """The colour or gray image's file.

        Raises:
            DatasetError: there is none.
        """
        folder = self._scene_dir(scene_id)
        names = [f"{image_id:06d}{suffix}" for suffix in _SUFFIXES]
        found = _find([folder / kind / name for kind in _FOLDERS for name in names])
        if found is None:
            raise DatasetError(
                f"scene {scene_id} has no image {image_id}: no {image_id:06d}{'/'.join(_SUFFIXES)} in "
                f"{folder}/rgb or gray"
            )
        return found

    def image(self, scene_id: int, image_id: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB; a gray image three times.

        Raises:
            DatasetError: there is none, or it can't be read.
        """
        path = self.image_path(scene_id, image_id)
        pixels = _read_pixels(path)
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        if pixels.dtype != np.uint8:
            raise DatasetError(f"image {path} has pixels of type {pixels.dtype}, expected 8 or 16 bits")
        if pixels.ndim == 2:
            return np.repeat(pixels[:, :, None], 3, axis=2)
        return np.ascontiguousarray(pixels[:, :, 2::-1])

    def camera(self, scene_id: int, image_id: int) -> CameraModel:
        """Of an image, which BOP has without distortion.

        Raises:
            DatasetError: the camera file can't be read or doesn't have the image, or there is no image.
            CameraError: it can't be used.
        """
        entry, where = self._entry("scene_camera.json", scene_id, image_id)
        K = _parsed(lambda e: np.array(e["cam_K"], np.float64).reshape(3, 3), entry, where)
        path = self.image_path(scene_id, image_id)
        try:
            with Image.open(path) as image:  # its header only
                width, height = image.size
        except (OSError, UnidentifiedImageError) as error:
            raise DatasetError(f"image {path} can't be read: {error}") from error
        return CameraModel(K, width, height)

    def depth(self, scene_id: int, image_id: int) -> np.ndarray:
        """(H, W) float32 metres, 0 where nothing was measured.

        Raises:
            DatasetError: there is none or it can't be read, or the camera file has no ``depth_scale``.
        """
        folder = self._scene_dir(scene_id) / "depth"
        path = _find([folder / f"{image_id:06d}{suffix}" for suffix in (".png", ".tif", ".tiff")])
        if path is None:
            raise DatasetError(f"scene {scene_id} has no depth image {image_id} in {folder}")
        entry, where = self._entry("scene_camera.json", scene_id, image_id)
        scale = _parsed(lambda e: float(e["depth_scale"]), entry, where)
        return _read_plane(path).astype(np.float32) * np.float32(scale / 1000.0)

    def ground_truth(self, scene_id: int, image_id: int) -> list[GroundTruth]:
        """The true instances of an image, in the file's order.

        Raises:
            DatasetError: ``scene_gt.json`` can't be read or doesn't have the image, or it and
                ``scene_gt_info.json`` don't fit each other.
        """
        entries, where = self._entry("scene_gt.json", scene_id, image_id)
        truths = [_parsed(_truth, entry, f"{where}, instance {k}") for k, entry in enumerate(entries)]
        if not (self._scene_dir(scene_id) / "scene_gt_info.json").is_file():
            return truths
        infos, where = self._entry("scene_gt_info.json", scene_id, image_id)
        if len(infos) != len(truths):
            raise DatasetError(f"{where}: has {len(infos)} instances, scene_gt.json has {len(truths)}")
        return [
            _parsed(lambda i, t=truth: _with_info(t, i), info, f"{where}, instance {k}")
            for k, (truth, info) in enumerate(zip(truths, infos))
        ]

    def mask(self, scene_id: int, image_id: int, gt_index: int, visible: bool = True) -> np.ndarray:
        """(H, W) bool of a true instance: what is visible of it, or its whole silhouette.

        Raises:
            DatasetError: there is none or it can't be read.
        """
        folder = self._scene_dir(scene_id) / ("mask_visib" if visible else "mask")
        return _read_plane(folder / f"{image_id:06d}_{gt_index:06d}.png") > 0

    def _scene_dir(self, scene_id: int) -> Path:
        folder = self.split_dir / f"{scene_id:06d}"
        if not folder.is_dir():
            raise DatasetError(f"there is no scene folder {folder}: the dataset is not complete")
        return folder

    def _entry(self, file: str, scene_id: int, image_id: int) -> tuple[Any, str]:
        """What a JSON file of a scene says of an image, and where that stands."""
        path = self._scene_dir(scene_id) / file
        if self._scene[0] != scene_id:
            self._scene = (scene_id, {})
        files = self._scene[1]
        if file not in files:
            files[file] = read_json(path, dict, DatasetError)
        if str(image_id) not in files[file]:
            raise DatasetError(f"{path}: has no entry of image {image_id}")
        return files[file][str(image_id)], f"{path}, image {image_id}"


def _split_dir(folder: Path, split: str) -> Path:
    if (folder / split).is_dir():
        return folder / split
    others = sorted(path for path in folder.glob(f"{split}_*") if path.is_dir())
    if len(others) == 1:
        return others[0]
    found = ", ".join(path.name for path in others) or "none"
    raise DatasetError(f"{folder} has no folder {split} (others like it: {found}); name one with --split")


def _models(folder: Path) -> dict[int, ObjectSpec]:
    if not folder.is_dir():
        raise DatasetError(f"there is no folder of models {folder}: the dataset is not complete")
    found = {}
    for spec in discover_objects(folder, "mm"):
        number = re.fullmatch(r"obj_(\d+)", spec.class_id)
        if number:
            found[int(number[1])] = spec
    if not found:
        raise DatasetError(f"{folder} holds no obj_*.ply: is it a folder of BOP models?")
    return found


def _spec(models: dict[int, ObjectSpec], obj_id: int, folder: Path) -> ObjectSpec:
    if obj_id not in models:
        known = ", ".join(map(str, sorted(models)))
        raise DatasetError(f"there is no object {obj_id} in {folder}; it holds {known}")
    return models[obj_id]


def _truth(entry: Any) -> GroundTruth:
    T = np.eye(4)
    T[:3, :3] = np.array(entry["cam_R_m2c"], np.float64).reshape(3, 3)
    T[:3, 3] = np.array(entry["cam_t_m2c"], np.float64).reshape(3) / 1000.0
    return GroundTruth(int(entry["obj_id"]), T)


def _with_info(truth: GroundTruth, info: Any) -> GroundTruth:
    x, y, width, height = (int(value) for value in info["bbox_visib"])
    return GroundTruth(
        truth.obj_id,
        truth.T_cam_obj,
        float(info["visib_fract"]),
        int(info["px_count_visib"]),
        (x, y, width, height),
    )


def _parsed(parse: Callable[[Any], _T], entry: Any, where: str) -> _T:
    try:
        return parse(entry)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DatasetError(f"{where}: is not in BOP's form ({reason})") from error


def _find(paths: list[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _read_pixels(path: Path) -> np.ndarray:
    """As they are in the file; OpenCV's channel order."""
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise DatasetError(f"image {path} can't be read: {error.strerror or error}") from error
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    except cv2.error:
        pixels = None
    if pixels is None:
        raise DatasetError(f"image {path} ({data.size} bytes) can't be decoded: it is damaged or no image")
    return pixels


def _read_plane(path: Path) -> np.ndarray:
    pixels = _read_pixels(path)
    return pixels if pixels.ndim == 2 else pixels[:, :, 0]
