"""The paper's losses: equal to the released code's on the parity fixture, and without its mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity import Parity, load_parity, parity_model

from picopose_ros.errors import CheckpointError
from picopose_ros.geometry.crops import crop_box_from_mask, crop_mask, crop_rgb
from picopose_ros.model import PicoPose, preset
from picopose_ros.model.affine import compose_affine
from picopose_ros.model.backbone import ViTBackbone
from picopose_ros.model.released_keys import resample_pos_embed
from picopose_ros.training.config import TrainConfig
from picopose_ros.training.data import Batch
from picopose_ros.training.labels import pose_affine
from picopose_ros.training.losses import AffineLabels, flow_labels
from picopose_ros.training.pairs import QueryCrop
from picopose_ros.training.released import (
    PAPER,
    RELEASED,
    TOTAL_LIMIT,
    AffineNoise,
    NoiseLevels,
    ReleasedFlaws,
    _limited,
    draw_noise,
    match_loss,
    noised_start,
    released_losses,
    start_released,
    visibility_labels,
)
from picopose_ros.training.views import QueryView, TemplateView

NO_NOISE = NoiseLevels(scale=(0.0,), angle_deg=(0.0,), translation_px=(0.0,))
CONFIG = TrainConfig(cross_share=0.0)


@pytest.fixture(scope="module")
def parity() -> Parity:
    return load_parity()


@pytest.fixture(scope="module")
def batch(parity: Parity) -> Batch:
    """The fixture's two detections, each with the template that it was made near."""
    near = parity.tensor("raw/near_template")
    rgba = parity.tensor("raw/template_rgba")[near]
    boxes = [crop_box_from_mask(t[..., 3]) for t in rgba]
    centre = parity.tensor("raw/template_pose_mm")[near][:, :3, 3] @ parity.tensor("raw/template_K").T
    centre = np.stack([b.affine() @ (c / c[2]) for b, c in zip(boxes, centre, strict=True)])[:, :2]
    axis = np.arange(64)
    grid = np.stack(np.meshgrid(axis, axis))
    position = torch.from_numpy(3.5 * (parity.tensor("oracle/flow64") + grid)).round().float()
    valid = parity.tensor("oracle/src_pts")[..., 0].reshape(2, 64, 64).transpose(0, 2, 1) >= 0
    valid = torch.from_numpy(np.ascontiguousarray(valid)).float()
    own = torch.arange(2)
    return Batch(
        template_rgb=torch.from_numpy(
            np.stack([crop_rgb(t[..., :3], b) for t, b in zip(rgba, boxes, strict=True)])
        ),
        template_mask=torch.from_numpy(
            np.stack([crop_mask(t[..., 3] == 255, b) for t, b in zip(rgba, boxes, strict=True)])
        ).float(),
        template_centre=torch.from_numpy(centre.astype(np.float32)),
        query_rgb=torch.from_numpy(parity.tensor("provider/real_rgb")),
        query_mask=torch.from_numpy(parity.tensor("provider/real_mask")),
        own=own,
        other=own,
        position=position,
        valid=valid,
        cross_position=position,
        cross_valid=valid,
        translation=torch.from_numpy(parity.tensor("oracle/gt_translation_px")) / 14,
        scale=torch.from_numpy(parity.tensor("oracle/gt_scale")),
        angle=torch.from_numpy(parity.tensor("oracle/gt_inplane_rad")),
        usable=torch.ones(2),
    )


@pytest.fixture(scope="module")
def released(parity: Parity) -> PicoPose:
    return parity_model()


def _generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def _queries(batch: Batch, chosen: slice) -> Batch:
    """Some of a batch's queries, all of its templates."""
    names = {f.name for f in fields(Batch)} - {"template_rgb", "template_mask", "template_centre"}
    values = {name: getattr(batch, name) for name in names}
    return replace(batch, **{n: v[chosen] for n, v in values.items() if isinstance(v, torch.Tensor)})


