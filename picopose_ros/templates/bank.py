"""The templates of an object with their features, built once per mesh and kept on disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from picopose_ros import __version__
from picopose_ros.errors import CacheError, MeshError
from picopose_ros.geometry.crops import (
    CROP_SIZE,
    CropBox,
    crop_box_from_mask,
    crop_mask,
    crop_points_consistent,
    crop_points_nearest,
    crop_rgb,
)
from picopose_ros.model import PicoPose, model_fingerprint
from picopose_ros.progress import progress_bar
from picopose_ros.templates.headlight import AMBIENT, DARKEST
from picopose_ros.templates.meshes import ObjectMesh, ObjectSpec, discover_objects, load_object, mesh_digest
from picopose_ros.templates.renderer import MeshRenderer, Rendering, Shading
from picopose_ros.templates.viewpoints import viewpoint_rotations

TEMPLATE_K = np.array([[572.4114, 0.0, 320.0], [0.0, 573.57043, 240.0], [0.0, 0.0, 1.0]])
"""Camera of the templates (released network): 640x480 pixels."""

TEMPLATE_SIZE = (640, 480)
"""Width and height of a template image."""

DISTANCE = 2.0
"""Distance of the template camera from the object's centre, in diagonals of its bounding box."""

WINDOW = 320
"""Side of the square in the middle of a template that is rendered. At `DISTANCE` every object lies within
149 pixels of the principal point, so the rest of the image is empty."""

ENCODE_BATCH = 16
"""Templates per forward pass of the network."""

