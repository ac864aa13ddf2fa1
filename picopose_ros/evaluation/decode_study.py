"""``picopose eval decode``: which way from dense offsets to a pose is the best one.

Two questions. What does a decode lose when the offsets are perfect: flows that are the training labels
themselves. And which decode, RANSAC and refinement
make the best poses of the offsets that the network gives: one pass of the network over rendered scenes, all
of them on the same hypotheses, compared query by query.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from picopose_ros import __version__
from picopose_ros.cli.options import add_onboarding_arguments, load_network, positive, settle_unit
from picopose_ros.errors import ConfigError
from picopose_ros.estimation.solving import hypothesis_quality
from picopose_ros.estimator import (
    EstimatorSettings,
    Hypothesis,
    PoseEstimator,
)
from picopose_ros.evaluation.metrics import (
    MSPD_THRESHOLDS,
    MSPD_WIDTH,
    RECALL_THRESHOLDS,
    EvaluationPoints,
    average_recall,
    bop_symmetries,
    evaluation_points,
    mspd,
    mssd,
    pose_errors,
)
from picopose_ros.evaluation.report import check_writable, number, plain, share, table, write_atomically
from picopose_ros.evaluation.stages import true_map, viewpoints
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.correspondences import Correspondences, DecodeMode, decode_correspondences
from picopose_ros.geometry.crops import CELL, GRID, crop_box_from_mask, crop_mask
from picopose_ros.geometry.pnp import Draw, PoseSolution, draw_five, draw_three, solve_pose
from picopose_ros.geometry.poses import make_transform
from picopose_ros.model import model_fingerprint
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import TemplateBank, onboard
from picopose_ros.templates.meshes import ObjectMesh, load_object
from picopose_ros.templates.renderer import MeshRenderer

BEGIN, END = "<!-- decode: begin -->", "<!-- decode: end -->"
"""Marks of the section of a document that the command writes."""

PERFECT_FOCAL = 1067.0
"""Of the camera of the perfect correspondences, px."""

PERFECT_DIAMETER = 0.15
"""Errors of the perfect correspondences are stated for an object of this size, metres, ..."""

PERFECT_DISTANCES = (0.55, 1.1)
"""... at these distances, metres."""

RESAMPLES = 2000
"""Of the queries, for the interval of a difference."""

_STREAM = 7  # of random numbers, for who shares the seed


def _opencv(flags: int) -> Draw:
    """OpenCV's RANSAC with one of its methods."""

    def draw(
        uv: np.ndarray, xyz: np.ndarray, K: np.ndarray, threshold: float, iterations: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        found, rvec, tvec, inliers = cv2.solvePnPRansac(
            np.asarray(xyz, np.float64),
            np.asarray(uv, np.float64),
            K.copy(),  # USAC writes into it
            None,
            iterationsCount=iterations,
            reprojectionError=threshold,
            confidence=0.999,
            flags=flags,
        )
        if not found or inliers is None or not np.isfinite(rvec).all():
            return None
        return make_transform(cv2.Rodrigues(rvec)[0], tvec), inliers.ravel()

    return draw


@dataclass(frozen=True)
class Variant:
    """A way from a hypothesis to a pose.

    Attributes:
        flow: where a correspondence ends: ``reference`` in a cell's middle, ``subpixel`` anywhere.
        points: which template points: ``nearest`` (the released network's) or ``consistent`` (the labels').
        draw: the RANSAC. refine: whether least squares on the inliers follow.
        threshold: of an inlier. crop_px: whether it is in crop pixels, else in image pixels.
        iterations: most draws.
        by_ratio: choose among hypotheses by the inlier ratio (released), else by the estimator's quality.
    """

    flow: DecodeMode = "subpixel"
    points: str = "consistent"
    draw: Draw = draw_three
    refine: bool = True
    threshold: float = EstimatorSettings.ransac_threshold_px
    crop_px: bool = True
    iterations: int = EstimatorSettings.ransac_iterations
    by_ratio: bool = False


DEFAULT = "subpixel, minimal draws, refined (the default)"
RELEASED = "reference, EPnP in 2 image px, 150 draws (the released network's)"
VARIANTS: dict[str, Variant] = {
    DEFAULT: Variant(),
    "the default, not refined": Variant(refine=False),
    RELEASED: Variant("reference", "nearest", draw_five, False, 2.0, False, 150, True),
    "reference pairs, the default's RANSAC": Variant("reference", "nearest"),
    "released 2D, consistent 3D": Variant("reference", "consistent"),
    "continuous 2D, released 3D": Variant("subpixel", "nearest"),
    "subpixel, EPnP in 2 image px, 150 draws": Variant(
        draw=draw_five, refine=False, threshold=2.0, crop_px=False, iterations=150
    ),
    "subpixel, EPnP": Variant(draw=_opencv(cv2.SOLVEPNP_EPNP), refine=False, iterations=150),
    "subpixel, EPnP, refined": Variant(draw=_opencv(cv2.SOLVEPNP_EPNP), iterations=150),
    "subpixel, SQPnP": Variant(draw=_opencv(cv2.SOLVEPNP_SQPNP), refine=False, iterations=150),
    "subpixel, SQPnP, refined": Variant(draw=_opencv(cv2.SOLVEPNP_SQPNP), iterations=150),
    "subpixel, AP3P, refined": Variant(draw=_opencv(cv2.SOLVEPNP_AP3P), iterations=150),
    "subpixel, AP3P, refined, 1000 draws": Variant(draw=_opencv(cv2.SOLVEPNP_AP3P)),
    "subpixel, USAC default": Variant(draw=_opencv(cv2.USAC_DEFAULT), refine=False),
    "subpixel, USAC default, refined": Variant(draw=_opencv(cv2.USAC_DEFAULT)),
    "subpixel, USAC MAGSAC": Variant(draw=_opencv(cv2.USAC_MAGSAC), refine=False),
    "subpixel, USAC MAGSAC, refined": Variant(draw=_opencv(cv2.USAC_MAGSAC)),
    "the default with 150 draws": Variant(iterations=150),
    "the default with 2 crop px": Variant(threshold=2.0),
    "the default with 3 crop px": Variant(threshold=3.0),
    "the default with 6 crop px": Variant(threshold=6.0),
    "the default with 8 crop px": Variant(threshold=8.0),
}
"""What is compared; differences are to the first."""

PERFECT: dict[str, tuple[str, tuple[str, str, str] | None]] = {
    RELEASED: ("released (cell's middle, nearest depth)", ("0.48 / 0.89", "1.36 / 1.86", "1.76 / 4.46")),
    "reference pairs, the default's RANSAC": ("the same, the default's RANSAC and refinement", None),
    "continuous 2D, released 3D": (
        "continuous 2D, released 3D",
        ("0.36 / 0.68", "1.36 / 1.73", "1.45 / 3.64"),
    ),
    "released 2D, consistent 3D": (
        "released 2D, consistent 3D",
        ("0.23 / 0.53", "0.25 / 0.55", "1.19 / 3.23"),
    ),
    DEFAULT: (
        "continuous 2D, consistent 3D (the default)",
        ("0.018 / 0.046", "0.013 / 0.036", "0.089 / 0.26"),
    ),
}
"""Of these the loss on perfect offsets is stated: name, and what the released code was measured to lose
(60 poses of one object; rotation, lateral and depth error, mean / 95th percentile, degrees and mm)."""


@dataclass(frozen=True)
class Case:
    """A segment with its hypotheses, best match first, and the truth.

    Attributes:
        M_crop_img: (3, 3) full image -> crop. mask: (224, 224) of the segment. truth: T_cam_obj (4, 4).
    """

    bank: TemplateBank
    camera: CameraModel
    M_crop_img: np.ndarray
    mask: np.ndarray
    hypotheses: tuple[Hypothesis, ...]
    truth: np.ndarray


@dataclass(frozen=True)
class Attempt:
    """What a variant makes of one hypothesis: a solution or None, its worth, and the milliseconds of this
    thread's processor time that it took."""

    solution: PoseSolution | None
    worth: float
    milliseconds: float


def attempt(case: Case, hypothesis: Hypothesis, variant: Variant) -> Attempt:
    """Decode and solve one hypothesis."""
    begin = time.thread_time()
    bank, template = case.bank, hypothesis.template
    points = bank.points_nearest if variant.points == "nearest" else bank.points_consistent
    T_cam_obj = bank.T_cam_ctr[template] @ bank.T_ctr_obj
    seen = decode_correspondences(
        hypothesis.flow,
        hypothesis.certainty,
        case.M_crop_img,
        points[template],
        T_cam_obj,
        variant.flow,
        case.mask,
    )
    pairs = Correspondences(case.camera.undistort_points(seen.uv), seen.xyz, seen.certainty)
    threshold = variant.threshold
    if variant.crop_px:
        threshold /= float(case.M_crop_img[0, 0])
    solution = solve_pose(pairs, case.camera.K, threshold, variant.iterations, variant.refine, variant.draw)
    worth = 0.0
    if solution is not None:
        worth = solution.inlier_ratio
        if not variant.by_ratio:
            worth = hypothesis_quality(seen.uv[solution.inliers], worth, case.M_crop_img, case.mask)
    return Attempt(solution, worth, 1e3 * (time.thread_time() - begin))


@dataclass(frozen=True)
class Judged:
    """Errors of an answer; all infinite where there is none."""

    rotation_deg: float = float("inf")
    lateral: float = float("inf")  # metres, across the ray to the object
    depth: float = float("inf")  # metres, along it
    correct: bool = False  # ADD(-S) below a tenth of the diameter
    mssd: float = float("inf")  # diameters
    mspd: float = float("inf")  # px in an image of `MSPD_WIDTH`

    @property
    def recall(self) -> float:
        """What the query adds to the mean of the average recalls of MSSD and MSPD."""
        parts = average_recall([self.mssd], RECALL_THRESHOLDS), average_recall([self.mspd], MSPD_THRESHOLDS)
        return float(np.mean(parts))


class Judge:
    """Errors of poses of one object."""

    def __init__(self, mesh: ObjectMesh, symmetric: bool) -> None:
        self.mesh, self._symmetric = mesh, symmetric
        self._points: EvaluationPoints = evaluation_points(mesh)
        self.symmetries = bop_symmetries(mesh.spec.symmetries)

    def __call__(self, T: np.ndarray | None, truth: np.ndarray, camera: CameraModel) -> Judged:
        """Of a pose T_cam_obj (4, 4) or None."""
        if T is None:
            return Judged()
        errors = pose_errors(
            self._points.surface, self.mesh.diameter, T, truth, self.symmetries, self._symmetric
        )
        # At the box's centre: the origin may lie anywhere, where a rotation moves it.
        at, true = (pose[:3, :3] @ self.mesh.centre + pose[:3, 3] for pose in (T, truth))
        ray = true / np.linalg.norm(true)
        along = float((at - true) @ ray)
        extreme = self._points.extreme
        return Judged(
            errors.rotation_deg,
            float(np.linalg.norm(at - true - along * ray)),
            abs(along),
            errors.correct,
            mssd(extreme, T, truth, self.symmetries) / self.mesh.diameter,
            mspd(extreme, T, truth, self.symmetries, camera.K) * MSPD_WIDTH / camera.width,
        )


# -- perfect correspondences -------------------------------------------------------------------------------


def perfect_cases(
    meshes: Sequence[ObjectMesh], banks: Mapping[str, TemplateBank], count: int, seed: int
) -> Iterator[tuple[str, Case]]:
    """Random poses, each with the nearest template and the training labels for its flow; (class id, case).

    The labels are whole crop pixels, rounded down, as the released label maker gives them. Pose ``i`` is of
    object ``i % n``.
    """
    size = 640, 480
    K = np.array([[PERFECT_FOCAL, 0, size[0] / 2], [0, PERFECT_FOCAL, size[1] / 2], [0, 0, 1]])
    camera = CameraModel(K, *size)
    rng = np.random.default_rng([seed, _STREAM])
    grid = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)))
    with MeshRenderer() as renderer:
        for index in range(count):
            mesh = meshes[index % len(meshes)]
            bank = banks[mesh.spec.class_id]
            distance = rng.uniform(*PERFECT_DISTANCES) * mesh.diameter / PERFECT_DIAMETER
            T_cam_ctr = make_transform(Rotation.random(rng=rng).as_matrix(), np.zeros(3))
            T_cam_ctr[:3, 3] = distance * np.append(rng.uniform(-0.04, 0.04, 2), 1.0)
            truth = T_cam_ctr @ bank.T_ctr_obj
            view = renderer.render(mesh, truth, K, *size)
            box = crop_box_from_mask(view.mask)
            near = viewpoints(bank, truth, np.eye(4)[None])
            template = near.nearest
            true = true_map(bank, template, T_cam_ctr, K, box.affine(), view.depth, view.mask)
            hypothesis = Hypothesis(
                template,
                1.0,
                np.eye(3),
                np.floor(true.position) / CELL - grid,
                np.where(true.visible, 9.0, -9.0),
            )
            mask = crop_mask(view.mask, box)
            yield mesh.spec.class_id, Case(bank, camera, box.affine(), mask, (hypothesis,), truth)


