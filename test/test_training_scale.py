"""The loss on a flow's scale and rotation."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from picopose_ros.synthetic.labels import labels_at
from picopose_ros.training.losses import flow_labels, scale_loss


def labels(scale: float, degrees: float) -> tuple[Tensor, Tensor]:
    """Positions (1, 2, 64, 64) of a template turned and scaled about the crop's centre, and a round mask."""
    axis = (torch.arange(64) + 0.5) * 3.5 - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    a = math.radians(degrees)
    u, v = x - 112, y - 112
    position = (
        torch.stack([u * math.cos(a) - v * math.sin(a), u * math.sin(a) + v * math.cos(a)]) * scale + 112
    )
    return position[None], ((u**2 + v**2) < 80**2).float()[None]


def levels(position: Tensor, valid: Tensor) -> list[SimpleNamespace]:
    return [SimpleNamespace(flow=flow_labels(labels_at(position, valid, n)[0], n)) for n in (16, 32, 64)]


def test_the_true_flow_costs_nothing() -> None:
    position, valid = labels(0.9, 20)
    assert scale_loss(levels(position, valid), position, valid) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("scale", "degrees"), [(0.96, 0), (1.05, 0), (1.0, 3), (0.97, -2)])
def test_it_is_the_logarithm_of_the_scale_and_the_angle(scale: float, degrees: float) -> None:
    position, valid = labels(1.0, 0)
    moved, _ = labels(scale, degrees)
    expected = abs(math.log(scale)) + abs(math.radians(degrees))
    assert scale_loss(levels(moved, valid), position, valid) == pytest.approx(expected, rel=0.02)


def test_its_gradient_stretches_a_flow_that_shrinks() -> None:
    position, valid = labels(1.2, 0)
    factor = torch.tensor(0.97, requires_grad=True)
    shrunk = (position - 112) * factor + 112
    scale_loss(levels(shrunk, valid), position, valid).backward()
    assert factor.grad < 0


def test_cells_that_are_hidden_or_far_off_do_not_count() -> None:
    position, valid = labels(1.0, 0)
    moved = position.clone()
    moved[..., :20] += 60  # farther off than an eighth of the crop
    half = valid.clone()
    half[..., 30:] = 0  # hidden
    wrong = position.clone()
    wrong[..., 30:] *= 1.05
    assert scale_loss(levels(moved, valid), position, valid) < 0.01
    assert scale_loss(levels(wrong, half), position, half) < 0.01
    assert scale_loss(levels(wrong, valid), position, valid) > 0.01


def test_a_pair_without_visible_cells_counts_nothing() -> None:
    position, valid = labels(1.0, 0)
    assert scale_loss(levels(position * 1.1, valid * 0), position, valid * 0) == 0
