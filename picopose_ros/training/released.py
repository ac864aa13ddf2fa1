"""The paper's losses (Eq. 4-7) in the form of the released code, for the presets that have its network.

Two things differ from the released code unless `RELEASED` is asked for. Where paper and code disagree, the
paper holds (`ReleasedForm`). And the code's mistakes are mended (`ReleasedFlaws`); each can be switched on,
so that what it costs can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picopose_ros.model import PicoPose
from picopose_ros.model.affine import compose_affine
from picopose_ros.model.checkpoint import load_backbone
from picopose_ros.model.config import CELL, GRIDS
from picopose_ros.model.matching import patch_mask
from picopose_ros.model.offsets import OffsetLevel
from picopose_ros.synthetic.labels import LABEL_GRID
from picopose_ros.training.config import TrainConfig
from picopose_ros.training.data import Batch
from picopose_ros.training.distributed import per_process
from picopose_ros.training.losses import AffineLabels, affine_loss, flow_labels
from picopose_ros.training.pairs import PairLabels, QueryCrop, pair_labels
from picopose_ros.training.views import TemplateView

TEMPERATURE = 0.1
"""Of the InfoNCE loss; fixed, not learned."""
TOTAL_LIMIT = 100.0
"""The sum of all losses never exceeds this."""


@dataclass(frozen=True)
class ReleasedFlaws:
    """Mistakes of the released training code. All are mended; True brings one back."""

    mirrored_rotation: bool = False
    """The angle of the affine that noise is added to comes from an arc cosine, so that a negative one loses
    its sign: half of stage 3's starts are turned the wrong way."""
    corner_pivot: bool = False
    """Noise of angle and scale turns and scales about the crop's corner instead of the object's centre, so
    that it moves the object far more than its translation noise does."""
    negative_scale: bool = False
    """The noised scale's factor is kept above -0.5 instead of 0.5: it may vanish, and mirror the object."""
    self_occluded: bool = False
    """A template point that projects onto the visible mask is labelled visible, even where the object's own
    front hides it: no depth is compared."""


@dataclass(frozen=True)
class NoiseLevels:
    """Standard deviations of the noise on the affine that stage 3 starts from; a share draws one of each."""

    scale: tuple[float, ...] = (0.01, 0.05, 0.1, 0.15, 0.2)
    """Of the factor on the scale."""
    angle_deg: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 15.0)
    translation_px: tuple[float, ...] = (2.0, 5.0, 10.0, 15.0, 20.0)
    """Per axis, crop px."""


@dataclass(frozen=True)
class ReleasedForm:
    """Where the released code and the paper (or an unbiased label) differ. The defaults are the latter."""

    squared_scale: bool = False
    """(ln s - ln s^)^2 as in the code instead of |ln s - ln s^| as in the paper."""
    whole_pixels: bool = False
    """Labels rounded down to whole crop pixels. Their unbiased form is half a pixel below the true place,
    and what the decode adds back in either case."""
    noise: NoiseLevels = field(default_factory=NoiseLevels)
    flaws: ReleasedFlaws = field(default_factory=ReleasedFlaws)


PAPER = ReleasedForm()
"""The paper's losses, unflawed: what a training uses."""
RELEASED = ReleasedForm(squared_scale=True, whole_pixels=True, flaws=ReleasedFlaws(True, True, True, True))
"""Everything as the released code has it."""


def visibility_labels(
    template: TemplateView, query: QueryCrop, diagonal: float, flaws: ReleasedFlaws = PAPER.flaws
) -> PairLabels:
    """Labels of a pair: `pair_labels`, or without its depth check where that flaw is asked for."""
    # No depth difference is too large for an object of any size.
    return pair_labels(template, query, math.inf if flaws.self_occluded else diagonal)


def match_loss(query: Tensor, template: Tensor, position: Tensor, valid: Tensor) -> Tensor:
    """InfoNCE over all valid patch pairs of a share, template -> query (paper Eq. 4).

    Every pair's query patch is a negative of every other pair, also of other images.

    Args:
        query, template: (B, C, 256) unit vectors. position: (B, 2, 64, 64) query crop px of the template's
            cells. valid: (B, 64, 64) in {0, 1}.
    Returns:
        () the sum over the pairs.
    """
    side = GRIDS[0]
    step = LABEL_GRID // side
    x, y = (position[..., ::step, ::step] / CELL).floor().long().clamp(0, side - 1).flatten(2).unbind(1)
    counted = valid[:, ::step, ::step].flatten(1) > 0
    pair = torch.arange(len(query), device=query.device)[:, None].expand_as(counted)[counted]
    anchors = template.transpose(1, 2)[counted]
    targets = query.transpose(1, 2)[pair, (y * side + x)[counted]]
    logits = anchors.float() @ targets.float().T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(logits), device=query.device), reduction="sum")


