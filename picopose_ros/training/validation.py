"""How good the three stages are on fixed held-out pairs, the right template given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from picopose_ros.model import PicoPose
from picopose_ros.model.config import CROP_SIZE
from picopose_ros.model.matching import patch_mask
from picopose_ros.model.offsets import OffsetLevel, grid_positions
from picopose_ros.synthetic.labels import labels_at
from picopose_ros.training.data import Batch

_STAGES = ("stage1", "stage2", "stage3_16", "stage3_32", "stage3")
"""Where a stage's end point is measured; the last is stage 3's finest grid, 64x64."""


def end_points(level: OffsetLevel) -> Tensor:
    """(B, 2, n, n) where a grid's cells point to, query crop px."""
    grid = level.flow.shape[-1]
    return (level.flow + grid_positions(grid, level.flow)) * (CROP_SIZE / grid) + 0.5


class _Errors:
    """Distances of end points from the truth: a mean per pair, and all visible cells of all pairs."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []
        self._cells: list[Tensor] = []

    def add(self, error: Tensor, visible: Tensor) -> None:
        """Args: error: (B, n, n) crop px. visible: (B, n, n) in {0, 1}."""
        count = visible.sum((1, 2))
        self._means.append((error * visible).sum((1, 2)) / count.masked_fill(count == 0, torch.nan))
        self._cells.append(error[visible > 0])

    def figures(self, name: str) -> dict[str, float]:
        """`NAME`: median over pairs of their mean; `NAME_median`: over all visible cells."""
        return {
            name: float(torch.nanmedian(torch.cat(self._means))),
            f"{name}_median": float(torch.cat(self._cells).nanmedian()),
        }


@torch.no_grad()
def validate(model: PicoPose, batches: Sequence[Batch]) -> dict[str, float]:
    """End-point errors of the stages in crop px on fixed held-out pairs, and certainty's quality.

    Returns:
        Per stage (`stage1`, `stage2`, `stage3_16`, `stage3_32`, `stage3`) the median over pairs of the mean
        over a pair's visible cells, which a pair's outliers dominate, and as `..._median` the median over the
        visible cells of all pairs. `precision`, `recall`: of a certainty above 0 as a claim to be visible and
        within 5 px. `ranked`: how often the own template scores above another view of the same object.
    """
    model.eval()
    errors = {name: _Errors() for name in _STAGES}
    hits, claims, present, wins = 0.0, 0.0, 0.0, []
    for batch in batches:
        template, query = model.encode(batch.template_rgb), model.encode(batch.query_rgb)
        own = template.select(batch.own)
        at16, seen16 = labels_at(batch.position, batch.valid, 16)
        similarity = own.descriptors.transpose(1, 2) @ query.descriptors
        similarity = similarity.masked_fill(patch_mask(batch.query_mask).flatten(1)[:, None] == 0, -1.0)
        best = similarity.argmax(2)
        matched = torch.stack([best % 16, best // 16], 1).unflatten(2, (16, 16)) * 14.0 + 6.5
        errors["stage1"].add((matched - at16).norm(dim=1), seen16)
        result = model.regress(
            query, own, batch.query_mask, batch.template_mask[batch.own], batch.template_centre[batch.own]
        )
        pixels = torch.floor((grid_positions(64, batch.position) + 0.5) * 3.5)
        moved = (result.affine[:, :2, :2] @ pixels.flatten(1)).unflatten(2, (64, 64)) + result.affine[
            :, :2, 2, None, None
        ]
        errors["stage2"].add((moved - batch.position).norm(dim=1), batch.valid)
        for name, level in zip(_STAGES[2:], result.levels, strict=True):
            at, seen = labels_at(batch.position, batch.valid, level.flow.shape[-1])
            error = (end_points(level) - at).norm(dim=1)
            errors[name].add(error, seen)
        good = (batch.valid > 0) & (error < 5)
        claimed = result.certainty[:, 0] > 0
        hits += float((good & claimed).sum())
        claims += float(claimed.sum())
        present += float(good.sum())
        for index in (batch.own, batch.other):
            inside = patch_mask(batch.template_mask).flatten(1)[index]
            s = query.descriptors.transpose(1, 2) @ template.descriptors[index]
            foreground = patch_mask(batch.query_mask).flatten(1)
            s = s.masked_fill(inside[:, None] == 0, -1.0).amax(2)
            wins.append((s * foreground).sum(1) / foreground.sum(1).clamp(min=1))
    figures: dict[str, float] = {}
    for name, values in errors.items():
        figures |= values.figures(name)
    scores = torch.stack([torch.cat(wins[0::2]), torch.cat(wins[1::2])])
    return {
        **figures,
        "precision": hits / max(claims, 1),
        "recall": hits / max(present, 1),
        "ranked": float((scores[0] > scores[1]).float().mean()),
    }
