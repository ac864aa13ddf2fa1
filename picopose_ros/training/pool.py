"""Rendered views of procedural objects on disk: written once, read by training while the pool still grows.

A pool is a folder of NumPy files that are mapped, not loaded. The unit is the *cluster*: one template view
of an object, rendered as :mod:`picopose_ros.templates.bank` renders it, and a few query views from nearby
directions. Everything is in the object's centred frame (origin at the bounding-box centre), metres.

Query depth is stored as 16-bit steps of the object's diagonal: value 0 is background, value ``q`` is the
depth ``z_centre + diagonal * ((q - 1) / 65534 - 0.5)``, so that it is off by at most ``diagonal / 131068``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from picopose_ros.errors import ConfigError, PicoPoseError
from picopose_ros.synthetic.objects import VALIDATION_SEED, build_object
from picopose_ros.templates.bank import TEMPLATE_K
from picopose_ros.templates.renderer import MeshRenderer
from picopose_ros.templates.viewpoints import viewpoint_rotations
from picopose_ros.training.views import (
    QUERY_SIZE,
    QueryView,
    TemplateView,
    draw_query_pose,
    framing_intrinsics,
    render_template,
    template_pose,
)

_FORMAT = 2
_VIEWPOINTS = 162
_DEPTH_STEPS = 65534
_ABSENT, _COMPLETE, _BROKEN = 0, 1, 2


class BrokenSampleError(PicoPoseError):
    """A sample that is not what was written: a damaged disk, a copy that was cut short."""


@dataclass(frozen=True)
class PoolItem:
    """One cluster of the pool."""

    template: TemplateView
    queries: tuple[QueryView, ...]
    object_index: int  # within the pool
    cluster: int  # within the object
    seed: int  # of the procedural object
    diagonal: float  # of its bounding box, metres
    shape_families: tuple[str, ...]
    texture_families: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """What a pool is made of; a pool can be resumed only with the same plan."""

    objects: int
    first_seed: int
    clusters: int
    queries: int
    format: int = _FORMAT
    query_size: int = QUERY_SIZE


def _arrays(plan: _Plan) -> dict[str, tuple[tuple[int, ...], type]]:
    clusters, views = plan.objects * plan.clusters, (plan.objects * plan.clusters, plan.queries)
    return {
        "template_rgb": ((clusters, 224, 224, 3), np.uint8),
        "template_shaded": ((clusters, 224, 224), np.uint8),
        "template_mask": ((clusters, 224, 224), np.uint8),
        "template_points": ((clusters, 64, 64, 3), np.float32),
        "template_pose": ((clusters, 4, 4), np.float32),
        "template_affine": ((clusters, 3, 3), np.float32),
        "template_viewpoint": ((clusters,), np.int16),
        "query_rgb": ((*views, QUERY_SIZE, QUERY_SIZE, 3), np.uint8),
        "query_depth": ((*views, QUERY_SIZE, QUERY_SIZE), np.uint16),
        "query_pose": ((*views, 4, 4), np.float32),
        "query_K": ((*views, 3, 3), np.float32),
        "diagonal": ((plan.objects,), np.float64),
        "state": ((plan.objects,), np.uint8),
    }


def encode_depth(depth: np.ndarray, z_centre: float, diagonal: float) -> np.ndarray:
    """Quantise a query's depth (metres, 0 = background) to uint16; see the module's text."""
    steps = np.rint((((depth - z_centre) / diagonal) + 0.5) * _DEPTH_STEPS) + 1
    return np.where(depth > 0, np.clip(steps, 1, _DEPTH_STEPS + 1), 0).astype(np.uint16)


def decode_depth(steps: np.ndarray, z_centre: float, diagonal: float) -> np.ndarray:
    """Metres (float32, 0 = background) from :func:`encode_depth`'s uint16 steps."""
    depth = z_centre + diagonal * ((steps.astype(np.float32) - 1) / _DEPTH_STEPS - 0.5)
    return np.where(steps > 0, depth, 0).astype(np.float32)


