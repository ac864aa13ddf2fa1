"""Image, camera and segments in, poses out: what the node, the command line and the tests call."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from picopose_ros.confidence import Calibration
from picopose_ros.errors import CameraError, ConfigError, ImageError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.correspondences import (
    Correspondences,
    DecodeMode,
    decode_correspondences,
    fit_similarity,
)
from picopose_ros.geometry.covariance import move_covariance, ray_covariance
from picopose_ros.geometry.crops import (
    CROP_SIZE,
    crop_box_from_mask,
    crop_mask,
    crop_rgb,
    mask_background,
)
from picopose_ros.geometry.pnp import PoseSolution, pose_covariance, solve_pose
from picopose_ros.geometry.poses import pose_from_affine
from picopose_ros.inference import (
    PATCHES,
    Choice,
    Hypothesis,
    Network,
    Precision,
    Query,
    resolve_precision,
)
from picopose_ros.model import PicoPose, load_model
from picopose_ros.model.fast import Prepared, Schedule
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import Progress, TemplateBank, onboard

_log = logging.getLogger(__name__)

# The released network's PnP, which the decode mode "reference" reproduces.
_RELEASED_THRESHOLD_PX = 2.0
_RELEASED_ITERATIONS = 150

# A pose from offsets needs this many inliers and this quality; else the affine's pose is the better guess.
_MIN_INLIERS = 12
_MIN_QUALITY = 0.02

# How far off an affine's pose is taken to be: it knows the view only as well as the nearest template does.
_AFFINE_SIGMA_CROP_PX = 10.0
_AFFINE_SIGMA_SCALE = 0.1
_AFFINE_SIGMA_RAD = np.radians(20.0)
_AFFINE_CONFIDENCE = 0.1


@dataclass(frozen=True)
class EstimatorSettings:
    """How poses are computed.

    Attributes:
        hypotheses: templates tried per segment.
        decode: ``subpixel``, or ``reference`` for the released network's decode, PnP and choice.
        ransac_threshold_px: largest reprojection error of an inlier in *crop* pixels, because that is what
            the network's errors scale with; ``reference`` always takes 2 image pixels.
        ransac_iterations: most RANSAC draws; ``reference`` always takes 150.
        correlated_pairs: so many pairs err together and count as one measurement in the covariance; measured
            with the tiny preset on the demo and on synthetic scenes (docs/poses.md), depth bias included.
        min_mask_pixels: segments with fewer visible pixels are skipped.
        rerank: so many of the best matching templates are put in order by how well their matches agree on
            one motion (`match_agreement`) before the hypotheses are taken; 0: by the match alone, as in the
            paper. Only presets whose stage 2 starts from such a motion do so.
        second_look: once more through stage 3 for the best pose, from the template nearest to it and the
            affine that it implies; the better of the two poses is published. Not in the paper.
        max_batch: most crops or hypotheses that go through the network at once.
        template_cache_mb: memory for what stages 2 and 3 need of templates that were hypotheses lately.
        precision: what the network computes in: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        prune: so many hypotheses of a segment go through the last grid, the ones that promise most after the
            grids before; 0: all of them.
        compile: a backend of `torch.compile` (``inductor``, ``cudagraphs``) for the network, or "" for none.
            Batches are filled up to the sizes that :meth:`PoseEstimator.warm_up` compiles in minutes.
        keep_background: leave the pixels around a segment as they are, also where the preset blacks them out.
    """

    hypotheses: int = 5
    decode: DecodeMode = "subpixel"
    ransac_threshold_px: float = 4.0
    ransac_iterations: int = 1000
    correlated_pairs: float = 780.0
    rerank: int = 64
    second_look: bool = False
    min_mask_pixels: int = 32
    max_batch: int = 16
    template_cache_mb: int = 512
    precision: Precision = "auto"
    prune: int = 0
    compile: str = ""
    keep_background: bool = False

    def __post_init__(self) -> None:
        for name in ("hypotheses", "ransac_iterations", "min_mask_pixels", "max_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("ransac_threshold_px", "correlated_pairs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be positive")
        for name in ("template_cache_mb", "prune", "rerank"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must not be negative")
        resolve_precision(self.precision, torch.device("cpu"))
        if self.compile and self.compile not in torch._dynamo.list_backends(()):
            known = ", ".join(torch._dynamo.list_backends())
            raise ConfigError(f"compile is '{self.compile}', choose one of {known}, or '' for none")
        if self.decode not in ("reference", "subpixel"):
            raise ConfigError(f"decode is '{self.decode}', choose 'subpixel' or 'reference'")


@dataclass(frozen=True)
class ObjectPose:
    """One estimated pose.

    Attributes:
        class_id: class of the bank, also where the segment named an alias.
        T_cam_obj: (4, 4) float64 mesh's own frame -> camera, metres.
        confidence: 0..1, how much of the segment the pose explains and how well the pairs agree; calibrated
            weights turn that into the share of such poses that were right on their benchmark.
        covariance: (6, 6) of x, y, z (m) and the rotation about the camera's fixed axes (rad): ROS's order.
        source: ``offsets`` (stage 3 and PnP) or ``affine`` (stage 2 alone, where PnP found nothing).
        segment: index of the segment in the input.
        segment_score: its score.
        template: index of the hypothesis' template in the bank.
        inliers: pairs that agree with the pose; 0 for ``affine``.
        inlier_ratio: their share of all pairs.
        match_score: stage 1's score of the template.
        bbox_centre: (3,) centre of the object's bounding box in its own frame, metres.
        bbox_size: (3,) its sides, metres.
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


