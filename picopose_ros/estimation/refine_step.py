"""One step of refinement: compare an image with the object rendered at a pose, and solve for a better pose.

`refine_step` is all that following an object from image to image needs beside the rounds of
`picopose_ros.estimation.refine`: an image, a pose with its covariance and a view rendered there go in, the
pose with its covariance and how well image and view agree come out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch

from picopose_ros.estimation.evidence import STAGES, Evidence, Weights
from picopose_ros.estimation.passes import Network, patch_masks
from picopose_ros.geometry.correspondences import Correspondences, decode_correspondences
from picopose_ros.geometry.covariance import pose_error
from picopose_ros.geometry.crops import (
    CROP_SIZE,
    GRID,
    CropBox,
    crop_box_from_mask,
    crop_box_of_extent,
    crop_mask,
    crop_segment,
    sides_at_border,
)
from picopose_ros.geometry.least_squares import Edges, Prior, Reprojections, Solution, Term, solve
from picopose_ros.model.fast import Prepared
from picopose_ros.model.offsets import sample_at
from picopose_ros.templates.posed import PosedView

_PATCHES = 16
_INLIER_CROP_PX = 4.0
_MIN_PAIRS = 12
_CUTOFFS = (20.0, 2.0)
"""Of the correspondences, in turn: the first brings the pose near from wherever it begins."""
_PAIRS = 200
"""Correspondences that are used: neighbours say the same."""
RIM = 0.02
"""Of a silhouette that is taken as the mask. That of a pose that is too far away is too small, and without a
rim it hides the object's own edge: what is left looks as small as the pose has it. Without contour and
regions, two rounds ended 1.5 % too far on 66 instances on tables, with it .3 %; ADD < .1 d .70 -> .82."""


@dataclass(frozen=True)
class Look:
    """An object at a pose in an image.

    Attributes:
        view: the object rendered at ``T_cam_obj``.
        T_cam_obj: (4, 4) where the step begins.
        mask: (H, W) bool, where the object is thought to be.
        segment: (H, W) bool, the mask whose edge is used; None: no contour.
        prior: (6, 6) covariance of ``T_cam_obj``, if it is to count; in the order of ROS.
        depth: (H, W) m of `picopose_ros.geometry.depth.reliable_depth`, registered to the image; or None.
        features: of the crop of ``mask``, where it was encoded before.
        rim: share of the longer side by which more around a mask is shown to the network that is
            the silhouette at ``T_cam_obj``, see `RIM`; 0: the mask is a segment.
        box: of the crop, where it is not the one around the mask.
    """

    view: PosedView
    T_cam_obj: np.ndarray
    mask: np.ndarray
    segment: np.ndarray | None = None
    prior: np.ndarray | None = None
    depth: np.ndarray | None = None
    features: Prepared | None = None
    rim: float = 0.0
    box: CropBox | None = None


@dataclass(frozen=True)
class Step:
    """A pose after a step.

    Attributes:
        T_cam_obj: (4, 4). covariance: (6, 6) in the order of ROS.
        agreement: 0..1, how well image and view agree where both show the object.
        covered: share of the mask's patches that correspondences reach.
        explained: share of the view's patches that have correspondences in the image.
        inliers: correspondences that agree with the pose. inlier_ratio: their share.
        moved: length of the step in standard deviations of the least squares.
        weights: per term how much each measurement counted.
        remark: what of the evidence could not be used, and why; or "".
        terms: what the pose was solved from, but for a prior.
    """

    T_cam_obj: np.ndarray
    covariance: np.ndarray
    agreement: float
    covered: float
    explained: float
    inliers: int
    inlier_ratio: float
    moved: float
    weights: Mapping[str, np.ndarray]
    remark: str = ""
    terms: Mapping[str, Term] = field(default_factory=dict, repr=False, compare=False)


def refine_step(
    network: Network,
    rgb: np.ndarray,
    K: np.ndarray,
    looks: Sequence[Look],
    blacken: bool = True,
    weights: Weights | None = None,
) -> list[Step | None]:
    """One step for several objects, or several poses of one, in one pass through the network.

    Args:
        network: the passes.
        rgb: (H, W, 3) uint8 of an undistorted camera (see `picopose_ros.geometry.rectify.straighten`).
        K: (3, 3) its intrinsics.
        looks: where to begin.
        blacken: black out what is outside a look's mask, as the preset wants it.
        weights: the measured ones if None.

    Returns:
        Per look the step, or None where the image doesn't fix the pose.
    """
    weights = weights or Weights()
    crops = _Crops(rgb, K, blacken)
    known = {_key(look): look.features for look in looks if look.features is not None}
    ready: list[tuple[int, np.ndarray]] = []
    for i, look in enumerate(looks):
        if look.mask.any():
            affine = look.view.affine(look.T_cam_obj, K, crops.of(look).M_crop_img)
            if affine is not None:
                ready.append((i, affine))
    steps: list[Step | None] = [None] * len(looks)
    if not ready:
        return steps
    with torch.inference_mode():
        features = _encoded(network, crops, known, [looks[i].view for i, _ in ready])
        for start in range(0, len(ready), network.max_pairs):
            part = ready[start : start + network.max_pairs]
            own = [crops.of(looks[i]) for i, _ in part]
            rows = torch.tensor([crop.row for crop in own], device=network.device)
            query = features.select(rows)
            template = network.views([looks[i].view for i, _ in part])
            patches = patch_masks(np.stack([looks[i].view.crop.mask for i, _ in part]))
            affines = network.upload(np.stack([affine for _, affine in part]).astype(np.float32))
            state = network.start(affines, network.upload(patches))
            state = network.offsets(state, query, template)[-1]
            alike = _alikeness(
                query.descriptors,
                template.descriptors,
                affines,
                network.upload(patch_masks(np.stack([crop.mask for crop in own]))),
                network.upload(patches),
            )
            found = [t.float().cpu().numpy() for t in (state.flow, state.certainty[:, 0], alike)]
            for k, (i, _) in enumerate(part):
                flow, certainty, agreement = (one[k] for one in found)
                steps[i] = _solve(looks[i], K, own[k], rgb, flow, certainty, float(agreement), weights)
    return steps


@dataclass(frozen=True)
class _Crop:
    row: int
    input: np.ndarray
    mask: np.ndarray
    own: np.ndarray
    """Of the mask without a rim."""
    M_crop_img: np.ndarray


_LARGEST = 3.0
"""Side of the crop of a whole object in those of the crop of what is seen of it, beyond which what is seen
would be too small in it."""

_Key = tuple[int, float, CropBox | None]
"""What a crop is of: the same array is the same mask."""


def _key(look: Look) -> _Key:
    return id(look.mask), look.rim, look.box


class _Crops:
    """The crops of the masks of an image, each made once."""

    def __init__(self, rgb: np.ndarray, K: np.ndarray, blacken: bool) -> None:
        self._rgb, self._K, self._blacken = rgb, K, blacken
        self._made: dict[_Key, _Crop] = {}

    def of(self, look: Look) -> _Crop:
        """The crop of a look."""
        key = _key(look)
        if key not in self._made:
            shown = grown(look.mask, look.rim) if look.rim else look.mask
            box = look.box or crop_box_from_mask(shown)
            if look.box is None and look.features is None and np.any(sides_at_border(shown)):
                whole = _whole(look, self._K)
                if whole is not None and whole.side <= _LARGEST * box.side:
                    box = whole
            crop, inside = crop_segment(self._rgb, shown, box, self._blacken)
            own = crop_mask(look.mask, box) if look.rim else inside
            self._made[key] = _Crop(len(self._made), crop, inside, own, box.content())
        return self._made[key]

    def all(self) -> dict[_Key, _Crop]:
        """By what they are of, in the order of their rows."""
        return self._made


def _whole(look: Look, K: np.ndarray) -> CropBox | None:
    """The box around all of an object, in the image and out of it; None where that is behind the camera.

    The crop of what is seen of it would be of another scale than the view: of 50 queries at the border on
    tables, each with its true and a degraded mask, ADD(-S) < .05 d rose from 62 to 69.
    """
    uv = look.view.projected(look.T_cam_obj, K)
    if uv is None or not np.isfinite(uv).all():
        return None
    low, high = uv.min(0), uv.max(0)
    margin = (look.rim + 1 / GRID) * (high - low).max()  # points are the middles of a view's cells
    return crop_box_of_extent(low - margin, high + margin)


def grown(mask: np.ndarray, share: float) -> np.ndarray:
    """A mask (H, W) bool, grown all round by a share of its longer side."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    reach = round(share * max(width, height))
    if not reach:
        return mask
    part = slice(max(top - reach, 0), top + height + reach), slice(max(left - reach, 0), left + width + reach)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    found = np.zeros_like(mask)
    found[part] = cv2.dilate(mask[part].astype(np.uint8), kernel) > 0
    return found