def perfect_figures(
    meshes: Sequence[ObjectMesh], banks: Mapping[str, TemplateBank], count: int, seed: int
) -> dict[str, dict[str, float]]:
    """Of every variant of `PERFECT`: mean and 95th percentile of the errors in degrees and mm."""
    judges = {mesh.spec.class_id: Judge(mesh, False) for mesh in meshes}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in PERFECT}
    for class_id, case in perfect_cases(meshes, banks, count, seed):
        judge = judges[class_id]
        scale = 1e3 * PERFECT_DIAMETER / judge.mesh.diameter
        for name in PERFECT:
            solution = attempt(case, case.hypotheses[0], VARIANTS[name]).solution
            error = judge(None if solution is None else solution.T_cam_obj, case.truth, case.camera)
            found[name].append((error.rotation_deg, scale * error.lateral, scale * error.depth))
    keys = ("rotation_deg", "lateral_mm", "depth_mm")
    return {
        name: {
            f"{key}_{what}": float(value)
            for what, values in (("mean", np.mean(rows, 0)), ("p95", np.percentile(rows, 95, axis=0)))
            for key, value in zip(keys, values)
        }
        for name, rows in found.items()
    }


# -- the network's correspondences -------------------------------------------------------------------------


class Study:
    """All variants on the network's hypotheses, scene by scene.

    Args:
        estimator: with the banks of the objects.
        judges: by class id.
    """

    def __init__(self, estimator: PoseEstimator, judges: Mapping[str, Judge]) -> None:
        self.estimator, self._judges = estimator, judges
        self.hypotheses = sorted({1, estimator.settings.hypotheses})
        self.errors: dict[str, dict[int, list[Judged]]] = {
            name: {count: [] for count in self.hypotheses} for name in VARIANTS
        }
        self.milliseconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        self.queries = 0

    def add(self, rgb: np.ndarray, camera: CameraModel, truths: Sequence[tuple[Segment, np.ndarray]]) -> None:
        """Measure an image (H, W, 3) with its segments and their true T_cam_obj (4, 4)."""
        result = self.estimator.estimate(rgb, camera, [segment for segment, _ in truths], trace=True)
        traces = {trace.query.index: trace for trace in result.traces}
        for index, (_, truth) in enumerate(truths):
            self.queries += 1
            trace = traces.get(index)
            case = None
            if trace is not None:
                query = trace.query
                own = tuple(one.hypothesis for one in trace.hypotheses)
                case = Case(query.bank, camera, query.M_crop_img, query.mask, own, truth)
            for name, variant in VARIANTS.items():
                self._measure(name, variant, case)

    def _measure(self, name: str, variant: Variant, case: Case | None) -> None:
        if case is None:
            for errors in self.errors[name].values():
                errors.append(Judged())
            return
        attempts = [attempt(case, hypothesis, variant) for hypothesis in case.hypotheses]
        self.milliseconds[name] += [one.milliseconds for one in attempts]
        judge = self._judges[case.bank.class_id]
        for count, errors in self.errors[name].items():
            solved = [one for one in attempts[:count] if one.solution is not None]
            best = max(solved, key=lambda one: one.worth, default=None)
            errors.append(judge(best and best.solution.T_cam_obj, case.truth, case.camera))

    def figures(self, seed: int) -> dict[str, dict[str, Any]]:
        """Of every variant, per number of hypotheses: figures, and the gain over the default."""
        return {
            name: {
                "milliseconds": float(np.median(self.milliseconds[name] or [float("nan")])),
                **{
                    str(count): _figures(errors, self.errors[DEFAULT][count], seed)
                    for count, errors in by_count.items()
                },
            }
            for name, by_count in self.errors.items()
        }


