"""Which object a proposal shows: its descriptors compared with those of every object's templates.

As CNOS (Nguyen et al., ICCV workshops 2023) and SAM-6D (Lin et al., CVPR 2024) score: first the aggregated
descriptor of the proposal with that of each template; then, for the templates that this leaves, patch by
patch, where a match counts if it leads back to where it came from. What a proposal lacks or has too much is
mended by the network's second stage: it lays the best template over the crop, and its silhouette, clipped to
the image, is judged as another proposal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from picopose_ros.geometry.crops import CROP_SIZE, CropBox, crop_box_from_mask, crop_segment
from picopose_ros.model import PicoPose
from picopose_ros.model.affine import compose_affine
from picopose_ros.model.config import GRIDS
from picopose_ros.model.matching import patch_mask
from picopose_ros.segmentation.boxes import cut_out
from picopose_ros.segmentation.segments import mask_roi
from picopose_ros.templates.bank import TemplateBank

BATCH = 8
"""Crops in one pass of the network; more at once are slower on a CPU."""

LEAST_PIXELS = 100
"""Proposals with fewer pixels are not looked at."""

MENDED = 1
"""How often the masks of the best matches are replaced by their templates' silhouettes."""

SPARE = 1
"""Matches of an object that are mended beyond the number of instances that there may be."""

CUT_LIKE, CUT_SAME, CUT_LOSS = 0.4, 0.95, 0.02
"""A mask is replaced by what GrabCut finds in its box where their overlap (IoU) lies between the first two
and the score loses no more than the third."""

HOPELESS = 0.2
"""A match whose score is this far below the least is not mended."""

_AGGREGATED = 5  # an object's aggregated score is the mean over its so many best templates
_ROUND_TRIP = 1.5  # cells that a match may miss the patch it came from


@dataclass(frozen=True)
class MatchSettings:
    """How proposals are judged.

    Attributes:
        candidates: proposals per object whose patches are compared, the best by the aggregated descriptors.
        templates: templates per candidate that are compared patch by patch.
        min_score: matches with a lower score are dropped.
        per_class: at most so many instances of an object.
        overlap: of two instances that share more (of the smaller one) only the surer stays.
    """

    candidates: int = 8
    templates: int = 4
    min_score: float = 0.63
    per_class: int = 2
    overlap: float = 0.5


@dataclass(frozen=True)
class Match:
    """A proposal and the object it shows.

    Attributes:
        class_id: of the object. score: 0..1. mask: (H, W) bool. template: the most alike of its bank.
        row: of the proposal among those that were encoded together.
    """

    class_id: str
    score: float
    mask: np.ndarray
    template: int
    row: int = -1


@dataclass(frozen=True)
class _Crops:
    """Encoded proposals: masks, boxes, descriptors (P, C, 256), patches (P, 16, 16), aggregated (P, C)."""

    masks: list[np.ndarray]
    boxes: list[CropBox]
    descriptors: Tensor
    patches: Tensor
    aggregated: Tensor

    def select(self, rows: Sequence[int]) -> _Crops:
        index = torch.tensor(rows, dtype=torch.long, device=self.descriptors.device)
        return _Crops(
            [self.masks[row] for row in rows],
            [self.boxes[row] for row in rows],
            self.descriptors[index],
            self.patches[index],
            self.aggregated[index],
        )


@dataclass(frozen=True)
class _Object:
    """A bank on the device: descriptors (N, C, 256) half, patches (N, 16, 16), aggregated (N, C)."""

    bank: TemplateBank
    descriptors: Tensor
    patches: Tensor
    aggregated: Tensor


