"""Stage 2: correspondence map -> 2D affine from template crop to query crop (paper Sec. III-C)."""

from __future__ import annotations

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


def soft_correspondence_map(
    query: Tensor, template: Tensor, query_mask: Tensor, template_mask: Tensor, temperature: Tensor
) -> Tensor:
    """Where each template patch goes, as a distribution over the crop's foreground patches.

    Args:
        query: (B, C, 256) unit vectors. template: (B, C, 256). query_mask, template_mask: (B, 16, 16).
    Returns:
        (B, 260, 16, 16) on the template's grid: 256 probabilities, their mean position (x, y) in
        [-1, 1], their maximum, the template's mask.
    """
    side = GRIDS[0]
    logits = torch.einsum("bcs,bct->bst", template, query).float() / temperature
    logits = logits.masked_fill(query_mask.flatten(1)[:, None] == 0, -1e4)
    probability = logits.softmax(2) * template_mask.flatten(1)[:, :, None]
    axis = (torch.arange(side, device=query.device, dtype=torch.float32) + 0.5) * 2 / side - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    position = probability @ torch.stack([x.flatten(), y.flatten()], 1)
    parts = [
        4 * probability,
        position,
        probability.amax(2, keepdim=True),
        template_mask.flatten(1)[:, :, None],
    ]
    return torch.cat(parts, 2).transpose(1, 2).unflatten(2, (side, side))


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
    matrix = torch.zeros(len(scale), 3, 3, dtype=linear.dtype, device=linear.device)
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
        channels = GRIDS[0] ** 2 + (4 if config.input == "softmax" else 0)
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

    def forward(self, correspondence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, 16, 16) -> translation (B, 2) in 14 crop px, scale (B,), in-plane (cos, sin) (B, 2)."""
        x = self.features(correspondence).flatten(1)
        x = F.leaky_relu(self.fc1(x), 0.1)
        x = F.leaky_relu(self.fc2(x), 0.1)
        scale = self.scale(x)[:, 0].float()
        if self.log_scale:
            scale = scale.clamp(-2.5, 2.5).exp()
        inplane = F.normalize(torch.tanh(self.inplane(x).float()), dim=1)
        return self.translation(x).float(), scale, inplane


def initial_flow(affine: Tensor, template_mask: Tensor) -> Tensor:
    """The affine as a flow on the template's 16x16 grid (paper Eq. 3, template -> query).

    Args:
        affine: (B, 3, 3) template crop px -> query crop px. template_mask: (B, 16, 16) in {0, 1}.
    Returns:
        (B, 2, 16, 16) flow (x, y) in cells. A cell's position is its integer index while the target is
        crop px / 14, so the identity has flow 0.5; cells outside the mask point to (0, 0).
    """
    side = GRIDS[0]
    axis = torch.arange(side, device=affine.device, dtype=affine.dtype)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centres = torch.stack([x.flatten(), y.flatten(), torch.zeros_like(x.flatten())], 0)
    centres[:2] = (centres[:2] + 0.5) * (CROP_SIZE / side)
    centres[2] = 1
    target = (affine[:, :2] @ centres).unflatten(2, (side, side)) / (CROP_SIZE / side)
    return target * template_mask[:, None] - torch.stack([x, y])
