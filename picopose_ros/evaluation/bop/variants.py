"""The variants of the paper's tables, measured image by image from one traced pass of the estimator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from scipy.ndimage import map_coordinates

from picopose_ros.errors import CameraError, DatasetError, ImageError
from picopose_ros.estimator import EstimateResult, Hypothesis, ObjectPose, PoseEstimator, SegmentTrace
from picopose_ros.evaluation.bop.dataset import BopDataset, GroundTruth
from picopose_ros.evaluation.bop.detections import BopDetections, Selection
from picopose_ros.evaluation.bop.journal import ImageRecord
from picopose_ros.evaluation.bop.results import BopRow
from picopose_ros.evaluation.metrics import bop_symmetries
from picopose_ros.evaluation.stages import endpoint_errors, true_map, viewpoints
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.correspondences import fit_similarity
from picopose_ros.geometry.crops import CROP_SIZE, GRID
from picopose_ros.segmentation import Problems
from picopose_ros.templates.meshes import ObjectMesh, load_object
from picopose_ros.templates.renderer import MeshRenderer
from picopose_ros.templates.viewpoints import spread_viewpoints

TEMPLATE_COUNTS = (2, 6, 42, 162)
"""Of Table VIII."""

MATCH_TOLERANCE_PX = 14.0
"""A patch match this near to a similarity agrees with it: one patch."""

LEAST_OVERLAP = 0.3
"""Of a segment and what is visible of an instance (intersection over union), for its end points to be
measured against that instance."""

PATCH = 14
"""Side of a patch, crop px."""

EPE_STAGES = ("1", "2", "3")


def stage(which: int) -> str:
    """Name of a stage's pose."""
    return f"stage {which}"


def start(what: str) -> str:
    """Name of the pose that stage 3 gives from another start."""
    return f"start: {what}"


def blocks(count: int) -> str:
    """Name of the pose from so many offset blocks."""
    return f"{count} block{'s' if count > 1 else ''}"


def templates(count: int) -> str:
    """Name of the pose with so many templates and one hypothesis."""
    return f"{count} templates"


def refined(hypotheses: int) -> str:
    """Name of the pose with so many hypotheses after refinement."""
    return f"{answer(hypotheses)}, refined"


def answer(hypotheses: int) -> str:
    """Name of the published pose with so many hypotheses."""
    return f"{hypotheses} hypothes{'i' if hypotheses == 1 else 'e'}s"


def matched_affine(hypothesis: Hypothesis, mask: np.ndarray) -> np.ndarray:
    """The similarity (3, 3), template crop px -> query crop px, that most of stage 1's matches agree on.

    Args:
        hypothesis: traced. mask: (224, 224) of the template.
    """
    side = CROP_SIZE // PATCH
    inside = mask.reshape(side, PATCH, side, PATCH).mean((1, 3)) >= 0.5
    y, x = np.nonzero(inside)
    source = np.stack([x, y], 1) * PATCH + (PATCH - 1) / 2
    target = hypothesis.matches[:, y, x].T.astype(np.float64)
    if len(source) < 3:
        return np.eye(3)
    found, _ = cv2.estimateAffinePartial2D(
        source, target, method=cv2.RANSAC, ransacReprojThreshold=MATCH_TOLERANCE_PX, maxIters=500
    )
    if found is None or not np.linalg.norm(found[:, 0]) > 1e-3:
        return fit_similarity(source, target)
    return np.vstack([found, [0, 0, 1]])


def after_block(hypothesis: Hypothesis, index: int) -> Hypothesis:
    """A traced hypothesis with the flow and certainty of an earlier block, brought to the last one's grid.

    Args:
        index: of the block: 0 for the coarsest.
    """
    flow, certainty = hypothesis.coarse[index]
    side = flow.shape[-1]
    # Cell i of a grid stands where cell i * GRID / side of the last one does, as its labels do.
    at = np.arange(GRID) * side / GRID
    where = np.stack(np.meshgrid(at, at, indexing="ij"))

    def finer(values: np.ndarray) -> np.ndarray:
        return map_coordinates(values.astype(np.float64), where, order=1, mode="nearest")

    return replace(
        hypothesis,
        flow=np.stack([finer(part) for part in flow]) * (GRID / side),
        certainty=finer(certainty),
        coarse=(),
    )


@dataclass(frozen=True, eq=False)
class _Image:
    """What is known of the image being measured."""

    scene_id: int
    image_id: int
    rgb: np.ndarray
    camera: CameraModel
    selection: Selection