def _write_json(path: Path, content: dict[str, object]) -> None:
    """Replace a file in one step: a reader sees the old content or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            json.dump(content, stream, indent=1)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _open(folder: Path, plan: _Plan, mode: str) -> dict[str, np.ndarray]:
    arrays = {}
    for name, (shape, dtype) in _arrays(plan).items():
        path = folder / f"{name}.npy"
        try:
            arrays[name] = np.lib.format.open_memmap(path, mode=mode)
        except (OSError, ValueError) as error:
            raise PicoPoseError(
                f"pool file {path} cannot be mapped ({error}): delete the folder and build it again"
            ) from error
        if arrays[name].shape != shape or arrays[name].dtype != dtype:
            raise PicoPoseError(
                f"pool file {path} does not fit {folder / 'pool.json'}: delete the folder and build it again"
            )
    return arrays


def _create(folder: Path, plan: _Plan) -> None:
    """Make every file at its full size: a disk that is too small shows now and not as a crash on a page."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (shape, dtype) in _arrays(plan).items():
        path, length = folder / f"{name}.npy", int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            offset = array.offset
            del array
            with path.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, offset + length)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise PicoPoseError(
                f"cannot reserve {length / 1e9:.1f} GB for {path} ({error.strerror}): free disk space or"
                " build fewer objects"
            ) from error
    _write_json(folder / "pool.json", asdict(plan))  # last: a folder without it is not a pool yet