def test_the_released_losses_are_reproduced(parity: Parity, batch: Batch, released: PicoPose) -> None:
    # The fixture's stage 3 starts from the true affine itself, so the flaws of the noise play no part.
    form = replace(RELEASED, noise=NO_NOISE, flaws=ReleasedFlaws())
    with torch.no_grad():
        losses = released_losses(released, batch, CONFIG, 0.0, _generators(1), form)
    translation, scale, angle = parity.tensor("loss/stage2_trans_scale_inplane")
    expected = {
        "match": parity.tensor("loss/stage1_infonce"),
        "translation": translation,
        "scale": scale,
        "angle": angle,
    }
    for level, grid in enumerate((16, 32, 64)):
        expected[f"flow_{grid}"] = parity.tensor(f"loss/loss_flow{level}")
        expected[f"certainty_{grid}"] = parity.tensor(f"loss/loss_certainty{level}")
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-4), name


def test_the_paper_form_differs_where_it_should(batch: Batch, released: PicoPose) -> None:
    """And its gradients reach every parameter of the released network."""
    batch = _queries(batch, slice(1))
    released.zero_grad()
    losses = released_losses(released, batch, CONFIG, 0.0, _generators(1), replace(PAPER, noise=NO_NOISE))
    sum(losses.values()).backward()
    untouched = [n for n, p in released.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert untouched == []
    released.zero_grad()
    with torch.no_grad():
        form = replace(RELEASED, noise=NO_NOISE, flaws=ReleasedFlaws())
        code = released_losses(released, batch, CONFIG, 0.0, _generators(1), form)
    assert float(losses["scale"].detach()) > 2 * float(code["scale"])  # |x| and x^2 of about 0.08
    assert float(losses["match"].detach()) == float(code["match"])
    assert 0 < abs(float(losses["flow_64"].detach() - code["flow_64"])) < 0.1 * 2 * 0.5 / 3.5


def test_pose_affine_is_the_released_label(parity: Parity) -> None:
    near = parity.tensor("raw/near_template")
    for i, t in enumerate(near):
        query = np.eye(4)
        query[:3, :3], query[:3, 3] = parity.tensor("raw/gt_R")[i], parity.tensor("raw/gt_t_mm")[i] / 1000
        template = parity.tensor("raw/template_pose_mm")[t].copy()
        template[:3, 3] /= 1000
        tau, scale, angle = pose_affine(
            query,
            parity.tensor("raw/query_K"),
            parity.tensor("provider/real_M")[i],
            template,
            parity.tensor("raw/template_K"),
            parity.tensor("provider/tem_M")[t],
        )
        np.testing.assert_allclose(tau * 14, parity.tensor("oracle/gt_translation_px")[i], atol=1e-3)
        assert scale == pytest.approx(float(parity.tensor("oracle/gt_scale")[i]), rel=1e-5)
        assert angle % (2 * np.pi) == pytest.approx(
            float(parity.tensor("oracle/gt_inplane_rad")[i]), abs=1e-5
        )


# Each mistake of the released code has a check that holds, and that fails with the mistake.

LABELS = AffineLabels(
    translation=torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 0.0]]),
    scale=torch.tensor([0.8, 1.3, 1.0]),
    angle=torch.tensor([-0.5, 2.0, -3.0]),
    weight=torch.ones(3),
)
CENTRE = torch.tensor([[112.0, 100.0], [90.0, 130.0], [112.0, 112.0]])


def _true() -> torch.Tensor:
    cos_sin = torch.stack([LABELS.angle.cos(), LABELS.angle.sin()], 1)
    return compose_affine(LABELS.translation, LABELS.scale, cos_sin, CENTRE)


def _noise(factor: float = 1.0, angle: float = 0.0) -> AffineNoise:
    return AffineNoise(torch.full((3,), factor), torch.full((3,), angle), torch.zeros(3, 2))


def _check_rotation(flaws: ReleasedFlaws) -> None:
    """Without noise stage 3 starts from the truth, whatever the angle's sign."""
    torch.testing.assert_close(noised_start(LABELS, CENTRE, _noise(), flaws), _true(), rtol=1e-4, atol=1e-3)


def _check_pivot(flaws: ReleasedFlaws) -> None:
    """Noise of angle and scale leaves the object's centre where it is."""
    start = noised_start(LABELS, CENTRE, _noise(1.2, 0.2), flaws)
    centre = torch.cat([CENTRE, torch.ones(3, 1)], 1)[..., None]
    torch.testing.assert_close(start @ centre, _true() @ centre, rtol=1e-4, atol=1e-3)


def _check_scale(flaws: ReleasedFlaws) -> None:
    """However large the draw, the start neither mirrors the object nor shrinks it to a point."""
    start = noised_start(LABELS, CENTRE, _noise(-0.2), flaws)
    # A negative scale turns by half a turn, so compare with the true direction.
    along = (start[:, :2, 0] * _true()[:, :2, 0]).sum(1)
    assert (along > 0).all()


