"""Training pairs: a pooled query view becomes a crop as a robot would see it, with exact labels.

In-plane rotation, scale and shift are 2D warps of the rendered view: a turn of the image about the principal
point is a turn of the camera, and a crop only changes the intrinsics, so the labels stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from picopose_ros.geometry.crops import CROP_SIZE, crop_box_from_mask, crop_mask
from picopose_ros.synthetic.disturbances import occluder
from picopose_ros.synthetic.labels import MIN_FIT_CELLS, fit_affine
from picopose_ros.training.augment import (
    another_look,
    background,
    cut_off,
    degrade_mask,
    grey_look,
    photometric,
    relight,
)
from picopose_ros.training.pool import PoolReader
from picopose_ros.training.views import QUERY_SIZE, QueryView, TemplateView

_CANVAS = 384
"""Side of the virtual image that a turned query view fits into."""
_DEPTH_TOLERANCE = 0.012
"""A surface point counts as visible where the query's depth is nearer than this share of the diagonal."""


@dataclass(frozen=True)
class QueryCrop:
    """A query as the network sees it, with the camera of the virtual image it was cut from."""

    rgb: np.ndarray
    """(224, 224, 3) uint8 RGB."""
    mask: np.ndarray
    """(224, 224) uint8 in {0, 1}, the (degraded) segment mask."""
    T_cam_ctr: np.ndarray
    """(4, 4) pose in the virtual camera."""
    K: np.ndarray
    """(3, 3) of the virtual camera."""
    M_crop_img: np.ndarray
    """(3, 3) virtual image px -> crop px."""
    view: QueryView
    """The rendered view."""
    turn: np.ndarray
    """(2, 3) rendered view px -> virtual image px."""
    shown: np.ndarray
    """(384, 384) uint8, 1 where the virtual image shows the object to the network."""


@dataclass(frozen=True)
class PairLabels:
    """Where a template's surface points are in a query crop."""

    position: np.ndarray
    """(2, 64, 64) float32 crop px (x, y) of each template cell."""
    valid: np.ndarray
    """(64, 64) float32 in {0, 1}: visible in the query."""
    translation: np.ndarray
    """(2,) stage 2's tau, units of 14 crop px."""
    scale: float
    angle: float
    """Radians."""
    usable: float
    """1 where stage 2 has a right answer, else 0."""


@dataclass(frozen=True)
class Difficulty:
    """How hard the queries are made; probabilities of each disturbance."""

    occlusion: float = 0.4
    cut: float = 0.0
    """Of the covered queries: those that lose up to three quarters to one side."""
    keep_background: float = 0.2
    degrade: float = 0.6
    light: float = 1.0
    """Queries that are relit."""
    photometric: float = 1.0
    another_look: float = 0.7
    """Templates whose colours are another scan's."""
    grey: float = 0.08
    """Objects whose templates are those of a mesh without colours."""
    turn: float = np.pi
    """Largest in-plane angle, radians."""