class TemplateMatcher:
    """Compares proposals with the banks of all objects. Not for use by two threads at once.

    Args:
        model: in evaluation mode. banks: by class id, made with it.
        settings: the defaults if None. device: of the network.
        dtype: what crops are encoded in.
    """

    def __init__(
        self,
        model: PicoPose,
        banks: Mapping[str, TemplateBank],
        settings: MatchSettings | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.settings = settings or MatchSettings()
        self.device = torch.device(device)
        self._dtype = dtype
        self._model = model.to(self.device).eval()
        self._encode = self._model.describer()
        self._objects = {name: self._object(bank) for name, bank in banks.items()}

    @property
    def classes(self) -> list[str]:
        """Class ids of the objects."""
        return list(self._objects)

    def bank(self, class_id: str) -> TemplateBank:
        """The templates of an object."""
        return self._objects[class_id].bank

    def encode(self, crops: np.ndarray) -> Tensor:
        """Descriptors (P, C, 256) float32 of crops (P, 3, 224, 224) float32."""
        half = self._dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self._dtype, enabled=half):
            parts = torch.from_numpy(crops).split(BATCH)
            return torch.cat([self._encode(part.to(self.device)).float() for part in parts])

    def sample(self, class_id: str, count: int) -> Tensor:
        """(C, count) descriptors of an object's surface, evenly from all its templates."""
        one = self._objects[class_id]
        where = one.patches.flatten(1).nonzero()
        chosen = where[torch.linspace(0, len(where) - 1, count, device=where.device).long()]
        return one.descriptors[chosen[:, 0], :, chosen[:, 1]].float().T

    def match(self, rgb: np.ndarray, proposals: Sequence[np.ndarray]) -> list[Match]:
        """The objects in an image, surest first.

        Args:
            rgb: (H, W, 3) uint8. proposals: masks (H, W) bool.
        """
        with torch.inference_mode():
            crops = self._crop(rgb, proposals)
            if crops is None or not self._objects:
                return []
            found = self._judge(crops)
            every = found = self._surest(found)
            for _ in range(MENDED if found else 0):
                crops = self._crop(rgb, self._silhouettes(crops, found, rgb.shape[:2]))
                if crops is None:
                    break
                found = self._judge_again(crops, found)
                every = [*every, *found]
            return self._cut_out(rgb, suppress(every, self.settings))

    def _cut_out(self, rgb: np.ndarray, matches: Sequence[Match]) -> list[Match]:
        """The matches with what in their boxes looks unlike its surroundings for a mask, where that is
        no less like the object."""
        masks = [cut_out(rgb, _box_around(match.mask)) for match in matches]
        rows = []
        for row, (mask, match) in enumerate(zip(masks, matches)):
            alike = np.count_nonzero(mask & match.mask) / np.count_nonzero(mask | match.mask)
            if CUT_LIKE < alike < CUT_SAME and np.count_nonzero(mask) >= LEAST_PIXELS:
                rows.append(row)
        crops = self._crop(rgb, [masks[row] for row in rows])
        if crops is None:
            return list(matches)
        found = list(matches)
        for row, new in zip(rows, self._judge_again(crops, [matches[row] for row in rows])):
            old = matches[row]
            if new.score >= old.score - CUT_LOSS:
                found[row] = replace(new, score=max(new.score, old.score))
        return found

    def _object(self, bank: TemplateBank) -> _Object:
        descriptors = torch.from_numpy(bank.descriptors).to(self.device)
        patches = patch_mask(torch.from_numpy(bank.masks)).to(self.device)
        return _Object(bank, descriptors, patches, _aggregated(descriptors, patches))

    def _crop(self, rgb: np.ndarray, masks: Sequence[np.ndarray]) -> _Crops | None:
        """The masks that are large enough, encoded; None if none is."""
        masks = [mask for mask in masks if np.count_nonzero(mask) >= LEAST_PIXELS]
        if not masks:
            return None
        boxes = [crop_box_from_mask(mask) for mask in masks]
        blacken = self._model.config.mask_background
        crops, inside = zip(*(crop_segment(rgb, mask, box, blacken) for mask, box in zip(masks, boxes)))
        descriptors = self.encode(np.stack(crops).astype(np.float32))
        patches = patch_mask(torch.from_numpy(np.stack(inside))).to(self.device)
        return _Crops(masks, boxes, descriptors, patches, _aggregated(descriptors, patches))

    def _judge(self, crops: _Crops) -> list[Match]:
        """Each object with its best proposals."""
        found = []
        for class_id, one in self._objects.items():
            similar = crops.aggregated @ one.aggregated.T
            own = similar.topk(min(_AGGREGATED, similar.shape[1])).values.mean(1)
            rows = own.topk(min(self.settings.candidates, len(own))).indices
            found += self._compare(crops, rows, class_id, similar[rows], own[rows])
        return found

    def _judge_again(self, crops: _Crops, matches: Sequence[Match]) -> list[Match]:
        """Each match with the crop of its row, which was mended for it."""
        found = list(matches)
        for class_id, one in self._objects.items():
            rows = [row for row, match in enumerate(matches) if match.class_id == class_id]
            if not rows:
                continue
            index = torch.tensor(rows, device=self.device)
            similar = crops.aggregated[index] @ one.aggregated.T
            own = similar.topk(min(_AGGREGATED, similar.shape[1])).values.mean(1)
            for match in self._compare(crops, index, class_id, similar, own):
                found[match.row] = match
        return found

    def _compare(
        self, crops: _Crops, rows: Tensor, class_id: str, similar: Tensor, aggregated: Tensor
    ) -> list[Match]:
        """Proposals ``rows`` (r,) and the best of an object's templates, ``similar`` (r, N) as a whole."""
        one = self._objects[class_id]
        templates = similar.topk(min(self.settings.templates, similar.shape[1])).indices  # (r, n)
        patches = patch_similarity(
            crops.descriptors[rows], crops.patches[rows], one.descriptors[templates], one.patches[templates]
        )
        value, best = patches.max(1)
        scores = ((aggregated + value) / 2).clamp(min=0.0)
        chosen = templates.gather(1, best[:, None])[:, 0]
        return [
            Match(class_id, score, crops.masks[row], template, row)
            for score, template, row in zip(scores.tolist(), chosen.tolist(), rows.tolist())
        ]

    def _surest(self, matches: Sequence[Match]) -> list[Match]:
        """Of every object the matches that are worth mending: the best ones that differ, and not hopeless."""
        p = self.settings
        few = replace(p, min_score=p.min_score - HOPELESS, per_class=p.per_class + SPARE)
        own = [[match for match in matches if match.class_id == class_id] for class_id in self._objects]
        return [match for some in own for match in suppress(some, few)]

    def _silhouettes(
        self, crops: _Crops, matches: Sequence[Match], size: tuple[int, int]
    ) -> list[np.ndarray]:
        """The masks of the matches' templates where stage 2 lays them; where it finds no place, as before."""
        masks = [match.mask for match in matches]
        for class_id, one in self._objects.items():
            rows = [row for row, match in enumerate(matches) if match.class_id == class_id]
            if not rows:
                continue
            places = [matches[row].row for row in rows]
            affines = self._affines(crops.select(places), one, [matches[row].template for row in rows])
            for row, place, affine in zip(rows, places, affines):
                mask = silhouette(one.bank, matches[row].template, affine, crops.boxes[place], size)
                if np.count_nonzero(mask) >= LEAST_PIXELS:
                    masks[row] = mask
        return masks

    def _affines(self, crops: _Crops, one: _Object, templates: Sequence[int]) -> np.ndarray:
        """(P, 3, 3) template crop px -> query crop px, of stage 2."""
        centres = torch.from_numpy(one.bank.centres[list(templates)]).to(self.device)
        index = torch.tensor(templates, device=self.device)
        found = self._model.correspond(
            crops.descriptors, one.descriptors[index].float(), crops.patches, one.patches[index], centres
        )
        return compose_affine(*self._model.affine(*found), centres).cpu().numpy()


