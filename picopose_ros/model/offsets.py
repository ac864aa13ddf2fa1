"""Stage 3: offset blocks at 16x16, 32x32 and 64x64 (paper Sec. III-D)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    reach = torch.arange(-radius, radius + 2, device=position.device)
    rows = template.flatten(2).transpose(1, 2)
    samples = []
    for level in range(levels):
        if level:
            query = F.avg_pool2d(query, 2)
        size = query.shape[-1]
        centre = position.flatten(2).transpose(1, 2) / 2**level
        base = centre.detach().floor()
        fraction = centre - base
        # Cells outside the grid count as zero: a border of zeros wide enough for every clamped window.
        pad = radius + 2
        base = base.clamp(-pad, size + pad).long()
        x = (base[:, :, 0:1] + reach).clamp(-1, size) + 1
        y = (base[:, :, 1:2] + reach).clamp(-1, size) + 1
        padded = size + 2
        index = y[:, :, :, None] * padded + x[:, :, None, :]
        table = F.pad(query, (1, 1, 1, 1)).flatten(2).transpose(1, 2)
        dots = _dots(rows, table, index.flatten(2)).reshape(batch, n * n, side + 1, side + 1)
        fx = fraction[:, :, 0, None, None]
        fy = fraction[:, :, 1, None, None]
        dots = dots[:, :, :-1] * (1 - fy) + dots[:, :, 1:] * fy
        dots = dots[:, :, :, :-1] * (1 - fx) + dots[:, :, :, 1:] * fx
        # (y, x) -> x slow
        samples.append(dots.transpose(2, 3).reshape(batch, n, n, side * side))
    return torch.cat(samples, 3).permute(0, 3, 1, 2)


_PAYS = 60
"""On a CPU so many products of a matrix take the time of one of gathered values."""
_AT_ONCE = {"cpu": 2**18, "cuda": 2**27}
"""Values gathered or computed at once for dot products: what a cache holds, or what memory allows."""


def _dots(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Dot products of rows with some rows of a table.

    Args:
        rows: (B, m, C). table: (B, t, C). index: (B, m, k) which of the table's.
    Returns:
        (B, m, k).
    """
    batch, size, channels = table.shape
    count, kind = index.shape[2], rows.device.type
    at_once = _AT_ONCE.get(kind, 2**27)
    # Every part would have a gradient of the whole table; a compiler keeps what is gathered in registers.
    undivided = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if size < _PAYS * count and not undivided:  # all of them, and take what is named
        step = max(at_once // size, 1)
        found = [
            (part @ whole.T).gather(1, names)
            for own, whole, i in zip(rows, table, index)
            for part, names in zip(own.split(step), i.split(step))
        ]
        return torch.cat(found).view_as(index)
    index = index + torch.arange(batch, device=index.device).view(-1, 1, 1) * size
    index, rows, table = index.flatten(0, 1), rows.reshape(-1, channels, 1), table.reshape(-1, channels)
    step = len(rows) if undivided else max(at_once // (count * channels), 1)
    # A CPU's batched product takes matrices one by one.
    by_hand = torch.compiler.is_compiling() or (kind == "cpu" and not torch.is_grad_enabled())
    found = []
    for own, names in zip(rows.split(step), index.split(step)):
        cells = F.embedding(names, table)
        found.append((cells * own.transpose(1, 2)).sum(2) if by_hand else (cells @ own)[..., 0])
    return torch.cat(found).view(batch, -1, count)


_LOOKUP = {"volume": lookup_volume, "local": lookup_local}


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
