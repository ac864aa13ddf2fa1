"""The paper's data: pairs from BOP/MegaPose shards (`train_pbr_web`), mixed with other sources by weight.

Shards are usually streamed. Here they are read at random, so that a batch is a pure function of (seed, step,
share) and resuming needs no state. Neighbouring steps draw from the same few shards, each slot of a batch
from its own, so the index of a shard serves hundreds of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from picopose_ros.errors import ConfigError, PicoPoseError, RenderError
from picopose_ros.geometry.crops import CROP_SIZE, crop_box_from_mask, crop_mask
from picopose_ros.training.augment import degrade_mask, photometric
from picopose_ros.training.data import Batch, assemble, concatenate
from picopose_ros.training.pairs import Difficulty, QueryCrop, Sample
from picopose_ros.training.released import PAPER, ReleasedFlaws, visibility_labels
from picopose_ros.training.shard_files import (
    SceneImage,
    ShardIndex,
    UnusableSample,
    decode_sample,
    import_webdataset,
    index_shard,
    list_shards,
    read_sample,
)
from picopose_ros.training.shard_source import ShardSource
from picopose_ros.training.template_sources import (
    MESH_UPS,
    FolderTemplates,
    MeshTemplates,
    TemplateSource,
)
from picopose_ros.training.views import QUERY_SIZE, QueryView

MIN_CROP_PX = 32
"""An instance counts from this many mask pixels in its 224-pixel crop."""
NEAREST_TEMPLATES = 5
"""A query's template is one of this many nearest views."""

_VISIT = 256
"""Steps for which a slot of the batch stays with one shard."""
_TRIES = 100
"""Samples in a row that may be unusable before the source gives up."""
_KEPT_INDICES = 48
_CANVAS, _MARGIN = 384, (QUERY_SIZE - CROP_SIZE) // 2
_CHECKED_PAIRS = 24
_LEAST_AGREEMENT = 0.5

Source = Callable[[int, int, int, int], Batch]
"""``source(seed, step, share, pairs)``: a batch of exactly that many queries, a function of these alone."""


def crop_query(
    image: SceneImage, T_obj_ctr: np.ndarray, difficulty: Difficulty, rng: np.random.Generator
) -> QueryCrop:
    """Crop an instance as the network sees it at test time, disturbed as `difficulty` says.

    Of a `Difficulty` only what suits a finished image is used: the chance of a degraded mask, of a background
    that stays, and of photometric noise (`photometric`: this package's list, not the paper's imgaug one).
    What covers the object is in the image; it is not turned.

    Args:
        T_obj_ctr: (4, 4) from the templates' centred frame to the data set's object frame.
    Raises:
        UnusableSample: too little of the instance is visible in its crop.
    """
    visible = image.instance.mask.astype(np.uint8)
    if not visible.any():
        raise UnusableSample("mask_visib.json: the mask is empty", broken=False)
    segment = degrade_mask(visible, rng) if rng.uniform() < difficulty.degrade else visible
    box = crop_box_from_mask(segment)
    mask = crop_mask(segment, box)
    if mask.sum() < MIN_CROP_PX or crop_mask(visible, box).sum() < MIN_CROP_PX:
        raise UnusableSample("too little of the instance is visible", broken=False)
    size = (CROP_SIZE, CROP_SIZE)
    rgb = cv2.resize(image.rgb[box.slices], size, interpolation=cv2.INTER_LINEAR)
    keep_background = rng.uniform() < difficulty.keep_background
    if rng.uniform() < difficulty.photometric:
        rgb = np.clip(photometric(rgb.astype(np.float32), rng), 0, 255).astype(np.uint8)
    if not keep_background:
        rgb = rgb * mask[..., None]

    # The labels want a view of 256 pixels: the crop's scale, and 16 pixels more on every side. Depth and mask
    # are sampled where the view's pixel centres fall in the image, so that they fit the view's camera.
    affine = box.affine().astype(np.float64)
    to_view = affine.copy()
    to_view[:2, 2] += _MARGIN
    inverse = np.linalg.inv(to_view)[:2]

    def sampled(array: np.ndarray, side: int, offset: float, how: int = cv2.INTER_NEAREST) -> np.ndarray:
        back = inverse.copy()
        back[:, 2] -= inverse[:, :2] @ np.full(2, offset)
        return cv2.warpAffine(array, back, (side, side), flags=how | cv2.WARP_INVERSE_MAP)

    pose = image.instance.T_cam_obj @ T_obj_ctr
    view = QueryView(
        rgb=sampled(image.rgb, QUERY_SIZE, 0, cv2.INTER_LINEAR),
        depth=sampled(image.depth, QUERY_SIZE, 0),
        T_cam_ctr=pose.astype(np.float32),
        K=(to_view @ image.K).astype(np.float32),
    )
    border = (_CANVAS - QUERY_SIZE) // 2
    turn = np.array([[1.0, 0, border], [0, 1, border]])
    shift = np.eye(3)
    shift[:2, 2] = border
    to_crop = np.eye(3)
    to_crop[:2, 2] = -border - _MARGIN
    shown = visible if keep_background else visible & segment
    return QueryCrop(
        rgb=rgb,
        mask=mask,
        T_cam_ctr=pose,
        K=shift @ to_view @ image.K,
        M_crop_img=to_crop,
        view=view,
        turn=turn,
        shown=sampled(shown, _CANVAS, border),
    )


