"""Stage 3: offset blocks at 16x16, 32x32 and 64x64 (paper Sec. III-D)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from picopose_ros.model.config import CROP_SIZE, GRIDS, OffsetConfig


@dataclass
class OffsetLevel:
    """What one offset block computed, on the template's grid of side n."""

    flow: Tensor
    """(B, 2, n, n) cumulative flow (x, y) in cells of this grid."""
    certainty: Tensor
    """(B, 1, n, n) cumulative logits."""
    flow_step: Tensor
    """(B, 2, n, n) what this block added to the flow."""
    certainty_step: Tensor
    """(B, 1, n, n) what this block added to the certainty."""
    flow_in: Tensor
    """(B, 2, n, n) the flow this block started from."""
    template: Tensor
    """(B, C, n, n) projected template features."""
    query: Tensor
    """(B, C, n, n) projected query features."""
    correlation: Tensor
    """(B, L (2r+1)^2, n, n) looked-up correlations."""
    motion: Tensor
    """(B, M, n, n) motion features."""
    residual: Tensor | None = None
    """(B, 2, n, n) with `aligned`: the flow less the affine, in cells of the template's axes."""


def grid_positions(n: int, like: Tensor) -> Tensor:
    """(2, n, n) integer (x, y) position of every cell."""
    axis = torch.arange(n, device=like.device, dtype=like.dtype)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y])


def _window(radius: int, like: Tensor) -> Tensor:
    """((2r+1)^2, 2) offsets (x, y); x is the slow axis, as in the released network."""
    axis = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def sample_at(features: Tensor, position: Tensor) -> Tensor:
    """Bilinear samples with zeros outside; integer positions are cell centres.

    Args:
        features: (B, C, h, w). position: (B, 2, ...) with (x, y) in cells, two trailing axes.
    Returns:
        (B, C, ...).
    """
    height, width = features.shape[-2:]
    scale = position.new_tensor([max(width - 1, 1), max(height - 1, 1)]).view(1, 2, 1, 1)
    grid = (position * 2 / scale - 1).permute(0, 2, 3, 1)
    return F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def lookup_volume(template: Tensor, query: Tensor, position: Tensor, radius: int, levels: int) -> Tensor:
    """Correlate all pairs of cells, then sample a window around each cell's position.

    Args:
        template, query: (B, C, n, n); the correlation is their dot product.
        position: (B, 2, n, n) where each template cell points to, in query cells.
    Returns:
        (B, levels (2r+1)^2, n, n).
    """
    batch, _, n, _ = template.shape
    volume = template.flatten(2).transpose(1, 2) @ query.flatten(2)
    volume = volume.reshape(batch * n * n, 1, n, n)
    centre = position.permute(0, 2, 3, 1).reshape(batch * n * n, 2, 1, 1)
    side = 2 * radius + 1
    window = _window(radius, position).T.reshape(1, 2, side, side)
    samples = []
    for level in range(levels):
        found = sample_at(volume, centre / 2**level + window)
        samples.append(found.reshape(batch, n, n, side * side))
        if level + 1 < levels:
            volume = F.avg_pool2d(volume, 2)
    return torch.cat(samples, 3).permute(0, 3, 1, 2)