def _two_walls() -> tuple[TemplateView, QueryCrop]:
    """Two walls 0.2 m apart: the query sees the front one, the template the rear one from behind."""
    K = np.array([[300.0, 0, 127.5], [0, 300.0, 127.5], [0, 0, 1]])
    Q = np.eye(4)
    Q[2, 3] = 1.0
    T = np.diag([-1.0, 1, -1, 1])
    T[2, 3] = 1.0
    half = 0.15
    v, u = np.mgrid[:256, :256]
    depth = np.where(np.maximum(abs(u - 127.5), abs(v - 127.5)) / 300 * 0.9 < half, 0.9, 0.0)
    view = QueryView(
        np.zeros((256, 256, 3), np.uint8),
        depth.astype(np.float32),
        Q.astype(np.float32),
        K.astype(np.float32),
    )
    shown = np.zeros((384, 384), np.uint8)
    shown[64:320, 64:320] = depth > 0
    turn = np.array([[1.0, 0, 64], [0, 1, 64]])
    virtual = K.copy()
    virtual[:2, 2] += 64
    crop = np.array([[1.0, 0, -80], [0, 1, -80], [0, 0, 1]])
    rgb = np.zeros((224, 224, 3), np.uint8)
    query = QueryCrop(rgb, rgb[..., 0], Q, virtual, crop, view, turn, shown)
    side = np.linspace(-0.1, 0.1, 64)
    x, y = np.meshgrid(side, side)
    points = np.stack([x, y, np.full_like(x, 0.9)], -1).astype(np.float32)  # in the template's camera
    template = TemplateView(rgb, rgb[..., 0] == 0, points, T.astype(np.float32), np.eye(3), K, 0)
    return template, query


def _check_self_occlusion(flaws: ReleasedFlaws) -> None:
    """What the object itself hides is not labelled visible."""
    template, query = _two_walls()
    labels = visibility_labels(template, query, 0.5, flaws)
    assert (labels.position >= 0).all() and (labels.position < 224).all()  # all on the visible mask
    assert labels.valid.sum() == 0


@pytest.mark.parametrize(
    ("flaw", "check"),
    [
        ("mirrored_rotation", _check_rotation),
        ("corner_pivot", _check_pivot),
        ("negative_scale", _check_scale),
        ("self_occluded", _check_self_occlusion),
    ],
)
def test_a_mistake_of_the_released_code_is_mended(flaw: str, check: Callable[[ReleasedFlaws], None]) -> None:
    check(PAPER.flaws)
    with pytest.raises(AssertionError):
        check(ReleasedFlaws(**{flaw: True}))
    for other in ("mirrored_rotation", "corner_pivot", "negative_scale", "self_occluded"):
        if other != flaw and not (flaw, other) == ("corner_pivot", "mirrored_rotation"):
            check(ReleasedFlaws(**{other: True}))


def test_noise_has_the_paper_levels_and_bounds() -> None:
    levels = NoiseLevels()
    seen = set()
    for seed in range(60):
        noise = draw_noise(400, levels, torch.Generator().manual_seed(seed))
        assert float(noise.shift.abs().max()) <= 56
        assert math.degrees(float(noise.angle.abs().max())) <= 45 + 1e-3
        ratio = float(noise.factor.std()) / torch.tensor(levels.scale)
        level = int((ratio - 1).abs().argmin())
        assert float((ratio[level] - 1).abs()) < 0.2
        seen.add(level)
        start = noised_start(
            AffineLabels(torch.zeros(400, 2), torch.ones(400), torch.zeros(400), torch.ones(400)),
            torch.full((400, 2), 112.0),
            noise,
        )
        assert 0.5 - 1e-4 <= float(start[:, :2, 0].norm(dim=1).min())
        assert float(start[:, :2, 0].norm(dim=1).max()) <= 1.5 + 1e-4
    assert seen == set(range(5))


def test_a_large_sum_is_limited_and_still_teaches() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    small, large = _limited({"a": x, "b": 2 * x}), _limited({"a": 100 * x, "b": x})
    assert float(sum(small.values()).detach()) == 9.0
    total = sum(large.values())
    assert float(total.detach()) == pytest.approx(TOTAL_LIMIT)
    total.backward()
    assert 0 < float(x.grad) < 101