@dataclass(frozen=True)
class HypothesisTrace:
    """The poses that the stages give with one template; all T_cam_obj (4, 4), or None where there is none.

    Attributes:
        hypothesis: what the network said.
        T_match: stage 1 alone: the template's pose, put where the segment's crop is and as large as that.
        T_affine: stage 2: turned in the image plane and placed by the affine.
        T_offsets: stage 3: PnP on its correspondences, also where the estimator doesn't believe it.
        answer: what would be published if this were the only hypothesis.
    """

    hypothesis: Hypothesis
    T_match: np.ndarray | None
    T_affine: np.ndarray | None
    T_offsets: np.ndarray | None
    answer: ObjectPose | None


@dataclass(frozen=True)
class SegmentTrace:
    """What became of one segment, stage by stage.

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
    """What became of the segments of one image.

    Attributes:
        poses: one per segment that got a pose, in the order of the segments.
        skipped: (index of the segment, why it has none).
        timings: milliseconds: crop, encode, match, regress, pnp (decode included), total.
        traces: where they were asked for, one per segment that was worth asking about.
    """

    poses: list[ObjectPose]
    skipped: list[tuple[int, str]]
    timings: dict[str, float]
    traces: list[SegmentTrace] = field(default_factory=list)


@dataclass(frozen=True)
class _Attempt:
    """A hypothesis' way through decode and PnP.

    Attributes:
        pairs: undistorted. solution: None where PnP found nothing. quality: of it, 0..1.
    """

    hypothesis: Hypothesis
    pairs: Correspondences
    solution: PoseSolution | None
    quality: float


def torch_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device '{name}' doesn't exist; choose cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device '{name}' isn't there: PyTorch sees {count} CUDA devices; choose cpu")
    return device


class PoseEstimator:
    """Poses of the segments of an image. Not for use by two threads at once.

    Attributes:
        banks: by class id.
        model: the network, on ``device``.
        settings: how poses are computed.
    """

    def __init__(
        self,
        model: PicoPose,
        banks: Mapping[str, TemplateBank],
        settings: EstimatorSettings | None = None,
        device: str | torch.device = "cpu",
        aliases: Mapping[str, str] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """Move the network to ``device``.

        Args:
            model: in evaluation mode.
            banks: by class id, made with this model.
            settings: the defaults if None.
            device: torch device of the network.
            aliases: further class ids of segments -> class id of a bank.
            schedule: what is done to be fast; everything if None. For measurements.
        """
        self.banks = dict(banks)
        self.settings = settings or EstimatorSettings()
        self.device = torch_device(device)
        self.model = model.to(self.device).eval()
        self._calibration = Calibration(*getattr(model, "calibration", ()))
        self._aliases = dict(aliases or {})
        self._schedule = schedule or Schedule()
        # As many threads as the network has: they wait while it runs, and it while they do.
        self._solvers = ThreadPoolExecutor(torch.get_num_threads(), "pnp")

    @cached_property
    def _network(self) -> Network:
        """The network with what it needs of the banks, on the device."""
        settings = self.settings
        return Network(
            self.model,
            self.banks,
            self.device,
            settings.max_batch,
            settings.template_cache_mb * 2**20,
            settings.precision,
            self._schedule,
            settings.compile,
        )

    def warm_up(self) -> None:
        """Make what is made when it is first needed: from now on estimates take their usual time."""
        self._network.warm_up()

    def with_banks(
        self, banks: Mapping[str, TemplateBank], aliases: Mapping[str, str] | None = None
    ) -> PoseEstimator:
        """The same for other objects; what is prepared of the network and of those that stay is kept.

        Args:
            banks, aliases: as for a new one. A bank that stays is the same object as before.
        """
        other = type(self)(self.model, banks, self.settings, self.device, aliases)
        other._schedule = self._schedule
        if "_network" in self.__dict__:
            other._network = self._network.with_banks(banks)
        return other

    def resident_bytes(self) -> dict[str, int]:
        """Memory on the device beside the network's: ``descriptors``, ``masks``, ``cache`` of templates."""
        return self._network.resident_bytes()

    @classmethod
    def from_mesh_dir(
        cls,
        mesh_dir: str | Path,
        preset: str = "tiny",
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        unit: str = "m",
        viewpoints: int = 162,
        cache_dir: str | Path | None = None,
        hypotheses: int = 5,
        progress: bool | Progress = False,
        precision: Precision = "auto",
    ) -> PoseEstimator:
        """Load the network, onboard the objects of a folder, be ready.

        Args:
            mesh_dir: folder of meshes. unit: of meshes that nothing else says it of: m, cm, mm or in.
            preset, weights: of the network; None for the packaged weights.
            device: torch device.
            viewpoints: templates per object: 42, 162 or 642.
            cache_dir: of the banks; None for the user's cache folder.
            hypotheses: templates tried per segment.
            progress: True for a bar on the terminal; or called as each object is begun and done. What it
                raises ends the loading.
            precision: what the network computes in: ``auto``, ``fp32``, ``bf16`` or ``fp16``.

        Raises:
            MeshError, CheckpointError, ConfigError, RenderError: what can't be used, where and what to do.
        """
        settings = EstimatorSettings(hypotheses=hypotheses, precision=precision)
        model = load_model(preset, weights, torch_device(device))
        onboarding = onboard(mesh_dir, model, viewpoints, unit, cache_dir, device, progress)
        aliases = {
            alias: class_id
            for class_id, spec in onboarding.specs.items()
            for alias in spec.aliases
            if class_id in onboarding.banks
        }
        return cls(model, onboarding.banks, settings, device, aliases)

    def estimate(
        self, rgb: np.ndarray, camera: CameraModel, segments: Sequence[Segment], trace: bool = False
    ) -> EstimateResult:
        """Poses of all segments of an image, in one batched pass.

        Args:
            rgb: (H, W, 3) uint8, as the camera saw it (distortion and all).
            camera: of the image.
            segments: of the image. One that can't have a pose is skipped with a reason; the others go on.
            trace: also tell what each stage did; the poses are the same.

        Raises:
            ImageError: the image isn't (H, W, 3) uint8.
            CameraError: the camera can't be used or is of another image size.
        """
        _check_image(rgb, camera)
        clock = StageClock(self.device)
        queries, skipped = self._prepare(rgb, segments)
        clock.lap("crop")
        poses: list[ObjectPose] = []
        attempted: list[list[_Attempt]] = []
        again: list[dict[int, _Attempt]] = []
        if queries:
            with torch.inference_mode():
                features = self._encode(queries)
                clock.lap("encode")
                chosen = self._retrieve(queries, features)
                clock.lap("match")
                found = self._regress(queries, features, chosen, trace, keep=self.settings.prune or None)
                attempted = self._attempts(queries, chosen, found, camera, clock)
            again = self._look_again(queries, features, attempted, camera, clock, trace)
            for query, own, seconds in zip(queries, attempted, again):
                pose = self._choose(query, _with_second(own, seconds, self._best(own)), camera)
                if pose is None:
                    skipped.append((query.index, "no pose agrees with the network's correspondences"))
                else:
                    poses.append(pose)
            clock.lap("pnp")
        timings = clock.milliseconds()
        traces = []
        if trace:
            traces = [self._trace(*found, camera) for found in zip(queries, attempted, again)]
        return EstimateResult(poses, sorted(skipped), timings, traces)

    def examine(
        self,
        rgb: np.ndarray,
        camera: CameraModel,
        segments: Sequence[Segment],
        templates: Sequence[Sequence[int]],
        affines: Sequence[Sequence[np.ndarray | None]] | None = None,
    ) -> list[SegmentTrace | None]:
        """What the later stages make of given templates, whatever stage 1 would have chosen.

        Args:
            rgb, camera, segments: as in :meth:`estimate`.
            templates: per segment, indices in its class' bank; they are its hypotheses in this order.
            affines: per segment and template an affine (3, 3) that stage 3 starts from instead of stage 2's.

        Returns:
            Per segment its trace, or None where it can't have a pose.
        """
        _check_image(rgb, camera)
        queries, _ = self._prepare(rgb, segments)
        given = None
        if affines is not None:
            given = [affine for query in queries for affine in affines[query.index]]
        traces: list[SegmentTrace | None] = [None] * len(segments)
        if any(len(templates[query.index]) for query in queries):
            with torch.inference_mode():
                features = self._encode(queries)
                scores = self._scores(queries, features)
                chosen = [
                    (row, t, float(scores[row][t]))
                    for row, query in enumerate(queries)
                    for t in templates[query.index]
                ]
                found = self._regress(queries, features, chosen, True, given)
                attempted = self._attempts(queries, chosen, found, camera, StageClock(self.device))
            for query, attempts in zip(queries, attempted):
                traces[query.index] = self._trace(query, attempts, {}, camera)
        return traces

    def answer(self, query: Query, hypothesis: Hypothesis, camera: CameraModel) -> ObjectPose | None:
        """What would be published with this hypothesis alone, be it the network's or a changed one."""
        return self._choose(query, [self._attempt(query, hypothesis, camera)], camera)

    def _prepare(
        self, rgb: np.ndarray, segments: Sequence[Segment]
    ) -> tuple[list[Query], list[tuple[int, str]]]:
        """Crops of the segments that can be asked about, and why the others can't."""
        queries: list[Query] = []
        skipped: list[tuple[int, str]] = []
        height, width = rgb.shape[:2]
        for index, segment in enumerate(segments):
            bank = self.banks.get(self._aliases.get(segment.class_id, segment.class_id))
            pixels = int(segment.mask.sum())
            if bank is None:
                known = ", ".join(sorted(self.banks))
                reason = f"no object is called '{segment.class_id}'; onboarded are {known}"
            elif segment.mask.shape != (height, width):
                size = f"{segment.mask.shape[1]}x{segment.mask.shape[0]}"
                reason = f"its mask is {size}, the image {width}x{height}; both must be of one size"
            elif pixels == 0:
                reason = "its mask is empty"
            elif pixels < self.settings.min_mask_pixels:
                least = self.settings.min_mask_pixels
                reason = f"its mask has {pixels} pixels, at least {least} are needed"
            else:
                box = crop_box_from_mask(segment.mask)
                crop, mask = crop_rgb(rgb, box), crop_mask(segment.mask, box)
                if self.model.config.mask_background and not self.settings.keep_background:
                    crop = mask_background(crop, mask)
                queries.append(Query(index, segment, bank, box.affine(), crop, mask))
                continue
            skipped.append((index, reason))
        return queries, skipped

    def _encode(self, queries: Sequence[Query]) -> Prepared:
        """What the stages need of the queries' crops, in their order."""
        return self._network.encode(queries)

    def _scores(self, queries: Sequence[Query], encoded: Prepared) -> list[torch.Tensor]:
        """Stage 1: per query the score (N,) of every template of its bank."""
        return self._network.scores(queries, encoded)

    def _retrieve(self, queries: Sequence[Query], encoded: Prepared) -> list[Choice]:
        """Stage 1: the templates to try, best first within a query."""
        chosen: list[Choice] = []
        count, rerank = self.settings.hypotheses, self.settings.rerank if self.model.reranks else 0
        for row, scores in enumerate(self._scores(queries, encoded)):
            best = scores.topk(min(max(count, rerank), len(scores))).indices
            if rerank:
                agreement = self._network.agreement(queries[row], encoded.descriptors[row], best)
                best = best[agreement.argsort(descending=True, stable=True)]
            best = best[:count]
            chosen += [(row, *choice) for choice in zip(best.tolist(), scores[best].tolist())]
        return chosen

    def _regress(
        self,
        queries: Sequence[Query],
        encoded: Prepared,
        chosen: Sequence[Choice],
        trace: bool = False,
        affines: Sequence[np.ndarray | None] | None = None,
        keep: int | None = None,
    ) -> Iterator[tuple[int, Hypothesis]]:
        """Stages 2 and 3; see `Network.regress`."""
        return self._network.regress(queries, encoded, chosen, trace, affines, keep)

    def _attempts(
        self,
        queries: Sequence[Query],
        chosen: Sequence[Choice],
        found: Iterable[tuple[int, Hypothesis]],
        camera: CameraModel,
        clock: StageClock,
    ) -> list[list[_Attempt]]:
        """Per query the attempts of its choices, made in threads while the network goes on with others."""
        begun: dict[int, Future[_Attempt] | _Attempt] = {}
        for i, hypothesis in found:
            task = (queries[chosen[i][0]], hypothesis, camera)
            parallel = self._schedule.parallel_pnp
            begun[i] = self._solvers.submit(self._attempt, *task) if parallel else self._attempt(*task)
        clock.lap("regress")
        attempted: list[list[_Attempt]] = [[] for _ in queries]
        for i, (row, *_) in enumerate(chosen):
            one = begun[i]
            attempted[row].append(one.result() if isinstance(one, Future) else one)
        clock.lap("pnp")
        return attempted

    def _attempt(self, query: Query, hypothesis: Hypothesis, camera: CameraModel) -> _Attempt:
        """Decode and PnP."""
        if hypothesis.pruned:
            none = Correspondences(np.empty((0, 2)), np.empty((0, 3)), np.empty(0))
            return _Attempt(hypothesis, none, None, 0.0)
        seen = self._decode(query, hypothesis)
        pairs = Correspondences(camera.undistort_points(seen.uv), seen.xyz, seen.certainty)
        solution = self._solve(pairs, camera, query.M_crop_img)
        quality = 0.0
        if solution is not None:
            quality = hypothesis_quality(
                seen.uv[solution.inliers], solution.inlier_ratio, query.M_crop_img, query.mask
            )
        return _Attempt(hypothesis, pairs, solution, quality)

    def _best(self, attempts: Sequence[_Attempt]) -> int | None:
        """Which attempt gives the best pose from offsets; None where none of them is to be believed."""
        reference = self.settings.decode == "reference"
        solved = [i for i, attempt in enumerate(attempts) if attempt.solution is not None]
        if not solved:
            return None

        def worth(index: int) -> float:
            attempt = attempts[index]
            return attempt.solution.inlier_ratio if reference else attempt.quality

        best = max(solved, key=worth)  # the first of equals: retrieval order, as in the released network
        enough = len(attempts[best].solution.inliers) >= _MIN_INLIERS and worth(best) >= _MIN_QUALITY
        return best if reference or enough else None

    def _look_again(
        self,
        queries: list[Query],
        features: Prepared,
        attempted: Sequence[Sequence[_Attempt]],
        camera: CameraModel,
        clock: StageClock,
        trace: bool,
    ) -> list[dict[int, _Attempt]]:
        """Second looks per query, by the attempt that they started from: the best one's.

        Where it is traced, also those of what would be best among the first k attempts.
        """
        again: list[dict[int, _Attempt]] = [{} for _ in queries]
        if not self.settings.second_look:
            return again
        chosen: list[Choice] = []
        affines: list[np.ndarray] = []
        places: list[tuple[int, int]] = []
        for row, (query, attempts) in enumerate(zip(queries, attempted)):
            counts = range(1, len(attempts) + 1) if trace else (len(attempts),)
            for index in sorted({self._best(attempts[:k]) for k in counts} - {None}):
                attempt = attempts[index]
                seen = _nearest_template(query, attempt.solution.T_cam_obj, camera)
                if seen is not None:
                    chosen.append((row, seen[0], attempt.hypothesis.match_score))
                    affines.append(seen[1])
                    places.append((row, index))
        if chosen:
            with torch.inference_mode():
                found = self._regress(queries, features, chosen, trace, affines)
                attempts = self._attempts(queries, chosen, found, camera, clock)
            looks = [iter(own) for own in attempts]
            for row, index in places:
                again[row][index] = next(looks[row])
        return again

    def _choose(self, query: Query, attempts: Sequence[_Attempt], camera: CameraModel) -> ObjectPose | None:
        """The best hypothesis' pose: from offsets, else from an affine, else none."""
        index = self._best(attempts)
        if index is not None:
            best = attempts[index]
            solution = best.solution
            if solution is not None:
                covariance = solution.covariance
                if covariance is None:
                    inliers = best.pairs.select(solution.inliers)
                    covariance = pose_covariance(solution.T_cam_obj, inliers.uv, inliers.xyz, camera.K)
                if covariance is not None:
                    # Flow errors are smooth over the grid: many pairs are few independent measurements.
                    covariance = covariance * self.settings.correlated_pairs
                    confidence = float(self._calibration.apply(best.quality))
                    return _object_pose(
                        query, best.hypothesis, solution.T_cam_obj, confidence, covariance, solution
                    )
        return self._from_affine(query, [attempt.hypothesis for attempt in attempts], camera)

    def _trace(
        self,
        query: Query,
        attempts: Sequence[_Attempt],
        again: Mapping[int, _Attempt],
        camera: CameraModel,
    ) -> SegmentTrace:
        traces = []
        for attempt in attempts:
            hypothesis, solution = attempt.hypothesis, attempt.solution
            placed = [_place(query, hypothesis.template, M, camera) for M in (np.eye(3), hypothesis.affine)]
            matched, turned = (None if T is None else T @ query.bank.T_ctr_obj for T in placed)
            traces.append(
                HypothesisTrace(
                    hypothesis=hypothesis,
                    T_match=matched,
                    T_affine=turned,
                    T_offsets=None if solution is None else solution.T_cam_obj,
                    answer=self._choose(query, [attempt], camera),
                )
            )
        answers = []
        for count in range(1, len(attempts) + 1):
            own = attempts[:count]
            answers.append(self._choose(query, _with_second(own, again, self._best(own)), camera))
        return SegmentTrace(query, tuple(traces), tuple(answers))

    def _decode(self, query: Query, hypothesis: Hypothesis) -> Correspondences:
        """Pairs of pixels as the camera saw them and points in the mesh's own frame."""
        bank, template, mode = query.bank, hypothesis.template, self.settings.decode
        points = bank.points_nearest if mode == "reference" else bank.points_consistent
        T_cam_obj = bank.T_cam_ctr[template] @ bank.T_ctr_obj
        return decode_correspondences(
            hypothesis.flow,
            hypothesis.certainty,
            query.M_crop_img,
            points[template],
            T_cam_obj,
            mode,
            query.mask,
        )

    def _solve(
        self, pairs: Correspondences, camera: CameraModel, M_crop_img: np.ndarray
    ) -> PoseSolution | None:
        settings = self.settings
        if settings.decode == "reference":
            return solve_pose(pairs, camera.K, _RELEASED_THRESHOLD_PX, _RELEASED_ITERATIONS, refine=False)
        threshold = settings.ransac_threshold_px / float(M_crop_img[0, 0])
        return solve_pose(pairs, camera.K, threshold, settings.ransac_iterations)

    def _from_affine(
        self, query: Query, hypotheses: Sequence[Hypothesis], camera: CameraModel
    ) -> ObjectPose | None:
        """The pose that stage 2 alone implies, of the best matching template that gives one."""
        for hypothesis in hypotheses:
            T_cam_ctr = _place(query, hypothesis.template, hypothesis.affine, camera)
            if T_cam_ctr is None:
                continue
            centre = T_cam_ctr[:3, 3]
            across = _AFFINE_SIGMA_CROP_PX / float(query.M_crop_img[0, 0]) * centre[2] / camera.K[0, 0]
            covariance = ray_covariance(centre, across, _AFFINE_SIGMA_SCALE, _AFFINE_SIGMA_RAD)
            confidence = _AFFINE_CONFIDENCE * float(np.clip(hypothesis.match_score, 0, 1))
            T_cam_obj = T_cam_ctr @ query.bank.T_ctr_obj
            # The affine places the centre; where the mesh's origin is depends on the rotation too.
            covariance = move_covariance(covariance, T_cam_obj[:3, 3] - centre)
            return _object_pose(query, hypothesis, T_cam_obj, confidence, covariance, None)
        return None


