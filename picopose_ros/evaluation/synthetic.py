"""``picopose eval synthetic``: how good the poses of rendered objects are, stage by stage.

Every query is the segment of one object in a rendered scene whose true poses are known. All figures come
from one pass: the estimator traces what each stage did, and the answer with one hypothesis is a part of that
with five. A query without a pose counts as wrong everywhere.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from picopose_ros import __version__
from picopose_ros.cli.options import add_onboarding_arguments, load_network, positive, settle_unit
from picopose_ros.errors import ConfigError
from picopose_ros.estimation.confidence import Calibration, fit_calibration
from picopose_ros.estimator import (
    EstimatorSettings,
    HypothesisTrace,
    ObjectPose,
    PoseEstimator,
    Precision,
    SegmentTrace,
)
from picopose_ros.evaluation.metrics import (
    MISSING,
    BopErrors,
    EvaluationPoints,
    PoseErrors,
    VsdScorer,
    area_under_roc,
    bop_errors,
    bop_recalls,
    bop_symmetries,
    evaluation_points,
    pose_errors,
    reliability,
)
from picopose_ros.evaluation.report import check_writable, markdown, plain, write_atomically
from picopose_ros.evaluation.sheets import Shot, contact_sheet, reliability_picture, scene_overlay
from picopose_ros.evaluation.stages import (
    STAGES,
    TrueMap,
    Viewpoints,
    certainty_counts,
    certainty_figures,
    endpoint_errors,
    true_affine,
    true_map,
    viewpoints,
    with_true_certainty,
    with_true_flow,
)
from picopose_ros.geometry.crops import crop_box_from_mask
from picopose_ros.model import model_fingerprint
from picopose_ros.model.checkpoint import save_calibration, weights_path
from picopose_ros.progress import progress_bar
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import onboard
from picopose_ros.templates.meshes import ObjectMesh, load_object
from picopose_ros.templates.renderer import MeshRenderer
from picopose_ros.training.augment import degrade_mask

if TYPE_CHECKING:
    from picopose_ros.evaluation.objects import ObjectFacts
    from picopose_ros.evaluation.scenes import Difficulty, Scene, SceneInstance

VISIBILITY_BINS = ((0.0, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
"""Visible shares that are told apart."""

NEAR_DEG = 15.0
"""A template within this angle of the true viewpoint is a good one: about the spacing of 162 templates."""

RIGHT_DEG, WRONG_DEG = 25.0, 60.0
"""A hypothesis is right within the first angle of the true viewpoint, and wrong beyond the second."""

MSPD_PX = 10.0
"""A pose whose MSPD is smaller is good, in pixels of an image 640 wide."""

SUBSTITUTIONS = (
    "nothing",
    "template",
    "affine",
    "flow",
    "certainty",
    "template and affine",
    "template, affine and flow",
    "everything",
)
"""What is replaced by the truth, with one hypothesis. The affine is the one that fits the true
correspondences best; the flow is replaced where the surface is visible; the certainty says exactly that."""

_MASKS, _WRONG = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class PoseFigures:
    """All errors of one pose."""

    errors: PoseErrors
    bop: BopErrors
    source: str  # "offsets" or "affine"; of stages 1 and 2 their own


@dataclass(frozen=True)
class PairFigures:
    """What stages 2 and 3 made of one template."""

    endpoints: dict[str, np.ndarray]  # stage -> errors of the visible cells, crop px
    certainty: dict[str, int]


@dataclass
class Record:
    """Everything that is measured on one query; a figure that there is none of is None or absent."""

    scene: str
    class_id: str
    visible: float
    template_deg: float | None = None  # viewpoint error of the best match
    best_of_five_deg: float | None = None
    poses: dict[str, PoseFigures | None] = field(default_factory=dict)
    retrieved: PairFigures | None = None  # with the best match
    given: PairFigures | None = None  # with the template nearest to the truth
    confidence: float = 0.0  # of the published pose
    right_scores: list[float] = field(default_factory=list)
    far_scores: list[float] = field(default_factory=list)
    other_scores: list[float] = field(default_factory=list)
    substituted: dict[str, bool] = field(default_factory=dict)
    shot: Shot | None = None

    def correct(self, pose: str) -> bool:
        """Whether a pose has an ADD(-S) below a tenth of the diameter."""
        figures = self.poses.get(pose)
        return figures is not None and figures.errors.correct

    def from_offsets(self, pose: str) -> bool:
        """Whether a pose is stage 3's and not the fallback to stage 2's."""
        figures = self.poses.get(pose)
        return figures is not None and figures.source == "offsets"


def answer_name(hypotheses: int) -> str:
    """What the published pose with so many hypotheses is called in the report."""
    return f"stage 3, {hypotheses} hypothes{'i' if hypotheses == 1 else 'e'}s"


class Benchmark:
    """Measures an estimator scene by scene.

    Args:
        estimator: with the banks of the objects.
        meshes, facts: by class id.
        seed: of degraded masks and wrong hypotheses; they depend on it and on the scene's number only.
        mask_noise: give the estimator masks as a segmenter makes them instead of the true ones.
        renderer: of the calling thread.
        pictures: called with a scene's number, the scene and the poses of its segments, where given.
    """

    def __init__(
        self,
        estimator: PoseEstimator,
        meshes: Mapping[str, ObjectMesh],
        facts: Mapping[str, ObjectFacts],
        seed: int,
        renderer: MeshRenderer,
        mask_noise: bool = False,
        pictures: Callable[[int, Scene, list[tuple[SceneInstance, ObjectPose | None]]], None] | None = None,
    ) -> None:
        self.estimator = estimator
        self.records: list[Record] = []
        self.milliseconds: list[tuple[int, dict[str, float]]] = []  # segments of a scene, its timings
        self._meshes, self._facts = meshes, facts
        self._seed, self._mask_noise = seed, mask_noise
        self._renderer, self._pictures = renderer, pictures
        self._points: dict[str, EvaluationPoints] = {n: evaluation_points(m) for n, m in meshes.items()}
        self._symmetries = {n: bop_symmetries(m.spec.symmetries) for n, m in meshes.items()}
        one = replace(estimator.settings, hypotheses=1)
        self._single = PoseEstimator(estimator.model, estimator.banks, one, estimator.device)
        count = estimator.settings.hypotheses
        self.hypotheses = sorted({1, count} | ({5} if count > 5 else set()))

    @property
    def stages(self) -> list[str]:
        """Names of the poses that are measured."""
        return ["stage 1", "stage 2", *(answer_name(count) for count in self.hypotheses)]

    def add(self, index: int, scene: Scene) -> None:
        """Measure every segment of the scene of that number."""
        asked = scene.instances
        if not asked:
            return
        segments = [Segment(one.class_id, 1.0, self._mask(index, k, one)) for k, one in enumerate(asked)]
        background = (
            self.estimator.settings.keep_background or not self.estimator.model.config.mask_background
        )
        shown = [one.visible if background else one.visible & s.mask for one, s in zip(asked, segments)]
        result = self.estimator.estimate(scene.rgb, scene.camera, segments, trace=True)
        self.milliseconds.append((len(segments), result.timings))
        traces = {trace.query.index: trace for trace in result.traces}
        queries = [
            _Asked(index, k, scene, one, segments[k], traces.get(k), self._symmetries[one.class_id], shown[k])
            for k, one in enumerate(asked)
        ]
        records = [Record(scene.name, q.instance.class_id, float(q.instance.visib_fract)) for q in queries]
        found = [(query, record) for query, record in zip(queries, records) if query.trace is not None]
        for query, record in found:
            self._measure_viewpoint(query, record)
            self._measure_poses(query, record)
        if found:
            self._measure_given(scene, found)
            self._measure_other_objects(scene, found)
        for record in records:
            for name in SUBSTITUTIONS:
                record.substituted.setdefault(name, False)
        self.records += records
        if self._pictures is not None:
            last = [None if q.trace is None else q.trace.answers[-1] for q in queries]
            self._pictures(index, scene, [(q.instance, pose) for q, pose in zip(queries, last)])

    def _mask(self, index: int, k: int, instance: SceneInstance) -> np.ndarray:
        if not self._mask_noise:
            return instance.visible
        rng = np.random.default_rng([self._seed, index, k, _MASKS])
        return degrade_mask(instance.visible.astype(np.uint8), rng).astype(bool)

    def _measure_viewpoint(self, query: _Asked, record: Record) -> None:
        errors = [query.views.errors_deg[t.hypothesis.template] for t in query.trace.hypotheses]
        record.template_deg, record.best_of_five_deg = float(errors[0]), float(min(errors[:5]))
        for error, one in zip(errors, query.trace.hypotheses):
            if error <= RIGHT_DEG:
                record.right_scores.append(_score(one))
            elif error > WRONG_DEG:
                record.far_scores.append(_score(one))

    def _measure_poses(self, query: _Asked, record: Record) -> None:
        scene, instance, trace = query.scene, query.instance, query.trace
        class_id = instance.class_id
        scorer = VsdScorer(
            self._renderer, self._meshes[class_id], instance.T_cam_obj, scene.depth, scene.camera.K
        )
        known: dict[bytes, PoseFigures] = {}

        def figures(T: np.ndarray | None, source: str) -> PoseFigures | None:
            if T is None:
                return None
            key = T.tobytes() + source.encode()
            if key not in known:
                bop = bop_errors(
                    self._points[class_id].extreme,
                    self._meshes[class_id].diameter,
                    T,
                    instance.T_cam_obj,
                    self._symmetries[class_id],
                    scene.camera.K,
                    scene.camera.width,
                    scorer,
                )
                known[key] = PoseFigures(self._errors(class_id, T, instance.T_cam_obj), bop, source)
            return known[key]

        first = trace.hypotheses[0]
        record.poses["stage 1"] = figures(first.T_match, "match")
        record.poses["stage 2"] = figures(first.T_affine, "affine")
        for count in self.hypotheses:
            pose = trace.answers[min(count, len(trace.answers)) - 1]
            record.poses[answer_name(count)] = None if pose is None else figures(pose.T_cam_obj, pose.source)
        final = trace.answers[-1]
        record.confidence = 0.0 if final is None else final.confidence
        last = record.poses[answer_name(self.hypotheses[-1])]
        record.shot = Shot.take(
            scene.rgb,
            crop_box_from_mask(query.segment.mask),
            scene.camera.K,
            class_id,
            trace.query.bank,
            (final or first.hypothesis).template,
            instance.T_cam_obj,
            None if final is None else final.T_cam_obj,
            [
                f"{scene.name}  {class_id}",
                _said(last),
                f"confidence {record.confidence:.2f}  visible {record.visible:.2f}",
            ],
        )

    def _errors(self, class_id: str, estimate: np.ndarray, truth: np.ndarray) -> PoseErrors:
        return pose_errors(
            self._points[class_id].surface,
            self._meshes[class_id].diameter,
            estimate,
            truth,
            self._symmetries[class_id],
            self._facts[class_id].symmetric,
        )

    def _measure_given(self, scene: Scene, found: list[tuple[_Asked, Record]]) -> None:
        """What the later stages make of the right template, of true affines, and of a far template."""
        segments, templates, affines, names = [], [], [], []
        for query, record in found:
            first, nearest = query.trace.hypotheses[0].hypothesis, query.views.nearest
            record.retrieved = self._pair(query, query.trace.hypotheses[0])
            wanted: list[tuple[str, int, np.ndarray | None]] = []
            if nearest not in query.tried:
                wanted.append(("template", nearest, None))
            for name, template in {"affine": first.template, "template and affine": nearest}.items():
                affine = true_affine(query.map_of(template), query.trace.query.bank.centres[template])
                if affine is not None and (name == "affine" or template != first.template):
                    wanted.append((name, template, affine))
            rng = np.random.default_rng([self._seed, query.index, query.position, _WRONG])
            far = np.flatnonzero(query.views.errors_deg > WRONG_DEG)
            if len(far):
                wanted.append(("far", int(rng.choice(far)), None))
            segments.append(query.segment)
            templates.append([template for _, template, _ in wanted])
            affines.append([affine for _, _, affine in wanted])
            names.append([name for name, _, _ in wanted])
        traces = self.estimator.examine(scene.rgb, scene.camera, segments, templates, affines)
        for (query, record), trace, labels in zip(found, traces, names):
            by_name = dict(zip(labels, () if trace is None else trace.hypotheses))
            if query.views.nearest in query.tried:
                by_name["template"] = query.tried[query.views.nearest]
            else:
                record.right_scores.append(_score(by_name["template"]))
            if query.views.nearest == query.trace.hypotheses[0].hypothesis.template and "affine" in by_name:
                by_name["template and affine"] = by_name["affine"]
            record.given = self._pair(query, by_name["template"])
            if "far" in by_name:
                record.far_scores.append(_score(by_name["far"]))
            self._substitute(query, record, by_name)

    def _substitute(self, query: _Asked, record: Record, by_name: dict[str, HypothesisTrace]) -> None:
        """Put the true answer in each stage. Where there is none, the predicted one stays."""
        first, right = query.trace.hypotheses[0], by_name["template"]
        here, there = (query.map_of(one.hypothesis.template) for one in (first, right))
        placed = by_name.get("template and affine", right)
        flown = with_true_flow(placed.hypothesis, there)
        changed = {
            "flow": with_true_flow(first.hypothesis, here),
            "certainty": with_true_certainty(first.hypothesis, here),
            "template, affine and flow": flown,
            "everything": with_true_certainty(flown, there),
        }
        answers = {
            "nothing": first.answer,
            "template": right.answer,
            "affine": by_name.get("affine", first).answer,
            "template and affine": placed.answer,
            **{
                name: self.estimator.answer(query.trace.query, hypothesis, query.scene.camera)
                for name, hypothesis in changed.items()
            },
        }
        class_id, truth = query.instance.class_id, query.instance.T_cam_obj
        for name, pose in answers.items():
            right_pose = pose is not None and self._errors(class_id, pose.T_cam_obj, truth).correct
            record.substituted[name] = right_pose

    def _measure_other_objects(self, scene: Scene, found: list[tuple[_Asked, Record]]) -> None:
        """The best match of the segment in the bank of another object."""
        classes = sorted(self.estimator.banks)
        segments = []
        for query, _ in found:
            rng = np.random.default_rng([self._seed, query.index, query.position, _WRONG, 1])
            others = [name for name in classes if name != query.instance.class_id]
            if others:
                segments.append(replace(query.segment, class_id=others[int(rng.integers(len(others)))]))
        if len(segments) == len(found):
            result = self._single.estimate(scene.rgb, scene.camera, segments, trace=True)
            for trace in result.traces:
                found[trace.query.index][1].other_scores.append(_score(trace.hypotheses[0]))

    def _pair(self, query: _Asked, one: HypothesisTrace) -> PairFigures:
        truth = query.map_of(one.hypothesis.template)
        endpoints = {
            name: errors.astype(np.float32) for name, errors in endpoint_errors(one.hypothesis, truth).items()
        }
        return PairFigures(endpoints, certainty_counts(one.hypothesis, truth))


class _Asked:
    """A query with what is known about its truth."""

    def __init__(
        self,
        index: int,
        position: int,
        scene: Scene,
        instance: SceneInstance,
        segment: Segment,
        trace: SegmentTrace | None,
        symmetries: np.ndarray,
        shown: np.ndarray,
    ) -> None:
        self._shown = shown
        self.index, self.position = index, position
        self.scene, self.instance, self.segment, self.trace = scene, instance, segment, trace
        self._maps: dict[int, TrueMap] = {}
        if trace is not None:
            self.views: Viewpoints = viewpoints(trace.query.bank, instance.T_cam_obj, symmetries)
            self.tried: dict[int, HypothesisTrace] = {t.hypothesis.template: t for t in trace.hypotheses}
            self._depth = np.where(instance.visible, scene.depth, 0)

    def map_of(self, template: int) -> TrueMap:
        """Where the cells of a template are, in the form of the true pose that is nearest to it."""
        if template not in self._maps:
            query = self.trace.query
            self._maps[template] = true_map(
                query.bank,
                template,
                self.views.truths[template],
                self.scene.camera.K,
                query.M_crop_img,
                self._depth,
                self._shown,
            )
        return self._maps[template]


def _said(pose: PoseFigures | None) -> str:
    if pose is None:
        return "no pose"
    return f"ADD {pose.errors.add / pose.errors.diameter:.3f} d  {pose.errors.rotation_deg:.1f} deg"


def _score(one: HypothesisTrace) -> float:
    return 0.0 if one.answer is None else one.answer.confidence


# -- figures -----------------------------------------------------------------------------------------------


def figures(records: Sequence[Record], stages: Sequence[str]) -> dict[str, Any]:
    """The figures of some records, in plain types."""
    asked = [record for record in records if record.template_deg is not None]
    return {
        "queries": len(records),
        "objects": len({record.class_id for record in records}),
        "viewpoint": {
            name: {
                "median_deg": _median([getattr(record, key) for record in asked]),
                "within_15_deg": _share([getattr(r, key) for r in asked], NEAR_DEG, len(records)),
            }
            for name, key in (("best template", "template_deg"), ("best of five", "best_of_five_deg"))
        },
        "endpoints_px": {
            "retrieved template": _endpoint_figures([r.retrieved for r in asked]),
            "right template given": _endpoint_figures([r.given for r in asked]),
        },
        "certainty": {
            "retrieved template": certainty_figures([r.retrieved.certainty for r in asked if r.retrieved]),
            "right template given": certainty_figures([r.given.certainty for r in asked if r.given]),
        },
        "pose": {stage: _pose_figures([record.poses.get(stage) for record in records]) for stage in stages},
    }


def _endpoint_figures(pairs: Sequence[PairFigures | None]) -> dict[str, Any]:
    """Over the pairs that have a visible cell in common: median of all cells, and of the pairs' means."""
    result: dict[str, Any] = {"pairs": sum(1 for p in pairs if p is not None and len(p.endpoints["3"]))}
    for stage in STAGES:
        errors = [p.endpoints[stage] for p in pairs if p is not None and stage in p.endpoints]
        errors = [e for e in errors if len(e)]
        if errors:
            result[stage] = {
                "median": float(np.median(np.concatenate(errors))),
                "median_of_means": float(np.median([e.mean(dtype=np.float64) for e in errors])),
            }
    return result