def _similarity(angle: float, about: np.ndarray, to: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([linear, (to - linear @ about)[:, None]], 1)


def make_query(
    view: QueryView, rng: np.random.Generator, difficulty: Difficulty, scenery: np.ndarray
) -> QueryCrop | None:
    """Turn, light, occlude, crop and disturb a rendered view.

    Args:
        view: a pooled query view. scenery: (h, w, 3) uint8 picture that backgrounds and occluders come from.
    Returns:
        The crop, or None where too little of the object is left.
    """
    angle = rng.uniform(-difficulty.turn, difficulty.turn)
    middle = np.full(2, (QUERY_SIZE - 1) / 2)
    turn = _similarity(angle, middle, np.full(2, (_CANVAS - 1) / 2))
    K = view.K.astype(np.float64)
    K[:2, 2] = turn[:, :2] @ K[:2, 2] + turn[:, 2]
    pose = np.eye(4)
    pose[:2, :2] = turn[:, :2]
    pose = pose @ view.T_cam_ctr

    whole = cv2.warpAffine(view.mask.astype(np.uint8), turn, (_CANVAS, _CANVAS), flags=cv2.INTER_NEAREST)
    visible = whole
    cover = None
    if rng.uniform() < difficulty.occlusion:
        cut = difficulty.cut > 0 and rng.uniform() < difficulty.cut  # at 0 a seed's samples stay as they were
        cover = cut_off(whole, rng) if cut else occluder(whole, rng)
        visible = whole & ~cover
        if visible.sum() < (0.2 if cut else 0.4) * whole.sum():
            cover, visible = None, whole
    segment = degrade_mask(visible, rng) if rng.uniform() < difficulty.degrade else visible
    if segment.sum() < 64:
        return None
    box = crop_box_from_mask(segment)
    mask = crop_mask(segment, box)

    # cv2.resize's convention: the crop's pixel p shows the virtual image at (p + .5) / s - .5 + corner.
    scale = CROP_SIZE / box.side
    sample = np.array([[scale, 0, (0.5 - box.left) * scale - 0.5], [0, scale, (0.5 - box.top) * scale - 0.5]])
    warp = sample[:, :2] @ turn
    warp[:, 2] += sample[:, 2]
    size = (CROP_SIZE, CROP_SIZE)
    lit = view.rgb
    if difficulty.light >= 1 or rng.uniform() < difficulty.light:  # at 1 a seed's samples stay as they were
        lit = relight(view.rgb, view.depth, view.mask, float(view.K[0, 0]), rng)
    rgb = cv2.warpAffine(lit, warp, size, flags=cv2.INTER_LINEAR)
    coverage = cv2.warpAffine(view.mask.astype(np.float32), warp, size, flags=cv2.INTER_LINEAR)[..., None]
    keep_background = rng.uniform() < difficulty.keep_background
    rgb = rgb * coverage + background(scenery, rng) * (1 - coverage)
    if cover is not None:
        covered = cv2.warpAffine(cover, sample, size, flags=cv2.INTER_LINEAR) > 0
        rgb[covered] = background(scenery, rng)[covered]
    if rng.uniform() < difficulty.photometric:
        rgb = photometric(rgb, rng)
    rgb = np.clip(rgb, 0, 255).astype(np.uint8)
    if not keep_background:
        rgb = rgb * mask[..., None]
    shown = visible if keep_background else visible & segment
    return QueryCrop(rgb, mask, pose, K, box.affine(), view, turn, shown)


def pair_labels(template: TemplateView, query: QueryCrop, diagonal: float) -> PairLabels:
    """Exact labels of a template and a query of the same object.

    A template cell counts as visible where its surface point is the nearest thing along the query's ray
    (self-occlusion), nothing covers it, and the network is shown that pixel.
    """
    points = template.points_consistent.astype(np.float64)
    present = points[..., 2] > 0
    T, Q = template.T_cam_ctr.astype(np.float64), query.view.T_cam_ctr.astype(np.float64)
    seen = ((points - T[:3, 3]) @ T[:3, :3]) @ Q[:3, :3].T + Q[:3, 3]
    z = np.maximum(seen[..., 2], 1e-6)
    K = query.view.K
    uv = seen[..., :2] / z[..., None] * [K[0, 0], K[1, 1]] + K[:2, 2]
    nearest = np.rint(uv).astype(int)
    inside = ((nearest >= 1) & (nearest < QUERY_SIZE - 1)).all(-1)
    x, y = np.clip(nearest, 1, QUERY_SIZE - 2).transpose(2, 0, 1)
    gap = np.full(z.shape, np.inf)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            gap = np.minimum(gap, np.abs(query.view.depth[y + dy, x + dx] - z))
    valid = present & inside & (gap < _DEPTH_TOLERANCE * diagonal)

    virtual = uv @ query.turn[:, :2].T + query.turn[:, 2]
    x, y = np.clip(np.rint(virtual).astype(int), 0, _CANVAS - 1).transpose(2, 0, 1)
    valid &= query.shown[y, x] > 0
    M = query.M_crop_img.astype(np.float64)
    position = virtual @ M[:2, :2].T + M[:2, 2]
    valid &= ((position >= 0) & (position <= CROP_SIZE - 1)).all(-1)

    translation, scale, angle = fit_affine(position, valid, template_centre(template))
    return PairLabels(
        position=position.transpose(2, 0, 1).astype(np.float32),
        valid=valid.astype(np.float32),
        translation=translation.astype(np.float32),
        scale=scale,
        angle=angle,
        usable=float(valid.sum() >= MIN_FIT_CELLS),
    )


def template_centre(template: TemplateView) -> np.ndarray:
    """(2,) the object's centre in the template crop, px."""
    point = template.K @ (template.T_cam_ctr[:3, 3] / template.T_cam_ctr[2, 3])
    return (template.M_crop_img @ point)[:2].astype(np.float32)


@dataclass(frozen=True)
class Sample:
    """Two templates of one object, queries near each, and labels against either."""

    templates: tuple[TemplateView, TemplateView]
    queries: list[QueryCrop]
    own: list[int]
    """Which template each query was rendered near."""
    labels: list[PairLabels]
    """Against its own template."""
    cross: list[PairLabels]
    """Against the other template: mostly another side, so mostly invisible."""


def _looked(
    template: TemplateView, rng: np.random.Generator, difficulty: Difficulty, grey: bool
) -> TemplateView:
    """The template with other colours, or with none."""
    if grey:
        return replace(template, rgb=grey_look(template.shaded, template.mask, rng))
    if rng.uniform() < difficulty.another_look:
        return replace(template, rgb=another_look(template.rgb, template.shaded, template.mask, rng))
    return template


def draw_sample(pool: PoolReader, rng: np.random.Generator, difficulty: Difficulty) -> Sample:
    """Draw an object, two of its clusters and their queries."""
    while True:
        index = int(rng.choice(pool.objects))
        first, second = (int(c) for c in rng.choice(pool.clusters, 2, replace=False))
        items = [pool.at(index, first), pool.at(index, second)]
        other = pool.template(int(rng.choice(pool.objects)), int(rng.integers(pool.clusters)))
        grey = rng.uniform() < difficulty.grey
        templates = tuple(_looked(item.template, rng, difficulty, grey) for item in items)
        queries, own, labels, cross = [], [], [], []
        for which, item in enumerate(items):
            for view in item.queries:
                crop = make_query(view, rng, difficulty, other.rgb)
                if crop is None:
                    continue
                queries.append(crop)
                own.append(which)
                labels.append(pair_labels(templates[which], crop, item.diagonal))
                cross.append(pair_labels(templates[1 - which], crop, item.diagonal))
        if len(queries) == 2 * pool.queries:
            return Sample(templates, queries, own, labels, cross)
