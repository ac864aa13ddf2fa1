"""What is minimised: the losses of the three stages on one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picopose_ros.model import PicoPose
from picopose_ros.model.affine import compose_affine
from picopose_ros.model.matching import patch_mask
from picopose_ros.synthetic.labels import labels_at
from picopose_ros.training.config import TrainConfig
from picopose_ros.training.data import Batch
from picopose_ros.training.losses import (
    AffineLabels,
    affine_loss,
    correlation_loss,
    infonce,
    noised_affine,
    offset_loss,
    scale_loss,
    soft_patch_targets,
)
from picopose_ros.training.released import released_losses


def share_generator(seed: int, step: int, share: int) -> torch.Generator:
    """The random numbers that a share of a step's losses need, on the CPU."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step + (share << 52))


class Objective(nn.Module):
    """All losses as one forward pass, which is what `DistributedDataParallel` wraps."""

    def __init__(self, model: PicoPose, config: TrainConfig) -> None:
        super().__init__()
        self.model, self._config = model, config

    def forward(
        self, batch: Batch, progress: float, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        """The weighted losses of this process's shares of a batch, one generator per share."""
        losses = released_losses if self._config.form == "released" else training_losses
        return losses(self.model, batch, self._config, progress, generators)


def _choose(
    batch: Batch, config: TrainConfig, generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Queries that go through stage 3, and which of them meet the wrong template."""
    queries = len(batch.own) // len(generators)
    count = min(config.refine_pairs // config.shares, queries)
    chosen = torch.cat(
        [n * queries + torch.randperm(queries, generator=g)[:count] for n, g in enumerate(generators)]
    )
    cross = torch.arange(count) < round(count * config.cross_share)
    return chosen, cross.repeat(len(generators))


def _noise(queries: int, generators: Sequence[torch.Generator]) -> AffineLabels:
    """What `noised_affine` makes of no motion, for this many queries a share."""
    still = AffineLabels(
        torch.zeros(queries, 2), torch.ones(queries), torch.zeros(queries), torch.ones(queries)
    )
    parts = [noised_affine(still, g) for g in generators]
    return AffineLabels(*(torch.cat([getattr(p, name) for p in parts]) for name in vars(still)))


def training_losses(
    model: PicoPose,
    batch: Batch,
    config: TrainConfig,
    progress: float,
    generators: torch.Generator | Sequence[torch.Generator],
) -> dict[str, Tensor]:
    """All weighted losses of a batch; their sum is what is minimised.

    Args:
        progress: how far `predicted_start` has grown, 0 to 1.
        generators: CPU generators, one per share of the batch.
    """
    if isinstance(generators, torch.Generator):
        generators = [generators]
    device = batch.query_rgb.device
    count = len(batch.template_rgb)
    features = model.encode(torch.cat([batch.template_rgb, batch.query_rgb]))
    template, query = features.descriptors[:count], features.descriptors[count:]
    template_patches, query_patches = patch_mask(batch.template_mask), patch_mask(batch.query_mask)
    losses: dict[str, Tensor] = {}

    at16, valid16 = labels_at(batch.position, batch.valid, 16)
    target = soft_patch_targets(at16, valid16)
    losses["match"] = config.match_weight * infonce(query, template[batch.own], target, model.temperature)

    # Retrieval: the own template has to score above another view of the same object.
    foreground = query_patches.flatten(1)
    scores = []
    for index in (batch.own, batch.other):
        similarity = query.transpose(1, 2) @ template[index]
        similarity = similarity.masked_fill(template_patches.flatten(1)[index][:, None] == 0, -1.0)
        scores.append((similarity.amax(2) * foreground).sum(1) / foreground.sum(1).clamp(min=1))
    losses["rank"] = config.rank_weight * F.softplus((scores[1] - scores[0]) / 0.05).mean()

    truth = batch.affine_labels()
    own = batch.own
    correspondence, anchor = model.correspond(
        query.detach(),
        template.detach()[own],
        query_patches,
        template_patches[own],
        batch.template_centre[own],
    )
    translation, scale, cos_sin = model.affine(correspondence.detach(), anchor)
    for name, value in affine_loss(translation, scale, cos_sin, truth).items():
        losses[name] = config.affine_weight * value

    chosen, cross = _choose(batch, config, generators)
    noise = _noise(len(own) // len(generators), generators)
    chance = torch.cat([torch.rand(len(chosen) // len(generators), generator=g) for g in generators])
    chosen, cross, chance = chosen.to(device), cross.to(device), chance.to(device)
    against = torch.where(cross, batch.other[chosen], batch.own[chosen])
    angle = (truth.angle + noise.angle.to(device))[chosen]
    affine = compose_affine(
        (truth.translation + noise.translation.to(device))[chosen],
        (truth.scale * noise.scale.to(device))[chosen],
        torch.stack([angle.cos(), angle.sin()], 1),
        batch.template_centre[own[chosen]],
    )
    predicted = compose_affine(
        translation.detach(), scale.detach(), cos_sin.detach(), batch.template_centre[own]
    )[chosen]
    # Stage 2's own answer, where it is near enough for the look-up windows to see the truth.
    near = (predicted - affine)[:, :2, 2].norm(dim=1) < 40
    use = (chance < config.predicted_start * progress) & near
    affine = torch.where(use[:, None, None], predicted, affine)

    maps = model.pyramid(features.taps)
    levels = model.refine(
        tuple(m[count:][chosen] for m in maps),
        tuple(m[:count][against] for m in maps),
        affine,
        template_patches[against],
    )
    position = torch.where(cross[:, None, None, None], batch.cross_position[chosen], batch.position[chosen])
    valid = torch.where(cross[:, None, None], batch.cross_valid[chosen], batch.valid[chosen])
    # Two cells beyond each look-up window: the warped features still tell the direction there.
    reach = tuple(block.radius + 2.0 for block in model.offsets.blocks)
    offset = offset_loss(levels, position, valid, reach)
    losses["flow"] = config.flow_weight * offset["flow"]
    losses["certainty"] = config.certainty_weight * offset["certainty"]
    if config.scale_weight:
        losses["similarity"] = config.scale_weight * scale_loss(levels, position, valid)
    losses["correlation"] = config.correlation_weight * correlation_loss(levels, position, valid)
    return losses