def nearest_templates(T_cam_ctr: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """All templates (N,) by how near their direction of view is to a query's, nearest first.

    The direction is that from the object's centre to the camera. (The released code compares optical axes;
    for an object at an image's border they differ from what is seen by up to half the field of view.)

    Args:
        T_cam_ctr: (4, 4). poses: (N, 4, 4) of the templates.
    """
    to_camera = -np.einsum("nji,nj->ni", poses[:, :3, :3], poses[:, :3, 3])
    query = -T_cam_ctr[:3, :3].T @ T_cam_ctr[:3, 3]
    cosine = to_camera @ query / np.linalg.norm(to_camera, axis=1)
    return np.argsort(-cosine, kind="stable")


class ShardPairs:
    """Pairs of shards: a `Source`, and picklable for DataLoader workers.

    Every query has an own template, one of the 5 nearest, and another one of the same object, any of the
    rest. A sample that is broken is passed over and named in the batch's `skipped`.

    Args:
        source: where the shards and the templates are.
        difficulty: see `crop_query`.
        flaws: `self_occluded` leaves the labels' depth check out.
    Raises:
        ConfigError: see `list_shards`, `MeshTemplates`, `FolderTemplates`.
        PicoPoseError: webdataset is missing.
    """

    def __init__(
        self, source: ShardSource, difficulty: Difficulty, flaws: ReleasedFlaws = PAPER.flaws
    ) -> None:
        import_webdataset()
        self.source, self.difficulty, self.flaws = source, difficulty, flaws
        self.paths = list_shards(source.shards)
        self._open()

    def _open(self) -> None:
        near = self.paths[0].parent
        if self.source.models:
            models = Path(self.source.models).expanduser()
            self.templates: TemplateSource = MeshTemplates(models, near, self.source.models_up)
        else:
            folder = Path(self.source.templates).expanduser()
            self.templates = FolderTemplates(folder, self.source.template_scale)
        self._indices: dict[int, ShardIndex] = {}
        self._agreements: list[float] = []
        self._checked: list[SceneImage] = []

    def __getstate__(self) -> dict[str, Any]:
        # What is open stays in its process: an OpenGL context, above all.
        return {
            "source": self.source,
            "difficulty": self.difficulty,
            "flaws": self.flaws,
            "paths": self.paths,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __call__(self, seed: int, step: int, share: int, pairs: int) -> Batch:
        """The pairs of a share of a step.

        Raises:
            PicoPoseError: 100 samples in a row could not be used; names the last.
            ConfigError: poses and templates do not fit together.
        """
        skipped: list[str] = []
        samples = [self._slot(seed, step, share, slot, skipped) for slot in range(pairs)]
        return assemble(samples, skipped)

    def _slot(self, seed: int, step: int, share: int, slot: int, skipped: list[str]) -> Sample:
        rng = np.random.default_rng([seed, step, share, slot, 0x5A])
        visit, place = divmod(step, _VISIT)
        epoch, turn = divmod(visit, len(self.paths))
        order = np.random.default_rng([seed, share, slot, epoch, 0x5B]).permutation(len(self.paths))
        shard, reason = int(order[turn]), ""
        for attempt in range(_TRIES):
            if attempt and attempt % 20 == 0:  # this shard seems to be of no use
                shard = int(rng.integers(len(self.paths)))
            path = self.paths[shard]
            index = self._index(shard, skipped)
            if not index:
                shard, reason = int(rng.integers(len(self.paths))), f"{path}: no whole sample in it"
                continue
            keys = list(index)
            if attempt == 0:
                shuffled = np.random.default_rng([seed, share, slot, visit, 0x5C]).permutation(len(keys))
                key = keys[shuffled[place % len(keys)]]
            else:
                key = keys[int(rng.integers(len(keys)))]
            try:
                return self.sample(path, index[key], rng)
            except UnusableSample as error:
                reason = f"{path}: {key}: {error}"
                if error.broken:
                    skipped.append(reason)
            except (ConfigError, RenderError):  # of the machine or the settings, not of the sample
                raise
            except (PicoPoseError, OSError, ArithmeticError, cv2.error) as error:
                reason = f"{path}: {key}: {error}"
                skipped.append(reason)
        raise PicoPoseError(
            f"{_TRIES} samples in a row of shards {self.source.shards} cannot be used; the last: {reason}"
        )

    def _index(self, shard: int, skipped: list[str]) -> ShardIndex:
        if shard not in self._indices:
            while len(self._indices) >= _KEPT_INDICES:
                del self._indices[next(iter(self._indices))]
            self._indices[shard], problems = index_shard(self.paths[shard])
            skipped += [f"{self.paths[shard]}: {problem}" for problem in problems]
        return self._indices[shard]

    def sample(self, path: Path, places: Mapping[str, tuple[int, int]], rng: np.random.Generator) -> Sample:
        """A query of one sample with its two templates and the labels against either."""
        image = decode_sample(read_sample(path, places), rng, self.templates.__contains__)
        number = image.instance.number
        T_obj_ctr = np.eye(4)
        T_obj_ctr[:3, 3] = self.templates.centre(number)
        query = crop_query(image, T_obj_ctr, self.difficulty, rng)
        near = nearest_templates(query.T_cam_ctr, self.templates.poses(number))
        chosen = near[int(rng.integers(NEAREST_TEMPLATES))], near[rng.integers(NEAREST_TEMPLATES, len(near))]
        templates = tuple(self.templates.view(number, int(index)) for index in chosen)
        diagonal = self.templates.diagonal(number)
        own, cross = (visibility_labels(t, query, diagonal, self.flaws) for t in templates)
        if len(self._agreements) < _CHECKED_PAIRS:
            self._check(image, query, int(chosen[0]))
        return Sample(templates, [query], [0], [own], [cross])

    def _agreement(self, templates: TemplateSource, number: int, query: QueryCrop, index: int) -> float:
        """Share of a near template's points on the visible mask that the depth image confirms."""
        template, diagonal = templates.view(number, index), templates.diagonal(number)
        seen = visibility_labels(template, query, diagonal).valid.sum()
        projected = visibility_labels(
            template, query, diagonal, ReleasedFlaws(self_occluded=True)
        ).valid.sum()
        return float(seen / max(projected, 20))

    def _check(self, image: SceneImage, query: QueryCrop, index: int) -> None:
        """Tell meshes in another scale or frame than the poses: nothing else would notice them."""
        self._agreements.append(self._agreement(self.templates, image.instance.number, query, index))
        if len(self._checked) < 8:
            self._checked.append(image)
        if len(self._agreements) < _CHECKED_PAIRS:
            return
        checked, self._checked = self._checked, []
        middle = float(np.median(self._agreements))
        if middle >= _LEAST_AGREEMENT:
            return
        advice = "check template_scale" if self.source.templates else "check the meshes' scale"
        if isinstance(self.templates, MeshTemplates):
            found = {up: self._median_agreement(checked, up) for up in MESH_UPS}
            advice += "; by models_up: " + ", ".join(f"{up} {share:.0%}" for up, share in found.items())
        raise ConfigError(
            f"shards {self.source.shards}: only {middle:.0%} of the templates' points lie where the depth "
            f"images have them; poses and {self.source.models or self.source.templates} do not fit together: "
            f"{advice}"
        )

    def _median_agreement(self, checked: Sequence[SceneImage], up: str) -> float:
        templates = self.templates.turned(up)
        plain = Difficulty(occlusion=0, keep_background=1, degrade=0, photometric=0)
        found = []
        for image in checked:
            number = image.instance.number
            T_obj_ctr = np.eye(4)
            T_obj_ctr[:3, 3] = templates.centre(number)
            query = crop_query(image, T_obj_ctr, plain, np.random.default_rng(0))
            near = int(nearest_templates(query.T_cam_ctr, templates.poses(number))[0])
            found.append(self._agreement(templates, number, query, near))
        return float(np.median(found))


class Mixed:
    """A source that draws each of its pairs from one of several sources, by weight.

    Raises:
        ConfigError: no source has a weight.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]]) -> None:
        weights = np.array([weight for _, weight in sources], np.float64)
        if not (len(weights) and (weights >= 0).all() and 0 < weights.sum() < np.inf):
            raise ConfigError("the weights of the training's sources must not be negative, and one positive")
        self.sources = [source for source, _ in sources]
        self.shares = weights / weights.sum()

    def __call__(self, seed: int, step: int, share: int, pairs: int) -> Batch:
        counts = np.random.default_rng([seed, step, share, 0x317]).multinomial(pairs, self.shares)
        batches = [
            source(seed, step, share, int(count))
            for source, count in zip(self.sources, counts, strict=True)
            if count
        ]
        return concatenate(batches)
