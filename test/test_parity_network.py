"""Filled with the fixture's deterministic weights, the network reproduces the released intermediates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parity import Parity, load_parity, parity_model

from picopose_ros.geometry.crops import crop_box_from_mask, crop_mask, crop_rgb
from picopose_ros.model import Features, PicoPose, Refinement
from picopose_ros.model.matching import patch_mask

# fp32 through two dozen blocks and back; ids, crops and masks are exact.
RTOL = 1e-5
RTOL_DEEP = 1e-4


@pytest.fixture(scope="module")
def parity() -> Parity:
    return load_parity()


@pytest.fixture(scope="module")
def model() -> PicoPose:
    return parity_model()


class Run:
    """Everything the network computes on the fixture's scene, once per module."""

    def __init__(self, parity: Parity, model: PicoPose) -> None:
        rgba = parity.tensor("raw/template_rgba")
        boxes = [crop_box_from_mask(t[..., 3]) for t in rgba]
        crops = [crop_rgb(t[..., :3], b) for t, b in zip(rgba, boxes, strict=True)]
        self.template_rgb = torch.from_numpy(np.stack(crops))
        masks = [crop_mask(t[..., 3] == 255, b) for t, b in zip(rgba, boxes, strict=True)]
        self.template_mask = torch.from_numpy(np.stack(masks)).float()
        self.query_rgb = torch.from_numpy(parity.tensor("provider/real_rgb"))
        self.query_mask = torch.from_numpy(parity.tensor("provider/real_mask"))
        pose = parity.tensor("raw/template_pose_mm")[:, :3, 3] @ parity.tensor("raw/template_K").T
        centre = np.stack([b.affine() @ (p / p[2]) for b, p in zip(boxes, pose, strict=True)])[:, :2]
        self.centre = torch.from_numpy(centre.astype(np.float32))
        with torch.no_grad():
            self.templates = model.encode(self.template_rgb)
            self.queries = model.encode(self.query_rgb)
            self.scores = model.match(
                self.queries.descriptors, self.query_mask, self.templates.descriptors, self.template_mask
            )
            self.top, self.ids = self.scores.topk(parity.hypotheses, dim=1)
            self.hypotheses = [self._regress(model, k) for k in range(parity.hypotheses)]

    def _regress(self, model: PicoPose, k: int) -> Refinement:
        ids = self.ids[:, k]
        template = self.templates.select(ids)
        return model.regress(
            self.queries, template, self.query_mask, self.template_mask[ids], self.centre[ids]
        )


@pytest.fixture(scope="module")
def run(parity: Parity, model: PicoPose) -> Run:
    return Run(parity, model)


def test_tokens_and_position_embedding(parity: Parity, model: PicoPose) -> None:
    parity.assert_matches("stage1/pos_embed_16", model.backbone.vit.pos_embed, RTOL)
    tokens = model.backbone.embed(torch.from_numpy(parity.tensor("provider/real_rgb")))
    parity.assert_matches("stage1/tokens_in", tokens, RTOL)


def test_taps(parity: Parity, model: PicoPose, run: Run) -> None:
    for index, tap in enumerate(run.queries.taps, start=1):
        parity.assert_matches(f"stage1/query_feature_{index}", tap, RTOL_DEEP)
    parity.assert_matches("stage1/template_feature", run.templates.taps[-1], RTOL_DEEP)
    chosen = run.templates.select(run.ids[:, 0])
    for index, tap in enumerate(chosen.taps, start=1):
        parity.assert_matches(f"hyp0/tem_feature_{index}", tap, RTOL_DEEP)


def test_the_first_official_tap_is_the_block_the_network_leaves_out(parity: Parity, model: PicoPose) -> None:
    dead = {"vits": 2, "vitb": 2, "vitl": 5}[model.config.name]
    with torch.no_grad():
        (tap,) = model.backbone.blocks(torch.from_numpy(parity.tensor("provider/real_rgb")), (dead,))
    parity.assert_matches("stage1/query_feature_0", tap, RTOL_DEEP)


def test_match_scores_and_ids(parity: Parity, run: Run) -> None:
    order = run.scores.argsort(dim=1, descending=True, stable=True)
    assert np.array_equal(order.numpy(), parity.tensor("stage1/all_ids_sorted"))
    parity.assert_matches("stage1/all_scores_sorted", run.scores.gather(1, order), RTOL_DEEP)
    assert np.array_equal(run.ids.numpy(), parity.tensor("stage1/topk_id"))
    parity.assert_matches("stage1/topk_score", run.top, RTOL_DEEP)


def test_affine_stage(parity: Parity, run: Run) -> None:
    for k, result in enumerate(run.hypotheses):
        parity.assert_matches(f"hyp{k}/corr_map", result.correspondence, RTOL_DEEP)
        parity.assert_matches(f"hyp{k}/translation", result.translation, RTOL_DEEP)
        parity.assert_matches(f"hyp{k}/scale", result.scale, RTOL_DEEP)
        parity.assert_matches(f"hyp{k}/inplane_cos_sin", result.cos_sin, RTOL_DEEP)
        parity.assert_matches(f"hyp{k}/affine_M", result.affine, RTOL_DEEP)
        parity.assert_matches(f"hyp{k}/init_flow", result.levels[0].flow_in, RTOL_DEEP)
        mask = patch_mask(run.template_mask[run.ids[:, k]])[:, None]
        parity.assert_matches(f"hyp{k}/init_certainty", mask, 0)


def test_pyramids(parity: Parity, model: PicoPose, run: Run) -> None:
    chosen = run.templates.select(run.ids[:, 0])
    with torch.no_grad():
        template, query = model.pyramid(chosen.taps), model.pyramid(run.queries.taps)
    for level in range(3):
        parity.assert_matches(f"hyp0/dpt_tem_{level}", template[level], RTOL_DEEP)
        parity.assert_matches(f"hyp0/dpt_query_{level}", query[level], RTOL_DEEP)


def test_offset_blocks(parity: Parity, run: Run) -> None:
    for k, result in enumerate(run.hypotheses):
        for index, level in enumerate(result.levels):
            parity.assert_matches(f"hyp{k}/flow_{index}", level.flow, RTOL_DEEP)
            parity.assert_matches(f"hyp{k}/certainty_{index}", level.certainty, RTOL_DEEP)
    for index, level in enumerate(run.hypotheses[0].levels):
        parity.assert_matches(f"hyp0/proj_tem_{index}", level.template, RTOL_DEEP)
        parity.assert_matches(f"hyp0/proj_query_{index}", level.query, RTOL_DEEP)
        parity.assert_matches(f"hyp0/corr_{index}", level.correlation, RTOL_DEEP)
        parity.assert_matches(f"hyp0/motion_{index}", level.motion, RTOL_DEEP)
        parity.assert_matches(f"hyp0/dflow_{index}", level.flow_step, RTOL_DEEP)
        parity.assert_matches(f"hyp0/dcert_{index}", level.certainty_step, RTOL_DEEP)


def test_a_batch_equals_single_pairs(model: PicoPose, run: Run) -> None:
    ids = run.ids[:1, 0]
    query = Features(tuple(t[:1] for t in run.queries.taps), run.queries.descriptors[:1])
    with torch.no_grad():
        single = model.regress(
            query, run.templates.select(ids), run.query_mask[:1], run.template_mask[ids], run.centre[ids]
        )
    torch.testing.assert_close(single.flow, run.hypotheses[0].flow[:1], rtol=1e-4, atol=1e-4)
