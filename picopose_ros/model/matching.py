"""Stage 1: match a crop's patches with every template's (paper Sec. III-B, Eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from picopose_ros.model.config import GRIDS


def patch_mask(mask: Tensor, grid: int = GRIDS[0]) -> Tensor:
    """A crop mask at the cells of a grid: the mask's value at each cell's top-left pixel.

    Args:
        mask: (B, 224, 224), any dtype, non-zero inside.
    Returns:
        (B, grid, grid) float in {0, 1}.
    """
    return F.interpolate(mask[:, None].float(), size=grid, mode="nearest")[:, 0].ne(0).float()


def match_scores_released(query: Tensor, query_mask: Tensor, bank: Tensor) -> Tensor:
    """Scores of the released network: mean over 256 of mutual-checked best similarities.

    Two quirks are part of it: the template's best index is tested at the query's patch, and a best
    match at patch 0 counts as none. Template masks play no part.

    Args:
        query: (C, 256) unit vectors of one crop. query_mask: (256,) in {0, 1}.
        bank: (N, C, 256) unit vectors.
    Returns:
        (N,) scores.
    """
    similarity = torch.einsum("ct,ncs->nts", query, bank) * query_mask[None, :, None]
    best, best_template = similarity.max(dim=2)
    best_query = similarity.argmax(dim=1)
    valid = query_mask[None] * (best_query != 0) * (best_template != 0)
    return (valid * best).sum(1) / query.shape[1]


def match_scores_masked(query: Tensor, query_mask: Tensor, bank: Tensor, bank_mask: Tensor) -> Tensor:
    """Mean over the crop's foreground patches of the best similarity to a template's foreground patch.

    Args:
        query: (C, 256) unit vectors. query_mask: (256,) in {0, 1}. bank: (N, C, 256). bank_mask: (N, 256).
    Returns:
        (N,) scores in [-1, 1].
    """
    patches = query[:, query_mask > 0]
    if patches.shape[1] == 0:
        return query.new_zeros(len(bank))
    similarity = torch.einsum("ct,ncs->nts", patches, bank)
    similarity = similarity.masked_fill(bank_mask[:, None] == 0, -1.0)
    return similarity.amax(2).mean(1)