def _read_plan(folder: Path) -> _Plan | None:
    path = folder / "pool.json"
    if not path.exists():
        return None
    try:
        return _Plan(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise PicoPoseError(
            f"pool description {path} cannot be read ({error}): delete the folder and build it again"
        ) from error


def _families(folder: Path, index: int) -> Path:
    return folder / "families" / f"{index:06d}.json"


def _render_object(
    renderer: MeshRenderer, arrays: dict[str, np.ndarray], folder: Path, plan: _Plan, index: int
) -> None:
    seed = plan.first_seed + index
    made = build_object(seed)
    parts, diagonal = made.centred(), made.diagonal
    points = np.concatenate([part.vertices for part in parts])
    rotations = viewpoint_rotations(_VIEWPOINTS)
    rng = np.random.default_rng([seed, 0x9001])
    for cluster, viewpoint in enumerate(rng.permutation(_VIEWPOINTS)[: plan.clusters]):
        row = index * plan.clusters + cluster
        template = render_template(
            renderer, parts, template_pose(rotations[viewpoint], diagonal), int(viewpoint)
        )
        arrays["template_rgb"][row] = template.rgb
        arrays["template_shaded"][row] = template.shaded
        arrays["template_mask"][row] = template.mask
        arrays["template_points"][row] = template.points_consistent
        arrays["template_pose"][row] = template.T_cam_ctr
        arrays["template_affine"][row] = template.M_crop_img
        arrays["template_viewpoint"][row] = viewpoint
        for column in range(plan.queries):
            pose = draw_query_pose(rng, rotations[viewpoint], diagonal)
            K = framing_intrinsics(points, pose)
            view = renderer.render(parts, pose, K, QUERY_SIZE, QUERY_SIZE)
            if not view.mask.any():
                raise PicoPoseError(f"object {seed} is invisible from viewpoint {viewpoint}")
            arrays["query_rgb"][row, column] = view.rgb
            arrays["query_depth"][row, column] = encode_depth(view.depth, pose[2, 3], diagonal)
            arrays["query_pose"][row, column] = pose
            arrays["query_K"][row, column] = K
    renderer.release(parts)
    arrays["diagonal"][index] = diagonal
    names = {"seed": seed, "shapes": made.shape_families, "textures": made.texture_families}
    _write_json(_families(folder, index), names)


def _work(
    folder: Path, plan: _Plan, worker: int, workers: int, progress: Callable[[int, int], None] | None
) -> None:
    arrays = _open(folder, plan, "r+")
    state = arrays["state"]
    with MeshRenderer(antialias=True) as renderer:
        for index in range(worker, plan.objects, workers):
            if state[index] == _COMPLETE:
                continue
            try:
                _render_object(renderer, arrays, folder, plan, index)
            except (PicoPoseError, ValueError, IndexError, ArithmeticError) as error:
                _write_json(_families(folder, index), {"seed": plan.first_seed + index, "error": repr(error)})
                state[index] = _BROKEN
            else:
                for array in arrays.values():  # on the disk before it counts, should the power go
                    array.flush()
                state[index] = _COMPLETE
            done = int(np.count_nonzero(state == _COMPLETE))
            broken = [plan.first_seed + int(i) for i in np.flatnonzero(state == _BROKEN)]
            _write_json(
                folder / "progress.json", {"objects": plan.objects, "done": done, "broken_seeds": broken}
            )
            if progress is not None:
                progress(done, plan.objects)


def build_pool(
    out_dir: str | Path,
    objects: int,
    first_seed: int = 0,
    clusters: int = 8,
    queries: int = 3,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Render a pool, or go on with one that was interrupted.

    An object counts once its views are all written; an object that was cut short is rendered again. An
    object that cannot be rendered is skipped, and its seed is named in ``progress.json``.

    :param out_dir: the pool's folder; made if needed.
    :param objects: number of objects; seeds ``first_seed`` and up.
    :param clusters: template views per object, without repetition.
    :param queries: query views per template view.
    :param workers: processes that render side by side.
    :param progress: called as ``progress(done, objects)`` after every object (with one worker).
    :raises ConfigError: impossible numbers, training and validation seeds in one pool, or a folder that
        already holds a pool made with other numbers.
    :raises PicoPoseError: the disk is too small or full, or the folder's files do not fit together. What is
        complete stays, and the same call goes on.
    """
    if min(objects, clusters, queries, workers) < 1 or clusters > _VIEWPOINTS or first_seed < 0:
        raise ConfigError(
            f"cannot build a pool of {objects} objects from seed {first_seed} with {clusters} clusters (1 to"
            f" {_VIEWPOINTS}), {queries} queries and {workers} workers: all must be positive"
        )
    if first_seed < VALIDATION_SEED < first_seed + objects:
        raise ConfigError(
            f"seeds {first_seed} to {first_seed + objects - 1} mix training and validation objects: stay on"
            f" one side of {VALIDATION_SEED}"
        )
    folder, plan = Path(out_dir), _Plan(objects, first_seed, clusters, queries)
    present = _read_plan(folder)
    if present is None:
        _create(folder, plan)
    elif present != plan:
        raise ConfigError(
            f"{folder} already holds another pool ({present}, wanted {plan}): use another folder"
        )
    try:
        (folder / "families").mkdir(exist_ok=True)
        if workers == 1:
            _work(folder, plan, 0, 1, progress)
            return
        context = multiprocessing.get_context("spawn")  # an OpenGL context does not survive a fork
        with ProcessPoolExecutor(workers, mp_context=context) as executor:
            for done in [executor.submit(_work, folder, plan, n, workers, None) for n in range(workers)]:
                done.result()
    except OSError as error:
        raise PicoPoseError(
            f"pool {folder} cannot be written ({error}): free disk space and run it again; it goes on with "
            "the objects that are missing"
        ) from error
    except BrokenProcessPool as error:
        raise PicoPoseError(
            f"a process that renders into {folder} was killed (out of memory?): run it again to go on"
        ) from error


def _is_pose(matrix: np.ndarray) -> bool:
    """Whether a (4, 4) matrix is a rotation and a shift."""
    rotation = matrix[:3, :3].astype(np.float64)
    return (
        bool(np.isfinite(matrix).all())
        and bool((matrix[3] == (0, 0, 0, 1)).all())
        and np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3)
        and matrix[2, 3] > 0
    )


def _what_is_broken(item: PoolItem) -> str | None:
    """Why a cluster cannot be trained on; None where nothing speaks against it."""
    template = item.template
    if not (np.isfinite(item.diagonal) and item.diagonal > 0):
        return f"its diagonal is {item.diagonal}"
    if not _is_pose(template.T_cam_ctr):
        return "its template's pose is none"
    if not template.mask.any():
        return "its template's mask is empty"
    if not np.isfinite(template.M_crop_img).all() or template.M_crop_img[0, 0] <= 0:
        return "its template's crop is none"
    if not np.isfinite(template.points_consistent).all() or not template.points_consistent.any():
        return "its template's points are not finite, or none"
    for number, query in enumerate(item.queries):
        if not _is_pose(query.T_cam_ctr):
            return f"pose of query {number} is none"
        if not np.isfinite(query.K).all() or query.K[0, 0] <= 0:
            return f"camera of query {number} is none"
        if not query.mask.any():
            return f"mask of query {number} is empty"
    return None


class PoolReader:
    """Clusters of a pool by index; only objects that are complete are seen, and the pool may still grow.

    ``len(reader)`` is the number of complete clusters as of the last :meth:`refresh`; with pools written by
    one worker an index keeps its meaning while the pool grows.

    :param folder: a folder written by :func:`build_pool`.
    :raises PicoPoseError: there is no pool, or its files do not fit together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        plan = _read_plan(self.folder)
        if plan is None:
            raise PicoPoseError(f"{self.folder} holds no pool (no pool.json): build one with build_pool")
        if plan.format != _FORMAT:
            raise PicoPoseError(
                f"{self.folder} has pool format {plan.format}, this version reads {_FORMAT}: build it again"
            )
        self._plan = plan
        self._arrays = _open(self.folder, plan, "r")
        self._names: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self.refresh()

    def refresh(self) -> int:
        """Look again which objects are complete; returns the number of complete clusters."""
        self.objects = np.flatnonzero(self._arrays["state"] == _COMPLETE)  # indices of complete objects
        return len(self)

    @property
    def clusters(self) -> int:
        """Clusters per object."""
        return self._plan.clusters

    @property
    def queries(self) -> int:
        """Query views per cluster."""
        return self._plan.queries

    def __len__(self) -> int:
        return len(self.objects) * self.clusters

    def __getitem__(self, index: int) -> PoolItem:
        if not 0 <= index < len(self):
            raise IndexError(f"cluster {index} of {len(self)} complete ones in {self.folder}")
        return self.at(int(self.objects[index // self.clusters]), index % self.clusters)

    def at(self, object_index: int, cluster: int) -> PoolItem:
        """Cluster ``cluster`` of the object at ``object_index`` (one of :attr:`objects`).

        :raises BrokenSampleError: what is on the disk cannot be what was rendered.
        """
        row = object_index * self.clusters + cluster
        diagonal = float(self._arrays["diagonal"][object_index])
        shapes, textures = self._object_names(object_index)
        queries = tuple(self._query(row, column, diagonal) for column in range(self.queries))
        seed = self._plan.first_seed + object_index
        item = PoolItem(
            self.template(object_index, cluster),
            queries,
            object_index,
            cluster,
            seed,
            diagonal,
            shapes,
            textures,
        )
        if reason := _what_is_broken(item):
            raise self._broken(object_index, f"cluster {cluster}, {reason}")
        return item

    def _broken(self, object_index: int, reason: str) -> BrokenSampleError:
        seed = self._plan.first_seed + object_index
        return BrokenSampleError(f"{self.folder}: object {object_index} (seed {seed}): {reason}")

    def template(self, object_index: int, cluster: int) -> TemplateView:
        """Only the template of a cluster: for wrong and far templates, without reading the queries."""
        row = object_index * self.clusters + cluster
        arrays = self._arrays
        return TemplateView(
            rgb=np.array(arrays["template_rgb"][row]),
            shaded=np.array(arrays["template_shaded"][row]),
            mask=arrays["template_mask"][row] > 0,
            points_consistent=np.array(arrays["template_points"][row]),
            T_cam_ctr=np.array(arrays["template_pose"][row]),
            M_crop_img=np.array(arrays["template_affine"][row]),
            K=TEMPLATE_K.astype(np.float32),
            viewpoint=int(arrays["template_viewpoint"][row]),
        )

    def _query(self, row: int, column: int, diagonal: float) -> QueryView:
        pose = np.array(self._arrays["query_pose"][row, column])
        return QueryView(
            rgb=np.array(self._arrays["query_rgb"][row, column]),
            depth=decode_depth(self._arrays["query_depth"][row, column], float(pose[2, 3]), diagonal),
            T_cam_ctr=pose,
            K=np.array(self._arrays["query_K"][row, column]),
        )

    def _object_names(self, index: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if index not in self._names:
            path = _families(self.folder, index)
            try:
                names = json.loads(path.read_text())
                self._names[index] = (tuple(names["shapes"]), tuple(names["textures"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise self._broken(index, f"{path.name} cannot be read ({error!r})") from error
        return self._names[index]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `picopose pool`."""
    parser.add_argument("out", metavar="OUT", type=Path, help="the pool's folder; an interrupted one goes on")
    parser.add_argument("--objects", type=int, default=900, help="number of objects (900: 8.3 GB)")
    parser.add_argument(
        "--first-seed", type=int, default=0, help=f"of the objects; from {VALIDATION_SEED} on for validation"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that render side by side")


def run(args: argparse.Namespace) -> int:
    """`picopose pool`."""
    build_pool(args.out, args.objects, args.first_seed, workers=args.workers)
    reader = PoolReader(args.out)
    print(f"{args.out}: {len(reader.objects)} of {args.objects} objects, {len(reader)} clusters")
    return 0
