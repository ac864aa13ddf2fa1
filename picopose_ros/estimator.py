"""Image, camera and segments in, poses out: what the node, the command line and the tests call."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from picopose_ros.errors import CameraError, ConfigError, ImageError, MeshError
from picopose_ros.geometry.cameras import CameraModel
from picopose_ros.geometry.correspondences import Correspondences, DecodeMode, decode_correspondences
from picopose_ros.geometry.crops import (
    CROP_SIZE,
    crop_box_from_mask,
    crop_mask,
    crop_rgb,
    mask_background,
)
from picopose_ros.geometry.pnp import PoseSolution, pose_covariance, solve_pose
from picopose_ros.geometry.poses import pose_from_affine
from picopose_ros.model import Features, PicoPose, load_model, model_fingerprint
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import Onboarding, TemplateBank, load_or_build, onboard
from picopose_ros.templates.meshes import discover_objects

_log = logging.getLogger(__name__)

PATCHES = 16
"""Side of the grid on which it is counted how much of a segment a hypothesis explains."""

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

Progress = Callable[[str, int, int], None]
"""Called with a class id, the number of objects done and the number of objects."""


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
            with the tiny preset on the demo's frames, depth bias included.
        min_mask_pixels: segments with fewer visible pixels are skipped.
        max_batch: most crops or hypotheses that go through the network at once.
        template_cache_mb: memory for the features of templates that were hypotheses lately.
    """

    hypotheses: int = 5
    decode: DecodeMode = "subpixel"
    ransac_threshold_px: float = 4.0
    ransac_iterations: int = 1000
    correlated_pairs: float = 2000.0
    min_mask_pixels: int = 32
    max_batch: int = 16
    template_cache_mb: int = 256

    def __post_init__(self) -> None:
        for name in ("hypotheses", "ransac_iterations", "min_mask_pixels", "max_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("ransac_threshold_px", "correlated_pairs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, it must be positive")
        if self.decode not in ("reference", "subpixel"):
            raise ConfigError(f"decode is '{self.decode}', choose 'subpixel' or 'reference'")


@dataclass(frozen=True)
class ObjectPose:
    """One estimated pose.

    Attributes:
        class_id: class of the bank, also where the segment named an alias.
        T_cam_obj: (4, 4) float64 mesh's own frame -> camera, metres.
        confidence: 0..1, how much of the segment the pose explains and how well the pairs agree.
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
class EstimateResult:
    """What became of the segments of one image.

    Attributes:
        poses: one per segment that got a pose, in the order of the segments.
        skipped: (index of the segment, why it has none).
        timings: milliseconds: crop, encode, match, regress, pnp (decode included), total.
    """

    poses: list[ObjectPose]
    skipped: list[tuple[int, str]]
    timings: dict[str, float]


@dataclass(frozen=True)
class _Query:
    """A segment that is worth asking about.

    Attributes:
        index: of the segment in the input. bank: of its class. M_crop_img: (3, 3) full image -> crop.
        crop: (3, 224, 224) network input. mask: (224, 224) uint8.
    """

    index: int
    segment: Segment
    bank: TemplateBank
    M_crop_img: np.ndarray
    crop: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class _Hypothesis:
    """A template of a query, with what the network says about the two.

    Attributes:
        query: position in the list of queries. template: index in the bank. match_score: stage 1's.
        affine: (3, 3) template crop px -> query crop px. flow: (2, 64, 64). certainty: (64, 64) logits.
    """

    query: int
    template: int
    match_score: float
    affine: np.ndarray
    flow: np.ndarray
    certainty: np.ndarray


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
    ) -> None:
        """Move the network and what stage 1 needs of the banks to ``device``.

        Args:
            model: in evaluation mode.
            banks: by class id, made with this model.
            settings: the defaults if None.
            device: torch device of the network.
            aliases: further class ids of segments -> class id of a bank.
        """
        self.banks = dict(banks)
        self.settings = settings or EstimatorSettings()
        self.device = torch_device(device)
        self.model = model.to(self.device).eval()
        self._aliases = dict(aliases or {})
        self._descriptors = {n: torch.from_numpy(b.descriptors).to(self.device) for n, b in banks.items()}
        self._masks = {n: torch.from_numpy(b.masks).to(self.device) for n, b in banks.items()}
        self._templates = _TemplateFeatures(self.settings.template_cache_mb * 2**20)

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

        Raises:
            MeshError, CheckpointError, ConfigError, RenderError: what can't be used, where and what to do.
        """
        settings = EstimatorSettings(hypotheses=hypotheses)
        model = load_model(preset, weights, torch_device(device))
        if callable(progress):
            onboarding = _onboard_telling(mesh_dir, model, viewpoints, unit, cache_dir, device, progress)
        else:
            onboarding = onboard(mesh_dir, model, viewpoints, unit, cache_dir, device, progress)
        aliases = {
            alias: class_id
            for class_id, spec in onboarding.specs.items()
            for alias in spec.aliases
            if class_id in onboarding.banks
        }
        return cls(model, onboarding.banks, settings, device, aliases)

    def estimate(self, rgb: np.ndarray, camera: CameraModel, segments: Sequence[Segment]) -> EstimateResult:
        """Poses of all segments of an image, in one batched pass.

        Args:
            rgb: (H, W, 3) uint8, as the camera saw it (distortion and all).
            camera: of the image.
            segments: of the image. One that can't have a pose is skipped with a reason; the others go on.

        Raises:
            ImageError: the image isn't (H, W, 3) uint8.
            CameraError: the camera can't be used or is of another image size.
        """
        _check_image(rgb, camera)
        clock = _Clock(self.device)
        queries, skipped = self._prepare(rgb, segments)
        clock.lap("crop")
        poses: list[ObjectPose] = []
        if queries:
            with torch.inference_mode():
                hypotheses = self._infer(queries, clock)
            for position, query in enumerate(queries):
                own = [h for h in hypotheses if h.query == position]
                pose = self._choose(query, own, camera)
                if pose is None:
                    skipped.append((query.index, "no pose agrees with the network's correspondences"))
                else:
                    poses.append(pose)
            clock.lap("pnp")
        return EstimateResult(poses, sorted(skipped), clock.milliseconds())

    def _prepare(
        self, rgb: np.ndarray, segments: Sequence[Segment]
    ) -> tuple[list[_Query], list[tuple[int, str]]]:
        """Crops of the segments that can be asked about, and why the others can't."""
        queries: list[_Query] = []
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
                if self.model.config.mask_background:
                    crop = mask_background(crop, mask)
                queries.append(_Query(index, segment, bank, box.affine(), crop, mask))
                continue
            skipped.append((index, reason))
        return queries, skipped

    def _infer(self, queries: list[_Query], clock: _Clock) -> list[_Hypothesis]:
        """The network on all queries: the best templates of each and the correspondences with them."""
        size = self.settings.max_batch
        crops = torch.from_numpy(np.stack([query.crop for query in queries])).to(self.device)
        masks = torch.from_numpy(np.stack([query.mask for query in queries])).to(self.device)
        features = _concatenate([self.model.encode(part) for part in crops.split(size)])
        clock.lap("encode")

        chosen: list[tuple[int, int, float]] = []  # position of the query, template, score
        for class_id in dict.fromkeys(query.bank.class_id for query in queries):
            rows = [i for i, query in enumerate(queries) if query.bank.class_id == class_id]
            scores = self.model.match(
                features.descriptors[rows],
                masks[rows].float(),
                self._descriptors[class_id],
                self._masks[class_id],
            )
            best = scores.topk(min(self.settings.hypotheses, scores.shape[1]), dim=1)
            for row, ids, values in zip(rows, best.indices.tolist(), best.values.tolist()):
                chosen += [(row, template, score) for template, score in zip(ids, values)]
        chosen.sort(key=lambda choice: choice[0])  # stable: best score first within a query
        clock.lap("match")

        wanted = [(queries[row].bank, template) for row, template, _ in chosen]
        self._templates.ensure(wanted, self.model, self.device, size)
        clock.lap("encode")

        hypotheses: list[_Hypothesis] = []
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            rows = torch.tensor([row for row, _, _ in part], device=self.device)
            banks = [queries[row].bank for row, _, _ in part]
            ids = [template for _, template, _ in part]
            refinement = self.model.regress(
                features.select(rows),
                self._templates.batch(list(zip(banks, ids))),
                masks[rows].float(),
                torch.stack([self._masks[bank.class_id][i] for bank, i in zip(banks, ids)]).float(),
                torch.from_numpy(np.stack([bank.centres[i] for bank, i in zip(banks, ids)])).to(self.device),
            )
            affines = refinement.affine.float().cpu().numpy()
            flows = refinement.flow.float().cpu().numpy()
            certainties = refinement.certainty[:, 0].float().cpu().numpy()
            hypotheses += [
                _Hypothesis(row, template, score, *maps)
                for (row, template, score), *maps in zip(part, affines, flows, certainties)
            ]
        self._templates.trim()
        clock.lap("regress")
        return hypotheses

    def _choose(self, query: _Query, hypotheses: list[_Hypothesis], camera: CameraModel) -> ObjectPose | None:
        """The best hypothesis' pose: from offsets, else from an affine, else none."""
        reference = self.settings.decode == "reference"
        candidates = []
        for hypothesis in hypotheses:
            seen = self._decode(query, hypothesis)
            pairs = Correspondences(camera.undistort_points(seen.uv), seen.xyz, seen.certainty)
            solution = self._solve(pairs, camera, query.M_crop_img)
            if solution is not None:
                quality = hypothesis_quality(
                    seen.uv[solution.inliers], solution.inlier_ratio, query.M_crop_img, query.mask
                )
                rank = solution.inlier_ratio if reference else quality
                candidates.append((rank, quality, hypothesis, solution, pairs))
        if candidates:
            # max keeps the first of equals: retrieval order, as in the released network.
            _, quality, hypothesis, solution, pairs = max(candidates, key=lambda candidate: candidate[0])
            if reference or (len(solution.inliers) >= _MIN_INLIERS and quality >= _MIN_QUALITY):
                covariance = solution.covariance
                if covariance is None:
                    inliers = pairs.select(solution.inliers)
                    covariance = pose_covariance(solution.T_cam_obj, inliers.uv, inliers.xyz, camera.K)
                if covariance is not None:
                    # Flow errors are smooth over the grid: many pairs are few independent measurements.
                    covariance = covariance * self.settings.correlated_pairs
                    return _object_pose(query, hypothesis, solution.T_cam_obj, quality, covariance, solution)
        return self._from_affine(query, hypotheses, camera)

    def _decode(self, query: _Query, hypothesis: _Hypothesis) -> Correspondences:
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
        self, query: _Query, hypotheses: list[_Hypothesis], camera: CameraModel
    ) -> ObjectPose | None:
        """The pose that stage 2 alone implies, of the best matching template that gives one."""
        bank = query.bank
        for hypothesis in hypotheses:
            try:
                T_cam_ctr = pose_from_affine(
                    hypothesis.affine,
                    query.M_crop_img,
                    bank.M_crop_img[hypothesis.template],
                    camera.K,
                    bank.K,
                    bank.T_cam_ctr[hypothesis.template],
                )
            except ValueError:
                continue
            if camera.distorted:
                uv = camera.K @ T_cam_ctr[:3, 3]
                straight = camera.undistort_points(uv[None, :2] / uv[2])[0]
                if not np.isfinite(straight).all():
                    continue
                T_cam_ctr[:3, 3] = np.linalg.solve(camera.K, [*straight, 1.0]) * T_cam_ctr[2, 3]
            z = T_cam_ctr[2, 3]
            if not z > 0:
                continue
            lateral = _AFFINE_SIGMA_CROP_PX / float(query.M_crop_img[0, 0]) * z / camera.K[0, 0]
            sigma = np.array([lateral, lateral, _AFFINE_SIGMA_SCALE * z, *(_AFFINE_SIGMA_RAD,) * 3])
            confidence = _AFFINE_CONFIDENCE * float(np.clip(hypothesis.match_score, 0, 1))
            T_cam_obj = T_cam_ctr @ bank.T_ctr_obj
            return _object_pose(query, hypothesis, T_cam_obj, confidence, np.diag(sigma**2), None)
        return None


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
    query: _Query,
    hypothesis: _Hypothesis,
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