def lookup_local(template: Tensor, query: Tensor, position: Tensor, radius: int, levels: int) -> Tensor:
    """`lookup_volume` without the volume: correlate only with the cells that are looked up.

    All samples of a window share their fraction of a cell, so (2r+2)^2 dot products with whole cells,
    mixed bilinearly, give all (2r+1)^2 samples.
    """
    batch, _, n, _ = template.shape
    side = 2 * radius + 1
    # Cells outside the grid count as zero. Where a row ends, the next one's border is the zeros on its right.
    border = 2 * radius + 2
    reach = torch.arange(side + 1, device=position.device, dtype=torch.int32)
    rows = template.flatten(2).transpose(1, 2).flatten(0, 1)
    samples = []
    for level in range(levels):
        if level:
            query = F.avg_pool2d(query, 2)
        size = query.shape[-1]
        wide = size + border
        table = F.pad(query, (border, 0, border, border + 1))
        centre = position.flatten(2) / 2**level
        base = centre.detach().floor()
        fraction = (centre - base).transpose(1, 2).reshape(-1, 2, 1, 1)
        # Integers are limited, not floats: what is no number points outside, too.
        first = base.int().clamp(-radius - 2, size + radius) + (border - radius)
        offset = torch.arange(batch, device=position.device, dtype=torch.int32) * (table[0, 0].numel())
        first = first[:, 0] + wide * first[:, 1] + offset[:, None]
        index = first.reshape(-1, 1) + (reach[:, None] + wide * reach).flatten()  # x is the slow axis
        dots = _dots(rows, table.flatten(2).transpose(1, 2).flatten(0, 1), index)
        dots = dots.unflatten(1, (side + 1, side + 1))
        dots = torch.lerp(dots[:, :, :-1], dots[:, :, 1:], fraction[:, 1].to(dots.dtype))
        dots = torch.lerp(dots[:, :-1], dots[:, 1:], fraction[:, 0].to(dots.dtype))
        samples.append(dots.reshape(batch, n, n, side * side))
    return (torch.cat(samples, 3) if levels > 1 else samples[0]).permute(0, 3, 1, 2)


def _dots(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Dot products of rows with some rows of a table.

    Args:
        rows: (m, C). table: (t, C). index: (m, k) int32, which of the table's.
    Returns:
        (m, k).
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        cells = F.embedding(index, table)
        # A compiler keeps what is gathered in registers.
        by_hand = torch.compiler.is_compiling()
        return (cells * rows[:, None]).sum(2) if by_hand else (cells @ rows[:, :, None])[..., 0]
    kind = torch.promote_types(rows.dtype, torch.float32)  # sparse products know no shorter types
    return _SparseDots.apply(rows.to(kind), table.to(kind), index).to(rows.dtype)


with warnings.catch_warnings():  # PyTorch says once per process that these tensors may change
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0])