def _figures(errors: Sequence[Judged], default: Sequence[Judged], seed: int) -> dict[str, Any]:
    gain = np.array([one.recall for one in errors]) - [one.recall for one in default]
    drawn = np.random.default_rng(seed).integers(0, len(gain), (RESAMPLES, len(gain)))
    low, high = np.percentile(gain[drawn].mean(1), (2.5, 97.5))
    return {
        "answered": sum(np.isfinite(one.rotation_deg) for one in errors),
        "add_recall": float(np.mean([one.correct for one in errors])),
        "rotation_deg": float(np.median([one.rotation_deg for one in errors])),
        "translation_mm": float(np.median([1e3 * np.hypot(one.lateral, one.depth) for one in errors])),
        "mssd": average_recall([one.mssd for one in errors], RECALL_THRESHOLDS),
        "mspd": average_recall([one.mspd for one in errors], MSPD_THRESHOLDS),
        "gain": float(gain.mean()),
        "gain_interval": [float(low), float(high)],
    }


# -- report ------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    """Both tables of a report."""
    about = report["study"]
    perfect = report["perfect"]
    rows = []
    for name, (title, released) in PERFECT.items():
        cut = perfect[name]
        cells = [
            f"{cut[f'{key}_mean']:.2g} / {cut[f'{key}_p95']:.2g}"
            for key in ("rotation_deg", "lateral_mm", "depth_mm")
        ]
        rows.append([title, *cells, "–" if released is None else ", ".join(released)])
    head = [
        "",
        "rotation, deg",
        "lateral, mm",
        "depth, mm",
        "released code: rotation, lateral, depth",
    ]
    first = (
        f"Perfect offsets: {about['perfect_poses']} random poses of {about['objects']} objects, scaled to "
        f"{1e2 * PERFECT_DIAMETER:.0f} cm, at {PERFECT_DISTANCES[0]} to {PERFECT_DISTANCES[1]} m, focal "
        f"length {PERFECT_FOCAL:.0f} px, nearest template, the training labels as flow; mean / 95th "
        "percentile. The last column was measured with the released code and one object.\n\n"
        + table(head, rows)
    )
    second = (
        f"The network's offsets: {about['queries']} queries of {about['objects']} unambiguous objects "
        f"(seed {about['seed']}), true masks, preset `{about['preset']}`, weights `{about['weights']}`. No "
        "pose counts as wrong; stage 2's pose never steps in. Thresholds are 4 crop pixels where nothing "
        "else is said. The interval is a bootstrap over the queries of the difference on the same "
        "hypotheses; milliseconds are of one hypothesis, decode and PnP, one thread."
    )
    parts = [first, second]
    for count in about["hypotheses"]:
        words = f"{count} hypothes{'i' if count == 1 else 'e'}s"
        parts.append(_variants_table(words, str(count), report["variants"]))
    return "\n\n".join(parts) + "\n"