def _box_around(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: the upright box around a mask, a little larger."""
    x, y, w, h = mask_roi(mask)
    box = np.zeros_like(mask)
    dx, dy = w // 16 + 1, h // 16 + 1
    box[max(y - dy, 0) : y + h + dy, max(x - dx, 0) : x + w + dx] = True
    return box


def _aggregated(descriptors: Tensor, patches: Tensor) -> Tensor:
    """(B, C) unit vectors: the mean of the descriptors (B, C, 256) inside patch masks (B, 16, 16)."""
    weight = patches.flatten(1).to(descriptors.dtype)
    return F.normalize(torch.einsum("bcs,bs->bc", descriptors, weight).float(), dim=1)


def patch_similarity(query: Tensor, query_patches: Tensor, templates: Tensor, patches: Tensor) -> Tensor:
    """How alike crops are to templates, patch by patch.

    Every patch of the one looks for the most similar patch of the other, and that for the most similar one of
    the first. If this leads back to within 1.5 cells of where it began, the similarity counts. The result is
    the geometric mean of the crop's mean and the template's, so that a part of an object and an object with
    its surroundings lose as much as they lack or have too much.

    Args:
        query: (r, C, 256) unit vectors. query_patches: (r, 16, 16) in {0, 1}.
        templates: (r, n, C, 256) unit vectors, any float type: those that each crop is compared with.
        patches: (r, n, 16, 16).

    Returns:
        (r, n) in 0..1.
    """
    ours, theirs = query_patches.flatten(1)[:, None] > 0, patches.flatten(2) > 0  # (r, 1, 256), (r, n, 256)
    similarity = torch.matmul(query.mT[:, None], templates.to(query.dtype))  # (r, n, query, template)
    best, to = similarity.masked_fill(~theirs[:, :, None], -1.0).max(3)
    best_back, back = similarity.masked_fill_(~ours[..., None], -1.0).max(2)
    every = torch.arange(GRIDS[0] ** 2, device=query.device)
    good = best.clamp(min=0) * _near(back.gather(2, to), every) * ours
    good_back = best_back.clamp(min=0) * _near(to.gather(2, back), every) * theirs
    kept = good.sum(2) / ours.sum(2).clamp(min=1)
    covered = good_back.sum(2) / theirs.sum(2).clamp(min=1)
    return (kept * covered).sqrt().clamp(max=1.0)


def _near(one: Tensor, other: Tensor) -> Tensor:
    """Whether two cells, by number, are neighbours."""
    side = GRIDS[0]
    return (
        torch.hypot((one % side - other % side).float(), (one // side - other // side).float()) <= _ROUND_TRIP
    )


def silhouette(
    bank: TemplateBank, template: int, affine: np.ndarray, box: CropBox, size: tuple[int, int]
) -> np.ndarray:
    """A template's mask where an affine lays it over an image.

    Args:
        affine: (3, 3) template crop px -> query crop px. box: of the query crop. size: (H, W) of the image.

    Returns:
        (H, W) bool.
    """
    M_img_crop = np.linalg.inv(box.affine().astype(np.float64))
    M = M_img_crop @ np.asarray(affine, np.float64)
    mask = bank.masks[template].astype(np.float32)
    if not np.isfinite(M).all():
        return np.zeros(size, bool)
    assert mask.shape == (CROP_SIZE, CROP_SIZE)
    return cv2.warpAffine(mask, M[:2], (size[1], size[0]), flags=cv2.INTER_LINEAR) > 0.5


def suppress(matches: Sequence[Match], settings: MatchSettings) -> list[Match]:
    """Without doubles and what is too unsure, at most ``per_class`` of an object, surest first.

    Two matches are doubles where they share more than ``overlap`` of the smaller one, whatever they are of.
    """
    kept: list[Match] = []
    counts: dict[str, int] = {}
    for match in sorted(matches, key=lambda one: -one.score):
        if match.score < settings.min_score or counts.get(match.class_id, 0) >= settings.per_class:
            continue
        area = np.count_nonzero(match.mask)
        if any(
            np.count_nonzero(match.mask & other.mask)
            > settings.overlap * min(area, np.count_nonzero(other.mask))
            for other in kept
        ):
            continue
        kept.append(match)
        counts[match.class_id] = counts.get(match.class_id, 0) + 1
    return kept