def _pose_figures(poses: Sequence[PoseFigures | None]) -> dict[str, Any]:
    """Shares are of all queries; medians count a missing pose as infinitely far off."""
    found = [pose for pose in poses if pose is not None]
    bop = [MISSING if pose is None else pose.bop for pose in poses]
    missing = [np.inf] * (len(poses) - len(found))
    return {
        "answered": len(found),
        "from_affine": sum(pose.source == "affine" for pose in found),
        "add_recall": _mean([pose is not None and pose.errors.correct for pose in poses]),
        "rotation_deg": _median([pose.errors.rotation_deg for pose in found] + missing),
        "translation_mm": _median([1e3 * pose.errors.translation for pose in found] + missing),
        "translation_diameters": _median(
            [pose.errors.translation / pose.errors.diameter for pose in found] + missing
        ),
        "mspd_10px": _mean([error.mspd < MSPD_PX for error in bop]),
        **bop_recalls(bop),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _share(values: Sequence[float], below: float, count: int) -> float:
    return sum(value <= below for value in values) / count if count else float("nan")


def confidence_figures(records: Sequence[Record], stage: str) -> dict[str, Any]:
    """How well the published confidence tells right from wrong."""
    scores = {
        name: [score for record in records for score in getattr(record, f"{name}_scores")]
        for name in ("right", "far", "other")
    }
    wrong = scores["far"] + scores["other"]
    confidence = np.array([record.confidence for record in records])
    correct = np.array([record.correct(stage) for record in records], bool)
    curve = reliability(confidence, correct)
    return {
        "auc": area_under_roc(scores["right"], wrong),
        "auc_far_view": area_under_roc(scores["right"], scores["far"]),
        "auc_other_object": area_under_roc(scores["right"], scores["other"]),
        "hypotheses": {name: len(values) for name, values in scores.items()},
        "auc_correct_pose": area_under_roc(confidence[correct], confidence[~correct]),
        "calibration_error": curve.error,
        "reliability": [
            {"from": low, "to": high, "queries": int(n), "confidence": c, "correct": r}
            for low, high, n, c, r in zip(
                curve.edges, curve.edges[1:], curve.counts, curve.confidence, curve.correct
            )
        ],
        "mapping": {
            **asdict(calibration(records, stage)),
            "calibration_error": _left_by_calibration(records, stage),
        },
    }


def calibration(records: Sequence[Record], stage: str) -> Calibration:
    """The mapping of published confidences that fits, of poses from offsets: it is meant for those only."""
    used = [r for r in records if r.from_offsets(stage)]
    confidence, correct = [r.confidence for r in used], [r.correct(stage) for r in used]
    return fit_calibration(np.array(confidence), np.array(correct))


def _left_by_calibration(records: Sequence[Record], stage: str) -> float:
    """The calibration error that a mapping fitted on one half of the objects leaves on the other half."""
    names = sorted({record.class_id for record in records})
    halves = [[r for r in records if names.index(r.class_id) % 2 == which] for which in (0, 1)]
    mapped, correct = [], []
    for own, other in (halves, halves[::-1]):
        fitted = calibration(other, stage)
        for record in own:
            meant = record.from_offsets(stage)
            mapped.append(float(fitted.apply(record.confidence)) if meant else record.confidence)
            correct.append(record.correct(stage))
    return reliability(np.array(mapped), np.array(correct)).error


def bottleneck(records: Sequence[Record]) -> dict[str, float]:
    """ADD(-S) recall with one hypothesis and the truth in place of one stage's answer, or of several."""
    return {name: _mean([record.substituted[name] for record in records]) for name in SUBSTITUTIONS}


def summarise(
    records: Sequence[Record], facts: Mapping[str, ObjectFacts], stages: Sequence[str]
) -> dict[str, Any]:
    """All figures: overall, per group, per visibility, per object, confidence and bottleneck."""

    def cut(chosen: Iterable[Record]) -> dict[str, Any]:
        chosen = list(chosen)
        parts = {
            "all": chosen,
            "unambiguous": [r for r in chosen if not facts[r.class_id].ambiguous],
            "ambiguous": [r for r in chosen if facts[r.class_id].ambiguous],
        }
        return {name: figures(part, stages) for name, part in parts.items() if part}

    groups = dict.fromkeys(facts[record.class_id].group for record in records)
    unambiguous = [record for record in records if not facts[record.class_id].ambiguous]
    parts = {"all": list(records), "unambiguous": unambiguous}
    return {
        "overall": cut(records),
        "groups": {name: cut(r for r in records if facts[r.class_id].group == name) for name in groups},
        "visibility": {
            f"{low:.0%} to {high:.0%}": cut(
                r for r in records if low <= r.visible < high or (high == 1.0 and r.visible >= 1.0)
            )
            for low, high in VISIBILITY_BINS
        },
        "objects": {
            name: figures([r for r in records if r.class_id == name], stages)
            for name in sorted({record.class_id for record in records})
        },
        "confidence": {n: confidence_figures(part, stages[-1]) for n, part in parts.items() if part},
        "bottleneck": {n: bottleneck(part) for n, part in parts.items() if part},
    }


def query_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One line per query, for who wants to look closer."""
    rows = []
    for record in records:
        row: dict[str, Any] = {
            "scene": record.scene,
            "class_id": record.class_id,
            "visible": record.visible,
            "template_deg": record.template_deg,
            "best_of_five_deg": record.best_of_five_deg,
            "confidence": record.confidence,
        }
        for stage, pose in record.poses.items():
            row[stage] = pose and {
                "add_diameters": pose.errors.add / pose.errors.diameter,
                "rotation_deg": pose.errors.rotation_deg,
                "mspd_px": pose.bop.mspd,
                "source": pose.source,
            }
        rows.append(row)
    return rows


def times(benchmark: Benchmark, onboarding_s: float, total_s: float) -> dict[str, Any]:
    """What the estimator took per query and stage, and the benchmark as a whole."""
    import torch

    stages: dict[str, float] = {}
    for name in benchmark.milliseconds[0][1] if benchmark.milliseconds else ():
        stages[name] = _median([timings[name] / count for count, timings in benchmark.milliseconds])
    return {
        "milliseconds_per_query": stages,
        "device": str(benchmark.estimator.device),
        "threads": torch.get_num_threads(),
        "onboarding_s": onboarding_s,
        "total_s": total_s,
    }


# -- command -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--meshes", type=Path, required=True, help="folder with one mesh per object")
    parser.add_argument("--scenes", type=positive, default=480, help="scenes to render (480)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, masks and wrong hypotheses (0)")
    parser.add_argument(
        "--kind", choices=("single", "cluttered"), default="single", help="of scenes (single)"
    )
    parser.add_argument("--hypotheses", type=positive, default=5, help="templates tried per segment (5)")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT.json", help="report to write")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the report's tables as well")
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="write pictures of scenes and cases")
    parser.add_argument("--mask-noise", action="store_true", help="masks as a segmenter makes them")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="keep in the weights file what makes the confidence the share of right poses",
    )
    parser.add_argument(
        "--background", action="store_true", help="show the network what lies around the segment"
    )
    parser.add_argument(
        "--decode",
        choices=("subpixel", "reference"),
        default="subpixel",
        help="how pairs are read (subpixel)",
    )
    parser.add_argument(
        "--rerank",
        type=int,
        default=EstimatorSettings().rerank,
        metavar="N",
        help="templates that are put in order by how well their matches agree (%(default)s); 0: none",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default=EstimatorSettings().precision,
        help="what the network computes in (%(default)s)",
    )
    parser.add_argument(
        "--prune",
        type=int,
        default=EstimatorSettings().prune,
        metavar="N",
        help="only the N most promising hypotheses go through the last grid (%(default)s); 0: all",
    )
    parser.add_argument(
        "--second-look", action="store_true", help="once more from the template nearest to the best pose"
    )
    add_onboarding_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and write the report; 1 if a mesh could not be used.

    Raises:
        PicoPoseError: input that can't be used, or a report that can't be written.
    """
    from picopose_ros.evaluation.objects import object_facts
    from picopose_ros.evaluation.scenes import BENCHMARK_VERSION, difficulty, difficulty_figure, make_scenes

    begin = time.perf_counter()
    _check_places(args)
    settle_unit(args)
    model, device = load_network(args)
    onboarding = onboard(
        args.meshes, model, args.viewpoints, args.unit, args.cache_dir, device, progress=True
    )
    meshes = {name: load_object(onboarding.specs[name]) for name in sorted(onboarding.banks)}
    facts = object_facts(args.meshes, [mesh.spec for mesh in meshes.values()])
    settings = EstimatorSettings(
        hypotheses=args.hypotheses,
        decode=args.decode,
        rerank=args.rerank,
        precision=args.precision,
        prune=args.prune,
        second_look=args.second_look,
        keep_background=args.background,
    )
    estimator = PoseEstimator(model, onboarding.banks, settings, device)
    onboarded = time.perf_counter()
    with MeshRenderer() as renderer:
        pictures = None
        if args.overlays is not None:

            def pictures(
                index: int, scene: Scene, answers: list[tuple[SceneInstance, ObjectPose | None]]
            ) -> None:
                poses = [
                    (meshes[one.class_id], one.T_cam_obj, None if pose is None else pose.T_cam_obj)
                    for one, pose in answers
                ]
                scene_overlay(scene.rgb, scene.camera.K, poses, renderer, args.overlays / f"{scene.name}.jpg")

        benchmark = Benchmark(estimator, meshes, facts, args.seed, renderer, args.mask_noise, pictures)
        scenes = make_scenes(list(meshes.values()), args.scenes, args.seed, args.kind)
        hardness: list[Difficulty] = []
        for index, scene in enumerate(progress_bar(scenes, args.scenes, unit="scene")):
            hardness += difficulty(scene, meshes)
            benchmark.add(index, scene)
        if not benchmark.records:
            raise ConfigError(f"none of {args.scenes} scenes shows an object; make more scenes")
        report = {
            "benchmark": {
                "version": __version__,
                "scenes_version": BENCHMARK_VERSION,
                "meshes": args.meshes.name,
                "scenes": args.scenes,
                "seed": args.seed,
                "kind": args.kind,
                "hypotheses": args.hypotheses,
                "mask_noise": args.mask_noise,
                "background": args.background,
                "decode": args.decode,
                "rerank": args.rerank,
                "precision": args.precision,
                "prune": args.prune,
                "second_look": args.second_look,
                "viewpoints": args.viewpoints,
                "preset": args.preset,
                "weights": model_fingerprint(model)[:16],
            },
            "unreadable": onboarding.failed,
            "difficulty": _quantiles(hardness),
            "stages": benchmark.stages,
            "facts": {name: vars(fact) for name, fact in sorted(facts.items()) if name in meshes},
            "figures": summarise(benchmark.records, facts, benchmark.stages),
            "queries": query_rows(benchmark.records),
        }
        # Last, and the only part that differs from run to run.
        report["times"] = times(benchmark, onboarded - begin, time.perf_counter() - begin)
        report = plain(report)
        if args.overlays is not None:
            difficulty_figure(hardness, args.overlays / "difficulty.png")
            _write_cases(benchmark, meshes, renderer, args.overlays)
            reliability_picture(report["figures"]["confidence"]["all"], args.overlays / "reliability.png")
    write_atomically(args.out, report)
    text = markdown(report)
    if args.markdown is not None:
        write_atomically(args.markdown, text)
    if args.calibrate:
        fitted = Calibration(*model.calibration).then(calibration(benchmark.records, benchmark.stages[-1]))
        save_calibration(weights_path(args.preset, args.weights), fitted.slope, fitted.offset)
    print(text)
    for name, reason in sorted(onboarding.failed.items()):
        print(f"object '{name}' is left out: {reason}", file=sys.stderr)
    return 1 if onboarding.failed else 0


def _quantiles(instances: Sequence[Difficulty]) -> dict[str, dict[str, float]]:
    """How hard the queries are: of each measure the 5th, 50th and 95th percentile."""
    return {
        name: dict(zip(("5%", "50%", "95%"), np.percentile([vars(i)[name] for i in instances], (5, 50, 95))))
        for name in (vars(instances[0]) if instances else ())
    }


def _check_places(args: argparse.Namespace) -> None:
    """Say before the long work that a file can't be written.

    Raises:
        ConfigError: names the place.
    """
    for place in (args.out, args.markdown, args.overlays and args.overlays / "contact_sheet.png"):
        if place is not None:
            check_writable(place)


def _write_cases(
    benchmark: Benchmark, meshes: Mapping[str, ObjectMesh], renderer: MeshRenderer, folder: Path
) -> None:
    """The contact sheet: best, median and worst cases by ADD(-S) over the diameter."""
    stage = benchmark.stages[-1]

    def badness(record: Record) -> float:
        pose = record.poses.get(stage)
        return float("inf") if pose is None else pose.errors.add / pose.errors.diameter

    ordered = sorted((r for r in benchmark.records if r.shot is not None), key=badness)
    if not ordered:
        return
    count = min(6, len(ordered))
    middle = (len(ordered) - count) // 2
    cases = {
        "best": ordered[:count],
        "median": ordered[middle : middle + count],
        "worst": ordered[::-1][:count],
    }
    shots = {name: [record.shot for record in records] for name, records in cases.items()}
    contact_sheet(shots, meshes, renderer, folder / "contact_sheet.png")
