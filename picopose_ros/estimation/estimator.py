"""Image, camera and segments in, poses out: what the node, the command line and the tests call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from picopose_ros.errors import ConfigError, PicoPoseError
from picopose_ros.estimation import regression
from picopose_ros.estimation.backends import encode_by
from picopose_ros.estimation.choosing import choose_pose
from picopose_ros.estimation.confidence import Calibration
from picopose_ros.estimation.passes import Network
from picopose_ros.estimation.queries import Query, check_image, make_queries
from picopose_ros.estimation.refine import Refined, Start, Task, refine_poses
from picopose_ros.estimation.refine_step import Look, Step, refine_step
from picopose_ros.estimation.refining import (
    answer,
    in_metres,
    refined_pose,
    remark,
    score_of,
    straighten_tasks,
)
from picopose_ros.estimation.results import (
    Choice,
    EstimateResult,
    Hypothesis,
    HypothesisTrace,
    ObjectPose,
    SegmentTrace,
    StageClock,
)
from picopose_ros.estimation.retrieval import best_crops, choose_templates
from picopose_ros.estimation.settings import Backend, EstimatorSettings, Precision, torch_device
from picopose_ros.estimation.solving import SolvedHypothesis, place_template, solve_hypothesis
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.model import PicoPose, load_model
from picopose_ros.model.fast import Prepared, Schedule
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import Progress, TemplateBank, onboard
from picopose_ros.templates.posed import PosedView, PosedViews
from picopose_ros.templates.renderer import Shading


class PoseEstimator:
    """Poses of the segments of an image. Not for use by two threads at once.

    Attributes:
        banks: by class id.
        model: the network, on ``device``.
        settings: how poses are computed.
        device: of the network.
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
            schedule: which optimisations are on; all if None. For measurements.
        """
        self.banks = dict(banks)
        self.settings = settings or EstimatorSettings()
        self.device = torch_device(device)
        self.model = model.to(self.device).eval()
        self._calibration = Calibration(*getattr(model, "calibration", ()))
        self._aliases = dict(aliases or {})
        self._schedule = schedule or Schedule()
        # As many threads as the network has: they wait while it runs, and it waits while they do.
        self._solvers = ThreadPoolExecutor(torch.get_num_threads(), "pnp")

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
        hypotheses: int = EstimatorSettings.hypotheses,
        progress: bool | Progress = False,
        precision: Precision = "auto",
        refinements: int = EstimatorSettings.refinements,
        backend: Backend = "torch",
        onnx_dir: str = "",
        shading: Shading | None = None,
    ) -> PoseEstimator:
        """Load the network and onboard the objects of a folder.

        Args:
            mesh_dir: folder of meshes.
            preset, weights: of the network; None for the packaged weights.
            device: torch device.
            unit: m, cm, mm or in, of meshes whose file and ``objects.yaml`` state none.
            viewpoints: templates per object: 42, 162 or 642.
            cache_dir: of the banks; None for the user's cache folder.
            hypotheses: templates tried per segment.
            progress: True to show it; or called before and after each object. What it raises
                ends the loading.
            precision: what the network computes in: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
            refinements: most rounds of refinement, 0 to 8.
            backend, onnx_dir: see `EstimatorSettings`.
            shading: how templates are lit, ``flat``, ``headlight`` or ``auto``; None: as the preset has it.

        Raises:
            MeshError, CheckpointError, ConfigError, RenderError: what can't be used, where and what to do.
        """
        settings = EstimatorSettings(
            hypotheses,
            precision=precision,
            refinements=refinements,
            backend=backend,
            onnx_dir=onnx_dir,
        )
        model = load_model(preset, weights, torch_device(device))
        encode_by(model, torch_device(device), backend, onnx_dir, precision)
        onboarding = onboard(mesh_dir, model, viewpoints, unit, cache_dir, device, progress, shading)
        aliases = {
            alias: class_id
            for class_id, spec in onboarding.specs.items()
            for alias in spec.aliases
            if class_id in onboarding.banks
        }
        return cls(model, onboarding.banks, settings, device, aliases)

    def with_banks(
        self, banks: Mapping[str, TemplateBank], aliases: Mapping[str, str] | None = None
    ) -> PoseEstimator:
        """The same for other objects; what is prepared for the network and for banks that stay is kept.

        Args:
            banks, aliases: as for a new one. A bank that stays is the same object as before.
        """
        other = type(self)(self.model, banks, self.settings, self.device, aliases)
        other._schedule = self._schedule
        if "_network" in self.__dict__:
            other._network = self._network.with_banks(banks)
        if "_views" in self.__dict__:
            other._views = self._views.with_banks(banks)
        return other

    def warm_up(self) -> None:
        """Compile and allocate in advance what the first estimate would."""
        regression.warm_up(self._network)

    def resident_bytes(self) -> dict[str, int]:
        """Memory on the device beside the network's: ``descriptors``, ``masks``, ``cache`` of templates."""
        return self._network.resident_bytes()

    def estimate(
        self,
        rgb: np.ndarray,
        camera: CameraModel,
        segments: Sequence[Segment],
        trace: bool = False,
        depth: np.ndarray | None = None,
    ) -> EstimateResult:
        """Poses of all segments of an image, in one batched pass.

        Args:
            rgb: (H, W, 3) uint8, as the camera saw it (distortion and all).
            camera: of the image.
            segments: of the image. One that can't have a pose is skipped with a reason; the others go on.
            trace: also return the output of every stage; the poses are the same.
            depth: (H, W) registered to the image, float in metres or uint16 in millimetres, 0 or NaN where
                there is none; refinement uses it.

        Raises:
            ImageError: the image isn't (H, W, 3) uint8, or the depth image is of another form or size.
            CameraError: the camera can't be used or is of another image size.
        """
        check_image(rgb, camera)
        depth = None if depth is None else in_metres(depth, camera)
        clock = StageClock(self.device)
        queries, skipped = self._crop(rgb, segments, self._border_crops)
        clock.lap("crop")
        if not queries:
            return EstimateResult([], sorted(skipped), clock.milliseconds())
        with torch.inference_mode():
            features = self._encode(queries)
            clock.lap("encode")
            queries, features, chosen = self._retrieve(queries, features)
            clock.lap("match")
            found = self._regress(queries, features, chosen, trace, keep=self.settings.prune or None)
            solved = self._solve(queries, chosen, found, camera, clock)
        clock.lap("pnp")
        counts = [range(1, len(own) + 1) if trace else [len(own)] for own in solved]
        rounds = 0 if self.settings.decode == "reference" else self.settings.refinements
        answers, reasons = answer(
            queries,
            solved,
            counts,
            lambda query, own: self._choose(query, own, camera),
            (lambda tasks: self._refine(rgb, camera, tasks, rounds, depth)) if rounds else None,
            self._calibration,
            # Those of the released schedule are of another form.
            features if isinstance(features, Prepared) else None,
        )
        clock.lap("refine")
        poses: list[ObjectPose] = []
        unrefined: list[tuple[int, str]] = []
        for query, own, why in zip(queries, answers, reasons):
            if own[-1] is None:
                skipped.append((query.index, "no pose agrees with the network's correspondences"))
                continue
            poses.append(own[-1])
            if why[-1]:
                unrefined.append((query.index, why[-1]))
        timings = clock.milliseconds()
        traces = []
        if trace:
            traces = [self._trace(*one, camera) for one in zip(queries, solved, answers)]
        return EstimateResult(poses, sorted(skipped), timings, traces, unrefined)

    def refine(
        self,
        rgb: np.ndarray,
        camera: CameraModel,
        poses: Sequence[ObjectPose],
        segments: Sequence[Segment] | None = None,
        rounds: int | None = None,
        depth: np.ndarray | None = None,
    ) -> EstimateResult:
        """Improve poses, wherever they come from, by what the image shows of the objects.

        Args:
            rgb, camera, depth: as in :meth:`estimate`.
            poses: to begin with; ``class_id`` is that of a bank, ``T_cam_obj`` the pose. Of one that can't be
                improved the result holds the pose as it is, and the reason in ``unrefined``.
            segments: their masks, by the poses' ``segment``; None: the objects' own silhouettes at the poses,
                and no contour.
            rounds: most of them; None: as many as in the settings.

        Returns:
            The poses in their order, with confidence and covariance of their own.

        Raises:
            ImageError, CameraError: as :meth:`estimate`.
            ConfigError: a pose names a class without a bank, or a segment that isn't there.
        """
        check_image(rgb, camera)
        depth = None if depth is None else in_metres(depth, camera)
        clock = StageClock(self.device)
        rounds = self.settings.refinements if rounds is None else rounds
        tasks = []
        for pose in poses:
            if pose.class_id not in self.banks:
                known = ", ".join(sorted(self.banks))
                raise ConfigError(f"no object is called '{pose.class_id}'; onboarded are {known}")
            if segments is not None and not 0 <= pose.segment < len(segments):
                raise ConfigError(f"a pose is of segment {pose.segment}, there are {len(segments)}")
            segment = None if segments is None else segments[pose.segment]
            mask = None if segment is None or segment.is_box else segment.mask
            start = Start(np.asarray(pose.T_cam_obj, np.float64), pose.confidence)
            tasks.append(Task(pose.class_id, mask, (start,)))
        refined = self._refine(rgb, camera, tasks, rounds, depth)
        clock.lap("refine")
        found = [refined_pose(pose, one, self._calibration) for pose, one in zip(poses, refined)]
        why = [(pose.segment, remark(one)) for pose, one in zip(poses, refined) if remark(one)]
        return EstimateResult(found, [], clock.milliseconds(), unrefined=why)

    def examine(
        self,
        rgb: np.ndarray,
        camera: CameraModel,
        segments: Sequence[Segment],
        templates: Sequence[Sequence[int]],
        affines: Sequence[Sequence[np.ndarray | None]] | None = None,
    ) -> list[SegmentTrace | None]:
        """The output of the later stages for given templates, whatever stage 1 would have chosen.

        Args:
            rgb, camera, segments: as in :meth:`estimate`.
            templates: per segment, indices in its class' bank; they are its hypotheses in this order.
            affines: per segment and template an affine (3, 3) that stage 3 starts from instead of stage 2's.

        Returns:
            Per segment its trace, or None where it can't have a pose.
        """
        check_image(rgb, camera)
        queries, _ = self._crop(rgb, segments)
        given = None
        if affines is not None:
            given = [affine for query in queries for affine in affines[query.index]]
        traces: list[SegmentTrace | None] = [None] * len(segments)
        if any(len(templates[query.index]) for query in queries):
            with torch.inference_mode():
                features = self._encode(queries)
                scores = self._scores(queries, features)
                chosen = [
                    Choice(row, t, float(scores[row][t]))
                    for row, query in enumerate(queries)
                    for t in templates[query.index]
                ]
                found = self._regress(queries, features, chosen, True, given)
                solved = self._solve(queries, chosen, found, camera, StageClock(self.device))
            for query, own in zip(queries, solved):
                traces[query.index] = self._trace(query, own, self._prefixes(query, own, camera), camera)
        return traces

    def render(self, wanted: Sequence[tuple[str, np.ndarray]]) -> list[PosedView | PicoPoseError]:
        """Views of objects (class id of a bank) at poses ``T_cam_obj`` (4, 4), or why there is none."""
        return self._views.render(wanted)

    def compare(self, rgb: np.ndarray, K: np.ndarray, looks: Sequence[Look]) -> list[Step | None]:
        """One step of refinement for each look, see `refine_step`.

        Args:
            rgb: (H, W, 3) uint8 of an undistorted camera with intrinsics ``K`` (3, 3).
        """
        blacken = self.model.config.mask_background and not self.settings.keep_background
        return refine_step(self._network, rgb, K, looks, blacken)

    def score(self, step: Step) -> float:
        """The confidence of a pose that such a step led to."""
        return score_of(step, self._calibration)

    def answer(self, query: Query, hypothesis: Hypothesis, camera: CameraModel) -> ObjectPose | None:
        """What would be published with this hypothesis alone, be it the network's or a changed one."""
        return self._choose(query, [solve_hypothesis(query, hypothesis, camera, self.settings)], camera)

    @cached_property
    def _views(self) -> PosedViews:
        """What renders the objects at their poses."""
        return PosedViews(self.banks)

    @cached_property
    def _network(self) -> Network:
        """The network with the banks' descriptors, on the device."""
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
            settings.backend,
            settings.onnx_dir,
        )

    @property
    def _border_crops(self) -> bool:
        """Whether crops may reach out of the image, which those of the released network never do."""
        settings = self.settings
        return settings.border_crops and self.model.reranks and settings.decode != "reference"

    def _crop(
        self, rgb: np.ndarray, segments: Sequence[Segment], beyond: bool = False
    ) -> tuple[list[Query], list[tuple[int, str]]]:
        """The queries, and of the other segments the index and the reason; see `make_queries`."""
        settings = self.settings
        blacken = self.model.config.mask_background and not settings.keep_background
        return make_queries(
            rgb, segments, self.banks, self._aliases, blacken, settings.min_mask_pixels, beyond
        )

    def _encode(self, queries: Sequence[Query]) -> Prepared:
        """Features of the queries' crops, in their order."""
        return self._network.encode(np.stack([query.crop for query in queries]))

    def _scores(self, queries: Sequence[Query], features: Prepared) -> list[torch.Tensor]:
        """Stage 1: per query the score (N,) of every template of its bank."""
        return self._network.scores(queries, features)

    def _retrieve(
        self, queries: Sequence[Query], features: Prepared
    ) -> tuple[Sequence[Query], Prepared, list[Choice]]:
        """Stage 1: one query per segment, its features, and the templates to try, best first within it."""
        scores = self._scores(queries, features)
        rows = best_crops([query.index for query in queries], scores)
        if len(rows) < len(queries):
            queries, scores = [queries[row] for row in rows], [scores[row] for row in rows]
            features = features.select(torch.tensor(rows, device=self.device))
        chosen = choose_templates(
            scores,
            self.settings.hypotheses,
            self.settings.rerank if self.model.reranks else 0,
            lambda row, best: self._network.agreement(queries[row], features.descriptors[row], best),
        )
        return queries, features, chosen

    def _regress(
        self,
        queries: Sequence[Query],
        features: Prepared,
        chosen: Sequence[Choice],
        trace: bool = False,
        affines: Sequence[np.ndarray | None] | None = None,
        keep: int | None = None,
    ) -> Iterator[tuple[int, Hypothesis]]:
        """Stages 2 and 3; see `regression.regress`."""
        return regression.regress(self._network, queries, features, chosen, trace, affines, keep)

    def _solve(
        self,
        queries: Sequence[Query],
        chosen: Sequence[Choice],
        found: Iterable[tuple[int, Hypothesis]],
        camera: CameraModel,
        clock: StageClock,
    ) -> list[list[SolvedHypothesis]]:
        """Per query its hypotheses with their poses, solved in threads while the network goes on."""
        begun: dict[int, Future[SolvedHypothesis] | SolvedHypothesis] = {}
        for i, hypothesis in found:
            task = (queries[chosen[i].query], hypothesis, camera, self.settings)
            parallel = self._schedule.parallel_pnp
            begun[i] = self._solvers.submit(solve_hypothesis, *task) if parallel else solve_hypothesis(*task)
        clock.lap("regress")
        solved: list[list[SolvedHypothesis]] = [[] for _ in queries]
        for i, choice in enumerate(chosen):
            one = begun[i]
            solved[choice.query].append(one.result() if isinstance(one, Future) else one)
        clock.lap("pnp")
        return solved

    def _refine(
        self,
        rgb: np.ndarray,
        camera: CameraModel,
        tasks: Sequence[Task],
        rounds: int,
        depth: np.ndarray | None,
    ) -> list[Refined | str]:
        """See `refine_poses`; the lens' distortion is taken out of image, depth and masks first."""
        if not tasks or not rounds:
            return ["no rounds were asked for"] * len(tasks)
        tasks, rgb, depth = straighten_tasks(tasks, rgb, depth, camera)
        blacken = self.model.config.mask_background and not self.settings.keep_background
        return refine_poses(self._network, self._views, rgb, camera.K, tasks, rounds, blacken, depth=depth)

    def _prefixes(
        self, query: Query, solved: Sequence[SolvedHypothesis], camera: CameraModel
    ) -> list[ObjectPose | None]:
        """The poses with the first k hypotheses, k = 1, 2, ..., without refinement."""
        return [self._choose(query, solved[:count], camera) for count in range(1, len(solved) + 1)]

    def _choose(
        self, query: Query, solved: Sequence[SolvedHypothesis], camera: CameraModel
    ) -> ObjectPose | None:
        """The best hypothesis' pose; see `choose_pose`."""
        return choose_pose(query, solved, camera, self.settings, self._calibration)

    def _trace(
        self,
        query: Query,
        solved: Sequence[SolvedHypothesis],
        answers: Sequence[ObjectPose | None],
        camera: CameraModel,
    ) -> SegmentTrace:
        """The output of every stage for a segment."""
        traces = []
        for one in solved:
            hypothesis, solution = one.hypothesis, one.solution
            placed = [
                place_template(query, hypothesis.template, M, camera) for M in (np.eye(3), hypothesis.affine)
            ]
            matched, turned = (None if T is None else T @ query.bank.T_ctr_obj for T in placed)
            traces.append(
                HypothesisTrace(
                    hypothesis=hypothesis,
                    T_match=matched,
                    T_affine=turned,
                    T_offsets=None if solution is None else solution.T_cam_obj,
                    answer=self._choose(query, [one], camera),
                )
            )
        return SegmentTrace(query, tuple(traces), tuple(answers))
