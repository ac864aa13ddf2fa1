"""Templates are put in order by how well their matches agree on one motion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from picopose_ros.errors import ConfigError
from picopose_ros.estimator import EstimatorSettings
from picopose_ros.model.agreement import match_agreement

TEMPERATURE = torch.tensor(0.07)


def features(seed: int) -> torch.Tensor:
    """(32, 256) unit vectors, one per patch."""
    drawn = torch.randn(32, 256, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=0)


def moved(source: torch.Tensor, quarter_turns: int, right: int) -> torch.Tensor:
    """The patches of a crop, turned and shifted."""
    grid = source.unflatten(1, (16, 16))
    return torch.roll(torch.rot90(grid, quarter_turns, (1, 2)), right, 2).flatten(1)


def agreement(
    query: torch.Tensor, mask: torch.Tensor, bank: torch.Tensor, masks: torch.Tensor
) -> torch.Tensor:
    """`match_agreement` of the patches inside a mask (256,)."""
    cells = mask.nonzero()[:, 0]
    return match_agreement(query[:, cells], cells, bank, masks, TEMPERATURE)


def disc() -> torch.Tensor:
    """(256,) a round mask in the middle of a crop."""
    y, x = np.mgrid[:16, :16] - 7.5
    return torch.from_numpy((np.hypot(x, y) < 5).astype(np.float32)).flatten()


@pytest.mark.parametrize("turns, right", [(0, 0), (1, 0), (2, 2), (3, -2)])
def test_a_moved_view_agrees_and_one_in_disorder_does_not(turns: int, right: int) -> None:
    template, inside = features(0), disc()
    query, mask = moved(template, turns, right), moved(inside[None], turns, right)[0]
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    # The same patches, every one of which has its perfect match, in another order.
    cells = inside.nonzero()[:, 0]
    mixed = template.clone()
    mixed[:, cells] = template[:, cells[order[order < len(cells)]]]
    bank, masks = torch.stack([mixed, template]), torch.stack([inside, inside])
    wrong, right_one = agreement(query, mask, bank, masks)
    assert right_one > 0.99
    assert wrong < 0.35


def test_what_is_hidden_in_the_crop_counts_for_nothing() -> None:
    template, inside = features(2), disc()
    half = inside * (torch.arange(256) % 16 < 8)
    assert agreement(template, half, template[None], inside[None]) > 0.95


def test_nothing_to_see_is_no_agreement() -> None:
    template, nothing = features(3), torch.zeros(256)
    both = torch.stack([nothing, disc()])
    assert agreement(template, nothing, template.expand(2, -1, -1), both).tolist() == [0, 0]
    assert torch.isfinite(agreement(template, disc(), template[None], nothing[None])).all()


def test_a_negative_number_of_templates_is_refused() -> None:
    with pytest.raises(ConfigError, match="rerank is -1"):
        EstimatorSettings(rerank=-1)
