"""The stages' own mathematics, beside what the parity fixture holds."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from picopose_ros.errors import ConfigError
from picopose_ros.model import PRESETS, PicoPose, preset
from picopose_ros.model.affine import compose_affine, initial_flow, soft_correspondence_map
from picopose_ros.model.matching import match_scores_masked, patch_mask
from picopose_ros.model.offsets import lookup_local, lookup_volume


@pytest.mark.parametrize(("radius", "levels"), [(2, 1), (2, 3), (3, 2)])
def test_both_lookups_agree_inside_and_outside_the_grid(radius: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    template, query = (torch.randn(2, 8, 16, 16, generator=generator, requires_grad=True) for _ in range(2))
    # From far outside on one side to far outside on the other, with whole and broken positions.
    position = torch.randn(2, 2, 16, 16, generator=generator) * 15 + 8
    position[:, :, ::2] = position[:, :, ::2].round()
    position.requires_grad_()
    volume = lookup_volume(template, query, position, radius, levels)
    local = lookup_local(template, query, position, radius, levels)
    assert volume.abs().max() > 1
    torch.testing.assert_close(volume, local, rtol=1e-4, atol=1e-4)
    weights = torch.randn(volume.shape, generator=generator)
    of_volume, of_local = (
        torch.autograd.grad((found * weights).sum(), (template, query, position))
        for found in (volume, local)
    )
    for a, b in zip(of_volume[:2], of_local[:2]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    # At a cell's centre the slope is either side's.
    broken = (position.detach() % 1).ne(0).all(1, keepdim=True).expand_as(position)
    if levels == 1:
        torch.testing.assert_close(of_volume[2][broken], of_local[2][broken], rtol=1e-3, atol=1e-3)


def test_what_is_no_position_is_outside_the_grid() -> None:
    maps = torch.ones(1, 4, 16, 16)
    position = torch.full((1, 2, 16, 16), 8.0)
    position[0, :, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e12])
    found = lookup_local(maps, maps, position, 2, 1)
    assert (found[0, :, 1:] == 4).all() and not (found[0, :, 0, :4] > 0).any()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_lookup_keeps_its_type(kind: torch.dtype) -> None:
    maps = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(kind)
    position = torch.full((1, 2, 16, 16), 7.5)
    assert lookup_local(maps, maps, position, 2, 1).dtype == kind


def test_the_anchor_finds_a_similarity_among_wrong_matches() -> None:
    generator = torch.Generator().manual_seed(3)
    axis = torch.arange(16) * 14 + 6.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([x.flatten(), y.flatten()], 1)
    angle, scale, shift = 0.5, 0.9, torch.tensor([6.0, -9.0])
    linear = scale * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    middle = torch.tensor([112.0, 112.0])
    target = (pixels - middle) @ linear.T + middle + shift
    query = torch.nn.functional.normalize(torch.randn(1, 64, 256, generator=generator), dim=1)
    nearest = torch.cdist(target, pixels).argmin(1)
    wrong = torch.rand(256, generator=generator) < 0.35
    nearest[wrong] = torch.randint(256, (int(wrong.sum()),), generator=generator)
    template = query[:, :, nearest]
    everywhere = torch.ones(1, 16, 16)
    maps, anchor = soft_correspondence_map(
        query, template, everywhere, everywhere, torch.tensor(0.07), middle[None]
    )
    assert maps.shape == (1, 263, 16, 16)
    assert anchor.scale.item() == pytest.approx(scale, abs=0.05)
    assert math.atan2(anchor.cos_sin[0, 1], anchor.cos_sin[0, 0]) == pytest.approx(angle, abs=0.05)
    torch.testing.assert_close(anchor.translation[0] * 14, shift, rtol=0, atol=4.0)


def test_an_affine_moves_its_centre_by_tau_and_becomes_a_flow() -> None:
    centre = torch.tensor([[100.0, 90.0]])
    affine = compose_affine(
        torch.tensor([[1.0, -2.0]]), torch.tensor([1.5]), torch.tensor([[0.0, 1.0]]), centre
    )
    moved = affine @ torch.cat([centre, torch.ones(1, 1)], 1)[:, :, None]
    torch.testing.assert_close(moved[0, :2, 0], torch.tensor([114.0, 62.0]))
    identity = initial_flow(torch.eye(3)[None], None)
    torch.testing.assert_close(identity, torch.full((1, 2, 16, 16), 0.5))
    masked = initial_flow(torch.eye(3)[None], torch.zeros(1, 16, 16))
    assert masked[0, 0, 3, 7] == -7 and masked[0, 1, 3, 7] == -3


def test_masked_scores_ignore_background_on_both_sides() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.nn.functional.normalize(torch.randn(16, 256, generator=generator), dim=0)
    bank = torch.nn.functional.normalize(torch.randn(2, 16, 256, generator=generator), dim=1)
    mask = torch.zeros(256)
    mask[:100] = 1
    bank[1, :, :100] = query[:, :100]
    bank[0, :, 156:] = query[:, :100]  # would match too, but lies outside the template's mask
    inside = torch.ones(2, 256)
    inside[0, 156:] = 0
    scores = match_scores_masked(query, mask, bank, inside)
    assert scores[1] == pytest.approx(1.0, abs=1e-5)
    assert scores[0] < 0.9
    changed = query.clone()
    changed[:, 100:] = 0
    torch.testing.assert_close(match_scores_masked(changed, mask, bank, inside), scores)
    assert match_scores_masked(query, torch.zeros(256), bank, inside).tolist() == [0, 0]


def test_patch_masks_take_the_top_left_pixel() -> None:
    mask = torch.zeros(1, 224, 224, dtype=torch.uint8)
    mask[0, 14, 28] = 1
    assert patch_mask(mask).nonzero().tolist() == [[0, 1, 2]]
    mask = torch.roll(mask, 1, 2)
    assert patch_mask(mask).sum() == 0


def test_presets_share_their_stages() -> None:
    tiny = PicoPose(preset("tiny"))
    with torch.device("meta"):
        vitl = PicoPose(preset("vitl"))
    for name in ("affine", "offsets"):
        assert type(getattr(tiny, name)) is type(getattr(vitl, name))
    # The released checkpoint without its dead tensors.
    assert sum(p.numel() for p in vitl.parameters()) == 380_905_417 - 5_845_441 - (1370 - 257) * 1024
    with pytest.raises(ConfigError, match=", ".join(PRESETS)):
        preset("huge")


COMPILER = """
import sys
import torch
import picopose_ros.node.node
from picopose_ros.model import load_model
load_model("tiny")
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
doubled = torch.compile(lambda x: 2 * x, backend="eager")
assert doubled(torch.ones(2)).tolist() == [2.0, 2.0] and "torch._dynamo" in sys.modules
from torchvision.ops import nms, roi_align
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu")
"""


def test_torchs_compiler_is_imported_when_it_is_used() -> None:
    """Its import takes a processor longer than all the others of the node."""
    done = subprocess.run([sys.executable, "-c", COMPILER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
