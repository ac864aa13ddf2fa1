"""Training losses of the three stages (paper Eq. 4-7).

Labels live on the template's 64x64 grid: for each cell the query crop pixel that shows the same surface
point, and whether it is visible there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from picopose_ros.model.config import CROP_SIZE, GRIDS
from picopose_ros.model.offsets import OffsetLevel, grid_positions
from picopose_ros.synthetic.labels import labels_at
from picopose_ros.training.distributed import per_process


@dataclass
class AffineLabels:
    """Ground truth of stage 2 for B pairs."""

    translation: Tensor
    """(B, 2) tau in units of 14 crop px."""
    scale: Tensor
    """(B,)."""
    angle: Tensor
    """(B,) in-plane angle, radians."""
    weight: Tensor
    """(B,) 0 where the template shows another side and no affine is right."""


def flow_labels(position: Tensor, grid: int) -> Tensor:
    """Query crop px (B, 2, grid, grid) -> flow in cells: (px - 0.5) / cell - index.

    The released labels are crop pixels rounded down; half a pixel less is their unbiased value, and what
    the decode adds back.
    """
    return (position - 0.5) * (grid / CROP_SIZE) - grid_positions(grid, position)


def soft_patch_targets(position: Tensor, valid: Tensor, side: int = GRIDS[0]) -> Tensor:
    """Each template cell's label as weights on the four nearest query cells.

    Args:
        position: (B, 2, ...) query crop px of n template cells. valid: (B, ...). side: of the query's grid.
    Returns:
        (B, n, side^2) weights [template cell, query cell], rows sum to 1 or (invalid) 0.
    """
    cell = CROP_SIZE / side
    x, y = (((position + 0.5) / cell - 0.5).clamp(0, side - 1)).flatten(2).unbind(1)
    x0, y0 = x.floor().clamp(max=side - 2), y.floor().clamp(max=side - 2)
    fx, fy = x - x0, y - y0
    index = (y0 * side + x0).long()
    target = torch.zeros(*x.shape, side * side, device=x.device)
    for offset, weight in (
        (0, (1 - fx) * (1 - fy)),
        (1, fx * (1 - fy)),
        (side, (1 - fx) * fy),
        (side + 1, fx * fy),
    ):
        target.scatter_add_(2, (index + offset)[..., None], weight[..., None])
    return target * valid.flatten(1)[..., None]


def infonce(query: Tensor, template: Tensor, target: Tensor, temperature: Tensor | float) -> Tensor:
    """InfoNCE between the patches of each pair, in both directions (paper Eq. 4).

    Args:
        query, template: (B, C, 256) unit vectors. target: (B, 256, 256) from `soft_patch_targets`.
    """
    logits = (template.transpose(1, 2) @ query) / temperature
    rows = -(target * logits.log_softmax(2)).sum((1, 2))
    columns = -(target * logits.log_softmax(1)).sum((1, 2))
    # A patch that several others point to counts once in either direction.
    return 0.5 * ((rows + columns).sum() / per_process(target.sum()))


def affine_loss(
    translation: Tensor, scale: Tensor, cos_sin: Tensor, labels: AffineLabels
) -> dict[str, Tensor]:
    """L1 of the translation, |ln s - ln s^|, geodesic distance of the angle (paper Eq. 5)."""
    count = per_process(labels.weight.sum())

    def mean(values: Tensor) -> Tensor:
        return (values * labels.weight).sum() / count

    true = torch.stack([labels.angle.cos(), labels.angle.sin()], 1)
    cosine = (cos_sin * true).sum(1).clamp(-1 + 1e-6, 1 - 1e-6)
    return {
        "translation": mean((translation - labels.translation).abs().mean(1)),
        "scale": mean((scale.clamp(min=5e-3).log() - labels.scale.log()).abs()),
        "angle": mean(cosine.acos()),
    }


def offset_loss(
    levels: list[OffsetLevel],
    position: Tensor,
    valid: Tensor,
    reach: tuple[float, float, float] = (math.inf, math.inf, math.inf),
) -> dict[str, Tensor]:
    """Masked L1 of the flow and cross-entropy of the certainty at every grid (paper Eq. 6, 7).

    Args:
        levels: offset blocks. position: (B, 2, 64, 64) query crop px. valid: (B, 64, 64) in {0, 1}.
        reach: per grid, a label counts where it is nearer than this many cells to where the block starts:
            what lies outside its look-up window a block cannot learn, and should not be certain of.
    """
    flow_sum, certainty_sum = 0.0, 0.0
    for level, cells in zip(levels, reach, strict=True):
        grid = level.flow.shape[-1]
        at, visible = labels_at(position, valid, grid)
        label = flow_labels(at, grid)
        near = (label - level.flow_in).detach().abs().amax(1) < cells
        counted = visible * near
        error = (level.flow - label).abs().sum(1)
        flow_sum = flow_sum + (error * counted).sum() / per_process(counted.sum())
        certainty_sum = certainty_sum + F.binary_cross_entropy_with_logits(level.certainty[:, 0], counted)
    return {"flow": flow_sum, "certainty": certainty_sum}


def _similarity(position: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """Least-squares similarity source -> position as complex numbers turn * source + shift: turn (B,)."""
    total = weight.sum(1, keepdim=True).clamp(min=1)
    a = source - (source * weight).sum(1, keepdim=True) / total
    b = position - (position * weight).sum(1, keepdim=True) / total
    return (weight * a.conj() * b).sum(1) / (weight * a.abs().square()).sum(1).clamp(min=1e-6)


def scale_loss(levels: list[OffsetLevel], position: Tensor, valid: Tensor, cells: int = 12) -> Tensor:
    """How far the similarity transform of a whole flow is from the true one's: |ln scale| and |angle|.

    An error that is the same share of every cell's distance from the centre is small beside the noise of a
    cell, and yet is the error in depth. Mean over pairs and grids.

    Args:
        position: (B, 2, 64, 64) query crop px. valid: (B, 64, 64). cells: a pair counts from so many visible
            cells (of the coarsest grid) on.
    """
    total = 0.0
    for level in levels:
        side = level.flow.shape[-1]
        at, visible = labels_at(position, valid, side)
        label = flow_labels(at, side)
        near = ((label - level.flow).detach().abs().amax(1) < side / 8).float()
        weight = (visible * near).flatten(1)
        grid = grid_positions(side, position).float()
        source = torch.complex(grid[0], grid[1]).flatten()[None]
        ends = [torch.complex(*(grid + flow).float().unbind(1)).flatten(1) for flow in (level.flow, label)]
        turns = [_similarity(end, source, weight) for end in ends]
        counted = (weight.sum(1) >= cells * (side / GRIDS[0]) ** 2) & (turns[1].abs() > 0.1)
        ratio = turns[0] / torch.where(counted, turns[1], torch.ones_like(turns[1]))
        error = ratio.abs().clamp(min=0.1).log().abs() + torch.atan2(ratio.imag, ratio.real).abs()
        total = total + (error.clamp(max=0.3) * counted).sum() / per_process(counted.float().sum())
    return total / len(levels)


def correlation_loss(
    levels: list[OffsetLevel], position: Tensor, valid: Tensor, temperature: float = 0.07, cells: int = 256
) -> Tensor:
    """Contrastive loss on the features that stage 3 correlates: the mean over the three grids.

    The flow loss alone reaches them only through the look-up windows, and teaches them slowly.

    Args:
        position: (B, 2, 64, 64) query crop px. valid: (B, 64, 64). cells: most template cells per grid,
            evenly spread, for the sake of time.
    """
    total = 0.0
    for level in levels:
        side = level.flow.shape[-1]
        at, seen = labels_at(position, valid, side)
        step = max(1, side * side // cells)
        at, seen = at.flatten(2)[..., ::step], seen.flatten(1)[:, ::step]
        template = F.normalize(level.template.float(), dim=1).flatten(2)[..., ::step]
        query = F.normalize(level.query.float(), dim=1).flatten(2)
        target = soft_patch_targets(at, seen, side)
        logits = (template.transpose(1, 2) @ query / temperature).log_softmax(2)
        total = total - (target * logits).sum() / per_process(target.sum())
    return total / len(levels)


def noised_affine(labels: AffineLabels, generator: torch.Generator | None = None) -> AffineLabels:
    """A true affine with noise about the object's centre: where stage 3 starts from in training.

    Scale is multiplied by e^N(0, .1), the angle gets N(0, 8 deg), the translation N(0, 7 px) an axis.
    """
    batch, device = labels.scale.shape, labels.scale.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return AffineLabels(
        translation=labels.translation + normal(*batch, 2) * 0.5,
        scale=labels.scale * (0.1 * normal(*batch)).exp(),
        angle=labels.angle + 0.14 * normal(*batch),
        weight=labels.weight,
    )