def _with_second(
    attempts: Sequence[_Attempt], again: Mapping[int, _Attempt], best: int | None
) -> list[_Attempt]:
    """The attempts, and the second look at the best of them, if there was one."""
    return [*attempts, again[best]] if best in again else list(attempts)


def _nearest_template(
    query: Query, T_cam_obj: np.ndarray, camera: CameraModel
) -> tuple[int, np.ndarray] | None:
    """The template whose view is nearest to a pose's, and the affine (3, 3) from its crop to the query's.

    None where the pose puts the object behind the camera.
    """
    bank = query.bank
    T_cam_ctr = T_cam_obj @ np.linalg.inv(bank.T_ctr_obj)
    rotations, shifts = bank.T_cam_ctr[:, :3, :3], bank.T_cam_ctr[:, :3, 3]
    from_where = -np.einsum("nji,nj->ni", rotations, shifts)  # camera centres in the object's frame
    wanted = -T_cam_ctr[:3, :3].T @ T_cam_ctr[:3, 3]
    cosines = from_where @ wanted / np.linalg.norm(from_where, axis=1)
    template = int(cosines.argmax())
    points = bank.points_consistent[template]
    inside = points[..., 2] > 0
    T = T_cam_ctr @ np.linalg.inv(bank.T_cam_ctr[template].astype(np.float64))
    moved = points[inside].astype(np.float64) @ T[:3, :3].T + T[:3, 3]
    if len(moved) < _MIN_INLIERS or moved[:, 2].min() <= 0:
        return None
    target = camera.project(moved) @ query.M_crop_img[:2, :2].T + query.M_crop_img[:2, 2]
    row, column = np.nonzero(inside)
    cell = CROP_SIZE / points.shape[0]
    source = np.floor((np.stack([column, row], 1) + 0.5) * cell)
    return template, fit_similarity(source, target)