def _variants_table(words: str, count: str, variants: Mapping[str, Any]) -> str:
    lines = []
    for name, cut in variants.items():
        part = cut[count]
        low, high = (100 * value for value in part["gain_interval"])
        gain = f"{100 * part['gain']:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(
            [
                name,
                share(part["add_recall"]),
                share((part["mssd"] + part["mspd"]) / 2),
                "" if name == DEFAULT else gain,
                number(part["rotation_deg"], 1),
                number(part["translation_mm"], 1),
                number(cut["milliseconds"], 1),
            ]
        )
    head = [
        words,
        "ADD(-S) < 0.1 d",
        "AR of MSSD, MSPD",
        "points more than the default (95 %)",
        "rotation, median deg",
        "translation, median mm",
        "ms",
    ]
    return table(head, lines)


def section(text: str, command: str, machine: str) -> str:
    """What is written between the marks of a document."""
    return f"{BEGIN}\n\n```bash\n{command}      # on {machine}\n```\n\n{text}\n{END}"


def machine() -> str:
    """What the numbers were measured on, in words."""
    import os

    import torch

    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, OpenCV {cv2.__version__}"


def _around(path: Path) -> tuple[str, str]:
    """What stands before and after the section of a document.

    Raises:
        ConfigError: it can't be read or has no such section.
    """
    try:
        document = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; name a document that exists") from error
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path} has no section between {BEGIN} and {END}; put these two lines into it")
    return before, after


