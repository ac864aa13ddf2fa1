"""Errors of a pose against the true one. Transforms are (4, 4) object -> camera, metres.

VSD, MSSD, MSPD and their average recalls are those of the BOP Challenge 2019 (Hodan et al., ECCVW 2020), as
the BOP toolkit computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import trimesh
from scipy.optimize import linear_sum_assignment
from scipy.spatial import ConvexHull, QhullError, cKDTree
from scipy.stats import rankdata

from picopose_ros.templates.meshes import ObjectMesh, Symmetries
from picopose_ros.templates.renderer import MeshRenderer

BOP_SYMMETRY_STEP = 0.01
"""BOP's largest share of the diameter that a point moves between two steps of a continuous symmetry."""

VSD_DELTA = 0.015
"""How far behind what the camera measured a surface may lie and still count as visible, metres."""

VSD_TAUS = np.arange(0.05, 0.51, 0.05)
"""Shares of the diameter from which on a pixel's distance is wrong."""

RECALL_THRESHOLDS = np.arange(0.05, 0.51, 0.05)
"""Of a VSD, and of an MSSD as a share of the diameter."""

MSPD_THRESHOLDS = np.arange(5.0, 51.0, 5.0)
"""Pixels in an image of `MSPD_WIDTH`."""

ADD_SHARES = {"add_02d": 0.02, "add_05d": 0.05, "add": 0.1}
"""By name of the recall: the share of the diameter that ADD(-S) stays below. The last is the usual one."""

MSPD_WIDTH = 640
"""Width of the image that MSPD thresholds are stated for, pixels."""


