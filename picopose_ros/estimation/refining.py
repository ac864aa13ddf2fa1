"""Between the estimator and refinement: what is refined of a segment's hypotheses, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from picopose_ros.errors import ImageError
from picopose_ros.estimation.choosing import MIN_INLIERS
from picopose_ros.estimation.confidence import REFINED, Calibration
from picopose_ros.estimation.queries import Query
from picopose_ros.estimation.refine import Refined, Start, Task, quality
from picopose_ros.estimation.refine_step import Step
from picopose_ros.estimation.results import ObjectPose
from picopose_ros.estimation.solving import SolvedHypothesis
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.rectify import straighten
from picopose_ros.model.fast import Prepared

Choose = Callable[[Query, Sequence[SolvedHypothesis]], ObjectPose | None]
"""The pose of some hypotheses of a query, without refinement."""


def answer(
    queries: Sequence[Query],
    solved: Sequence[Sequence[SolvedHypothesis]],
    counts: Sequence[Sequence[int]],
    choose: Choose,
    refine: Callable[[Sequence[Task]], list[Refined | str]] | None,
    calibration: Calibration,
    features: Prepared | None = None,
) -> tuple[list[list[ObjectPose | None]], list[list[str]]]:
    """The poses that are published.

    Args:
        queries, solved: the segments and their hypotheses.
        counts: per query some k; a pose is made of the first k hypotheses.
        choose: see `Choose`.
        refine: of tasks the results; None: nothing is refined.
        calibration: from quality to confidence.
        features: of the queries' crops, if refinement is to use them again.

    Returns:
        Per query and k the pose or None; and what went wrong with its refinement, or "".
    """
    answers = [[choose(query, own[:k]) for k in ks] for query, own, ks in zip(queries, solved, counts)]
    remarks = [[""] * len(own) for own in answers]
    if refine is None:
        return answers, remarks
    tasks: list[Task] = []
    origins: list[tuple[int, int, list[ObjectPose]]] = []
    for row, (query, own, ks) in enumerate(zip(queries, solved, counts)):
        each = {id(one): choose(query, [one]) for one in own}
        for place, (k, pose) in enumerate(zip(ks, answers[row])):
            if pose is None:
                continue
            poses, values = [pose], [0.0]
            if pose.source == "offsets":
                known = [(each[id(one)], one.quality) for one in own[:k] if _is_solved(one)]
                known = [(p, value) for p, value in known if p is not None and p.source == "offsets"]
                poses, values = [p for p, _ in known], [value for _, value in known]
            starts = tuple(Start(p.T_cam_obj, value) for p, value in zip(poses, values))
            # Of a box nothing is known but that the object is in it.
            mask = None if query.segment.is_box else query.segment.mask
            encoded = None
            if features is not None and mask is not None:
                encoded = features.select(slice(row, row + 1))
            tasks.append(Task(query.bank.class_id, mask, starts, encoded, query.box))
            origins.append((row, place, poses))
    for (row, place, poses), one in zip(origins, refine(tasks)):
        remarks[row][place] = remark(one)
        if isinstance(one, Refined):
            answers[row][place] = refined_pose(poses[one.start], one, calibration)
    return answers, remarks


def refined_pose(pose: ObjectPose, refined: Refined | str, calibration: Calibration) -> ObjectPose:
    """A pose after its refinement; the same where there is none."""
    if isinstance(refined, str):
        return pose
    step = refined.step
    return replace(
        pose,
        T_cam_obj=step.T_cam_obj,
        confidence=score_of(step, calibration),
        covariance=step.covariance,
        source="offsets",
        inliers=step.inliers,
        inlier_ratio=step.inlier_ratio,
        refinements=pose.refinements + refined.rounds,
        terms=step.terms,
    )


def score_of(step: Step, calibration: Calibration) -> float:
    """The confidence, 0..1, of a pose that a step led to; ``calibration``: the network's own."""
    return float(np.clip(REFINED.then(calibration).apply(quality(step)), 0.0, 1.0))


def remark(refined: Refined | str) -> str:
    """What went wrong with a refinement, or ""."""
    return refined if isinstance(refined, str) else refined.step.remark


def straighten_tasks(
    tasks: Sequence[Task], rgb: np.ndarray, depth: np.ndarray | None, camera: CameraModel
) -> tuple[list[Task], np.ndarray, np.ndarray | None]:
    """Tasks, image and depth image as an undistorted camera would have them."""
    if camera.distorted:  # what was encoded is of the distorted image
        tasks = [replace(task, features=None, box=None) for task in tasks]
    masks = {id(task.mask): task.mask for task in tasks if task.mask is not None}
    rgb, *straight = straighten([rgb, *masks.values()], camera)
    by_id = dict(zip(masks, straight))
    if depth is not None:
        (depth,) = straighten([depth], camera)
    return [replace(task, mask=by_id.get(id(task.mask))) for task in tasks], rgb, depth


def in_metres(depth: np.ndarray, camera: CameraModel) -> np.ndarray:
    """A depth image (H, W) of float metres or uint16 millimetres as float32 metres.

    Raises:
        ImageError: it has another form, or is of another size than the camera's image.
    """
    if not isinstance(depth, np.ndarray) or depth.ndim != 2 or depth.dtype.kind not in "uf":
        kind = f"{depth.dtype} {depth.shape}" if isinstance(depth, np.ndarray) else type(depth).__name__
        raise ImageError(f"the depth image is {kind}: give (H, W), uint16 in mm or float in m")
    height, width = depth.shape
    if (width, height) != (camera.width, camera.height):
        raise ImageError(
            f"the depth image is {width}x{height}, the image {camera.width}x{camera.height}: it must be "
            "registered to the image (aligned_depth_to_color, depth_image_proc/register)"
        )
    if depth.dtype.kind == "u":
        return depth.astype(np.float32) / np.float32(1000.0)
    return np.nan_to_num(depth.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _is_solved(one: SolvedHypothesis) -> bool:
    return one.solution is not None and len(one.solution.inliers) >= MIN_INLIERS
