"""What each of the three stages got right, measured in the query crop: templates, end points, certainty.

The labels follow the same geometry as training's (`picopose_ros.training.pairs`): a template cell is visible
in the query where its surface point is the nearest thing along the query's ray and the network is shown that
pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from picopose_ros.estimator import Hypothesis
from picopose_ros.geometry.crops import CELL, CROP_SIZE, GRID
from picopose_ros.synthetic.labels import fit_affine, labels_at
from picopose_ros.templates.bank import TemplateBank

DEPTH_TOLERANCE = 0.012
"""A point this share of the box diagonal off the query's depth still counts as visible: training's."""

GOOD_PX = 5.0
"""A correspondence with a smaller end-point error is a good one, crop pixels."""

STAGES = ("1", "2", "3 at 16", "3 at 32", "3")
"""Whose end points are measured: patch matches, affine, and the three offset blocks."""

FIT_CELLS = 40
"""With fewer visible cells no affine is right: the template shows another side. Training's."""

_COUNTS = ("claimed", "claimed_visible", "claimed_good", "visible", "good")


@dataclass(frozen=True)
class TrueMap:
    """Where the surface of a template is in a query crop.

    Attributes:
        position: (2, 64, 64) crop px (x, y) of every cell on the object.
        visible: (64, 64) bool, visible in the query. present: (64, 64) bool, on the object.
    """

    position: np.ndarray
    visible: np.ndarray
    present: np.ndarray

    @property
    def flow(self) -> np.ndarray:
        """(2, 64, 64) the true flow in cells, in the convention of the network's."""
        return (self.position - 0.5) / CELL - _grid(GRID)


def viewing_directions(T_cam_ctr: np.ndarray) -> np.ndarray:
    """Unit vectors (..., 3) from the object's centre to the camera, in the object's axes, of (..., 4, 4)."""
    towards = -np.einsum("...ji,...j->...i", T_cam_ctr[..., :3, :3], T_cam_ctr[..., :3, 3])
    return towards / np.linalg.norm(towards, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Viewpoints:
    """How far each template of a bank is from the true viewpoint.

    Attributes:
        errors_deg: (N,) angle between the viewing directions, the smallest over the object's symmetries.
        truths: (N, 4, 4) T_cam_ctr, the true pose in the form nearest to each template.
    """

    errors_deg: np.ndarray
    truths: np.ndarray

    @property
    def nearest(self) -> int:
        """The template that stage 1 should have found."""
        return int(self.errors_deg.argmin())


def viewpoints(bank: TemplateBank, T_cam_obj: np.ndarray, symmetries: np.ndarray) -> Viewpoints:
    """Compare a bank's templates with the true pose (4, 4).

    In-plane rotation plays no part: stage 2 handles it.

    Args:
        symmetries: (S, 4, 4) in the object's own frame, identity first; the first of equals is taken.
    """
    forms = np.asarray(T_cam_obj, np.float64) @ symmetries @ np.linalg.inv(bank.T_ctr_obj)
    cosines = viewing_directions(forms) @ viewing_directions(bank.T_cam_ctr.astype(np.float64)).T
    best = np.round(cosines, 9).argmax(0)  # rounded: equal forms differ by float noise
    cosine = cosines[best, np.arange(len(bank))]
    return Viewpoints(np.degrees(np.arccos(np.clip(cosine, -1, 1))), forms[best])


def true_map(
    bank: TemplateBank,
    template: int,
    T_cam_ctr: np.ndarray,
    K: np.ndarray,
    M_crop_img: np.ndarray,
    depth: np.ndarray,
    shown: np.ndarray,
) -> TrueMap:
    """Where a template's cells are in a query crop, and which of them are visible there.

    Args:
        T_cam_ctr: (4, 4) true pose of the centred object. K: (3, 3) of the undistorted image.
        M_crop_img: (3, 3) image -> crop. depth: (H, W) of the object in the image, metres, 0 off it.
        shown: (H, W) bool, what the network is shown of the object.
    """
    height, width = depth.shape
    points = bank.points_consistent[template].astype(np.float64)
    T = bank.T_cam_ctr[template].astype(np.float64)
    present = points[..., 2] > 0
    seen = ((points - T[:3, 3]) @ T[:3, :3]) @ T_cam_ctr[:3, :3].T + T_cam_ctr[:3, 3]
    z = np.maximum(seen[..., 2], 1e-6)
    uv = seen[..., :2] / z[..., None] * [K[0, 0], K[1, 1]] + K[:2, 2]
    nearest = np.clip(np.rint(uv), -2, [width + 1, height + 1]).astype(int)
    inside = ((nearest >= 0) & (nearest < [width, height])).all(-1)
    gap = np.full(z.shape, np.inf)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            x = np.clip(nearest[..., 0] + dx, 0, width - 1)
            y = np.clip(nearest[..., 1] + dy, 0, height - 1)
            gap = np.minimum(gap, np.abs(depth[y, x] - z))
    diagonal = float(np.linalg.norm(bank.extents))
    x, y = np.clip(nearest, 0, [width - 1, height - 1]).transpose(2, 0, 1)
    visible = present & inside & (gap < DEPTH_TOLERANCE * diagonal) & shown[y, x]
    M = np.asarray(M_crop_img, np.float64)
    position = uv @ M[:2, :2].T + M[:2, 2]
    visible &= ((position >= 0) & (position <= CROP_SIZE - 1)).all(-1)
    return TrueMap(position.transpose(2, 0, 1), visible, present)


def true_affine(truth: TrueMap, centre: np.ndarray) -> np.ndarray | None:
    """The affine (3, 3) that stage 2 should have given, template crop px -> query crop px; None without one.

    Args:
        centre: (2,) the object's centre in the template crop, px.
    """
    if truth.visible.sum() < FIT_CELLS:
        return None
    centre = np.asarray(centre, np.float64)
    shift, scale, angle = fit_affine(truth.position.transpose(1, 2, 0), truth.visible, centre)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]])
    affine = np.eye(3)
    affine[:2, :2] = linear
    affine[:2, 2] = centre + CROP_SIZE / 16 * shift - linear @ centre
    return affine


