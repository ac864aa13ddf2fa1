"""Stage 1's second thought: which of the best matching templates have matches that agree on one motion."""

from __future__ import annotations

import torch
from torch import Tensor

from picopose_ros.model.affine import fit_matches, patch_centres

_SCALE_PX = 15.0
"""Distance at which a match counts a quarter: one patch, stage 2's last."""


def match_agreement(
    query: Tensor, query_mask: Tensor, bank: Tensor, bank_mask: Tensor, temperature: Tensor
) -> Tensor:
    """How much of a crop a similarity transform of each template explains.

    Patch by patch a wrong view can look as alike as the right one, but its matches lie in disorder. For each
    template the similarity transform that most of its patches' best matches agree on is fitted; then it is
    seen how near to each patch of the crop it brings the template's patch that matches best. Not in the
    paper.

    Args:
        query: (C, 256) unit vectors of one crop. query_mask: (256,) in {0, 1}.
        bank: (N, C, 256) unit vectors of templates. bank_mask: (N, 256) in {0, 1}.
        temperature: of the softmax over patch similarities.
    Returns:
        (N,) in 0..1, mean over the crop's foreground patches.
    """
    similarity = torch.einsum("ncs,ct->nst", bank.to(query.dtype), query).float()
    seen = similarity.masked_fill(query_mask == 0, -1e4)
    linear, shift, _ = fit_matches(seen, bank_mask, temperature)
    best = similarity.masked_fill(bank_mask[:, :, None] == 0, -1.0).argmax(1)
    pixels = patch_centres(query)
    moved = pixels @ linear.transpose(1, 2) + shift[:, None]
    squared = (moved.gather(1, best[..., None].expand(-1, -1, 2)) - pixels).square().sum(2)
    near = (_SCALE_PX**2 / (_SCALE_PX**2 + squared)).square() * query_mask
    return near.sum(1) / query_mask.sum().clamp(min=1)
