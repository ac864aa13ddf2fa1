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


_AT_ONCE = 2**21
"""Values of a bank that a CPU converts and multiplies at once: they stay in its cache."""


def bank_scores(
    descriptors: Tensor, patches: Tensor, bank: Tensor, bank_patches: Tensor | None = None
) -> Tensor:
    """`match_scores_released`, or with ``bank_patches`` `match_scores_masked`, for all crops of an object.

    One product of a bank, which stays where and as it is, with the patches inside the masks of all crops;
    other patches count as zero, so nothing is computed of them.

    Args:
        descriptors: (B, C, 256) unit vectors; their type is computed in.
        patches: (B, 256) masks in {0, 1} on the CPU: they decide shapes, which the host has to know.
        bank: (N, C, 256) unit vectors of any float type. bank_patches: (N, 256) masks in {0, 1}.
    Returns:
        (B, N) scores, float32.
    """
    where = [mask.nonzero()[:, 0] for mask in patches]
    counts = [len(own) for own in where]
    crop = torch.repeat_interleave(torch.arange(len(patches)), torch.tensor(counts))
    device = descriptors.device
    crop, patch = torch.stack([crop, torch.cat(where)]).to(device, non_blocking=True)
    rows = descriptors.transpose(1, 2)[crop, patch]
    own_patch = patch.split(counts)
    scores = torch.zeros(len(patches), len(bank), device=device)
    step = max(_AT_ONCE // bank[0].numel(), 1) if device.type == "cpu" else len(bank)
    for start in range(0, len(bank), step):
        part = bank[start : start + step].to(rows.dtype)
        similarity = torch.bmm(rows.expand(len(part), -1, -1), part)
        if bank_patches is not None:
            similarity.masked_fill_(bank_patches[start : start + step, None] == 0, -1.0)
        for k, own in enumerate(similarity.split(counts, 1)):
            if counts[k] == 0:
                continue
            if bank_patches is not None:
                found = own.amax(2).float().mean(1)
            else:
                found = _released_scores(own, own_patch[k], starts_at_zero=int(where[k][0]) == 0)
            scores[k, start : start + step] = found
    return scores


def _released_scores(similarity: Tensor, patch: Tensor, starts_at_zero: bool) -> Tensor:
    """What `match_scores_released` gives, from the patches inside the mask alone.

    Args:
        similarity: (N, k, 256) of these. patch: (k,) which they are, ascending.
        starts_at_zero: whether patch 0 is among them.
    Returns:
        (N,) scores.
    """
    count, cells = similarity.shape[1:]
    elsewhere, at_zero = similarity[:, :, 1:].amax(2), similarity[:, :, 0]
    best = torch.maximum(elsewhere, at_zero).float()
    valid = elsewhere > at_zero
    # Is patch 0 the best match of a template patch? Those outside the mask have similarity 0 with all.
    if not starts_at_zero:
        valid &= (similarity.amax(1) > 0)[:, patch]
    elif count > 1:
        rest = similarity[:, 1:].amax(1)
        rest = rest.clamp(min=0) if count < cells else rest
        valid &= (rest > similarity[:, 0])[:, patch]
    else:
        valid &= (similarity[:, 0] < 0)[:, patch]
    return (best * valid).sum(1) / cells
