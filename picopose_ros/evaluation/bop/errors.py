"""The errors of the BOP Challenge 2019 and its matching, by this package or by the BOP toolkit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Protocol

import numpy as np
from scipy.spatial import ConvexHull, QhullError, cKDTree

from picopose_ros.errors import ConfigError
from picopose_ros.evaluation.bop.dataset import BopDataset
from picopose_ros.evaluation.metrics import (
    ADD_SHARES,
    MSPD_THRESHOLDS,
    MSPD_WIDTH,
    RECALL_THRESHOLDS,
    VSD_DELTA,
    VSD_TAUS,
    VsdScorer,
    add,
    bop_symmetries,
    matched,
    mspd,
    mssd,
    sphere_projections_overlap,
    spheres_overlap,
    transform_points,
    translation_error,
)
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.templates.meshes import ObjectMesh, load_object
from picopose_ros.templates.renderer import MeshRenderer

VSD_DELTAS = {"itodd": 0.005}
"""Metres; of the datasets that have another one than `VSD_DELTA`."""

TRANSLATION = 0.05
"""A translation that is less off is right, metres."""

THRESHOLDS: dict[str, np.ndarray] = {
    "vsd": RECALL_THRESHOLDS,
    "mssd": RECALL_THRESHOLDS,
    "mspd": MSPD_THRESHOLDS,
    "add": np.array(list(ADD_SHARES.values())),
    "translation": np.array([TRANSLATION]),
}
"""By error; VSD's apply to each of its tolerances."""

IMPLEMENTATIONS = ("auto", "own", "toolkit")


class Model:
    """What errors of an object are measured with.

    Attributes:
        mesh: the evaluation model. diameter: metres, as the dataset says. symmetries: (S, 4, 4), BOP's.
        symmetric: whether it has any: ADD-S instead of ADD.
    """

    def __init__(self, dataset: BopDataset, obj_id: int) -> None:
        self.obj_id = obj_id
        self.diameter = dataset.diameter(obj_id)
        self.symmetries = bop_symmetries(dataset.symmetries(obj_id))
        self.symmetric = len(self.symmetries) > 1
        self.mesh: ObjectMesh = load_object(dataset.eval_models[obj_id])

    @cached_property
    def hull(self) -> np.ndarray:
        """(n, 3) corners of the convex hull: the largest distance between two poses is found at one."""
        try:
            return self.mesh.vertices[ConvexHull(self.mesh.vertices).vertices]
        except QhullError:  # flat
            return self.mesh.vertices

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.mesh.vertices)

    def add_or_add_s(self, estimate: np.ndarray, truth: np.ndarray) -> float:
        """ADD(-S) in metres; infinite where a bound shows that an ADD-S is not below any threshold."""
        vertices = self.mesh.vertices
        if not self.symmetric:
            return add(vertices, estimate, truth)
        # In the estimate's object frame, so that the tree is always the same one; far points are slow.
        moved = transform_points(np.linalg.inv(estimate) @ truth, vertices)
        low, high = self.mesh.bounds
        beyond = np.linalg.norm(np.maximum(0, np.maximum(low - moved, moved - high)), axis=1)
        if beyond.mean() >= ADD_SHARES["add"] * self.diameter:
            return float("inf")
        return float(self._tree.query(moved)[0].mean())


@dataclass(frozen=True, eq=False)
class View:
    """An image that estimates are judged in: its camera, its depth (H, W) in metres, the renderer."""

    camera: CameraModel
    depth: np.ndarray
    renderer: MeshRenderer
    delta: float = VSD_DELTA