def _onboard_telling(
    mesh_dir: str | Path,
    model: PicoPose,
    viewpoints: int,
    unit: str,
    cache_dir: str | Path | None,
    device: str | torch.device,
    tell: Progress,
) -> Onboarding:
    """:func:`onboard`, telling about every object before and after it."""
    specs = {spec.class_id: spec for spec in discover_objects(mesh_dir, unit)}
    fingerprint = model_fingerprint(model)
    result = Onboarding({}, specs, {})
    for done, (class_id, spec) in enumerate(specs.items()):
        tell(class_id, done, len(specs))
        try:
            bank = load_or_build(spec, model, viewpoints, cache_dir, device, fingerprint=fingerprint)
        except MeshError as error:
            result.failed[class_id] = str(error)
            _log.error("object '%s' is left out: %s", class_id, error)
        else:
            result.banks[class_id] = bank
            for warning in bank.warnings:
                _log.warning(warning)
        tell(class_id, done + 1, len(specs))
    if not result.banks:
        raise MeshError(f"no object of {mesh_dir} can be used: " + "; ".join(result.failed.values()))
    return result


def _concatenate(parts: Sequence[Features]) -> Features:
    taps = tuple(torch.cat(levels) for levels in zip(*(part.taps for part in parts)))
    return Features(taps, torch.cat([part.descriptors for part in parts]))