class _SparseDots(torch.autograd.Function):
    """`_dots` on a CPU: entries of the product of two matrices, which a sparse matrix names.

    Nothing is gathered into memory, neither forward nor backward.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
        rows, table = rows.contiguous(), table.contiguous()
        ctx.save_for_backward(rows, table, index)
        count, width = index.shape
        entries = torch.sparse_csr_tensor(
            torch.arange(0, count * width + 1, width, dtype=torch.int32),
            index.flatten(),
            rows.new_zeros(count * width),  # zero times what is there must be zero
            (count, len(table)),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(entries, rows, table.T, beta=0).values().view(count, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, table, index = ctx.saved_tensors
        grad = grad.contiguous()
        of_rows = of_table = None
        if ctx.needs_input_grad[0]:
            of_rows = F.embedding_bag(index, table, per_sample_weights=grad, mode="sum")
        if ctx.needs_input_grad[1]:
            # PyTorch multiplies by a transposed sparse matrix only after it has sorted it, ten times slower.
            starts = torch.arange(0, index.numel() + 1, index.shape[1], dtype=torch.int32)
            parts = (grad.flatten().numpy(), index.flatten().numpy(), starts.numpy())
            entries = csr_matrix(parts, (len(rows), len(table)))
            of_table = torch.from_numpy(entries.T @ rows.numpy())
        return of_rows, of_table, None


def lookup_small(template: Tensor, query: Tensor, position: Tensor, radius: int, levels: int) -> Tensor:
    """`lookup_volume` on an accelerator, which multiplies fast; on a CPU `lookup_local`."""
    lookup = lookup_local if template.device.type == "cpu" else lookup_volume
    return lookup(template, query, position, radius, levels)


_LOOKUP = {"volume": lookup_small, "local": lookup_local}


def _norm(channels: int, norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm else nn.Identity()


class MotionEncoder(nn.Module):
    """Correlation window and flow -> motion features; the flow itself is appended."""

    def __init__(self, correlation: int, dims: tuple[int, int, int, int, int], norm: bool) -> None:
        super().__init__()
        corr1, corr2, flow1, flow2, out = dims
        self.corr = nn.ModuleList([nn.Conv2d(correlation, corr1, 1), nn.Conv2d(corr1, corr2, 3, padding=1)])
        self.flow = nn.ModuleList([nn.Conv2d(2, flow1, 7, padding=3), nn.Conv2d(flow1, flow2, 3, padding=1)])
        self.out = nn.Conv2d(corr2 + flow2, out, 3, padding=1)
        self.norms = nn.ModuleList([_norm(width, norm) for width in dims])

    def forward(self, correlation: Tensor, flow: Tensor) -> Tensor:
        x, y = correlation, flow
        for conv, norm in zip(self.corr, self.norms[:2], strict=True):
            x = F.relu(norm(conv(x)))
        for conv, norm in zip(self.flow, self.norms[2:4], strict=True):
            y = F.relu(norm(conv(y)))
        joint = self.norms[4](self.out(torch.cat([x, y], 1)))
        return torch.cat([F.relu(joint), flow.to(x.dtype)], 1)


class Head(nn.Module):
    """3x3 convolutions and a linear prediction."""

    def __init__(self, channels: int, dims: tuple[int, ...], out: int, kernel: int, norm: bool) -> None:
        super().__init__()
        widths = (channels, *dims)
        self.layers = nn.ModuleList(
            [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False)]
        )
        self.norms = nn.ModuleList([_norm(width, norm) for width in dims])
        self.predict = nn.Conv2d(widths[-1], out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return self.predict(x)


class OffsetBlock(nn.Module):
    """One grid: correlate around the current flow, warp the query, predict what to add."""

    def __init__(self, channels: int, config: OffsetConfig, level: int) -> None:
        super().__init__()
        dim = config.proj_dims[level]
        self.radius = config.radii[level]
        self.levels = config.levels[level]
        self.lookup = _LOOKUP[config.lookup[level]]
        self.cosine = config.cosine
        # A flow of a labelled pair is (crop px - 0.5) / cell - index; cell centres sit half a cell on.
        self.shift = GRIDS[level] / CROP_SIZE - 0.5 if config.half_pixel else 0.0
        self.proj = nn.Sequential(nn.Conv2d(channels, dim, 1), nn.BatchNorm2d(dim))
        if config.cosine:
            self.log_gain = nn.Parameter(torch.tensor(1.0))
        window = self.levels * (2 * self.radius + 1) ** 2
        self.encoder = MotionEncoder(window, config.motion_dims, config.norm)
        joint = 2 * dim + config.motion_dims[-1] + 2
        self.trunk: nn.Module = nn.Identity()
        if config.trunk_dims:
            width = config.trunk_dims[level]
            self.trunk = nn.Sequential(nn.Conv2d(joint, width, 1), _norm(width, config.norm), nn.ReLU())
            joint = width
        self.flow_head = Head(joint, config.head_dims[level], 2, 3, config.norm)
        self.certainty_head = Head(joint, config.certainty_dims[level], 1, 1, config.norm)
        if config.norm:
            nn.init.zeros_(self.flow_head.predict.weight)
            nn.init.zeros_(self.flow_head.predict.bias)

    def correlated(self, template: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Projected features (B, C, n, n) as those whose dot products are the correlations."""
        if self.cosine:
            gain = self.log_gain.exp()
            return gain * F.normalize(template.float(), dim=1), F.normalize(query.float(), dim=1)
        return template / math.sqrt(template.shape[1]), query

    def forward(
        self,
        template: Tensor,
        query: Tensor,
        flow: Tensor,
        certainty: Tensor,
        affine: Tensor | None = None,
    ) -> OffsetLevel:
        """One refinement.

        Args:
            template, query: (B, C, n, n). flow: (B, 2, n, n) cells, less the affine where one is given.
            certainty: (B, 1, n, n) logits. affine: (B, 3, 3) template crop px -> query crop px (`aligned`).
        """
        template, query = self.proj(template), self.proj(query)
        grid = grid_positions(flow.shape[-1], flow)
        if affine is None:
            seen, position = query, grid + flow + self.shift
        else:
            base = affine_flow(affine, flow.shape[-1])
            seen, position = sample_at(query, (grid + base + self.shift).to(query.dtype)), grid + flow
        corr_t, corr_q = self.correlated(template, seen)
        correlation = self.lookup(corr_t, corr_q, position, self.radius, self.levels)
        motion = self.encoder(correlation, flow)
        warped = sample_at(seen, position.to(seen.dtype))
        joint = self.trunk(torch.cat([template, warped, motion], 1))
        step = self.flow_head(joint).float()
        certainty_step = self.certainty_head(joint).float()
        flow_in, flow_step, residual = flow, step, None
        if affine is not None:
            residual = flow + step
            flow_in, flow_step = base + turned(affine, flow), turned(affine, step)
        return OffsetLevel(
            flow=flow_in + flow_step,
            certainty=certainty + certainty_step,
            flow_step=flow_step,
            certainty_step=certainty_step,
            flow_in=flow_in,
            template=template,
            query=query,
            correlation=correlation,
            motion=motion,
            residual=residual,
        )