class Implementation(Protocol):
    """Errors and matching."""

    name: str

    def errors(
        self, model: Model, view: View, estimates: Sequence[np.ndarray], truths: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """(E, G) per key of `THRESHOLDS`, VSD (E, G, tolerances); MSSD and ADD(-S) in diameters, MSPD in
        pixels of an image of `MSPD_WIDTH`, translation in metres. All poses T_cam_obj (4, 4)."""
        ...

    def found(self, errors: np.ndarray, scores: Sequence[float], thresholds: np.ndarray) -> np.ndarray:
        """(t,) how many of the G instances are found at each threshold; errors (E, G), best score first."""
        ...


class Own:
    """This package's implementation."""

    name = "own"

    def errors(
        self, model: Model, view: View, estimates: Sequence[np.ndarray], truths: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """See `Implementation`."""
        shape = len(estimates), len(truths)
        result = {name: np.full(shape, np.inf) for name in THRESHOLDS}
        result["vsd"] = np.ones((*shape, len(VSD_TAUS)))
        scorers: dict[int, VsdScorer] = {}
        for e, T in enumerate(estimates):
            distance = None
            for g, truth in enumerate(truths):
                if sphere_projections_overlap(T, truth, model.diameter):
                    if g not in scorers:
                        scorers[g] = VsdScorer(
                            view.renderer, model.mesh, truth, view.depth, view.camera.K, model.diameter
                        )
                    if distance is None:
                        distance = scorers[g].distance(T)
                    result["vsd"][e, g] = scorers[g].error_of(distance, view.delta)
                if spheres_overlap(T, truth, model.diameter):
                    result["mssd"][e, g] = mssd(model.hull, T, truth, model.symmetries) / model.diameter
                    result["add"][e, g] = model.add_or_add_s(T, truth) / model.diameter
                pixels = mspd(model.mesh.vertices, T, truth, model.symmetries, view.camera.K)
                result["mspd"][e, g] = pixels * MSPD_WIDTH / view.camera.width
                result["translation"][e, g] = translation_error(T, truth)
        return result

    def found(self, errors: np.ndarray, scores: Sequence[float], thresholds: np.ndarray) -> np.ndarray:
        """See `Implementation`."""
        return (matched(errors, thresholds) >= 0).sum(axis=1)


class Toolkit:
    """The BOP toolkit's errors and matching, with this package's reader and renderer.

    Raises:
        ConfigError: it isn't installed.
    """

    name = "toolkit"

    def __init__(self) -> None:
        try:
            from bop_toolkit_lib import misc, pose_error, pose_matching
        except ImportError as error:
            raise ConfigError(
                f"the BOP toolkit can't be imported ({error}); install it "
                "(pip install git+https://github.com/thodan/bop_toolkit) or use --implementation own"
            ) from error
        self._misc: ModuleType = misc
        self._errors: ModuleType = pose_error
        self._matching: ModuleType = pose_matching

    def errors(
        self, model: Model, view: View, estimates: Sequence[np.ndarray], truths: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """See `Implementation`."""
        shape = len(estimates), len(truths)
        result = {name: np.full(shape, np.inf) for name in THRESHOLDS}
        result["vsd"] = np.ones((*shape, len(VSD_TAUS)))
        renderer = _MillimetreRenderer(view, model)
        symmetries = [{"R": s[:3, :3], "t": 1e3 * s[:3, 3:]} for s in model.symmetries]
        points = 1e3 * model.mesh.vertices
        diameter = 1e3 * model.diameter
        distance = self._errors.adi if model.symmetric else self._errors.add
        K = view.camera.K
        for e, T in enumerate(estimates):
            for g, truth in enumerate(truths):
                pair = T[:3, :3], 1e3 * T[:3, 3:], truth[:3, :3], 1e3 * truth[:3, 3:]
                if self._misc.overlapping_sphere_projections(
                    diameter / 2, pair[1].squeeze(), pair[3].squeeze()
                ):
                    result["vsd"][e, g] = self._errors.vsd(
                        *pair,
                        1e3 * view.depth,
                        K,
                        1e3 * view.delta,
                        list(VSD_TAUS),
                        True,
                        diameter,
                        renderer,
                        model.obj_id,
                    )
                if np.linalg.norm(pair[1] - pair[3]) < diameter:
                    result["mssd"][e, g] = self._errors.mssd(*pair, points, symmetries) / diameter
                    result["add"][e, g] = distance(*pair, points) / diameter
                with np.errstate(all="ignore"):
                    pixels = self._errors.mspd(*pair, K, points, symmetries)
                result["mspd"][e, g] = pixels * MSPD_WIDTH / view.camera.width
                result["translation"][e, g] = self._errors.te(pair[1], pair[3]) / 1e3
        return result

    def found(self, errors: np.ndarray, scores: Sequence[float], thresholds: np.ndarray) -> np.ndarray:
        """See `Implementation`."""
        estimates = [
            {
                "est_id": e,
                "score": score,
                "errors": {g: [error] for g, error in enumerate(own)},
                "gt_visib_fracts": dict.fromkeys(range(len(own)), 1.0),
            }
            for e, (score, own) in enumerate(zip(scores, errors, strict=True))
        ]
        return np.array([len(self._matching.match_poses(estimates, [threshold])) for threshold in thresholds])


class _MillimetreRenderer:
    """This package's renderer in the form that the toolkit's VSD calls."""

    def __init__(self, view: View, model: Model) -> None:
        self._view, self._model = view, model

    def render_object(
        self, obj_id: int, R: np.ndarray, t: np.ndarray, fx: float, fy: float, cx: float, cy: float
    ) -> dict[str, np.ndarray]:
        T = np.eye(4)
        T[:3, :3], T[:3, 3] = R, np.ravel(t) / 1e3
        K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
        height, width = self._view.depth.shape
        return {"depth": 1e3 * self._view.renderer.render(self._model.mesh, T, K, width, height).depth}


def implementation(name: str) -> Implementation:
    """The one of that name; "auto" is the toolkit where it is installed.

    Raises:
        ConfigError: the toolkit is asked for and isn't installed.
    """
    if name == "auto":
        try:
            return Toolkit()
        except ConfigError:
            return Own()
    return Toolkit() if name == "toolkit" else Own()
