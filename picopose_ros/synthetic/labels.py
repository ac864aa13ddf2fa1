"""Labels of a rendered pair, on the template's 64x64 grid: where its surface points are in the query crop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from picopose_ros.geometry.crops import CELL, GRID

LABEL_GRID = GRID
"""Side of the grid that labels are made on."""
MIN_FIT_CELLS = 40
"""With fewer visible cells than this no affine is right: the template shows another side."""


def labels_at(position: Tensor, valid: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Labels of the 64x64 grid at the centres of a coarser grid's cells.

    The mean of the four 64x64 cells around a coarser cell's centre is the label at that centre; it counts
    where all four are visible.

    Args:
        position: (B, 2, 64, 64) query crop px. valid: (B, 64, 64) in {0, 1}.
    Returns:
        (B, 2, grid, grid) positions and (B, grid, grid) validity.
    """
    if grid == LABEL_GRID:
        return position, valid
    step = LABEL_GRID // grid
    first = step // 2 - 1
    taken = [slice(first + i, None, step) for i in range(2)]
    corners = [(..., r, c) for r in taken for c in taken]
    mean = torch.stack([position[i] for i in corners]).mean(0)
    return mean, torch.stack([valid[i] for i in corners]).amin(0)


def fit_affine(
    position: np.ndarray, valid: np.ndarray, centre: np.ndarray
) -> tuple[np.ndarray, float, float]:
    """Stage 2's labels: the similarity transform that fits the true correspondences best.

    The released network's labels come from the relative pose instead; between views that differ by ten or
    twenty degrees those leave twice the distance for stage 3 to bridge.

    Args:
        position: (64, 64, 2) query crop px. valid: (64, 64) bool. centre: (2,) in the template crop, px.
    Returns:
        tau (2,) in units of 14 crop px, scale, angle in radians; no motion where too little is visible.
    """
    if valid.sum() < MIN_FIT_CELLS:
        return np.zeros(2), 1.0, 0.0
    axis = np.floor((np.arange(GRID) + 0.5) * CELL)
    source = np.stack(np.meshgrid(axis, axis), -1)[valid]
    target = position[valid]
    # Complex numbers: a similarity is one multiplication and one addition.
    a, b = source @ [1, 1j], target @ [1, 1j]
    mean_a, mean_b = a.mean(), b.mean()
    turn = (np.conj(a - mean_a) @ (b - mean_b)) / max((np.abs(a - mean_a) ** 2).sum(), 1e-6)
    middle = centre @ [1, 1j]
    shift = mean_b + turn * (middle - mean_a) - middle
    scale = float(np.clip(np.abs(turn), 0.05, 20))
    return np.array([shift.real, shift.imag]) / 14, scale, float(np.angle(turn))
