"""The synthetic benchmark: runs the estimator on rendered scenes and measures every stage of every query."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from picopose_ros.estimator import HypothesisTrace, ObjectPose, PoseEstimator, SegmentTrace
from picopose_ros.evaluation.metrics import (
    EvaluationPoints,
    PoseErrors,
    VsdScorer,
    bop_errors,
    bop_symmetries,
    evaluation_points,
    pose_errors,
)
from picopose_ros.evaluation.records import SUBSTITUTIONS, PairFigures, PoseFigures, Record, answer_name
from picopose_ros.evaluation.sheets import Shot
from picopose_ros.evaluation.stages import (
    TrueMap,
    Viewpoints,
    certainty_counts,
    endpoint_errors,
    true_affine,
    true_map,
    viewpoints,
    with_true_certainty,
    with_true_flow,
)
from picopose_ros.geometry.crops import crop_box_from_mask
from picopose_ros.segmentation import Segment
from picopose_ros.synthetic.disturbances import degrade_mask
from picopose_ros.templates.meshes import ObjectMesh
from picopose_ros.templates.renderer import MeshRenderer

if TYPE_CHECKING:
    from picopose_ros.evaluation.objects import ObjectFacts
    from picopose_ros.evaluation.scenes import Scene, SceneInstance


RIGHT_DEG, WRONG_DEG = 25.0, 60.0
"""A hypothesis is right within the first angle of the true viewpoint, and wrong beyond the second."""

_MASKS, _WRONG = 1, 2  # streams of random numbers


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
            _Query(index, k, scene, one, segments[k], traces.get(k), self._symmetries[one.class_id], shown[k])
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

    def _measure_viewpoint(self, query: _Query, record: Record) -> None:
        errors = [query.views.errors_deg[t.hypothesis.template] for t in query.trace.hypotheses]
        record.template_deg, record.best_of_five_deg = float(errors[0]), float(min(errors[:5]))
        for error, one in zip(errors, query.trace.hypotheses):
            if error <= RIGHT_DEG:
                record.right_scores.append(_score(one))
            elif error > WRONG_DEG:
                record.far_scores.append(_score(one))

    def _measure_poses(self, query: _Query, record: Record) -> None:
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
                _result_text(last),
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

    def _measure_given(self, scene: Scene, found: list[tuple[_Query, Record]]) -> None:
        """Stages 2 and 3 with the right template, with true affines, and with a far template."""
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

    def _substitute(self, query: _Query, record: Record, by_name: dict[str, HypothesisTrace]) -> None:
        """Replace the result of each stage by the truth. Where there is none, the prediction stays."""
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

    def _measure_other_objects(self, scene: Scene, found: list[tuple[_Query, Record]]) -> None:
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

    def _pair(self, query: _Query, one: HypothesisTrace) -> PairFigures:
        truth = query.map_of(one.hypothesis.template)
        endpoints = {
            name: errors.astype(np.float32) for name, errors in endpoint_errors(one.hypothesis, truth).items()
        }
        return PairFigures(endpoints, certainty_counts(one.hypothesis, truth))


class _Query:
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


def _result_text(pose: PoseFigures | None) -> str:
    if pose is None:
        return "no pose"
    return f"ADD {pose.errors.add / pose.errors.diameter:.3f} d  {pose.errors.rotation_deg:.1f} deg"


def _score(one: HypothesisTrace) -> float:
    return 0.0 if one.answer is None else one.answer.confidence
