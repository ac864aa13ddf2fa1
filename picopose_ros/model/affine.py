"""Stage 2: correspondence map -> 2D affine from template crop to query crop (paper Sec. III-C)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picopose_ros.model.config import CELL, CROP_SIZE, GRIDS, AffineConfig


def correspondence_map(query: Tensor, template: Tensor, template_mask: Tensor) -> Tensor:
    """The released network's input of stage 2.

    Args:
        query: (B, C, 256) unit vectors. template: (B, C, 256). template_mask: (B, 16, 16) in {0, 1}.
    Returns:
        (B, 256, 16, 16): channel = template patch (row-major), first spatial axis = query x, second =
        query y; cosine similarity, zero where negative or outside the template's mask.
    """
    similarity = torch.einsum("bct,bcs->bst", query, template)
    similarity = (similarity * template_mask.flatten(1)[:, :, None]).clamp(min=0)
    side = GRIDS[0]
    return similarity.unflatten(2, (side, side)).transpose(2, 3)


@dataclass
class Anchor:
    """The similarity transform that most patch matches of a pair agree on, about the object's centre."""

    translation: Tensor
    """(B, 2) tau, units of 14 crop px."""
    scale: Tensor
    """(B,)."""
    cos_sin: Tensor
    """(B, 2)."""


_SOFT_CHANNELS = 7
"""Channels of the soft correspondence map beside the 256 probabilities."""
_FIT_SCALES_PX = (60.0, 40.0, 25.0, 20.0, 15.0, 15.0)
"""Residual at which a match counts a quarter, per round of the anchor's fit."""


