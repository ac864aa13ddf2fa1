"""Decoding of the network's dense offsets into 2D-3D pairs (paper Sec. III-D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch

from picopose_ros.geometry.crops import CELL, CROP_SIZE, GRID

DecodeMode = Literal["reference", "subpixel"]


@dataclass
class Correspondences:
    """Pairs of an image point and an object point.

    Attributes:
        uv: (n, 2) full-image pixels.
        xyz: (n, 3) object frame, metres.
        certainty: (n,) the network's certainty of each pair, 0.5..1.
    """

    uv: np.ndarray
    xyz: np.ndarray
    certainty: np.ndarray

    def __len__(self) -> int:
        return len(self.uv)

    def select(self, index: np.ndarray) -> Correspondences:
        """The pairs that ``index`` (indices or mask) names."""
        return Correspondences(self.uv[index], self.xyz[index], self.certainty[index])


def cell_centres_in_image(M_crop_img: np.ndarray) -> np.ndarray:
    """Full-image pixels (64, 64, 2) float32 of the cells' centres in the crop; row y, column x."""
    inverse = np.linalg.inv(np.asarray(M_crop_img, np.float64))
    centres = (np.arange(GRID) + 0.5) * CELL
    x, y = np.meshgrid(centres, centres)
    return (np.stack([x, y], -1) @ inverse[:2, :2].T + inverse[:2, 2]).astype(np.float32)


def decode_correspondences(
    flow: np.ndarray,
    certainty: np.ndarray,
    M_crop_img: np.ndarray,
    points: np.ndarray,
    T_cam_tpl: np.ndarray,
    mode: DecodeMode = "subpixel",
    query_mask: np.ndarray | None = None,
) -> Correspondences:
    """Offsets on the template's grid -> 2D-3D pairs.

    ``reference`` is the released network's decode, quirks included: the target is floored to a cell and
    stands at the cell's centre; nothing asks whether the template cell lies on the object, so background
    cells give the camera's centre as their 3D point; pairs are ordered column by column. ``subpixel`` keeps
    the target continuous in the convention of the training labels, and drops cells without depth and targets
    off the segment.

    Args:
        flow: (2, 64, 64) offsets (x, y) in cells; a template cell's position is its integer index, its target
            is the query crop's pixel divided by 3.5.
        certainty: (64, 64) logits.
        M_crop_img: (3, 3) full image -> query crop.
        points: (64, 64, 3) template points, camera frame, metres: :func:`~.crops.crop_points_nearest` for
            ``reference``, :func:`~.crops.crop_points_consistent` for ``subpixel``.
        T_cam_tpl: (4, 4) template pose; decides the object frame of the result.
        mode: see above.
        query_mask: (224, 224) segment mask in the query crop; ``subpixel`` drops targets further than one
            cell from it.

    Returns:
        Pairs in full-image pixels (lens distortion untouched) and object-frame metres.
    """
    # Arrays indexed [x, y] from here on: flattening them is column by column.
    axis = np.arange(GRID, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    target = grid + np.asarray(flow, np.float32).transpose(2, 1, 0)
    # torch's sigmoid: half a unit in the last place decides cells at exactly one half.
    probability = torch.sigmoid(torch.from_numpy(np.array(certainty, np.float32))).numpy().T
    points = np.asarray(points, np.float32).transpose(1, 0, 2)
    keep = ((target > 0) & (target < GRID - 1)).all(-1) & (probability > 0.5)
    if mode == "reference":
        x, y = target[keep].astype(np.int64).T
        uv = cell_centres_in_image(M_crop_img)[y, x]
    elif mode == "subpixel":
        keep &= points[..., 2] > 0
        # Training labels are whole crop pixels, rounded down: half a pixel more is their unbiased place.
        crop_px = CELL * target.astype(np.float64) + 0.5
        if query_mask is not None:
            near = cv2.dilate((query_mask != 0).astype(np.uint8), np.ones((7, 7), np.uint8))
            x, y = np.clip(np.nan_to_num(crop_px), 0, CROP_SIZE - 1).round().astype(int).transpose(2, 0, 1)
            keep &= near[y, x] > 0
        inverse = np.linalg.inv(np.asarray(M_crop_img, np.float64))
        uv = crop_px[keep] @ inverse[:2, :2].T + inverse[:2, 2]
    else:
        raise ValueError(f"decode mode {mode!r} doesn't exist; choose 'reference' or 'subpixel'")
    T = np.asarray(T_cam_tpl, np.float32)
    xyz = (points[keep] - T[:3, 3]) @ T[:3, :3]
    return Correspondences(uv, xyz, probability[keep])


def fit_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The turn, scale and shift (3, 3) that moves points (n, 2) nearest to others (n, 2), least squares."""
    # Complex numbers: a similarity is one multiplication and one addition.
    a, b = source @ [1, 1j], target @ [1, 1j]
    mean_a, mean_b = a.mean(), b.mean()
    turn = (np.conj(a - mean_a) @ (b - mean_b)) / max((np.abs(a - mean_a) ** 2).sum(), 1e-9)
    shift = mean_b - turn * mean_a
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag], [0, 0, 1]])