def _encoded(
    network: Network, crops: _Crops, known: Mapping[_Key, Prepared], views: Sequence[PosedView]
) -> Prepared:
    """Features of all crops in the order of their rows; those of ``known`` masks aren't computed again.

    The views are encoded in the same pass.
    """
    new = [crop.input for key, crop in crops.all().items() if key not in known]
    made = network.encode_views(views, np.stack(new) if new else None)
    if made is not None and len(new) == len(crops.all()):
        return made
    each = iter([] if made is None else made.split())
    return Prepared.join([known[key] if key in known else next(each) for key in crops.all()])


def _solve(
    look: Look,
    K: np.ndarray,
    crop: _Crop,
    rgb: np.ndarray,
    flow: np.ndarray,
    certainty: np.ndarray,
    agreement: float,
    weights: Weights,
) -> Step | None:
    """The pose from the network's output and the object's edge in mask and image."""
    view = look.view
    if look.segment is None:
        weights = weights.without_mask()
    pairs = decode_correspondences(
        flow, certainty, crop.M_crop_img, view.crop.points_consistent, view.T_view_obj, "subpixel", crop.mask
    )
    if len(pairs) < _MIN_PAIRS:
        return None
    few = pairs.select(np.arange(0, len(pairs), max(len(pairs) // _PAIRS, 1)))
    scale = float(crop.M_crop_img[0, 0])
    terms: dict[str, Term] = {
        "pairs": Reprojections(
            few.uv,
            few.xyz,
            K,
            weights.pair_sigma / scale,
            together=max(weights.pairs_together * len(few) / len(pairs), 1.0),
            scale_sigma=weights.pair_scale,
            scale_freedom=weights.freedom,
        )
    }
    if look.prior is not None:
        terms["prior"] = Prior(look.T_cam_obj, look.prior)
    pose, solution = look.T_cam_obj, None
    for cutoff in _CUTOFFS:
        terms["pairs"] = replace(terms["pairs"], cutoff=cutoff)
        solution = solve(pose, terms)
        if solution is None:
            return None
        pose = solution.T_cam_obj
    used = terms
    evidence = Evidence(view, rgb, K, CROP_SIZE / scale, look.segment, look.depth, weights)
    for stage in range(STAGES):
        found = evidence.terms(pose, stage)
        better = solve(pose, {**terms, **found}) if found else None
        if better is None:
            break
        pose, solution, used = better.T_cam_obj, better, {**terms, **found}
    solution, used = _or_exact(solution, used, weights)
    step = _step(look, K, crop, pairs, solution, agreement, evidence.remark, weights)
    if step is None:
        return None
    return replace(step, terms={name: term for name, term in used.items() if name != "prior"})


def _or_exact(
    solution: Solution, terms: Mapping[str, Term], weights: Weights
) -> tuple[Solution, Mapping[str, Term]]:
    """The solution and its terms, or those with a mask that ends where the object does, if that is likelier.

    By how much a mask is too large all round is of a mixture of two normal distributions, a narrow and a wide
    one: where the other terms agree with its edge, it is believed to a part of a pixel.
    """
    edge = terms.get("contour")
    if not isinstance(edge, Edges) or edge.sigma.max() > weights.exact_edge:
        return solution, terms
    exact = {**terms, "contour": replace(edge, growth_sigma=weights.exact_growth)}
    found = solve(solution.T_cam_obj, exact)
    if found is None:
        return solution, terms
    wide, narrow = weights.inexact / edge.growth_sigma, (1 - weights.inexact) / weights.exact_growth
    likelier = found.cost - 2 * math.log(narrow) < solution.cost - 2 * math.log(wide)
    return (found, exact) if likelier else (solution, terms)


def _step(
    look: Look,
    K: np.ndarray,
    crop: _Crop,
    pairs: Correspondences,
    solution: Solution,
    agreement: float,
    remark: str,
    weights: Weights,
) -> Step | None:
    T = solution.T_cam_obj
    points = pairs.xyz @ T[:3, :3].T + T[:3, 3]
    if points[:, 2].min() <= 0:
        return None
    scale = float(crop.M_crop_img[0, 0])
    uv = points[:, :2] / points[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2]
    inlier = np.linalg.norm(uv - pairs.uv, axis=1) * scale < _INLIER_CROP_PX
    covariance = solution.covariance * weights.covariance
    motion = pose_error(look.T_cam_obj, T)
    reached = (pairs.uv[inlier] @ crop.M_crop_img[:2, :2].T + crop.M_crop_img[:2, 2]) / CROP_SIZE
    T_view = look.view.T_view_obj
    seen = pairs.xyz[inlier] @ T_view[:3, :3].T + T_view[:3, 3]
    shown = seen[:, :2] / seen[:, 2:] * [look.view.K[0, 0], look.view.K[1, 1]] + look.view.K[:2, 2]
    box = look.view.crop.box
    return Step(
        T_cam_obj=T,
        covariance=covariance,
        agreement=float(np.clip(agreement, 0.0, 1.0)),
        covered=_share(crop.own, reached),
        explained=_share(look.view.crop.mask, (shown - [box.left, box.top]) / box.side),
        inliers=int(inlier.sum()),
        inlier_ratio=float(inlier.mean()),
        moved=float(np.sqrt(motion @ np.linalg.solve(solution.covariance, motion))),
        weights=solution.weights,
        remark=remark,
    )


def _share(mask: np.ndarray, places: np.ndarray) -> float:
    """Share of the patches of a crop's mask (224, 224) that hold one of the places (n, 2) in 0..1."""
    patch = CROP_SIZE // _PATCHES
    squares = mask.astype(np.uint8).reshape(_PATCHES, patch, _PATCHES, patch)
    visible = squares.mean((1, 3)) >= 0.5
    if not visible.any():  # a thin one: every patch it touches
        visible = squares.any((1, 3))
    x, y = (places * _PATCHES).astype(int).clip(0, _PATCHES - 1).T
    reached = np.zeros_like(visible)
    reached[y, x] = True
    return float((reached & visible).sum() / max(visible.sum(), 1))


def _alikeness(
    query: torch.Tensor,
    view: torch.Tensor,
    affines: torch.Tensor,
    query_patches: torch.Tensor,
    view_patches: torch.Tensor,
) -> torch.Tensor:
    """(B,) mean cosine of descriptors of a view's patches and of the query at the same places.

    Args:
        query, view: (B, C, 256) descriptors. affines: (B, 3, 3) view's crop px -> query's.
        query_patches, view_patches: (B, 16, 16). 0 where the two share none.
    """
    axis = torch.arange(_PATCHES, device=affines.device, dtype=affines.dtype)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    patch = CROP_SIZE / _PATCHES
    centres = (torch.stack([x, y]).flatten(1) + 0.5) * patch - 0.5
    at = (affines[:, :2, :2] @ centres + affines[:, :2, 2:] + 0.5) / patch - 0.5
    at = at.unflatten(2, (_PATCHES, _PATCHES))
    seen = sample_at(query.float().unflatten(2, (_PATCHES, _PATCHES)), at).flatten(2)
    cosine = torch.nn.functional.cosine_similarity(seen, view.float(), dim=1)
    both = (sample_at(query_patches[:, None].float(), at)[:, 0] * view_patches).flatten(1)
    return (cosine * both).sum(1) / both.sum(1).clamp_min(1e-6)