def _fit_similarity(source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least-squares similarity source -> target: linear part (B, 2, 2) and shift (B, 2)."""
    weight = weight[..., None]
    total = weight.sum(1, keepdim=True).clamp(min=1e-6)
    mean_source = (weight * source).sum(1, keepdim=True) / total
    mean_target = (weight * target).sum(1, keepdim=True) / total
    a, b = source - mean_source, target - mean_target
    spread = (weight * a * a).sum((1, 2)).clamp(min=1e-6)
    cos = (weight * a * b).sum((1, 2)) / spread
    sin = (weight[..., 0] * (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0])).sum(1) / spread
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return linear, mean_target[:, 0] - (linear @ mean_source[:, 0, :, None])[..., 0]


def patch_centres(like: Tensor) -> Tensor:
    """(256, 2) crop px (x, y) of the patches' centres."""
    axis = (torch.arange(GRIDS[0], device=like.device, dtype=torch.float32) + 0.5) * CELL - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def fit_matches(
    target: Tensor, confidence: Tensor, source: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The similarity transform that most template patches' matches agree on.

    Iteratively reweighted least squares with a redescending weight that tightens round by round, so that
    many matches may be wrong.

    Args:
        target: (B, P, 2) crop px (x, y) of each template patch's match. confidence: (B, P) in 0..1.
        source: (B, P, 2) crop px of these template patches' centres; None: all 256, row-major.
    Returns:
        Linear part (B, 2, 2) and shift (B, 2), crop px; weight (B, P) of each patch in the last fit.
    """
    if source is None:
        source = patch_centres(target).expand(target.shape[0], -1, -1)  # an exporter follows no len()
    weight = confidence
    linear, shift = _fit_similarity(source, target, weight)
    for scale_px in _FIT_SCALES_PX:
        residual = target - source @ linear.transpose(1, 2) - shift[:, None]
        squared = residual.square().sum(2)
        weight = confidence * (scale_px**2 / (scale_px**2 + squared)) ** 2
        linear, shift = _fit_similarity(source, target, weight)
    return linear, shift, weight


def soft_correspondence_map(
    query: Tensor,
    template: Tensor,
    query_mask: Tensor,
    template_mask: Tensor,
    temperature: Tensor,
    centre: Tensor,
) -> tuple[Tensor, Anchor]:
    """Where each template patch goes, and the similarity transform that most of them agree on.

    The anchor is what :func:`fit_matches` finds in every template patch's best match.

    Args:
        query: (B, C, 256) unit vectors. template: (B, C, 256). query_mask, template_mask: (B, 16, 16).
        centre: (B, 2) the object's centre in the template crop, px.
    Returns:
        (B, 263, 16, 16) on the template's grid: 256 probabilities, their mean position (x, y) in [-1, 1],
        their maximum, the template's mask, the best match's offset (x, y) from the anchor in units of
        56 px, its weight in the fit. And the anchor.
    """
    side = GRIDS[0]
    inside = template_mask.flatten(1)
    similarity = torch.einsum("bcs,bct->bst", template, query).float()
    similarity = similarity.masked_fill(query_mask.flatten(1)[:, None] == 0, -1e4)
    probability = (similarity / temperature).softmax(2) * inside[..., None]
    pixels = patch_centres(query)

    # Sharper than the probabilities: a match counts by how much better it is than its rivals.
    confidence = (similarity * 2 / temperature).softmax(2).amax(2) ** 2 * inside
    source, target = pixels.expand(query.shape[0], -1, -1), pixels[similarity.argmax(2)]
    linear, shift, weight = fit_matches(target, confidence)
    residual = target - source @ linear.transpose(1, 2) - shift[:, None]

    size = linear[:, :, 0].norm(dim=1)
    moved = (linear @ centre[:, :, None])[..., 0] + shift - centre
    anchor = Anchor(
        translation=(moved / CELL).clamp(-6, 6),
        scale=size.clamp(0.4, 2.5),
        cos_sin=linear[:, :, 0] / size.clamp(min=1e-6)[:, None],
    )
    parts = [
        4 * probability,
        probability @ (pixels * 2 / CROP_SIZE - 1),
        probability.amax(2, keepdim=True),
        inside[..., None],
        (residual / 56).clamp(-2, 2) * inside[..., None],
        weight[..., None],
    ]
    return torch.cat(parts, 2).transpose(1, 2).unflatten(2, (side, side)), anchor


def compose_affine(translation: Tensor, scale: Tensor, cos_sin: Tensor, centre: Tensor) -> Tensor:
    """The affine that moves the template's object centre c to c + 14 tau and rotates and scales about it.

    Args:
        translation: (B, 2) tau in units of 14 crop px. scale: (B,). cos_sin: (B, 2) unit vectors.
        centre: (B, 2) the object's centre in the template crop, px.
    Returns:
        (B, 3, 3) template crop px -> query crop px.
    """
    cos, sin = cos_sin[:, 0], cos_sin[:, 1]
    linear = scale[:, None, None] * torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    shift = centre + CELL * translation - (linear @ centre[:, :, None])[:, :, 0]
    matrix = torch.zeros(scale.shape[0], 3, 3, dtype=linear.dtype, device=linear.device)
    matrix[:, :2, :2] = linear
    matrix[:, :2, 2] = shift
    matrix[:, 2, 2] = 1
    return matrix


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)
    )


class AffineRegressor(nn.Module):
    """Two convolutions, two fully connected layers, three small heads."""

    def __init__(self, config: AffineConfig) -> None:
        super().__init__()
        self.log_scale = config.log_scale
        channels = GRIDS[0] ** 2 + (_SOFT_CHANNELS if config.input == "softmax" else 0)
        width = config.width
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.GroupNorm(32, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(32, width),
            nn.ReLU(),
        )
        first, second = config.hidden
        self.fc1 = nn.Linear(width * (GRIDS[0] // 2) ** 2, first)
        self.fc2 = nn.Linear(first, second)
        self.translation = _mlp(second, 2)
        self.scale = _mlp(second, 1)
        self.inplane = _mlp(second, 2)
        if config.input == "softmax":  # corrections of the anchor: start at none
            for head in (self.translation, self.scale, self.inplane):
                nn.init.normal_(head[-1].weight, std=1e-3)
                nn.init.zeros_(head[-1].bias)
            with torch.no_grad():
                self.inplane[-1].bias[0] = 1.0

    def forward(self, correspondence: Tensor, anchor: Anchor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Regress the affine, or with an anchor its correction.

        Args:
            correspondence: (B, K, 16, 16). anchor: where one is known.
        Returns:
            Translation (B, 2) in 14 crop px, scale (B,), in-plane (cos, sin) (B, 2).
        """
        x = self.features(correspondence).flatten(1)
        x = F.leaky_relu(self.fc1(x), 0.1)
        x = F.leaky_relu(self.fc2(x), 0.1)
        scale = self.scale(x)[:, 0].float()
        if self.log_scale:
            scale = scale.clamp(-2.5, 2.5).exp()
        inplane = F.normalize(torch.tanh(self.inplane(x).float()), dim=1)
        translation = self.translation(x).float()
        if anchor is None:
            return translation, scale, inplane
        cos, sin = anchor.cos_sin.unbind(1)
        turned = torch.stack(
            [cos * inplane[:, 0] - sin * inplane[:, 1], sin * inplane[:, 0] + cos * inplane[:, 1]], 1
        )
        return anchor.translation + translation, anchor.scale * scale, turned


def initial_flow(affine: Tensor, template_mask: Tensor | None) -> Tensor:
    """The affine as a flow on the template's 16x16 grid (paper Eq. 3, template -> query).

    Args:
        affine: (B, 3, 3) template crop px -> query crop px. template_mask: (B, 16, 16) in {0, 1}, or None.
    Returns:
        (B, 2, 16, 16) flow (x, y) in cells. A cell's position is its integer index while the target is
        crop px / 14, so the identity has flow 0.5; cells outside a given mask point to (0, 0).
    """
    side = GRIDS[0]
    axis = torch.arange(side, device=affine.device, dtype=affine.dtype)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centres = torch.stack([x.flatten(), y.flatten(), torch.zeros_like(x.flatten())], 0)
    centres[:2] = (centres[:2] + 0.5) * (CROP_SIZE / side)
    centres[2] = 1
    target = (affine[:, :2] @ centres).unflatten(2, (side, side)) / (CROP_SIZE / side)
    if template_mask is not None:
        target = target * template_mask[:, None]
    return target - torch.stack([x, y])
