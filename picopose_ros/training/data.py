"""Batches of training pairs, each a pure function of (seed, step): resuming needs no state.

A batch may consist of several shares, each drawn for itself as a pure function of (seed, step, share), so
that the processes of a distributed run can divide them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picopose_ros.errors import PicoPoseError
from picopose_ros.geometry.crops import normalise_crop
from picopose_ros.training.labels import pose_affine
from picopose_ros.training.losses import AffineLabels
from picopose_ros.training.pairs import Difficulty, Sample, draw_sample, template_centre
from picopose_ros.training.pool import BrokenSampleError, PoolReader

_PATIENCE = 100
"""A source with this many broken samples in a row is given up."""


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
    pose_affine: Tensor | None = None
    """(Q, 4) stage 2's label from the relative pose, as the released network has it: tau (x, y) in 14 px,
    scale, angle in radians; None: only the fitted one above is known."""
    skipped: tuple[str, ...] = ()
    """Names of broken samples that were met and left out while this batch was drawn."""

    def affine_labels(self) -> AffineLabels:
        """Ground truth of stage 2 against the own template."""
        return AffineLabels(self.translation, self.scale, self.angle, self.usable)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{
                name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in values.items()
            }
        )


def _normalised(crops: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([normalise_crop(rgb.astype(np.float32) / 255) for rgb in crops]))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, templates and queries one after the other.

    `pose_affine` is known where all of them know it.
    """
    if len(batches) == 1:
        return batches[0]
    values: dict[str, Any] = {}
    before = np.cumsum([0, *(len(b.template_rgb) for b in batches)]).tolist()
    for name in (f.name for f in fields(Batch)):
        parts = [getattr(b, name) for b in batches]
        if name in ("own", "other"):
            parts = [part + count for part, count in zip(parts, before, strict=False)]
        if name == "skipped":
            values[name] = sum(parts, ())
        else:
            values[name] = None if any(part is None for part in parts) else torch.cat(parts)
    return Batch(**values)


def take(batch: Batch, pairs: int) -> Batch:
    """The first `pairs` queries of a batch and the templates that they need."""
    values = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    needed, index = torch.cat([batch.own[:pairs], batch.other[:pairs]]).unique(return_inverse=True)
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = value[needed] if name.startswith("template_") else value[:pairs]
    return Batch(**values | {"own": index[:pairs], "other": index[pairs:]})


def _draw(pool: PoolReader, rng: np.random.Generator, difficulty: Difficulty, skipped: list[str]) -> Sample:
    """A sample of a pool; broken ones are left out and named in `skipped`."""
    for _ in range(_PATIENCE):
        try:
            return draw_sample(pool, rng, difficulty)
        except BrokenSampleError as error:
            skipped.append(str(error))
    raise PicoPoseError(
        f"{_PATIENCE} samples in a row of {pool.folder} are broken, the last one: {skipped[-1]}; delete the "
        "folder and build the pool again"
    )


def assemble(samples: Sequence[Sample], skipped: Sequence[str] = ()) -> Batch:
    """A batch of samples' templates (two each) and queries, in their order.

    Args:
        skipped: names of broken samples that were met on the way.
    """
    pairs = [
        (2 * n + which, 2 * n + 1 - which, query, sample.templates[which], right, wrong)
        for n, sample in enumerate(samples)
        for which, query, right, wrong in zip(
            sample.own, sample.queries, sample.labels, sample.cross, strict=True
        )
    ]
    own, other, queries, nearest, labels, cross = (list(column) for column in zip(*pairs))
    templates = [template for sample in samples for template in sample.templates]

    def stack(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays))

    def vector(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    affines = [
        pose_affine(q.T_cam_ctr, q.K, q.M_crop_img, t.T_cam_ctr, t.K, t.M_crop_img)
        for q, t in zip(queries, nearest)
    ]
    return Batch(
        template_rgb=_normalised([t.rgb for t in templates]),
        template_mask=stack([t.mask for t in templates]).float(),
        template_centre=stack([template_centre(t) for t in templates]),
        query_rgb=_normalised([query.rgb for query in queries]),
        query_mask=stack([query.mask for query in queries]).float(),
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
        pose_affine=stack([np.array([*tau, scale, angle], np.float32) for tau, scale, angle in affines]),
        skipped=tuple(skipped),
    )


def make_batch(
    pool: PoolReader, seed: int, step: int, objects: int, difficulty: Difficulty, share: int = 0
) -> Batch:
    """A share of a step's batch: `objects` objects, two templates each, the pool's queries of either.

    Raises:
        PicoPoseError: the pool has hardly a sample that is whole.
    """
    # Share 0 is what a batch was before there were shares; [seed, step, 0] would be the same, too.
    rng = np.random.default_rng([seed, step, share] if share else [seed, step])
    skipped: list[str] = []
    return assemble([_draw(pool, rng, difficulty, skipped) for _ in range(objects)], skipped)


class PoolSource:
    """Batches of a pool's samples; the pool is opened by the process that draws the first one.

    Memory maps are shared by the page cache, so every loader process may have its own.
    """

    def __init__(self, folder: str, difficulty: Difficulty) -> None:
        self._folder, self._difficulty = folder, difficulty
        self._pool: PoolReader | None = None

    def pool(self) -> PoolReader:
        """The pool, with what has been added to it since."""
        if self._pool is None:
            self._pool = PoolReader(self._folder)
        self._pool.refresh()
        return self._pool

    def objects(self, seed: int, step: int, share: int, objects: int) -> Batch:
        """A share with this many objects."""
        return make_batch(self.pool(), seed, step, objects, self._difficulty, share)

    def __call__(self, seed: int, step: int, share: int, pairs: int) -> Batch:
        """A share with this many queries."""
        objects = math.ceil(pairs / (2 * self.pool().queries))
        return take(self.objects(seed, step, share, objects), pairs)


class BatchDataset(torch.utils.data.Dataset[Batch]):
    """Batches by step number, for a DataLoader with batch_size=None.

    Args:
        draw: makes a share's batch from (step, share). shares: those of this process. steps: of the run.
    """

    def __init__(self, draw: Callable[[int, int], Batch], shares: Sequence[int], steps: int) -> None:
        self._draw, self._shares, self._steps = draw, shares, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        return concatenate([self._draw(step, share) for share in self._shares])
