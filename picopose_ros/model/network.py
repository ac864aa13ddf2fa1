"""PicoPose: the three stages and their composition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picopose_ros.model.affine import (
    AffineRegressor,
    Anchor,
    compose_affine,
    correspondence_map,
    initial_flow,
    soft_correspondence_map,
)
from picopose_ros.model.agreement import match_agreement
from picopose_ros.model.backbone import make_backbone
from picopose_ros.model.config import ModelConfig
from picopose_ros.model.fast import FastStages, Schedule
from picopose_ros.model.features import Features
from picopose_ros.model.folding import fold_norms
from picopose_ros.model.matching import match_scores_masked, match_scores_released, patch_mask
from picopose_ros.model.offsets import OffsetLevel, OffsetRegressor
from picopose_ros.model.pyramid import make_pyramid


@dataclass
class Refinement:
    """Stages 2 and 3 for a batch of (query, template) pairs."""

    correspondence: Tensor
    """(B, K, 16, 16) input of stage 2."""
    translation: Tensor
    """(B, 2) tau, units of 14 crop px."""
    scale: Tensor
    """(B,)."""
    cos_sin: Tensor
    """(B, 2)."""
    affine: Tensor
    """(B, 3, 3) template crop px -> query crop px."""
    levels: list[OffsetLevel]
    """Offset blocks at 16, 32, 64."""

    @property
    def flow(self) -> Tensor:
        """(B, 2, 64, 64) final flow on the template's grid, cells."""
        return self.levels[-1].flow

    @property
    def certainty(self) -> Tensor:
        """(B, 1, 64, 64) final certainty logits."""
        return self.levels[-1].certainty


class PicoPose(nn.Module):
    """The three-stage network (paper arXiv 2504.02617); `config` decides its widths."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Slope and offset of the confidence's `Calibration`; measured, and kept with the weights.
        self.calibration: tuple[float, float] = (1.0, 0.0)
        # What :meth:`describer` gives in place of this module, for who onboards by another backend.
        self.encoder: Callable[[Tensor], Tensor] | None = None
        tap_dims = config.backbone.tap_dims
        self.backbone = make_backbone(config.backbone)
        if config.match_dim:
            self.match_head = nn.Conv2d(tap_dims[-1], config.match_dim, 1)
        self.affine = AffineRegressor(config.affine)
        self.pyramid = make_pyramid(tap_dims, config.neck)
        self.offsets = OffsetRegressor(config.neck.widths, config.offsets)
        if config.affine.input == "softmax":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))

    @property
    def temperature(self) -> Tensor:
        """Temperature of the softmax over patch similarities (stage 1's loss, stage 2's input)."""
        return self.log_temperature.clamp(math.log(0.01), 0.0).exp()

    def fast(self, schedule: Schedule | None = None) -> FastStages:
        """The stages arranged for inference with the weights of now, where they are now."""
        return FastStages(self, schedule)

    def encode(self, rgb: Tensor) -> Features:
        """Encode normalised crops (B, 3, 224, 224), channels in BGR order."""
        return self.described(self.backbone(rgb))

    def describer(self) -> Callable[[Tensor], Tensor]:
        """What makes (B, C, 256) unit vectors of normalised crops (B, 3, 224, 224), with the weights of now;
        banks keep those of templates."""
        if self.encoder is not None:
            return self.encoder
        backbone = fold_norms(self.backbone, packed=True)
        return lambda rgb: self.described(backbone(rgb)).descriptors

    def described(self, taps: tuple[Tensor, ...]) -> Features:
        """The features of crops whose taps are known."""
        last = self.match_head(taps[-1]) if self.config.match_dim else taps[-1]
        return Features(taps, F.normalize(last.flatten(2).float(), dim=1, eps=1e-12))

    def match(
        self, descriptors: Tensor, masks: Tensor, bank_descriptors: Tensor, bank_masks: Tensor
    ) -> Tensor:
        """Stage 1: how well each crop matches each template.

        Args:
            descriptors: (B, C, 256). masks: (B, 224, 224). bank_descriptors: (N, C, 256), any float type.
            bank_masks: (N, 224, 224).
        Returns:
            (B, N) scores.
        """
        foreground = patch_mask(masks).flatten(1)
        bank = bank_descriptors.to(descriptors.dtype)
        if not self.config.masked_matching:
            return torch.stack(
                [match_scores_released(d, m, bank) for d, m in zip(descriptors, foreground, strict=True)]
            )
        inside = patch_mask(bank_masks).flatten(1)
        return torch.stack(
            [match_scores_masked(d, m, bank, inside) for d, m in zip(descriptors, foreground, strict=True)]
        )

    @property
    def reranks(self) -> bool:
        """Whether stage 2 fits a motion to matches, so that :meth:`agreement` can be asked."""
        return self.config.affine.input == "softmax"

    def agreement(self, query: Tensor, cells: Tensor, bank: Tensor, bank_patches: Tensor) -> Tensor:
        """How well the matches with each template agree on one motion, see `match_agreement`.

        Args:
            query: (C, k) descriptors of a crop's foreground patches. cells: (k,) which of the 256 they are.
            bank: (N, C, 256) descriptors of templates. bank_patches: (N, 16, 16) their patch masks.
        Returns:
            (N,) in 0..1.
        """
        return match_agreement(query, cells, bank, bank_patches.flatten(1), self.temperature)

    def correspond(
        self,
        query: Tensor,
        template: Tensor,
        query_patches: Tensor,
        template_patches: Tensor,
        template_centre: Tensor,
    ) -> tuple[Tensor, Anchor | None]:
        """Stage 2's input from descriptors (B, C, 256), patch masks (B, 16, 16) and centres (B, 2)."""
        if self.config.affine.input == "cosine":
            return correspondence_map(query, template, template_patches), None
        return soft_correspondence_map(
            query, template, query_patches, template_patches, self.temperature, template_centre
        )

    def refine(
        self,
        query: tuple[Tensor, ...],
        template: tuple[Tensor, ...],
        affine: Tensor,
        template_patches: Tensor,
    ) -> list[OffsetLevel]:
        """Stage 3 from an affine, given both pyramids and the template's patch mask (B, 16, 16)."""
        # With half-pixel grids the affine holds everywhere: a border of cells that point to a corner would
        # bleed into the object when the flow is upsampled.
        flow = initial_flow(affine, None if self.config.offsets.half_pixel else template_patches)
        return self.offsets(template, query, flow, template_patches[:, None], affine)

    def regress(
        self,
        query: Features,
        template: Features,
        query_mask: Tensor,
        template_mask: Tensor,
        template_centre: Tensor,
    ) -> Refinement:
        """Stages 2 and 3 for B pairs of a crop and a template.

        Args:
            query, template: features of B crops each. query_mask, template_mask: (B, 224, 224).
            template_centre: (B, 2) the object's centre in the template crop, px.
        """
        query_patches, template_patches = patch_mask(query_mask), patch_mask(template_mask)
        correspondence, anchor = self.correspond(
            query.descriptors, template.descriptors, query_patches, template_patches, template_centre
        )
        translation, scale, cos_sin = self.affine(correspondence, anchor)
        affine = compose_affine(translation, scale, cos_sin, template_centre)
        levels = self.refine(self.pyramid(query.taps), self.pyramid(template.taps), affine, template_patches)
        return Refinement(correspondence, translation, scale, cos_sin, affine, levels)
