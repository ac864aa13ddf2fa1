"""Predicted correspondences as a picture: what a curve does not tell."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from picopose_ros.geometry.crops import CELL, CROP_SIZE, GRID, normalise_crop
from picopose_ros.model import PicoPose
from picopose_ros.training.data import Batch, concatenate, take
from picopose_ros.training.validation import end_points

_TITLES = (
    "template",
    "query: where its cells go",
    "template moved there",
    "error: green 0, red 10 px; median",
)
_STEP = 2
"""Every so many cells a dot."""
_WORST_PX = 10.0


def validation_pairs(batches: Sequence[Batch]) -> Batch:
    """The first pair of every batch: what the picture of an evaluation shows."""
    return concatenate([take(batch, 1) for batch in batches])


@torch.no_grad()
def correspondence_picture(model: PicoPose, batch: Batch, title: str) -> np.ndarray:
    """A row per query: template, query, the template moved by stage 3, the error where the truth is known.

    Only cells that the network is certain of are drawn (certainty above 0). A cell has the same colour on
    the template and where it goes on the query.

    Args:
        batch: a few queries against their own templates.
    Returns:
        (h, w, 3) uint8 RGB.
    """
    model.eval()
    own = batch.own
    result = model.regress(
        model.encode(batch.query_rgb),
        model.encode(batch.template_rgb).select(own),
        batch.query_mask,
        batch.template_mask[own],
        batch.template_centre[own],
    )
    at = end_points(result.levels[-1]).nan_to_num(-999).clamp(-999, 999).cpu().numpy().transpose(0, 2, 3, 1)
    certain = result.certainty[:, 0].cpu().numpy() > 0
    inside = batch.template_mask[own].cpu().numpy() > 0
    templates, queries = _pictures(batch.template_rgb[own]), _pictures(batch.query_rgb)
    truth = batch.position.cpu().numpy().transpose(0, 2, 3, 1)
    seen = batch.valid.cpu().numpy() > 0
    cells = np.floor((np.arange(GRID) + 0.5) * CELL).astype(int)
    certain &= inside[:, cells[:, None], cells]  # (B, 64, 64)
    rows = [_head(title)]
    for n in range(len(own)):
        rows.append(_row(templates[n], queries[n], at[n], certain[n], truth[n], seen[n], inside[n]))
    return np.concatenate(rows)


def _pictures(crops: Tensor) -> np.ndarray:
    """(B, 224, 224, 3) uint8 RGB of normalised crops (B, 3, 224, 224)."""
    black, white = (normalise_crop(np.full((1, 1, 3), v, np.float32)) for v in (0, 1))
    rgb = (crops.float().cpu().numpy() - black) / (white - black)
    return np.ascontiguousarray((np.clip(rgb[:, ::-1], 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1))


def _head(title: str) -> np.ndarray:
    head = np.full((34, CROP_SIZE * len(_TITLES), 3), 255, np.uint8)
    cv2.putText(head, title, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    for column, text in enumerate(_TITLES):
        at = (4 + column * CROP_SIZE, 29)
        cv2.putText(head, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.38, (0, 0, 0), 1, cv2.LINE_AA)
    return head


def _wheel() -> np.ndarray:
    """(64, 64, 3) RGB: a hue per direction from the crop's centre, paler towards it."""
    y, x = np.mgrid[:GRID, :GRID] - (GRID - 1) / 2
    hue = ((np.arctan2(y, x) / (2 * np.pi)) % 1 * 180).astype(np.uint8)
    saturation = np.clip(90 + 330 * np.hypot(x, y) / GRID, 0, 255).astype(np.uint8)
    return cv2.cvtColor(np.dstack([hue, saturation, np.full_like(hue, 255)]), cv2.COLOR_HSV2RGB)


def _dots(picture: np.ndarray, points: np.ndarray, colours: np.ndarray) -> None:
    for point, colour in zip(np.rint(points).astype(int).tolist(), colours.tolist()):
        if -9 < min(point) and max(point) < CROP_SIZE + 9:
            cv2.circle(picture, point, 2, colour, -1, cv2.LINE_AA)


def _moved(
    template: np.ndarray, query: np.ndarray, at: np.ndarray, shown: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """The template's certain part splatted over the greyed query."""
    grey = cv2.cvtColor(cv2.cvtColor(query, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) // 2
    side = 2 * CROP_SIZE  # two samples a pixel leave no holes up to twice the size
    fine = cv2.resize(at, (side, side), interpolation=cv2.INTER_LINEAR)
    kept = cv2.resize(shown.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST) > 0
    kept &= cv2.resize(inside.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST) > 0
    x, y = np.rint(fine[kept]).astype(int).T
    colours = cv2.resize(template, (side, side), interpolation=cv2.INTER_LINEAR)[kept]
    there = (x >= 0) & (x < CROP_SIZE) & (y >= 0) & (y < CROP_SIZE)
    grey[y[there], x[there]] = colours[there]
    return grey


def _row(
    template: np.ndarray,
    query: np.ndarray,
    at: np.ndarray,
    shown: np.ndarray,
    truth: np.ndarray,
    seen: np.ndarray,
    inside: np.ndarray,
) -> np.ndarray:
    some = np.zeros_like(shown)
    some[_STEP // 2 :: _STEP, _STEP // 2 :: _STEP] = True
    some &= shown
    rows, columns = np.nonzero(some)
    cells = np.floor((np.stack([columns, rows], 1) + 0.5) * CELL)
    colours = _wheel()[some]
    left, middle = template // 2, query // 2
    _dots(left, cells, colours)
    _dots(middle, at[some], colours)
    moved = _moved(template, query, at, shown, inside)

    right = query // 3
    known = some & seen
    error = np.linalg.norm(at - truth, axis=-1)
    share = np.clip(error[known] / _WORST_PX, 0, 1)
    for start, end in zip(at[known], truth[known]):
        ends = np.rint([start, end]).astype(int).clip(-CROP_SIZE, 2 * CROP_SIZE).tolist()
        cv2.line(right, *ends, (150, 150, 150), 1, cv2.LINE_AA)
    _dots(right, at[known], np.stack([255 * share, 255 * (1 - share), 0 * share], 1).astype(np.uint8))
    claimed = shown & seen
    median = f"{np.median(error[claimed]):.1f} px" if claimed.any() else "-"
    text = f"{shown.sum()} certain, {seen.sum()} visible: {median}"
    for colour, thickness in ((0, 3), (255, 1)):
        at_text, font = (3, CROP_SIZE - 5), cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(right, text, at_text, font, 0.33, (colour,) * 3, thickness, cv2.LINE_AA)
    return np.concatenate([left, middle, moved, right], 1)