def _place(query: Query, template: int, affine: np.ndarray, camera: CameraModel) -> np.ndarray | None:
    """T_cam_ctr (4, 4) of a template turned and placed by an affine between the crops; None without one."""
    bank = query.bank
    try:
        T_cam_ctr = pose_from_affine(
            affine,
            query.M_crop_img,
            bank.M_crop_img[template],
            camera.K,
            bank.K,
            bank.T_cam_ctr[template],
        )
    except ValueError:
        return None
    if camera.distorted:
        uv = camera.K @ T_cam_ctr[:3, 3]
        straight = camera.undistort_points(uv[None, :2] / uv[2])[0]
        if not np.isfinite(straight).all():
            return None
        T_cam_ctr[:3, 3] = np.linalg.solve(camera.K, [*straight, 1.0]) * T_cam_ctr[2, 3]
    return T_cam_ctr if T_cam_ctr[2, 3] > 0 else None


def hypothesis_quality(
    uv: np.ndarray, inlier_ratio: float, M_crop_img: np.ndarray, mask: np.ndarray
) -> float:
    """How well a pose explains a segment, 0..1: share of its patches with inliers, times the inlier ratio.

    A ratio alone is perfect for five pairs that agree by luck, and a count alone grows with wrong pairs; what
    the inliers cover of the visible object does neither, whatever the scale between template and crop.

    Args:
        uv: (k, 2) inliers, full-image px. inlier_ratio: k over the number of pairs.
        M_crop_img: (3, 3) full image -> crop. mask: (224, 224) the segment in the crop.
    """
    patch = CROP_SIZE // PATCHES
    visible = mask.reshape(PATCHES, patch, PATCHES, patch).mean((1, 3)) >= 0.5
    if not visible.any():  # a sliver: every patch it touches
        visible = mask.reshape(PATCHES, patch, PATCHES, patch).any((1, 3))
    x, y = ((uv @ M_crop_img[:2, :2].T + M_crop_img[:2, 2]) // patch).astype(int).clip(0, PATCHES - 1).T
    reached = np.zeros_like(visible)
    reached[y, x] = True
    return float((reached & visible).sum() / visible.sum() * inlier_ratio)


def _object_pose(
    query: Query,
    hypothesis: Hypothesis,
    T_cam_obj: np.ndarray,
    confidence: float,
    covariance: np.ndarray,
    solution: PoseSolution | None,
) -> ObjectPose:
    return ObjectPose(
        class_id=query.bank.class_id,
        T_cam_obj=T_cam_obj,
        confidence=float(np.clip(confidence, 0.0, 1.0)),
        covariance=covariance,
        source="affine" if solution is None else "offsets",
        segment=query.index,
        segment_score=float(query.segment.score),
        template=hypothesis.template,
        inliers=0 if solution is None else len(solution.inliers),
        inlier_ratio=0.0 if solution is None else float(solution.inlier_ratio),
        match_score=float(hypothesis.match_score),
        bbox_centre=np.asarray(query.bank.centre, np.float64),
        bbox_size=np.asarray(query.bank.extents, np.float64),
    )


def _check_image(rgb: np.ndarray, camera: CameraModel) -> None:
    if not isinstance(rgb, np.ndarray) or rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        shape = getattr(rgb, "shape", type(rgb).__name__)
        raise ImageError(f"the image has shape {shape}, give it as RGB (height, width, 3)")
    if rgb.dtype != np.uint8:
        raise ImageError(f"the image is of type {rgb.dtype}, give it as uint8 in 0..255")
    camera.validate()
    height, width = rgb.shape[:2]
    if (camera.width, camera.height) != (width, height):
        raise CameraError(
            f"the camera is calibrated for {camera.width}x{camera.height}, the image is {width}x{height}; "
            "scale the intrinsics or send the image they belong to"
        )


class StageClock:
    """Milliseconds by stage; a stage may be lapped more than once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self._last = time.perf_counter()
        self._seconds = dict.fromkeys(("crop", "encode", "match", "regress", "pnp"), 0.0)

    def lap(self, stage: str) -> None:
        if self._device.type == "cuda":  # kernels run on after the call that queued them
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    def milliseconds(self) -> dict[str, float]:
        times = {**self._seconds, "total": time.perf_counter() - self._begin}
        return {stage: 1000.0 * seconds for stage, seconds in times.items()}