def affine_flow(affine: Tensor, n: int) -> Tensor:
    """The flow label ((px - 0.5) / cell - index) of an affine at the cell centres of a grid.

    Args:
        affine: (B, 3, 3) template crop px -> query crop px.
    Returns:
        (B, 2, n, n) cells.
    """
    cell = CROP_SIZE / n
    grid = grid_positions(n, affine)
    centres = ((grid + 0.5) * cell - 0.5).flatten(1)
    target = affine[:, :2, :2] @ centres + affine[:, :2, 2:]
    return (target.unflatten(2, (n, n)) - 0.5) / cell - grid


def turned(affine: Tensor, flow: Tensor) -> Tensor:
    """A flow (B, 2, n, n) in the template's axes as one in the query's, by an affine (B, 3, 3)."""
    return (affine[:, :2, :2] @ flow.flatten(2)).unflatten(2, flow.shape[2:])


def double(x: Tensor, half_pixel: bool) -> Tensor:
    """A map (B, C, n, n) at twice the resolution (B, C, 2n, 2n)."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=not half_pixel)


class OffsetRegressor(nn.Module):
    """The three offset blocks, coarse to fine."""

    def __init__(self, widths: tuple[int, int, int], config: OffsetConfig) -> None:
        super().__init__()
        self.detach = config.detach
        self.half_pixel = config.half_pixel
        self.aligned = config.aligned
        self.blocks = nn.ModuleList([OffsetBlock(width, config, level) for level, width in enumerate(widths)])

    def forward(
        self,
        template: tuple[Tensor, ...],
        query: tuple[Tensor, ...],
        flow: Tensor,
        certainty: Tensor,
        affine: Tensor,
    ) -> list[OffsetLevel]:
        """Refine a flow from the 16x16 grid to the 64x64 grid.

        Args:
            template, query: three maps (B, C, n, n) each, n = 16, 32, 64.
            flow: (B, 2, 16, 16) initial flow in cells. certainty: (B, 1, 16, 16) initial logits.
            affine: (B, 3, 3) template crop px -> query crop px, which the flow came from.
        """
        levels: list[OffsetLevel] = []
        if self.aligned:
            flow = torch.zeros_like(flow)
        for block, t, q in zip(self.blocks, template, query, strict=True):
            if levels:
                last = levels[-1]
                if self.aligned:
                    flow = 2 * double(last.residual, True)
                else:
                    flow = 2 * double(last.flow, self.half_pixel) - 0.5 * self.half_pixel
                certainty = double(last.certainty, self.half_pixel)
                if self.detach:
                    flow, certainty = flow.detach(), certainty.detach()
            levels.append(block(t, q, flow, certainty, affine if self.aligned else None))
        return levels