class Variants:
    """Measures the variants image by image.

    Args:
        estimator: of the dataset's objects. dataset, detections: what to estimate. renderer: of this thread.
        counts: of Table VIII, below the number of templates that there are.
    """

    def __init__(
        self,
        estimator: PoseEstimator,
        dataset: BopDataset,
        detections: BopDetections,
        renderer: MeshRenderer,
        counts: Sequence[int] = TEMPLATE_COUNTS,
    ) -> None:
        self.estimator, self.dataset, self.detections = estimator, dataset, detections
        self._renderer = renderer
        self._meshes: dict[int, ObjectMesh] = {}
        self._symmetries: dict[int, np.ndarray] = {}
        size = len(next(iter(estimator.banks.values())))
        self._fewer = {
            count: PoseEstimator(
                estimator.model,
                {name: b.select(spread_viewpoints(count, size)) for name, b in estimator.banks.items()},
                replace(estimator.settings, hypotheses=1),
                estimator.device,
            )
            for count in counts
            if count < size
        }

    def measure(self, scene_id: int, image_id: int) -> ImageRecord:
        """Rows of all variants, as csv lines in the record's ``extra``, and end-point errors."""
        problems = Problems()
        try:
            rgb = self.dataset.image(scene_id, image_id)
            camera = self.dataset.camera(scene_id, image_id)
        except (DatasetError, ImageError, CameraError) as error:
            problems.add("image that can't be used", str(error))
            return ImageRecord(scene_id, image_id, problems=problems.entries, failed=True)
        selection = self.detections.select(self.dataset.targets_of(scene_id, image_id), rgb.shape[:2])
        problems.entries += selection.problems.entries
        image = _Image(scene_id, image_id, rgb, camera, selection)
        lines: dict[str, list[str]] = {}
        errors: dict[str, list[float]] = {name: [] for name in EPE_STAGES}
        if selection.segments:
            for name, index, T in self._poses(image, errors):
                segment = selection.segments[index]
                row = BopRow.of_pose(scene_id, image_id, selection.obj_ids[index], segment.score, T, -1.0)
                lines.setdefault(name, []).append(row.line())
        extra = {"rows": lines, "epe": errors}
        return ImageRecord(scene_id, image_id, problems=problems.entries, extra=extra)

    def _poses(self, image: _Image, errors: dict[str, list[float]]) -> Iterator[tuple[str, int, np.ndarray]]:
        """(variant, index of the segment, T_cam_obj) of everything that gives a pose."""
        segments = image.selection.segments
        result = self.estimator.estimate(image.rgb, image.camera, segments, trace=True)
        truths = self.dataset.ground_truth(image.scene_id, image.image_id)
        visible = [self.dataset.mask(image.scene_id, image.image_id, k) for k in range(len(truths))]
        given: list[list[int]] = [[] for _ in segments]
        affines: list[list[np.ndarray]] = [[] for _ in segments]
        for trace in result.traces:
            index, first = trace.query.index, trace.hypotheses[0]
            poses: dict[str, np.ndarray | ObjectPose | None] = {
                answer(1): trace.answers[0],
                answer(self.estimator.settings.hypotheses): trace.answers[-1],
                stage(1): first.T_match,
                stage(2): first.T_affine,
            }
            for k in range(len(first.hypothesis.coarse)):
                earlier = after_block(first.hypothesis, k)
                poses[blocks(k + 1)] = self.estimator.answer(trace.query, earlier, image.camera)
            yield from _given(poses, index)
            template = first.hypothesis.template
            given[index] = [template, template]
            affines[index] = [np.eye(3), matched_affine(first.hypothesis, trace.query.bank.masks[template])]
            for name, error in self._endpoints(image, trace, truths, visible).items():
                errors[name].append(error)
        yield from self._refined(image, result)
        started = self.estimator.examine(image.rgb, image.camera, segments, given, affines)
        for index, trace in enumerate(started):
            if trace is not None and trace.hypotheses:
                names = start("identity"), start("stage 1")
                yield from _given(dict(zip(names, (one.answer for one in trace.hypotheses))), index)
        for count, estimator in self._fewer.items():
            for pose in estimator.estimate(image.rgb, image.camera, segments).poses:
                yield templates(count), pose.segment, pose.T_cam_obj

    def _refined(self, image: _Image, result: EstimateResult) -> Iterator[tuple[str, int, np.ndarray]]:
        """The poses after as many rounds as the settings say, from one hypothesis and from all."""
        settings = self.estimator.settings
        if not settings.refinements:
            return
        found = {settings.hypotheses: result.poses}
        if settings.hypotheses > 1:
            first = [trace.answers[0] for trace in result.traces if trace.answers[0] is not None]
            found[1] = self.estimator.refine(image.rgb, image.camera, first, image.selection.segments).poses
        for count, poses in found.items():
            for pose in poses:
                yield refined(count), pose.segment, pose.T_cam_obj

    def _endpoints(
        self,
        image: _Image,
        trace: SegmentTrace,
        truths: Sequence[GroundTruth],
        visible: Sequence[np.ndarray],
    ) -> dict[str, float]:
        """Mean end-point error of each stage over the cells that are visible, crop px, for the best match."""
        obj_id = image.selection.obj_ids[trace.query.index]
        mask = trace.query.segment.mask
        overlaps = {
            k: (mask & seen).sum() / max((mask | seen).sum(), 1)
            for k, (truth, seen) in enumerate(zip(truths, visible))
            if truth.obj_id == obj_id
        }
        best = max(overlaps, key=overlaps.__getitem__, default=None)
        if best is None or overlaps[best] < LEAST_OVERLAP:
            return {}
        bank, hypothesis = trace.query.bank, trace.hypotheses[0].hypothesis
        if obj_id not in self._meshes:
            self._meshes[obj_id] = load_object(self.dataset.models[obj_id])
            self._symmetries[obj_id] = bop_symmetries(self.dataset.symmetries(obj_id))
        T = truths[best].T_cam_obj
        camera = image.camera
        # Rendered, not measured: a sensor's depth is too coarse to say which cells are visible.
        depth = self._renderer.render(self._meshes[obj_id], T, camera.K, camera.width, camera.height).depth
        views = viewpoints(bank, T, self._symmetries[obj_id])
        true = true_map(
            bank,
            hypothesis.template,
            views.truths[hypothesis.template],
            camera.K,
            trace.query.M_crop_img,
            depth,
            visible[best],
        )
        found = endpoint_errors(hypothesis, true)
        return {name: float(found[name].mean()) for name in EPE_STAGES if len(found.get(name, ()))}


def _given(
    poses: Mapping[str, np.ndarray | ObjectPose | None], index: int
) -> Iterator[tuple[str, int, np.ndarray]]:
    for name, pose in poses.items():
        if pose is not None:
            yield name, index, pose.T_cam_obj if isinstance(pose, ObjectPose) else pose
