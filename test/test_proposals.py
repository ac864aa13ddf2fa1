"""Proposals, their matching with template banks, and the segmenter of both."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picopose_ros.errors import ConfigError, SegmentError
from picopose_ros.estimation.settings import resolve_precision
from picopose_ros.geometry.crops import CropBox, crop_box_from_mask, crop_rgb
from picopose_ros.model import PicoPose, load_model
from picopose_ros.segmentation.matching import (
    Match,
    MatchSettings,
    TemplateMatcher,
    patch_similarity,
    silhouette,
    suppress,
)
from picopose_ros.segmentation.proposals import (
    Picture,
    SourceOptions,
    check_proposals,
    proposal_source,
)
from picopose_ros.segmentation.proposals.builtin import MOST, find_cells, propose
from picopose_ros.segmentation.search import BankSearch
from picopose_ros.segmentation.segmenter import Segmenter
from picopose_ros.templates.bank import TemplateBank

SIZE = 240, 320


def filled(left: int, top: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return np.count_nonzero(one & other) / np.count_nonzero(one | other)


# Proposals.

THINGS = {(40, 60, 70, 80): (200, 40, 30), (180, 90, 90, 60): (30, 160, 60)}


@pytest.fixture(scope="module")
def picture() -> Picture:
    """A red and a green thing on a noisy grey table."""
    rng = np.random.default_rng(3)
    rgb = np.full((*SIZE, 3), 120.0)
    for place, colour in THINGS.items():
        rgb[filled(*place)] = colour
    return Picture(np.clip(rgb + rng.normal(0, 5, rgb.shape), 0, 255).astype(np.uint8))


def test_things_of_one_colour_are_proposed(picture: Picture) -> None:
    masks = propose(picture)
    assert 0 < len(masks) <= MOST
    assert all(mask.shape == SIZE and mask.dtype == bool and mask.any() for mask in masks)
    for place in THINGS:
        assert max(iou(mask, filled(*place)) for mask in masks) > 0.85


def test_what_only_depth_tells_apart_is_proposed() -> None:
    rng = np.random.default_rng(4)
    rgb = np.clip(rng.normal(120, 4, (*SIZE, 3)), 0, 255).astype(np.uint8)
    thing = filled(100, 60, 90, 100)
    depth = np.where(thing, 0.8, 1.0).astype(np.float32)
    depth[::7] = 0  # not measured
    without = max((iou(mask, thing) for mask in propose(Picture(rgb))), default=0.0)
    best = max(iou(mask, thing) for mask in propose(Picture(rgb, depth)))
    assert best > 0.75 and best > without


@pytest.mark.parametrize("size", [(8, 8), (5, 300), (1080, 1920)])
def test_images_of_any_size_have_cells(size: tuple[int, int]) -> None:
    rgb = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    cells = find_cells(Picture(rgb))
    assert cells.labels.min() == 0 and cells.labels.max() == len(cells.area) - 1
    assert cells.area.sum() == cells.labels.size
    if size[0] < 1000:
        assert all(mask.shape == size for mask in propose(Picture(rgb)))


def own_source(picture: Picture) -> list[np.ndarray]:
    """A proposal source of a user's."""
    return [picture.rgb[..., 0] > 150]


def test_a_source_of_ones_own_is_named_by_its_module(picture: Picture) -> None:
    sys.modules["my_segmenter"] = module = types.ModuleType("my_segmenter")
    module.propose = own_source
    source = proposal_source("my_segmenter:propose")
    assert iou(source(picture)[0], filled(40, 60, 70, 80)) > 0.95
    with pytest.raises(ConfigError, match="choose one of builtin, boxes, sam, sam2, fastsam"):
        proposal_source("yolo")
    for name in ("no_such_module:propose", "my_segmenter:other"):
        with pytest.raises(ConfigError, match=f"'{name}' can't be imported"):
            proposal_source(name)


@pytest.mark.parametrize("name", ["sam", "sam2", "fastsam"])
def test_sources_with_weights_say_what_is_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"proposals '{name}' need weights: name the file"):
        proposal_source(name)
    with pytest.raises(ConfigError, match="are not there"):
        proposal_source(name, SourceOptions(tmp_path / "none.pt"))