OBJECTS_AT_ONCE = min(4, max(2, (os.cpu_count() or 1) // 4))
"""Objects that are onboarded at the same time: one is rendered, read or written while another is encoded."""

Progress = Callable[[str, int, int], None]
"""Called with a class id, the number of objects done and the number of objects; what it raises ends all."""

_FORMAT = 2
"""Raise it when the meaning or the making of a bank changes: every cached bank is then rebuilt."""

_ARRAYS = (
    "images",
    "boxes",
    "masks",
    "points_nearest",
    "points_consistent",
    "T_cam_ctr",
    "centre",
    "M_crop_img",
    "K",
    "descriptors",
    "extents",
)

_PER_TEMPLATE = tuple(name for name in _ARRAYS if name not in ("centre", "K", "extents"))

_log = logging.getLogger(__name__)

_ENCODING = threading.Lock()
"""Two passes at once through a network that has every core would only be in each other's way."""


class _Stopped(Exception):
    """Nobody waits for this bank any more."""


@dataclass(frozen=True, eq=False)
class TemplateBank:
    """All N templates of one object.

    Poses are those of the *centred* object frame (``ctr``): the mesh's own frame moved to the centre of its
    bounding box. ``T_cam_obj = T_cam_ctr @ bank.T_ctr_obj`` goes back to the mesh's own frame. Image
    coordinates are those of the whole 640x480 template.
    """

    class_id: str
    images: np.ndarray
    """(N, B, B, 3) uint8 RGB: the pixels of each crop box, top left in a square of the largest box's side."""
    boxes: np.ndarray
    """(N, 3) int32 left, top and side of the crop boxes, full-image pixels."""
    masks: np.ndarray
    """(N, 224, 224) bool, the object in the crop."""
    points_nearest: np.ndarray
    """(N, 64, 64, 3) float32 camera-frame points for the decode mode ``reference``, m; 0 without depth."""
    points_consistent: np.ndarray
    """(N, 64, 64, 3) float32 camera-frame points for the decode mode ``subpixel``, m; 0 without depth."""
    T_cam_ctr: np.ndarray
    """(N, 4, 4) float32 centred object frame -> template camera, metres."""
    centre: np.ndarray
    """(3,) float64 centre of the bounding box in the mesh's own frame, metres."""
    M_crop_img: np.ndarray
    """(N, 3, 3) float32 full-image pixel -> crop pixel."""
    K: np.ndarray
    """(3, 3) float64 intrinsics of the full template image."""
    descriptors: np.ndarray
    """(N, C, 256) float16 unit vectors, one per patch, row-major: what stage 1 matches."""
    extents: np.ndarray
    """(3,) float64 sides of the bounding box, metres."""
    diameter: float
    """Largest distance between two vertices, metres."""
    warnings: tuple[str, ...] = ()
    """What looks wrong with the mesh."""
    shading: Shading = "flat"
    """How the templates were lit: what is compared with them is to be rendered in the same way."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sides(self) -> np.ndarray:
        """(N,) int32 sides of the crop boxes in pixels."""
        return self.boxes[:, 2]

    @property
    def T_ctr_obj(self) -> np.ndarray:
        """(4, 4) float64 mesh's own frame -> centred object frame."""
        transform = np.eye(4)
        transform[:3, 3] = -self.centre
        return transform

    @cached_property
    def centres(self) -> np.ndarray:
        """(N, 2) float32 where the object's centre lies in each crop, crop pixels."""
        centre = self.T_cam_ctr[:, :3, 3] @ self.K.T.astype(np.float32)
        centre = centre / centre[:, 2:]
        return np.einsum("nij,nj->ni", self.M_crop_img, centre)[:, :2]

    def crops(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """The network's input (n, 3, 224, 224) float32 of the templates ``ids`` (n,)."""
        crops = []
        for index in ids:
            side = int(self.boxes[int(index), 2])
            crops.append(crop_rgb(self.images[int(index)], CropBox(0, 0, side)))
        return torch.from_numpy(np.stack(crops)) if crops else torch.empty(0, 3, CROP_SIZE, CROP_SIZE)

    def select(self, ids: Sequence[int] | np.ndarray) -> TemplateBank:
        """The bank of the templates ``ids`` (n,) alone, in this order."""
        ids = np.asarray(ids, np.intp)
        return replace(self, **{name: getattr(self, name)[ids] for name in _PER_TEMPLATE})


@dataclass(frozen=True)
class Onboarding:
    """What became of the objects of a mesh directory."""

    banks: dict[str, TemplateBank]
    """By class id: the objects that can be estimated."""
    specs: dict[str, ObjectSpec]
    """By class id: all objects found."""
    failed: dict[str, str]
    """By class id: why an object has no bank."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong with the objects that have one."""


@dataclass(frozen=True)
class TemplateCrop:
    """What is kept of one rendered view."""

    box: CropBox
    """In pixels of the view."""
    pixels: np.ndarray
    """(side, side, 3) uint8 RGB."""
    mask: np.ndarray
    """(224, 224) bool."""
    points_nearest: np.ndarray
    """(64, 64, 3) float32, camera frame, metres."""
    points_consistent: np.ndarray
    """(64, 64, 3) float32, camera frame, metres."""


def crop_template(view: Rendering, K: np.ndarray) -> TemplateCrop:
    """Crop a rendered view with intrinsics ``K`` (3, 3) around its object, as the released network does.

    Raises:
        SegmentError: the view is empty.
    """
    box = crop_box_from_mask(view.mask)
    return TemplateCrop(
        box=box,
        pixels=view.rgb[box.slices].copy(),  # not a view that keeps the whole image alive
        mask=crop_mask(view.mask, box).astype(bool),
        points_nearest=crop_points_nearest(view.depth, K, box),
        points_consistent=crop_points_consistent(view.depth, K, box),
    )


def build_bank(
    mesh: ObjectMesh,
    model: PicoPose,
    count: int = 162,
    device: str | torch.device | None = None,
    progress: bool = False,
    stop: threading.Event | None = None,
    shading: Shading | None = None,
) -> TemplateBank:
    """Render an object from all sides and encode the views, both at the same time.

    Args:
        mesh: in metres.
        model: in evaluation mode.
        count: viewpoints: 42, 162 or 642.
        device: where the network runs; None: where it is.
        progress: show it.
        stop: once it is set, the work ends with an exception.
        shading: how the templates are lit; None: as the preset has it (``auto`` for tiny, ``flat`` for the
            released network).

    Raises:
        ConfigError: no such number of viewpoints.
        MeshError: the object is invisible from one of them.
        RenderError: nothing can be rendered on this machine.
    """
    rotations = viewpoint_rotations(count)
    shading = model.config.template_shading if shading is None else shading
    device = next(model.parameters()).device if device is None else torch.device(device)
    model = model.to(device)
    width, height = TEMPLATE_SIZE
    left, top = (width - WINDOW) // 2, (height - WINDOW) // 2
    K = TEMPLATE_K.copy()
    K[:2, 2] -= left, top
    T_ctr_obj = np.eye(4)
    T_ctr_obj[:3, 3] = -mesh.centre
    T_cam_ctr = np.tile(np.eye(4), (count, 1, 1))
    T_cam_ctr[:, :3, :3] = rotations
    T_cam_ctr[:, 2, 3] = DISTANCE * mesh.diagonal

    crops: list[TemplateCrop] = []
    descriptors: list[np.ndarray] = []
    poses = T_cam_ctr @ T_ctr_obj
    with (
        _bar(mesh.spec.class_id, count, progress) as bar,
        _rendered(mesh, poses, K, shading) as parts,
    ):
        for part, batch in parts:
            if stop is not None and stop.is_set():
                raise _Stopped(mesh.spec.class_id)
            with _ENCODING, torch.inference_mode():
                features = model.encode(batch.to(device))
                descriptors.append(features.descriptors.half().cpu().numpy())
            crops += part
            bar.update(len(part))

    boxes = [CropBox(left + crop.box.left, top + crop.box.top, crop.box.side) for crop in crops]
    images = np.zeros((count, *(max(box.side for box in boxes),) * 2, 3), np.uint8)
    for image, crop in zip(images, crops, strict=True):
        image[: crop.box.side, : crop.box.side] = crop.pixels
    return TemplateBank(
        class_id=mesh.spec.class_id,
        images=images,
        boxes=np.array([(box.left, box.top, box.side) for box in boxes], np.int32),
        masks=np.stack([crop.mask for crop in crops]),
        points_nearest=np.stack([crop.points_nearest for crop in crops]),
        points_consistent=np.stack([crop.points_consistent for crop in crops]),
        T_cam_ctr=T_cam_ctr.astype(np.float32),
        centre=mesh.centre,
        M_crop_img=np.stack([box.affine() for box in boxes]),
        K=TEMPLATE_K.copy(),
        descriptors=np.concatenate(descriptors),
        extents=mesh.extents,
        diameter=mesh.diameter,
        warnings=tuple(mesh.warnings),
        shading=shading,
    )


@contextlib.contextmanager
def _rendered(
    mesh: ObjectMesh, poses: np.ndarray, K: np.ndarray, shading: Shading
) -> Iterator[Iterator[tuple[list[TemplateCrop], torch.Tensor]]]:
    """Crops and network inputs (n, 3, 224, 224) of all poses (N, 4, 4), `ENCODE_BATCH` at a time, in order.

    They are rendered by a thread of its own, to which the OpenGL context belongs, two batches ahead.
    """
    renderers: list[MeshRenderer] = []

    def render(start: int) -> tuple[list[TemplateCrop], torch.Tensor]:
        if not renderers:
            renderers.append(MeshRenderer(antialias=True, shading=shading))
        crops, inputs = [], []
        for index, pose in enumerate(poses[start : start + ENCODE_BATCH], start):
            view = renderers[0].render(mesh, pose, K, WINDOW, WINDOW)
            if not view.mask.any():
                raise MeshError(
                    f"mesh {mesh.spec.path} cannot be seen from viewpoint {index}: its faces have no area "
                    "there; give it some thickness"
                )
            crops.append(crop_template(view, K))
            inputs.append(crop_rgb(view.rgb, crops[-1].box))
        return crops, torch.from_numpy(np.stack(inputs))

    ahead: deque[Future[tuple[list[TemplateCrop], torch.Tensor]]] = deque()

    def batches() -> Iterator[tuple[list[TemplateCrop], torch.Tensor]]:
        starts = deque(range(0, len(poses), ENCODE_BATCH))
        while ahead or starts:
            while starts and len(ahead) < 3:
                ahead.append(thread.submit(render, starts.popleft()))
            yield ahead.popleft().result()

    with ThreadPoolExecutor(1, "render") as thread:
        try:
            yield batches()
        finally:
            for batch in ahead:
                batch.cancel()
            for renderer in renderers:
                thread.submit(renderer.close).result()


def load_or_build(
    spec: ObjectSpec,
    model: PicoPose,
    count: int = 162,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    fingerprint: str | None = None,
    stop: threading.Event | None = None,
    shading: Shading | None = None,
) -> TemplateBank:
    """The bank of an object, from the cache where that holds exactly this one.

    An entry counts only if it was made from the same mesh bytes (and files the mesh refers to), unit,
    viewpoints, render settings, weights, preset and package version, and if its checksum is right; otherwise
    it is rebuilt and replaced, and the log says why. Processes that want the same entry wait for the one that
    builds it. Without a usable cache folder the bank is built every time, with a warning.

    Args:
        spec, model, count, device, progress, stop, shading: as in `build_bank`.
        cache_dir: None: ``picopose_ros`` in the user's cache folder.
        fingerprint: of the model, where it is known (`model_fingerprint` reads every weight).

    Raises:
        MeshError: the mesh cannot be used.
        RenderError: nothing can be rendered on this machine.
    """
    shading = model.config.template_shading if shading is None else shading
    recipe = _recipe(spec, model, count, fingerprint, shading)
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    path = folder / _entry_name(spec, model, count)
    bank = _cached(path, recipe, logging.DEBUG)  # it is looked at again under the lock
    if bank is not None:
        return bank
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder / f".{path.name}.lock", stop))
        except OSError as error:
            _log.warning("cache folder %s cannot be used (%s): the bank is not kept", folder, error)
            return build_bank(load_object(spec), model, count, device, progress, stop, shading)
        bank = _cached(path, recipe, logging.WARNING)  # another process may have built it meanwhile
        if bank is None:
            bank = build_bank(load_object(spec), model, count, device, progress, stop, shading)
            try:
                _write_entry(path, bank, recipe)
            except (OSError, SafetensorError) as error:
                _log.warning("the bank of '%s' cannot be kept in %s: %s", spec.class_id, path, error)
    return bank


@contextlib.contextmanager
def loading(
    specs: Sequence[ObjectSpec],
    model: PicoPose,
    count: int = 162,
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    fingerprint: str | None = None,
    shading: Shading | None = None,
) -> Iterator[list[Future[TemplateBank]]]:
    """`load_or_build` of several objects at once: a future for each, in their order.

    Whoever leaves the context gives up those that are not done yet.
    """
    fingerprint = model_fingerprint(model) if fingerprint is None else fingerprint
    stop = threading.Event()
    pool = ThreadPoolExecutor(OBJECTS_AT_ONCE, "onboard")
    try:
        yield [
            pool.submit(
                load_or_build, spec, model, count, cache_dir, device, progress, fingerprint, stop, shading
            )
            for spec in specs
        ]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def onboard(
    mesh_dir: str | Path,
    model: PicoPose,
    count: int = 162,
    unit: str = "m",
    cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool | Progress = False,
    shading: Shading | None = None,
) -> Onboarding:
    """Make the banks of all objects of a mesh directory. A mesh that cannot be used does not stop the others.

    Args:
        mesh_dir: see `discover_objects`; ``unit`` is its default unit.
        model, count, cache_dir, device, shading: see `load_or_build`.
        progress: True to show it; or called as each object is waited for and done.

    Raises:
        MeshError: the directory cannot be used, or not one of its meshes.
        ConfigError: no such number of viewpoints.
        RenderError: nothing can be rendered on this machine.
    """
    specs = {spec.class_id: spec for spec in discover_objects(mesh_dir, unit)}
    result = Onboarding({}, specs, {})
    tell = progress if callable(progress) else lambda *step: None
    bars = progress is True
    with loading(list(specs.values()), model, count, cache_dir, device, bars, shading=shading) as banks:
        for done, (class_id, bank) in enumerate(zip(specs, banks)):
            tell(class_id, done, len(specs))
            try:
                result.banks[class_id] = bank.result()
            except MeshError as error:
                result.failed[class_id] = str(error)
                _log.error("object '%s' is left out: %s", class_id, error)
            else:
                result.warnings.extend(result.banks[class_id].warnings)
                for warning in result.banks[class_id].warnings:
                    _log.warning("%s", warning)
            tell(class_id, done + 1, len(specs))
    if not result.banks:
        raise MeshError(f"no object of {mesh_dir} can be used: " + "; ".join(result.failed.values()))
    return result


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/picopose_ros``, or ``~/.cache/picopose_ros``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "picopose_ros"


def _bar(class_id: str, count: int, progress: bool) -> Any:
    return progress_bar(None, count, f"onboarding {class_id}", "view", hidden=not progress)


def _recipe(
    spec: ObjectSpec, model: PicoPose, count: int, fingerprint: str | None, shading: Shading
) -> dict[str, str]:
    """Everything that a bank depends on, by the name under which the log speaks of it."""
    settings = [TEMPLATE_K.tolist(), TEMPLATE_SIZE, DISTANCE, WINDOW, "antialiased", _FORMAT]
    return {
        "mesh": mesh_digest(spec),
        "unit": spec.unit,
        "viewpoints": str(count),
        "render settings": json.dumps(settings),
        "shading": json.dumps([shading, AMBIENT, DARKEST]),
        "weights": model_fingerprint(model) if fingerprint is None else fingerprint,
        "preset": model.config.name,
        "package version": __version__,
    }


def _entry_name(spec: ObjectSpec, model: PicoPose, count: int) -> str:
    """One entry per mesh file, preset and number of viewpoints, so that a stale one is replaced, not kept."""
    place = hashlib.sha256(str(spec.path.resolve()).encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", spec.class_id)[:60]
    return f"{readable}-{place}-{model.config.name}-{count}.safetensors"


def _checksum(arrays: dict[str, np.ndarray], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in _ARRAYS:
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path, stop: threading.Event | None = None) -> Iterator[None]:
    """Hold the lock file; the kernel frees it if this process dies."""
    with path.open("a") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    _log.info("waiting for another process that builds the same bank (%s)", path)
                waiting = True
                if stop is not None and stop.is_set():
                    raise _Stopped(path.name) from None
                time.sleep(0.1)
        yield


def _cached(path: Path, recipe: dict[str, str], level: int) -> TemplateBank | None:
    """The entry, or None; why it does not count is logged at that level."""
    if not path.is_file():
        return None
    try:
        return _read_entry(path, recipe)
    except CacheError as error:
        _log.log(level, "%s", error)
        return None


def _read_entry(path: Path, recipe: dict[str, str]) -> TemplateBank:
    """Raises CacheError if the entry is of another recipe or not intact."""
    try:
        with safe_open(path, framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            about: dict[str, Any] = json.loads(metadata["about"])
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        differing = [name for name in recipe if about["recipe"].get(name) != recipe[name]]
        if differing:
            raise CacheError(f"the cached bank {path} is stale: {', '.join(differing)} changed; rebuilding")
        if metadata["checksum"] != _checksum(arrays, metadata["about"]):
            raise CacheError(f"the cached bank {path} is damaged (wrong checksum): rebuilding")
        return TemplateBank(
            class_id=about["class_id"],
            diameter=about["diameter"],
            warnings=tuple(about["warnings"]),
            shading=about["shading"],
            **arrays,
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"the cached bank {path} is damaged ({error}): rebuilding") from error


def _write_entry(path: Path, bank: TemplateBank, recipe: dict[str, str]) -> None:
    """Write atomically, under the lock: readers see the old entry or the whole new one, whatever crashes."""
    for leftover in path.parent.glob(f".{path.name}.*.partial"):  # of processes that were killed
        leftover.unlink(missing_ok=True)
    about = json.dumps(
        {
            "class_id": bank.class_id,
            "diameter": bank.diameter,
            "warnings": bank.warnings,
            "shading": bank.shading,
            "recipe": recipe,
        }
    )
    arrays = {name: np.ascontiguousarray(getattr(bank, name)) for name in _ARRAYS}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(arrays, partial, metadata={"about": about, "checksum": _checksum(arrays, about)})
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