# -- command -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--meshes", type=Path, required=True, help="folder with one mesh per object")
    parser.add_argument("--scenes", type=positive, default=96, help="single scenes to render (96)")
    parser.add_argument("--perfect", type=positive, default=60, help="poses with perfect offsets (60)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and poses (0)")
    parser.add_argument("--hypotheses", type=positive, default=5, help="templates tried per segment (5)")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT.json", help="report to write")
    parser.add_argument(
        "--document",
        type=Path,
        metavar="FILE.md",
        help=f"write the tables between {BEGIN} and {END} of this file as well",
    )
    add_onboarding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and write the report; 1 if a mesh could not be used.

    Raises:
        PicoPoseError: input that can't be used, or a report that can't be written.
    """
    from picopose_ros.evaluation.objects import object_facts
    from picopose_ros.evaluation.scenes import BENCHMARK_VERSION, make_scenes

    check_writable(args.out)
    if args.document is not None:
        check_writable(args.document)
        _around(args.document)
    settle_unit(args)
    model, device = load_network(args)
    onboarding = onboard(
        args.meshes, model, args.viewpoints, args.unit, args.cache_dir, device, progress=True
    )
    specs = [onboarding.specs[name] for name in sorted(onboarding.banks)]
    facts = object_facts(args.meshes, specs)
    meshes = [load_object(spec) for spec in specs if not facts[spec.class_id].ambiguous]
    if not meshes:
        raise ConfigError(
            f"every object of {args.meshes} is ambiguous, so no pose can be told from another; use others"
        )
    settings = EstimatorSettings(hypotheses=args.hypotheses)
    estimator = PoseEstimator(model, onboarding.banks, settings, device)
    study = Study(estimator, {m.spec.class_id: Judge(m, facts[m.spec.class_id].symmetric) for m in meshes})
    perfect = perfect_figures(meshes, onboarding.banks, args.perfect, args.seed)
    scenes = make_scenes(meshes, args.scenes, args.seed)
    for scene in tqdm(scenes, total=args.scenes, unit="scene", disable=None):
        asked = [(Segment(one.class_id, 1.0, one.visible), one.T_cam_obj) for one in scene.instances]
        study.add(scene.rgb, scene.camera, asked)
    if not study.queries:
        raise ConfigError(f"none of {args.scenes} scenes shows an object; make more scenes")
    report = {
        "study": {
            "version": __version__,
            "scenes_version": BENCHMARK_VERSION,
            "meshes": args.meshes.name,
            "objects": len(meshes),
            "scenes": args.scenes,
            "queries": study.queries,
            "perfect_poses": args.perfect,
            "seed": args.seed,
            "hypotheses": study.hypotheses,
            "viewpoints": args.viewpoints,
            "preset": args.preset,
            "weights": model_fingerprint(model)[:16],
        },
        "unreadable": onboarding.failed,
        "perfect": perfect,
        "variants": study.figures(args.seed),
    }
    report = plain(report)
    write_atomically(args.out, report)
    text = markdown(report)
    if args.document is not None:
        command = (
            f"picopose eval decode --meshes {args.meshes} --scenes {args.scenes} --perfect {args.perfect} "
            f"--seed {args.seed} --hypotheses {args.hypotheses} --out {args.out}"
        )
        before, after = _around(args.document)  # as it is now: the study took its time
        write_atomically(args.document, before + section(text, command, machine()) + after)
    print(text)
    for name, reason in sorted(onboarding.failed.items()):
        print(f"object '{name}' is left out: {reason}", file=sys.stderr)
    return 1 if onboarding.failed else 0