@pytest.mark.parametrize(
    ("name", "package"), [("sam", "segment_anything"), ("sam2", "sam2"), ("fastsam", "ultralytics")]
)
def test_without_its_package_a_source_is_refused(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"nothing")
    for module in [m for m in sys.modules if m.split(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"'{name}' need the package"):
        proposal_source(name, SourceOptions(weights))


def test_what_a_source_gives_is_checked(picture: Picture) -> None:
    good = filled(40, 60, 70, 80)
    masks, wrong = check_proposals([good, good.astype(np.uint8), ~filled(0, 0, 320, 240)], picture.rgb)
    assert len(masks) == 2 and wrong == "" and all(mask.dtype == bool for mask in masks)
    masks, wrong = check_proposals([good[:100], good], picture.rgb)
    assert len(masks) == 1 and "proposal 0 has shape (100, 320), the image (240, 320)" in wrong
    assert check_proposals([], picture.rgb) == ([], "")
    with pytest.raises(SegmentError, match="no list of masks"):
        check_proposals(None, picture.rgb)  # type: ignore[arg-type]


# Matching.


def test_the_same_patches_are_most_alike_and_parts_are_less() -> None:
    torch.manual_seed(1)
    template = torch.nn.functional.normalize(torch.randn(64, 256), dim=0)
    other = torch.nn.functional.normalize(torch.randn(64, 256), dim=0)
    whole = torch.zeros(16, 16)
    whole[:, 4:12] = 1
    part = whole.clone()
    part[8:] = 0
    crops = torch.stack([template, template, other, other])
    masks = torch.stack([whole, part, whole, 0 * whole])
    both = torch.stack([template, template]).expand(4, -1, -1, -1)
    found = patch_similarity(crops, masks, both.half(), torch.stack([whole, part]).expand(4, -1, -1, -1))
    assert found.shape == (4, 2)
    assert found[:2].numpy() == pytest.approx(np.array([[1.0, 0.5**0.5], [0.5**0.5, 1.0]]), abs=0.02)
    assert float(found[2].max()) < 0.2 and float(found[3].max()) == 0.0


def small_bank(masks: np.ndarray) -> TemplateBank:
    count = len(masks)
    return TemplateBank(
        class_id="thing",
        images=np.zeros((count, 8, 8, 3), np.uint8),
        boxes=np.tile([0, 0, 8], (count, 1)).astype(np.int32),
        masks=masks,
        points_nearest=np.zeros((count, 64, 64, 3), np.float32),
        points_consistent=np.zeros((count, 64, 64, 3), np.float32),
        T_cam_ctr=np.tile(np.eye(4, dtype=np.float32), (count, 1, 1)),
        centre=np.zeros(3),
        M_crop_img=np.tile(np.eye(3, dtype=np.float32), (count, 1, 1)),
        K=np.eye(3),
        descriptors=np.zeros((count, 4, 256), np.float16),
        extents=np.ones(3),
        diameter=1.0,
    )


def test_a_silhouette_lies_where_the_affine_puts_it() -> None:
    masks = np.zeros((1, 224, 224), bool)
    masks[0, 56:168, 56:168] = True
    box = CropBox(100, 40, 112)  # two crop pixels are one image pixel
    np.testing.assert_array_equal(
        silhouette(small_bank(masks), 0, np.eye(3), box, SIZE), filled(128, 68, 56, 56)
    )
    moved = np.array([[1.0, 0, 20], [0, 1, 0], [0, 0, 1]])
    assert iou(silhouette(small_bank(masks), 0, moved, box, SIZE), filled(138, 68, 56, 56)) > 0.95
    beyond = np.array([[1.0, 0, 2000], [0, 1, 0], [0, 0, 1]])
    assert not silhouette(small_bank(masks), 0, beyond, box, SIZE).any()
    assert not silhouette(small_bank(masks), 0, np.full((3, 3), np.nan), box, SIZE).any()


def test_doubles_the_unsure_and_the_too_many_are_dropped() -> None:
    settings = MatchSettings(min_score=0.3, per_class=2, overlap=0.5)
    one = Match("cup", 0.9, filled(0, 0, 40, 40), 0)
    inside = replace(one, class_id="can", score=0.8, mask=filled(5, 5, 20, 20))
    apart = replace(one, score=0.7, mask=filled(30, 0, 40, 40))
    unsure = replace(one, score=0.2, mask=filled(100, 0, 40, 40))
    third = replace(one, score=0.5, mask=filled(150, 0, 40, 40))
    other = replace(third, class_id="can", score=0.4, mask=filled(200, 0, 40, 40))
    assert suppress([third, unsure, apart, inside, one, other], settings) == [one, apart, other]
    assert suppress([], settings) == []


# The whole segmenter, with a network that was never trained.


@pytest.fixture(scope="module")
def model(assets: dict[str, Path]) -> PicoPose:
    return load_model("tiny", assets["weights"], torch.device("cpu"))


@pytest.fixture(scope="module")
def banks(assets: dict[str, Path], model: PicoPose) -> dict[str, TemplateBank]:
    from picopose_ros.templates.bank import onboard

    return onboard(assets["mesh_dir"], model, 42, cache_dir=assets["cache_dir"]).banks


def test_segments_of_known_objects_come_out(
    model: PicoPose, banks: dict[str, TemplateBank], scene: Any
) -> None:
    truth = [segment.mask for segment in scene.segments]
    settings = MatchSettings(min_score=0.0, per_class=3)
    segmenter = Segmenter(model, banks, lambda picture: truth, False, settings)
    found = segmenter.segment(Picture(scene.rgb))
    assert found.proposals == 3 and found.problem == ""
    assert 1 <= len(found.segments) <= 3 and {s.class_id for s in found.segments} <= {"block", "can"}
    scores = [segment.score for segment in found.segments]
    assert scores == sorted(scores, reverse=True) and all(0 <= score <= 1 for score in scores)
    assert {"propose", "search", "match", "total"} == set(found.timings)

    searched = BankSearch(segmenter.matcher)(Picture(scene.rgb))
    assert searched and all(mask.shape == scene.rgb.shape[:2] and mask.any() for mask in searched)


def test_another_backend_encodes_proposals_too(
    model: PicoPose, banks: dict[str, TemplateBank], monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = np.random.default_rng(6).normal(size=(9, 3, 224, 224)).astype(np.float32)
    own = TemplateMatcher(model, banks).encode(crops)
    with torch.inference_mode():
        assert (own[3] - model.encode(torch.from_numpy(crops[3:4])).descriptors[0]).abs().max() < 1e-3
    seen = []

    def other(some: torch.Tensor) -> torch.Tensor:
        seen.append(len(some))
        return torch.ones(len(some), 128, 256)

    monkeypatch.setattr(model, "encoder", other)
    assert TemplateMatcher(model, banks).encode(crops).shape == (9, 128, 256) and sum(seen) == 9


def test_in_half_precision_descriptors_are_the_same(
    model: PicoPose, banks: dict[str, TemplateBank], scene: Any
) -> None:
    try:
        half = resolve_precision("bf16", torch.device("cpu"))
    except ConfigError:  # the environment forbids it
        half = torch.float32
    crops = np.stack([crop_rgb(scene.rgb, crop_box_from_mask(s.mask)) for s in scene.segments])
    full, found = (TemplateMatcher(model, banks, dtype=d).encode(crops) for d in (torch.float32, half))
    assert found.dtype == torch.float32
    assert (full * found).sum(1).mean() > 0.99


def test_nothing_proposed_is_nothing_found(
    model: PicoPose, banks: dict[str, TemplateBank], scene: Any
) -> None:
    specks = [np.pad(np.ones((3, 3), bool), ((0, 237), (0, 317)))]
    for proposals in ([], [np.zeros(SIZE, bool)], specks):
        found = Segmenter(model, banks, lambda picture, p=proposals: p, False).segment(Picture(scene.rgb))
        assert found.segments == [] and found.problem == ""
    assert TemplateMatcher(model, {}).match(scene.rgb, [scene.segments[0].mask]) == []


def test_a_source_that_fails_is_named(model: PicoPose, banks: dict[str, TemplateBank], scene: Any) -> None:
    def failing(picture: Picture) -> Sequence[np.ndarray]:
        raise RuntimeError("out of masks")

    with pytest.raises(SegmentError, match="source failed .RuntimeError: out of masks"):
        Segmenter(model, banks, failing, False).segment(Picture(scene.rgb))