def with_true_flow(hypothesis: Hypothesis, truth: TrueMap) -> Hypothesis:
    """The hypothesis with the true flow where the surface is visible, and its own elsewhere."""
    return replace(hypothesis, flow=np.where(truth.visible, truth.flow, hypothesis.flow))


def with_true_certainty(hypothesis: Hypothesis, truth: TrueMap) -> Hypothesis:
    """The hypothesis certain of all that is visible and of nothing else."""
    return replace(hypothesis, certainty=np.where(truth.visible, 9.0, -9.0))


def endpoint_errors(hypothesis: Hypothesis, truth: TrueMap) -> dict[str, np.ndarray]:
    """Per stage of `STAGES` the distances (n,) to the true positions over its visible cells, crop px.

    The hypothesis must have been traced; a network with fewer grids has fewer stages.
    """
    errors = {}

    def add(name: str, predicted: np.ndarray) -> None:
        side = predicted.shape[-1]
        position = torch.from_numpy(truth.position)[None]
        at, visible = labels_at(position, torch.from_numpy(truth.visible.astype(float))[None], side)
        distance = np.linalg.norm(predicted - at[0].numpy(), axis=0)
        errors[name] = distance[visible[0].numpy() > 0]

    if hypothesis.matches is not None:
        add("1", hypothesis.matches)
    pixels = np.floor((_grid(GRID) + 0.5) * CELL)
    M = np.asarray(hypothesis.affine, np.float64)
    add("2", np.tensordot(M[:2, :2], pixels, 1) + M[:2, 2, None, None])
    for flow, _ in (*hypothesis.coarse, (hypothesis.flow, None)):
        side = flow.shape[-1]
        name = "3" if side == GRID else f"3 at {side}"
        add(name, (flow + _grid(side)) * (CROP_SIZE / side) + 0.5)
    return errors


def certainty_counts(hypothesis: Hypothesis, truth: TrueMap) -> dict[str, int]:
    """Numbers of cells, for :func:`certainty_figures`."""
    end = (hypothesis.flow + _grid(GRID)) * CELL + 0.5
    good = truth.visible & (np.linalg.norm(end - truth.position, axis=0) < GOOD_PX)
    claimed = (hypothesis.certainty > 0) & truth.present
    cells = (claimed, claimed & truth.visible, claimed & good, truth.visible, good)
    return {name: int(mask.sum()) for name, mask in zip(_COUNTS, cells)}


def certainty_figures(counts: list[dict[str, int]]) -> dict[str, float]:
    """Precision and recall over many pairs: of the visible cells, and of the good ones (`GOOD_PX`)."""
    total = {name: sum(c[name] for c in counts) for name in _COUNTS}

    def share(part: str, whole: str) -> float:
        return total[part] / total[whole] if total[whole] else float("nan")

    return {
        "precision": share("claimed_visible", "claimed"),
        "recall": share("claimed_visible", "visible"),
        "precision_good": share("claimed_good", "claimed"),
        "recall_good": share("claimed_good", "good"),
    }


def _grid(side: int) -> np.ndarray:
    """(2, side, side) integer (x, y) of every cell."""
    return np.stack(np.meshgrid(np.arange(side), np.arange(side))).astype(np.float64)
