"""What the estimator returns, and what its stages pass on to each other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

from picopose_ros.estimation.queries import Query
from picopose_ros.geometry.least_squares import Term


class Choice(NamedTuple):
    """A template that is tried for a query.

    Attributes:
        query: position of the query in its list.
        template: index in the query's bank.
        score: stage 1's score of the two.
    """

    query: int
    template: int
    score: float


@dataclass(frozen=True)
class Hypothesis:
    """A template of a query, with the network's output for the two.

    Attributes:
        template: index in the bank.
        match_score: stage 1's.
        affine: (3, 3) template crop px -> query crop px.
        flow: (2, 64, 64) offsets (x, y) in cells.
        certainty: (64, 64) logits.
        coarse: with a trace, flow (2, n, n) and certainty (n, n) at the grids before the last.
        matches: with a trace, (2, 16, 16) query crop px (x, y) of each template patch's best match.
        pruned: it did not go through the last grid; flow and certainty are the previous grid's, enlarged.
    """

    template: int
    match_score: float
    affine: np.ndarray
    flow: np.ndarray
    certainty: np.ndarray
    coarse: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    matches: np.ndarray | None = None
    pruned: bool = False


@dataclass(frozen=True)
class ObjectPose:
    """One estimated pose.

    Attributes:
        class_id: class of the bank, also where the segment named an alias.
        T_cam_obj: (4, 4) float64 mesh's own frame -> camera, metres.
        confidence: 0..1, from how much of the segment the pose explains and how well the correspondences
            agree, mapped to the share of such poses that were right on held-out renderings.
        covariance: (6, 6) of x, y, z (m) and the rotation about the camera's fixed axes (rad): ROS's order.
        source: ``offsets`` (stage 3 and PnP) or ``affine`` (stage 2 alone, where PnP found nothing).
        segment: index of the segment in the input.
        segment_score: its score.
        template: index of the hypothesis' template in the bank.
        inliers: correspondences that agree with the pose; 0 for ``affine``.
        inlier_ratio: their share of all correspondences.
        match_score: stage 1's score of the template.
        bbox_centre: (3,) centre of the object's bounding box in its own frame, metres.
        bbox_size: (3,) its sides, metres.
        refinements: rounds of refinement that led to the pose; 0: it is as PnP found it.
        terms: what refinement solved the pose from, for who adds something to it.
    """

    class_id: str
    T_cam_obj: np.ndarray
    confidence: float
    covariance: np.ndarray
    source: Literal["offsets", "affine"]
    segment: int
    segment_score: float
    template: int
    inliers: int
    inlier_ratio: float
    match_score: float
    bbox_centre: np.ndarray
    bbox_size: np.ndarray
    refinements: int = 0
    terms: Mapping[str, Term] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class HypothesisTrace:
    """The poses of the stages for one template; all T_cam_obj (4, 4), or None where there is none.

    Attributes:
        hypothesis: the network's output.
        T_match: stage 1 alone: the template's pose, placed and scaled like the segment's crop.
        T_affine: stage 2: turned in the image plane and placed by the affine.
        T_offsets: stage 3: PnP on its correspondences, also where the estimator rejects it.
        answer: what would be published if this were the only hypothesis, without refinement.
    """

    hypothesis: Hypothesis
    T_match: np.ndarray | None
    T_affine: np.ndarray | None
    T_offsets: np.ndarray | None
    answer: ObjectPose | None


@dataclass(frozen=True)
class SegmentTrace:
    """The output of every stage for one segment.

    Attributes:
        query: the segment and its crop.
        hypotheses: its templates, best match first.
        answers: ``answers[k - 1]`` is what would be published with the first k hypotheses alone.
    """

    query: Query
    hypotheses: tuple[HypothesisTrace, ...]
    answers: tuple[ObjectPose | None, ...]


@dataclass(frozen=True)
class EstimateResult:
    """The poses of one image.

    Attributes:
        poses: one per segment that got a pose, in the order of the segments.
        skipped: (index of the segment, why it has none).
        timings: milliseconds: crop, encode, match, regress, pnp (decode included), refine, total.
        traces: where they were asked for, one per segment that was not skipped before the network.
        unrefined: (index of the segment, why), of poses that refinement could not improve on and that are
            published as they were.
    """

    poses: list[ObjectPose]
    skipped: list[tuple[int, str]]
    timings: dict[str, float]
    traces: list[SegmentTrace] = field(default_factory=list)
    unrefined: list[tuple[int, str]] = field(default_factory=list)


STAGES = ("crop", "encode", "match", "regress", "pnp", "refine")
"""What the time of an estimate goes to."""


class StageClock:
    """Milliseconds by stage; a stage may be lapped more than once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._last = time.perf_counter()
        self._seconds = dict.fromkeys(STAGES, 0.0)

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to a stage."""
        if self._device.type == "cuda":  # kernels run on after the call that queued them
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    def milliseconds(self) -> dict[str, float]:
        """By stage, and ``total`` since the start."""
        times = {**self._seconds, "total": time.perf_counter() - self._begin}
        return {stage: 1000.0 * seconds for stage, seconds in times.items()}