def released_affine_loss(
    translation: Tensor, scale: Tensor, cos_sin: Tensor, labels: AffineLabels, form: ReleasedForm = PAPER
) -> dict[str, Tensor]:
    """L1 of the translation, log-scale, geodesic angle (paper Eq. 5); arguments as in `affine_loss`."""
    losses = affine_loss(translation, scale, cos_sin, labels)
    if form.squared_scale:
        squared = (scale.clamp(min=5e-3).log() - labels.scale.log()).square() * labels.weight
        losses["scale"] = squared.sum() / per_process(labels.weight.sum())
    return losses


def released_offset_loss(
    levels: list[OffsetLevel], position: Tensor, valid: Tensor, form: ReleasedForm = PAPER
) -> dict[str, Tensor]:
    """Masked L1 of the flow and cross-entropy of the certainty (paper Eq. 6, 7), grid by grid.

    A coarser grid's label is that of the 64x64 cell with 4 or 2 times its index: with grids aligned at their
    corners that is the cell it is upsampled onto.

    Args:
        levels: offset blocks. position: (B, 2, 64, 64) query crop px. valid: (B, 64, 64) in {0, 1}.
    Returns:
        `flow_16`, `certainty_16`, ... unweighted.
    """
    losses: dict[str, Tensor] = {}
    place = position.floor() + 0.5 if form.whole_pixels else position
    for level in levels:
        grid = level.flow.shape[-1]
        step = LABEL_GRID // grid
        label, visible = flow_labels(place[..., ::step, ::step], grid), valid[:, ::step, ::step]
        error = (level.flow - label).abs().sum(1)
        losses[f"flow_{grid}"] = (error * visible).sum() / per_process(visible.sum())
        losses[f"certainty_{grid}"] = F.binary_cross_entropy_with_logits(level.certainty[:, 0], visible)
    return losses


@dataclass
class AffineNoise:
    """One draw of noise for B affines."""

    factor: Tensor
    """(B,) on the scale, around 1."""
    angle: Tensor
    """(B,) radians."""
    shift: Tensor
    """(B, 2) crop px."""


def draw_noise(count: int, levels: NoiseLevels, generator: torch.Generator) -> AffineNoise:
    """Noise for the `count` affines of a share; one level of each kind for all of them."""

    def level(choices: tuple[float, ...]) -> float:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sigma, turn, shift = level(levels.scale), level(levels.angle_deg), level(levels.translation_px)
    return AffineNoise(
        factor=1 + sigma * normal(count),
        angle=(math.radians(turn) * normal(count)).clamp(-math.pi / 4, math.pi / 4),
        shift=(shift * normal(count, 2)).clamp(-56, 56),
    )


def noised_start(
    labels: AffineLabels, centre: Tensor, noise: AffineNoise, flaws: ReleasedFlaws = PAPER.flaws
) -> Tensor:
    """The affine that stage 3 starts from in training: the true one with noise.

    Args:
        labels: of B pairs. centre: (B, 2) the object's centre in the template crop, px.
    Returns:
        (B, 3, 3) template crop px -> query crop px.
    """
    factor = noise.factor.clamp(-0.5 if flaws.negative_scale else 0.5, 1.5)
    angle = labels.angle
    if flaws.mirrored_rotation:
        angle = angle.cos().acos()
    turned = angle + noise.angle
    cos_sin = torch.stack([turned.cos(), turned.sin()], 1)
    start = compose_affine(labels.translation + noise.shift / CELL, labels.scale * factor, cos_sin, centre)
    if flaws.corner_pivot:
        true_cos_sin = torch.stack([labels.angle.cos(), labels.angle.sin()], 1)
        true = compose_affine(labels.translation, labels.scale, true_cos_sin, centre)
        start[:, :2, 2] = true[:, :2, 2] + noise.shift
    return start


