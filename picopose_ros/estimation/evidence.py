"""What image, mask and depth image say of an object's pose beside the network: the terms of refinement.

Where the object ends is measured along the normals of the rendered contour: in its mask, which may be too
large or too small all round, and in the image by its colours. A depth image is compared with the rendered
surface.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from picopose_ros.geometry.contours import contour_lines, mask_edges, signed_distance
from picopose_ros.geometry.depth import Patches, depth_term, surface_patches
from picopose_ros.geometry.least_squares import Edges, Term
from picopose_ros.geometry.regions import colour_groups, region_edges
from picopose_ros.templates.posed import PosedView

_REACHES = (0.06, 0.03)
"""How far from the contour an edge is looked for, in turn, as a share of the crop's side. A third look with
the shorter reach raised no recall of 60 scenes by more than one pose, and took 8 % of a round."""
_DEPTH_CUTOFFS = (20.0, 3.0)
"""Of the depths, in turn: the first brings a pose near whose depth is off by centimetres."""
_LEAST_REACH_PX = 3.0
_ROUGHNESS = 1.5
"""Standard deviation of a ragged mask's edge, in those of its deviations from the contour."""
_MIN_EDGES = 20
_MIN_COSINE = 0.6
"""Between the normals of the contour and of the mask where an edge is taken."""
_BORDER_PX = 2.0
"""A mask that ends this near to the image's border ends there and not at the object's edge."""

STAGES = len(_REACHES)
"""So many times the evidence is looked at, each time from the pose that the last time led to."""


@dataclass(frozen=True)
class Weights:
    """How large the errors are of what a pose is solved from; measured with the packaged weights.

    Attributes:
        pair_sigma: of one coordinate of a correspondence, crop px.
        pairs_together: correspondences that count as one, because neighbours err alike.
        pair_scale: scale of the common factor by which all correspondences are too far apart.
        edge_sigma: of one point of the mask's edge, image px.
        edges_together: such points that count as one.
        mask_growth: of what a mask is too large or small by all round, share of the crop's side.
        least_growth: the same in px, where that is more.
        inexact: share of the masks of which that is so. The others end where the object does.
        exact_growth: of what these are too large or small by all round, px.
        exact_edge: largest standard deviation of one point of a mask's edge that may be one of these, px.
        region_sigma: factor on what `region_edges` says of its errors.
        region_growth: scale of what all these edges are too far out or in by, px.
        freedom: degrees of freedom of Student's distribution of ``pair_scale`` and ``region_growth``: they
            are mostly small, now and then several times as large.
        regions_together: lines across the contour that count as one.
        covariance: factor from the least squares' covariance to that of the true errors.
    """

    pair_sigma: float = 1.3
    pairs_together: float = 200.0
    pair_scale: float = 0.012
    edge_sigma: float = 0.5
    edges_together: float = 4.0
    mask_growth: float = 0.017
    least_growth: float = 1.0
    inexact: float = 0.7
    exact_growth: float = 0.15
    exact_edge: float = 1.1
    region_sigma: float = 1.0
    regions_together: float = 8.0
    region_growth: float = 0.3
    freedom: float = 3.0
    covariance: float = 4.0

    def without_mask(self) -> Weights:
        """Those of a pose without a mask: nothing then tells which of flow and colours' edges is far off, and
        believing each in its small errors made poses worse (docs/refinement.md)."""
        return replace(self, pair_scale=0.02, region_growth=0.7, freedom=np.inf)


class Evidence:
    """What there is to be measured of one object in one image.

    Args:
        view: the object rendered near its pose.
        rgb: (H, W, 3) uint8 of an undistorted camera. K: (3, 3).
        side: of the object's crop, px.
        segment: (H, W) bool, its mask, or None.
        depth: (H, W) of `reliable_depth`, or None.
        weights: how large the errors are.

    Attributes:
        remark: what could not be used, and why; or "".
    """

    def __init__(
        self,
        view: PosedView,
        rgb: np.ndarray,
        K: np.ndarray,
        side: float,
        segment: np.ndarray | None,
        depth: np.ndarray | None,
        weights: Weights,
    ) -> None:
        self.remark = ""
        self._view, self._rgb, self._K, self._side, self._weights = view, rgb, K, side, weights
        self._distance: np.ndarray | None = None
        self._colours: np.ndarray | None = None
        if segment is not None:
            margin = int(2 * _REACHES[0] * side + 2 * _LEAST_REACH_PX)
            self._distance = signed_distance(segment, margin)
        self._depth = depth
        self._patches: Patches | None = None
        if depth is not None:
            self._patches = surface_patches(view.crop.points_consistent, view.T_view_obj)

    def terms(self, pose: np.ndarray, stage: int) -> dict[str, Term]:
        """The terms at a pose (4, 4); ``stage`` counts from 0 to `STAGES` - 1."""
        found: dict[str, Term] = dict(self._edges(pose, stage))
        if self._depth is not None and self._patches is not None and not self.remark:
            term = depth_term(self._depth, self._patches, pose, self._K, _DEPTH_CUTOFFS[stage])
            if isinstance(term, str):
                self.remark = term
            elif term is not None:
                found["depth"] = term
        return found

    def _edges(self, pose: np.ndarray, stage: int) -> dict[str, Edges]:
        """Where the object ends along the normals of the view's contour."""
        view, weights = self._view, self._weights
        reach = max(_REACHES[stage] * self._side, _LEAST_REACH_PX)
        height, width = self._rgb.shape[:2]
        contour = view.contour
        origin, normal = contour_lines(contour, view.T_view_obj, pose, view.K, self._K)

        def inside(at: np.ndarray) -> np.ndarray:
            most = [width - 1 - _BORDER_PX, height - 1 - _BORDER_PX]
            return (at.min(1) > _BORDER_PX) & (at < most).all(1)

        def made(
            good: np.ndarray,
            offset: np.ndarray,
            sigma: np.ndarray,
            together: float,
            growth: float,
            freedom: float = np.inf,
        ) -> Edges:
            return Edges(
                contour.xyz[good],
                self._K,
                origin[good],
                normal[good],
                offset[good],
                sigma[good],
                together=together,
                growth_sigma=growth,
                growth_freedom=freedom,
            )

        found: dict[str, Edges] = {}
        if self._distance is not None:
            offset, cosine = mask_edges(self._distance, origin, normal, reach)
            at = origin + normal * np.nan_to_num(offset)[:, None]
            good = np.isfinite(offset) & inside(at) & (cosine > _MIN_COSINE)
            if good.sum() >= _MIN_EDGES:
                rough = weights.edge_sigma
                if stage:  # how ragged the mask is: its edge scatters about a contour that is nearly right
                    off = np.abs(offset[good] - np.median(offset[good]))
                    rough = max(rough, _ROUGHNESS * 1.48 * float(np.median(off)))
                growth = max(weights.mask_growth * self._side, weights.least_growth)
                sigma = np.full(len(offset), rough)
                found["contour"] = made(good, offset, sigma, weights.edges_together, growth)
        good = inside(origin) & np.isfinite(normal).all(1)
        if good.sum() >= _MIN_EDGES:
            if self._colours is None:
                self._colours = colour_groups(self._rgb, origin[good], normal[good], reach)
            offset, sigma = region_edges(self._rgb, origin, normal, reach, self._colours)
            scaled = sigma * weights.region_sigma
            together, growth = weights.regions_together, weights.region_growth
            found["region"] = made(good, offset, scaled, together, growth, weights.freedom)
        return found
