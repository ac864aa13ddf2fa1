"""Image, camera and segments in, poses out: what the node, the command line and the tests call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from picopose_ros.estimation import regression
from picopose_ros.estimation.choosing import choose_pose
from picopose_ros.estimation.confidence import Calibration
from picopose_ros.estimation.passes import Network
from picopose_ros.estimation.queries import Query, check_image, make_queries
from picopose_ros.estimation.results import (
    Choice,
    EstimateResult,
    Hypothesis,
    HypothesisTrace,
    ObjectPose,
    SegmentTrace,
    StageClock,
)
from picopose_ros.estimation.retrieval import choose_templates
from picopose_ros.estimation.second_look import second_looks, with_second_look
from picopose_ros.estimation.settings import EstimatorSettings, Precision, torch_device
from picopose_ros.estimation.solving import SolvedHypothesis, place_template, solve_hypothesis
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.model import PicoPose, load_model
from picopose_ros.model.fast import Prepared, Schedule
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import Progress, TemplateBank, onboard


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
        hypotheses: int = 5,
        progress: bool | Progress = False,
        precision: Precision = "auto",
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
        return other

    def warm_up(self) -> None:
        """Compile and allocate in advance what the first estimate would."""
        regression.warm_up(self._network)

    def resident_bytes(self) -> dict[str, int]:
        """Memory on the device beside the network's: ``descriptors``, ``masks``, ``cache`` of templates."""
        return self._network.resident_bytes()

    def estimate(
        self, rgb: np.ndarray, camera: CameraModel, segments: Sequence[Segment], trace: bool = False
    ) -> EstimateResult:
        """Poses of all segments of an image, in one batched pass.

        Args:
            rgb: (H, W, 3) uint8, as the camera saw it (distortion and all).
            camera: of the image.
            segments: of the image. One that can't have a pose is skipped with a reason; the others go on.
            trace: also return the output of every stage; the poses are the same.

        Raises:
            ImageError: the image isn't (H, W, 3) uint8.
            CameraError: the camera can't be used or is of another image size.
        """
        check_image(rgb, camera)
        clock = StageClock(self.device)
        queries, skipped = self._crop(rgb, segments)
        clock.lap("crop")
        if not queries:
            return EstimateResult([], sorted(skipped), clock.milliseconds())
        with torch.inference_mode():
            features = self._encode(queries)
            clock.lap("encode")
            chosen = self._retrieve(queries, features)
            clock.lap("match")
            found = self._regress(queries, features, chosen, trace, keep=self.settings.prune or None)
            solved = self._solve(queries, chosen, found, camera, clock)
            again = self._look_again(queries, features, solved, camera, clock, trace)
        poses: list[ObjectPose] = []
        for query, own, seconds in zip(queries, solved, again):
            pose = self._choose(query, with_second_look(own, seconds, self.settings), camera)
            if pose is None:
                skipped.append((query.index, "no pose agrees with the network's correspondences"))
            else:
                poses.append(pose)
        clock.lap("pnp")
        timings = clock.milliseconds()
        traces = []
        if trace:
            traces = [self._trace(*one, camera) for one in zip(queries, solved, again)]
        return EstimateResult(poses, sorted(skipped), timings, traces)

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
                traces[query.index] = self._trace(query, own, {}, camera)
        return traces

    def answer(self, query: Query, hypothesis: Hypothesis, camera: CameraModel) -> ObjectPose | None:
        """What would be published with this hypothesis alone, be it the network's or a changed one."""
        return self._choose(query, [solve_hypothesis(query, hypothesis, camera, self.settings)], camera)

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
        )

    def _crop(
        self, rgb: np.ndarray, segments: Sequence[Segment]
    ) -> tuple[list[Query], list[tuple[int, str]]]:
        """The queries, and of the other segments the index and the reason; see `make_queries`."""
        settings = self.settings
        blacken = self.model.config.mask_background and not settings.keep_background
        return make_queries(rgb, segments, self.banks, self._aliases, blacken, settings.min_mask_pixels)

    def _encode(self, queries: Sequence[Query]) -> Prepared:
        """Features of the queries' crops, in their order."""
        return self._network.encode(np.stack([query.crop for query in queries]))

    def _scores(self, queries: Sequence[Query], features: Prepared) -> list[torch.Tensor]:
        """Stage 1: per query the score (N,) of every template of its bank."""
        return self._network.scores(queries, features)

    def _retrieve(self, queries: Sequence[Query], features: Prepared) -> list[Choice]:
        """Stage 1: the templates to try, best first within a query."""
        return choose_templates(
            self._scores(queries, features),
            self.settings.hypotheses,
            self.settings.rerank if self.model.reranks else 0,
            lambda row, best: self._network.agreement(queries[row], features.descriptors[row], best),
        )

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

    def _look_again(
        self,
        queries: Sequence[Query],
        features: Prepared,
        solved: Sequence[Sequence[SolvedHypothesis]],
        camera: CameraModel,
        clock: StageClock,
        trace: bool,
    ) -> list[dict[int, SolvedHypothesis]]:
        """Per query second looks, by the hypothesis that they started from; see `second_look`."""
        again: list[dict[int, SolvedHypothesis]] = [{} for _ in queries]
        if not self.settings.second_look:
            return again
        chosen, affines, origins = second_looks(queries, solved, camera, self.settings, trace)
        if chosen:
            found = self._regress(queries, features, chosen, trace, affines)
            looks = [iter(own) for own in self._solve(queries, chosen, found, camera, clock)]
            for row, index in origins:
                again[row][index] = next(looks[row])
        return again

    def _choose(
        self, query: Query, solved: Sequence[SolvedHypothesis], camera: CameraModel
    ) -> ObjectPose | None:
        """The best hypothesis' pose; see `choose_pose`."""
        return choose_pose(query, solved, camera, self.settings, self._calibration)

    def _trace(
        self,
        query: Query,
        solved: Sequence[SolvedHypothesis],
        again: Mapping[int, SolvedHypothesis],
        camera: CameraModel,
    ) -> SegmentTrace:
        """The output of every stage for a segment."""
        traces = []
        for one in solved:
            hypothesis, solution = one.hypothesis, one.solution
            placed = [
                place_template(query, hypothesis.template, M, camera)
                for M in (np.eye(3), hypothesis.affine)
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
        answers = [
            self._choose(query, with_second_look(solved[:count], again, self.settings), camera)
            for count in range(1, len(solved) + 1)
        ]
        return SegmentTrace(query, tuple(traces), tuple(answers))