def _limited(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """All losses scaled down together where their sum is beyond the limit.

    A plain clamp of the sum has the same value but no gradient, so that such a step would teach nothing.
    """
    total = sum(value.detach() for value in losses.values())
    factor = (TOTAL_LIMIT / total.clamp(min=1e-9)).clamp(max=1.0)
    return {name: value * factor for name, value in losses.items()}


def _affine_labels(batch: Batch) -> AffineLabels:
    if batch.pose_affine is None:
        return batch.affine_labels()
    pose = batch.pose_affine
    return AffineLabels(pose[:, :2], pose[:, 2], pose[:, 3], batch.usable)


def released_losses(
    model: PicoPose,
    batch: Batch,
    config: TrainConfig,
    progress: float,
    generators: Sequence[torch.Generator],
    form: ReleasedForm = PAPER,
) -> dict[str, Tensor]:
    """All weighted losses of a batch in the paper's form; their sum is what is minimised.

    All pairs go through all stages with their own template, a share `cross_share` of them through stage 3
    with another one of the same object. Stage 3 starts from the noised truth, never from stage 2's answer.

    Args:
        batch: its queries are the shares' queries one after the other, the same number each.
        progress: not used; the interface is that of `training_losses`.
        generators: one on the CPU per share of the batch.
    """
    queries, shares = len(batch.own), len(generators)
    own, device = batch.own, batch.own.device
    cross = torch.zeros(queries, dtype=torch.bool)
    share_of = torch.arange(queries) * shares // queries
    noises = []
    for share, generator in enumerate(generators):
        members = (share_of == share).nonzero()[:, 0]
        wrong = torch.randperm(len(members), generator=generator)[: round(len(members) * config.cross_share)]
        cross[members[wrong]] = True
        noises.append(draw_noise(len(members), form.noise, generator))
    cross = cross.to(device)
    noise = AffineNoise(
        *(torch.cat([getattr(n, name) for n in noises]).to(device) for name in ("factor", "angle", "shift"))
    )

    # Only the templates that take part go through the backbone.
    against = torch.where(cross, batch.other, own)
    used, place = torch.cat([own, against]).unique(return_inverse=True)
    own_place, against_place = place[:queries], place[queries:]
    features = model.encode(torch.cat([batch.template_rgb[used], batch.query_rgb]))
    template, query = features.descriptors[: len(used)], features.descriptors[len(used) :]
    template_patches, query_patches = patch_mask(batch.template_mask[used]), patch_mask(batch.query_mask)

    step = LABEL_GRID // GRIDS[0]
    matched = 0.0
    for share in range(shares):
        members = (share_of == share).to(device)
        matched = matched + match_loss(
            query[members], template[own_place[members]], batch.position[members], batch.valid[members]
        )
    losses = {
        "match": config.match_weight
        * matched
        / per_process(batch.valid[:, ::step, ::step].gt(0).float().sum())
    }

    truth, centre = _affine_labels(batch), batch.template_centre[own]
    correspondence, anchor = model.correspond(
        query, template[own_place], query_patches, template_patches[own_place], centre
    )
    translation, scale, cos_sin = model.affine(correspondence, anchor)
    for name, value in released_affine_loss(translation, scale, cos_sin, truth, form).items():
        losses[name] = config.affine_weight * value

    maps = model.pyramid(features.taps)
    levels = model.refine(
        tuple(m[len(used) :] for m in maps),
        tuple(m[: len(used)][against_place] for m in maps),
        noised_start(truth, centre, noise, form.flaws),
        template_patches[against_place],
    )
    position = torch.where(cross[:, None, None, None], batch.cross_position, batch.position)
    valid = torch.where(cross[:, None, None], batch.cross_valid, batch.valid)
    weights = {"flow": config.flow_weight, "certainty": config.certainty_weight}
    for name, value in released_offset_loss(levels, position, valid, form).items():
        losses[name] = weights[name.split("_")[0]] * value
    return _limited(losses)


def start_released(model: PicoPose, backbone: str | Path | None = None) -> None:
    """What the released network is trained from: DINOv2 in the backbone, Xavier-uniform weights in stage 2.

    Args:
        model: of a released preset, freshly made.
        backbone: DINOv2's published weights, as `load_backbone` reads them; None: the backbone starts from
            nothing.
    Raises:
        CheckpointError: the file can't be read, or does not fit the preset's backbone.
    """
    for parameter in model.affine.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    if backbone is not None:
        load_backbone(model, backbone)
