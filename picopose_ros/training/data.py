"""Batches of training pairs, each a pure function of (seed, step): resuming needs no state."""

from __future__ import annotations

from dataclasses import dataclass, fields

import cv2
import numpy as np
import torch
from torch import Tensor

from picopose_ros.geometry.crops import normalise_crop
from picopose_ros.training.losses import AffineLabels
from picopose_ros.training.pairs import Difficulty, PairLabels, draw_sample, template_centre
from picopose_ros.training.pool import PoolReader, TemplateView


@dataclass
class Batch:
    """T templates (two per object) and Q queries (the same number per template)."""

    template_rgb: Tensor
    """(T, 3, 224, 224) normalised."""
    template_mask: Tensor
    """(T, 224, 224)."""
    template_centre: Tensor
    """(T, 2) object centre in the template crop, px."""
    query_rgb: Tensor
    """(Q, 3, 224, 224)."""
    query_mask: Tensor
    """(Q, 224, 224)."""
    own: Tensor
    """(Q,) index of each query's own template."""
    other: Tensor
    """(Q,) index of another template of the same object."""
    position: Tensor
    """(Q, 2, 64, 64) labels against the own template, crop px."""
    valid: Tensor
    """(Q, 64, 64)."""
    cross_position: Tensor
    """(Q, 2, 64, 64) labels against the other template."""
    cross_valid: Tensor
    """(Q, 64, 64)."""
    translation: Tensor
    scale: Tensor
    angle: Tensor
    usable: Tensor

    def affine_labels(self) -> AffineLabels:
        """Ground truth of stage 2 against the own template."""
        return AffineLabels(self.translation, self.scale, self.angle, self.usable)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def _normalised(crops: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([normalise_crop(rgb.astype(np.float32) / 255) for rgb in crops]))


def make_batch(pool: PoolReader, seed: int, step: int, objects: int, difficulty: Difficulty) -> Batch:
    """The batch of a step: `objects` objects, two templates each, the pool's queries of either."""
    rng = np.random.default_rng([seed, step])
    templates: list[TemplateView] = []
    rgb, masks, own, other = [], [], [], []
    labels: list[PairLabels] = []
    cross: list[PairLabels] = []
    for index in range(objects):
        sample = draw_sample(pool, rng, difficulty)
        templates += sample.templates
        for query, which, right, wrong in zip(
            sample.queries, sample.own, sample.labels, sample.cross, strict=True
        ):
            rgb.append(query.rgb)
            masks.append(query.mask)
            own.append(2 * index + which)
            other.append(2 * index + 1 - which)
            labels.append(right)
            cross.append(wrong)

    def stack(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays))

    def vector(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return Batch(
        template_rgb=_normalised([t.rgb for t in templates]),
        template_mask=stack([t.mask for t in templates]).float(),
        template_centre=stack([template_centre(t) for t in templates]),
        query_rgb=_normalised(rgb),
        query_mask=stack(masks).float(),
        own=torch.tensor(own),
        other=torch.tensor(other),
        position=stack([pair.position for pair in labels]),
        valid=stack([pair.valid for pair in labels]),
        cross_position=stack([pair.position for pair in cross]),
        cross_valid=stack([pair.valid for pair in cross]),
        translation=stack([pair.translation for pair in labels]),
        scale=vector([pair.scale for pair in labels]),
        angle=vector([pair.angle for pair in labels]),
        usable=vector([pair.usable for pair in labels]),
    )


class BatchDataset(torch.utils.data.Dataset[Batch]):
    """Batches by step number, for a DataLoader with batch_size=None."""

    def __init__(self, pool: str, seed: int, steps: int, objects: int, difficulty: Difficulty) -> None:
        self._pool_path, self._pool = pool, None
        self._seed, self._steps, self._objects, self._difficulty = seed, steps, objects, difficulty

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        if self._pool is None:  # opened in the worker: memory maps are shared by the page cache
            cv2.setNumThreads(1)
            torch.set_num_threads(1)
            self._pool = PoolReader(self._pool_path)
        self._pool.refresh()
        return make_batch(self._pool, self._seed, step, self._objects, self._difficulty)
