"""Reranking of stage 1: which of the best matching templates have matches that agree on one motion."""

from __future__ import annotations

import torch
from torch import Tensor

from picopose_ros.model.affine import fit_matches, patch_centres

_SCALE_PX = 15.0
"""Distance at which a match counts a quarter: one patch, stage 2's last."""


def match_agreement(
    query: Tensor, cells: Tensor, bank: Tensor, bank_mask: Tensor, temperature: Tensor
) -> Tensor:
    """How much of a crop a similarity transform of each template explains.

    Patch by patch a wrong view can match as well as the right one, but its matches are inconsistent. For each
    template the similarity transform that most of its patches' best matches agree on is fitted; then it is
    measured how near to each patch of the crop it brings the template's patch that matches best. Not in the
    paper.

    Args:
        query: (C, k) unit vectors of a crop's foreground patches. cells: (k,) which of the 256 they are.
        bank: (N, C, 256) unit vectors of templates. bank_mask: (N, 256) in {0, 1}.
        temperature: of the softmax over patch similarities.
    Returns:
        (N,) in 0..1, mean over the crop's foreground patches; 0 where there are none.
    """
    if len(cells) == 0:
        return query.new_zeros(len(bank), dtype=torch.float32)
    # Patches outside a template's mask count for nothing, so nothing is computed of them: those inside come
    # first, as many as in the template with most; what fills the others up is masked. Only on a CPU: asking
    # an accelerator for the number means waiting for it.
    count = bank_mask.shape[1]
    if bank_mask.device.type == "cpu":
        count = max(int(bank_mask.sum(1).amax()), 1)
    inside = bank_mask.argsort(dim=1, descending=True, stable=True)[:, :count]
    mask = bank_mask.gather(1, inside)
    bank = bank.gather(2, inside[:, None].expand(-1, bank.shape[1], -1)).to(query.dtype)
    similarity = torch.bmm(bank.transpose(1, 2), query.expand(len(bank), -1, -1)).float()
    best, match = similarity.max(2, keepdim=True)
    pixels = patch_centres(query)
    own = pixels[cells]
    matched = similarity.masked_fill(mask[:, :, None] == 0, -1.0).argmax(1)
    # Stage 2's confidence: the largest of the softmax, squared.
    confidence = similarity.sub_(best).mul_(2 / temperature).exp_().sum(2).reciprocal_().square_() * mask
    source = pixels[inside]
    linear, shift, _ = fit_matches(own[match[..., 0]], confidence, source)
    moved = source @ linear.transpose(1, 2) + shift[:, None]
    squared = (moved.gather(1, matched[..., None].expand(-1, -1, 2)) - own).square().sum(2)
    return (_SCALE_PX**2 / (_SCALE_PX**2 + squared)).square().mean(1)