def test_every_valid_pair_of_a_share_is_a_negative_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(2, 8, 256, generator=generator), dim=1)
    axis = torch.arange(64) * 3.5
    position = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(2, 2, 64, 64)
    valid = torch.zeros(2, 64, 64)
    valid[0, 4, 8] = valid[1, 32, 60] = 1  # cells of patches (x 2, y 1) and (x 15, y 8)
    valid[1, 33, 61] = 1  # between the patches' cells: not sampled
    f = torch.stack([query[0, :, 1 * 16 + 2], query[1, :, 8 * 16 + 15]])
    expected = torch.nn.functional.cross_entropy(f @ f.T / 0.1, torch.arange(2), reduction="sum")
    torch.testing.assert_close(match_loss(query, query, position, valid), expected)


def test_shares_of_a_batch_are_independent(batch: Batch) -> None:
    """Two shares in one process give what one share each in two processes would."""
    torch.manual_seed(0)
    model = PicoPose(preset("tiny")).eval()
    with torch.no_grad():
        both = released_losses(model, batch, CONFIG, 0.0, _generators(2))
        apart = []
        for i, generator in enumerate(_generators(2)):
            one = _queries(batch, slice(i, i + 1))
            apart.append(released_losses(model, one, CONFIG, 0.0, [generator]))
    pairs = batch.valid[:, ::4, ::4].sum((1, 2))
    mean = (float(apart[0]["match"]) * pairs[0] + float(apart[1]["match"]) * pairs[1]) / pairs.sum()
    assert float(both["match"]) == pytest.approx(float(mean), rel=1e-5)
    for name in ("translation", "angle", "certainty_16", "certainty_64"):
        assert float(both[name]) == pytest.approx(
            (float(apart[0][name]) + float(apart[1][name])) / 2, rel=1e-4
        ), name


def test_wrong_templates_take_part_where_asked(batch: Batch) -> None:
    torch.manual_seed(0)
    model = PicoPose(preset("tiny")).eval()
    crossed = replace(batch, other=batch.own.flip(0), cross_valid=torch.zeros_like(batch.valid))
    with torch.no_grad():
        plain = released_losses(model, crossed, CONFIG, 0.0, _generators(1))
        wrong = released_losses(model, crossed, replace(CONFIG, cross_share=1.0), 0.0, _generators(1))
    assert float(wrong["flow_64"]) == 0 < float(plain["flow_64"])
    assert float(wrong["match"]) == pytest.approx(float(plain["match"]), rel=1e-6)


def test_labels_in_whole_pixels_are_half_a_pixel_from_the_unbiased_on_average() -> None:
    position = torch.rand(1, 2, 64, 64, generator=torch.Generator().manual_seed(0)) * 220
    whole = flow_labels(position.floor() + 0.5, 64)
    assert float((whole - flow_labels(position, 64)).mean()) == pytest.approx(0, abs=0.02 / 3.5)


def _small_vit() -> SimpleNamespace:
    config = preset("vits")
    affine = torch.nn.Linear(4, 3)
    return SimpleNamespace(affine=affine, backbone=ViTBackbone(config.backbone), config=config)


def test_a_released_training_starts_from_dinov2(tmp_path: Path) -> None:
    model = _small_vit()
    state = {k: torch.randn_like(v) for k, v in model.backbone.vit.state_dict().items()}
    state["pos_embed"] = torch.randn(1, 1370, 384)
    published = state | {
        "mask_token": torch.zeros(1, 384),
        "norm.weight": torch.ones(384),
        "norm.bias": torch.zeros(384),
    }
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(published, path)
    before = model.affine.weight.clone()
    start_released(model, path)
    loaded = model.backbone.vit.state_dict()
    assert torch.equal(loaded["blocks.3.attn.qkv.weight"], state["blocks.3.attn.qkv.weight"])
    torch.testing.assert_close(loaded["pos_embed"], resample_pos_embed(state["pos_embed"]))
    assert not torch.equal(model.affine.weight, before)

    torch.save({k: v for k, v in published.items() if k != "cls_token"}, path)
    with pytest.raises(CheckpointError, match=r"dinov2_vits14_pretrain\.pth do not fit.*cls_token"):
        start_released(model, path)
    with pytest.raises(CheckpointError, match="does not exist"):
        start_released(model, tmp_path / "none.pth")