class _Clock:
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


@dataclass
class _TemplateFeatures:
    """Features of templates by (class, template), the least lately used leaving first when memory is full."""

    limit: int
    _entries: OrderedDict[tuple[str, int], Features] = field(default_factory=OrderedDict)

    def ensure(
        self,
        wanted: Sequence[tuple[TemplateBank, int]],
        model: PicoPose,
        device: torch.device,
        batch: int,
    ) -> None:
        """Encode those that aren't here, together."""
        missing: dict[tuple[str, int], TemplateBank] = {}
        for bank, template in wanted:
            key = (bank.class_id, template)
            if key in self._entries:
                self._entries.move_to_end(key)
            else:
                missing[key] = bank
        keys = list(missing)
        for start in range(0, len(keys), batch):
            part = keys[start : start + batch]
            features = model.encode(torch.cat([missing[key].crops([key[1]]) for key in part]).to(device))
            for row, key in enumerate(part):
                # Copies: a view would keep the whole batch alive.
                taps = tuple(tap[row].clone() for tap in features.taps)
                self._entries[key] = Features(taps, features.descriptors[row].clone())

    def batch(self, wanted: Sequence[tuple[TemplateBank, int]]) -> Features:
        """The wanted ones, which must have been ensured, as one batch."""
        entries = [self._entries[bank.class_id, template] for bank, template in wanted]
        taps = tuple(torch.stack(levels) for levels in zip(*(entry.taps for entry in entries)))
        return Features(taps, torch.stack([entry.descriptors for entry in entries]))

    def trim(self) -> None:
        """Forget what exceeds the limit."""
        if not self._entries:
            return
        one = next(iter(self._entries.values()))
        size = sum(t.numel() * t.element_size() for t in (*one.taps, one.descriptors))
        while len(self._entries) > max(self.limit // size, 1):
            self._entries.popitem(last=False)