def transform_points(T: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (n, 3) moved by ``T`` (..., 4, 4)."""
    return points @ np.swapaxes(T[..., :3, :3], -1, -2) + T[..., None, :3, 3]


def rotation_error_deg(
    estimate: np.ndarray, truth: np.ndarray, symmetries: np.ndarray | None = None
) -> float:
    """Angle between two poses in degrees; the smallest one over symmetries (S, 4, 4)."""
    candidates = truth[None] if symmetries is None else truth @ symmetries
    traces = np.einsum("ij,sij->s", estimate[:3, :3], candidates[:, :3, :3])
    return float(np.rad2deg(np.arccos(np.clip((traces.max() - 1) / 2, -1, 1))))


def translation_error(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Distance between the two object origins in metres."""
    return float(np.linalg.norm(estimate[:3, 3] - truth[:3, 3]))


def add(points: np.ndarray, estimate: np.ndarray, truth: np.ndarray) -> float:
    """ADD (Hinterstoisser 2012): mean distance of the object's points (n, 3) to their true place, metres."""
    gaps = transform_points(estimate, points) - transform_points(truth, points)
    return float(np.linalg.norm(gaps, axis=1).mean())


def add_s(points: np.ndarray, estimate: np.ndarray, truth: np.ndarray) -> float:
    """ADD-S: mean distance of the truly placed points to the nearest estimated one, metres."""
    return float(cKDTree(transform_points(estimate, points)).query(transform_points(truth, points))[0].mean())


def add_or_add_s(points: np.ndarray, estimate: np.ndarray, truth: np.ndarray, symmetric: bool) -> float:
    """ADD(-S): ADD-S for objects flagged symmetric, ADD for the others, metres."""
    return (add_s if symmetric else add)(points, estimate, truth)


def mssd(points: np.ndarray, estimate: np.ndarray, truth: np.ndarray, symmetries: np.ndarray) -> float:
    """Largest symmetry-aware surface distance (BOP 2019), metres; ``symmetries`` (S, 4, 4) with identity."""
    moved = transform_points(estimate, points)

    def distances(T: np.ndarray, some: slice) -> np.ndarray:
        return np.linalg.norm(moved[some] - transform_points(T, points[some]), axis=-1)

    return _least_greatest(distances, truth @ symmetries, len(points))


def mspd(
    points: np.ndarray, estimate: np.ndarray, truth: np.ndarray, symmetries: np.ndarray, K: np.ndarray
) -> float:
    """Maximum symmetry-aware projection distance (BOP 2019) in pixels of a camera ``K`` (3, 3).

    As the BOP toolkit projects: points behind the camera too, which VSD and MSSD exclude; infinite
    where a point lies in its plane.
    """

    def project(T: np.ndarray, some: slice) -> np.ndarray:
        pixels = transform_points(T, points[some]) @ K.T
        with np.errstate(all="ignore"):
            return pixels[..., :2] / pixels[..., 2:]

    seen = project(estimate, slice(None))
    if not np.isfinite(seen).all():
        return float("inf")

    def distances(T: np.ndarray, some: slice) -> np.ndarray:
        return np.linalg.norm(seen[some] - project(T, some), axis=-1)

    return _least_greatest(distances, truth @ symmetries, len(points))


_FEW_POINTS = 64


def _least_greatest(
    distances: Callable[[np.ndarray, slice], np.ndarray], forms: np.ndarray, count: int
) -> float:
    """The least over forms (S, 4, 4) of the greatest distance of ``count`` points.

    Some of the points bound the greatest distance of a form from below, so that only forms that may be the
    best are evaluated with all of them.
    """
    few = slice(None, None, max(1, count // _FEW_POINTS))
    bounds = distances(forms, few).max(axis=-1)
    least = np.inf
    for index in np.argsort(bounds):
        if bounds[index] >= least:
            break
        least = min(least, distances(forms[index], slice(None)).max())
    return float(least)


def spheres_overlap(estimate: np.ndarray, truth: np.ndarray, diameter: float) -> bool:
    """Whether spheres of an object's diameter about its two origins do; else the BOP toolkit takes MSSD and
    ADD(-S) as infinite."""
    return translation_error(estimate, truth) < diameter


def sphere_projections_overlap(estimate: np.ndarray, truth: np.ndarray, diameter: float) -> bool:
    """Whether the images of these spheres do, nearly; else the BOP toolkit takes VSD as 1."""
    a, b = estimate[:3, 3], truth[:3, 3]
    if a[2] == 0 or b[2] == 0:
        return False
    apart = np.linalg.norm(a[:2] / a[2] - b[:2] / b[2])
    return bool(apart < diameter / 2 * (1 / a[2] + 1 / b[2]))


def bop_symmetries(symmetries: Symmetries, step: float = BOP_SYMMETRY_STEP) -> np.ndarray:
    """Symmetries in BOP's form: (S, 4, 4), identity first; a continuous one in ceil(pi / step) turns.

    Several continuous axes are listed one after the other and not combined with each other, as in BOP.
    """
    count = int(np.ceil(np.pi / step))
    turns = [
        trimesh.transformations.rotation_matrix(2 * np.pi * k / count, axis, offset)
        for axis, offset in symmetries.continuous
        for k in range(count)
    ]
    turns = turns or [np.eye(4)]
    return np.stack([turn @ other for other in (np.eye(4), *symmetries.discrete) for turn in turns])


@dataclass(frozen=True)
class EvaluationPoints:
    """Points of an object that errors are measured at, in its own frame, metres.

    Attributes:
        surface: (n, 3) spread evenly over the surface: for means (ADD).
        extreme: (m, 3) corners of the convex hull, where the largest distance between two poses of the object
            is found, and some of the surface: for maxima (MSSD, MSPD).
    """

    surface: np.ndarray
    extreme: np.ndarray


def evaluation_points(mesh: ObjectMesh, count: int = 2000) -> EvaluationPoints:
    """At most ``count`` points for either purpose; the same ones every time."""
    whole = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    surface = np.asarray(trimesh.sample.sample_surface(whole, count, seed=0)[0], np.float64)
    try:
        corners = mesh.vertices[ConvexHull(mesh.vertices).vertices]
    except QhullError:  # flat
        corners = np.unique(mesh.vertices, axis=0)
    some = surface[: count // 4]
    if len(corners) > count - len(some):  # a smooth hull: its neighbours stand in for those left out
        kept = np.random.default_rng(0).choice(len(corners), count - len(some), replace=False)
        corners = corners[np.sort(kept)]
    return EvaluationPoints(surface, np.concatenate([corners, some]))


def ray_lengths(height: int, width: int, K: np.ndarray) -> np.ndarray:
    """(H, W): how far from the camera's centre the point of each pixel is whose depth is 1."""
    v, u = np.indices((height, width))
    return np.sqrt(((u - K[0, 2]) / K[0, 0]) ** 2 + ((v - K[1, 2]) / K[1, 1]) ** 2 + 1.0)


def visible_surface(distance: np.ndarray, measured: np.ndarray, delta: float = VSD_DELTA) -> np.ndarray:
    """Where a rendered object (H, W) isn't behind what was measured; (H, W) bool.

    BOP 2019's rule: without a measurement (0) the object counts as visible.
    """
    return (distance > 0) & ((measured == 0) | (distance - measured <= delta))


def vsd_of_distances(
    estimate: np.ndarray,
    truth: np.ndarray,
    measured: np.ndarray,
    diameter: float,
    delta: float = VSD_DELTA,
    taus: np.ndarray = VSD_TAUS,
) -> np.ndarray:
    """Visible surface discrepancy for every tolerance, 0..1.

    Args:
        estimate, truth: (H, W) distances of the object rendered alone in either pose, metres, 0 off it.
        measured: (H, W) distances of what the camera saw, 0 where nothing was measured.
        diameter: of the object, metres. delta: see `VSD_DELTA`. taus: (t,) shares of the diameter.

    Returns:
        (t,) errors.
    """
    seen_truth = visible_surface(truth, measured, delta)
    # What is visible in the true pose is visible in the estimated one, whatever was measured there.
    seen_estimate = visible_surface(estimate, measured, delta) | (seen_truth & (estimate > 0))
    both = seen_truth & seen_estimate
    union = int((seen_truth | seen_estimate).sum())
    if union == 0:
        return np.ones(len(taus))
    apart = np.abs(truth[both] - estimate[both]) / diameter
    wrong = (apart[None] >= np.asarray(taus)[:, None]).sum(1)
    return (wrong + union - both.sum()) / union


class VsdScorer:
    """VSD against one true pose in one image. Renders the truth once and every estimate once.

    Args:
        renderer: of the calling thread. mesh: of the object. truth: T_cam_obj (4, 4).
        depth: (H, W) what the camera measured, metres, 0 where nothing. K: (3, 3) of the image.
        diameter: of the object in metres, where it isn't the mesh's: a BOP dataset says it itself.
    """

    def __init__(
        self,
        renderer: MeshRenderer,
        mesh: ObjectMesh,
        truth: np.ndarray,
        depth: np.ndarray,
        K: np.ndarray,
        diameter: float | None = None,
    ) -> None:
        self._renderer, self._mesh, self._K = renderer, mesh, np.asarray(K, np.float64)
        self._diameter = mesh.diameter if diameter is None else diameter
        self._rays = ray_lengths(*depth.shape, self._K)
        self._measured = depth * self._rays
        self._truth = self.distance(truth)

    def distance(self, T_cam_obj: np.ndarray) -> np.ndarray:
        """(H, W) distances of the object alone in a pose (4, 4), metres, 0 off it."""
        height, width = self._measured.shape
        return self._renderer.render(self._mesh, T_cam_obj, self._K, width, height).depth * self._rays

    def error(
        self, estimate: np.ndarray, delta: float = VSD_DELTA, taus: np.ndarray = VSD_TAUS
    ) -> np.ndarray:
        """(t,) VSD of an estimate T_cam_obj (4, 4) for every tolerance."""
        return self.error_of(self.distance(estimate), delta, taus)

    def error_of(
        self, distance: np.ndarray, delta: float = VSD_DELTA, taus: np.ndarray = VSD_TAUS
    ) -> np.ndarray:
        """(t,) VSD of an estimate whose :meth:`distance` (H, W) is known."""
        # Only where either pose has a surface can there be a difference.
        rows, columns = (np.flatnonzero(((distance > 0) | (self._truth > 0)).any(axis)) for axis in (1, 0))
        if not len(rows):
            return np.ones(len(taus))
        part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        return vsd_of_distances(
            distance[part], self._truth[part], self._measured[part], self._diameter, delta, taus
        )


@dataclass(frozen=True)
class BopErrors:
    """BOP's three errors of a pose.

    Attributes:
        vsd: (t,) per tolerance, 0..1. mssd: share of the diameter. mspd: pixels of an image of `MSPD_WIDTH`.
    """

    vsd: np.ndarray
    mssd: float
    mspd: float


def bop_errors(
    points: np.ndarray,
    diameter: float,
    estimate: np.ndarray,
    truth: np.ndarray,
    symmetries: np.ndarray,
    K: np.ndarray,
    width: int,
    scorer: VsdScorer,
) -> BopErrors:
    """BOP's errors of one pose.

    Args:
        points: (n, 3) of the object, its own frame, metres: its vertices in BOP. diameter: of it, metres.
        estimate, truth: T_cam_obj (4, 4). symmetries: (S, 4, 4) of :func:`bop_symmetries`.
        K: (3, 3) of an image of ``width`` pixels. scorer: made for the same truth and image.
    """
    return BopErrors(
        vsd=scorer.error(estimate),
        mssd=mssd(points, estimate, truth, symmetries) / diameter,
        mspd=mspd(points, estimate, truth, symmetries, K) * MSPD_WIDTH / width,
    )


MISSING = BopErrors(np.full(len(VSD_TAUS), np.inf), float("inf"), float("inf"))
"""The errors of a pose that wasn't given."""


def average_recall(errors: np.ndarray | Sequence[float], thresholds: np.ndarray) -> float:
    """Mean over the thresholds of the share of errors (n, ...) below each; NaN without errors."""
    errors = np.asarray(errors, np.float64)
    if not errors.size:
        return float("nan")
    return float(np.mean([(errors < threshold).mean() for threshold in thresholds]))


def bop_recalls(errors: Sequence[BopErrors]) -> dict[str, float]:
    """Average recalls ``vsd``, ``mssd``, ``mspd`` over the errors of all targets and their mean ``ar``.

    Every target counts once, with `MISSING` where it got no pose.
    """
    recalls = {
        "vsd": average_recall([e.vsd for e in errors], RECALL_THRESHOLDS),
        "mssd": average_recall([e.mssd for e in errors], RECALL_THRESHOLDS),
        "mspd": average_recall([e.mspd for e in errors], MSPD_THRESHOLDS),
    }
    return {**recalls, "ar": float(np.mean(list(recalls.values())))}


def area_under_roc(right: np.ndarray | Sequence[float], wrong: np.ndarray | Sequence[float]) -> float:
    """How often a score of ``right`` is above one of ``wrong``, ties half: 0.5 is chance; NaN without any."""
    right, wrong = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    if not len(right) or not len(wrong):
        return float("nan")
    ranks = rankdata(np.concatenate([right, wrong]))
    return float((ranks[: len(right)].sum() - len(right) * (len(right) + 1) / 2) / (len(right) * len(wrong)))


@dataclass(frozen=True)
class Reliability:
    """How often poses of a given confidence are right.

    Attributes:
        edges: (b + 1,) of the bins. counts: (b,) poses in each. confidence, correct: (b,) their mean
            confidence and the share of them that is right; NaN in an empty bin.
        error: expected calibration error, the mean gap between the two over all poses.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    error: float


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> Reliability:
    """Reliability of confidences (n,) in 0..1 against whether each pose is right (n,), in equal bins."""
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    edges = np.linspace(0.0, 1.0, bins + 1)
    which = np.clip((confidence * bins).astype(int), 0, bins - 1)
    counts = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, values, bins) / counts for values in (confidence, correct)]
    gaps = np.nan_to_num(np.abs(means[0] - means[1]))
    error = float((gaps * counts).sum() / len(confidence)) if len(confidence) else float("nan")
    return Reliability(edges, counts, means[0], means[1], error)


def matched(errors: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Match the estimates of an image to the true instances of their object, as BOP's localisation task does.

    Each estimate in turn takes the free instance it is nearest to, if it is nearer than the threshold.

    Args:
        errors: (E, G) of each estimate, best score first, to each instance. thresholds: (t,).

    Returns:
        (t, G) index of the instance's estimate for each threshold, -1 for none.
    """
    errors, thresholds = np.asarray(errors, np.float64), np.asarray(thresholds, np.float64)
    found = np.full((len(thresholds), errors.shape[1]), -1)
    rows = np.arange(len(thresholds))
    for index, own in enumerate(errors if errors.shape[1] else ()):
        free = np.where(found < 0, np.where(np.isnan(own), np.inf, own), np.inf)
        nearest = free.argmin(axis=1)
        good = free[rows, nearest] < thresholds
        found[rows[good], nearest[good]] = index
    return found


def match_by_position(estimates: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> list[int | None]:
    """For every true pose of a class the index of the estimate nearest to it, each used once, or None.

    The assignment has the smallest sum of distances between origins, which uses
    positions only. Estimates in excess stay unmatched.
    """
    if not len(estimates) or not len(truths):
        return [None] * len(truths)
    distance = np.linalg.norm(
        np.array([T[:3, 3] for T in truths])[:, None] - np.array([T[:3, 3] for T in estimates])[None], axis=-1
    )
    matched: list[int | None] = [None] * len(truths)
    for truth, estimate in zip(*linear_sum_assignment(distance), strict=True):
        matched[truth] = int(estimate)
    return matched


@dataclass(frozen=True)
class PoseErrors:
    """How far a pose is off."""

    rotation_deg: float
    translation: float  # metres
    add: float  # ADD or, for symmetric objects, ADD-S, metres
    diameter: float  # of the object, metres

    @property
    def correct(self) -> bool:
        """ADD(-S) below a tenth of the diameter."""
        return self.within(ADD_SHARES["add"])

    def within(self, share: float) -> bool:
        """ADD(-S) below a share of the diameter."""
        return self.add < share * self.diameter


def pose_errors(
    points: np.ndarray,
    diameter: float,
    estimate: np.ndarray,
    truth: np.ndarray,
    symmetries: np.ndarray | None = None,
    symmetric: bool = False,
) -> PoseErrors:
    """All errors of one pose.

    Args:
        points: (n, 3) of the object's surface, its own frame, metres.
        diameter: of the object, metres.
        estimate, truth: T_cam_obj (4, 4).
        symmetries: (S, 4, 4) motions that leave the object as it is, identity included; more than one flag it
            symmetric, which means ADD-S instead of ADD.
        symmetric: flag it symmetric although its symmetries aren't known.
    """
    symmetric = symmetric or (symmetries is not None and len(symmetries) > 1)
    return PoseErrors(
        rotation_error_deg(estimate, truth, symmetries),
        translation_error(estimate, truth),
        add_or_add_s(points, estimate, truth, symmetric),
        diameter,
    )
