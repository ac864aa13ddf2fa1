"""Stages 2 and 3 over all chosen templates of an image, in as few passes as memory allows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from picopose_ros.estimation.batching import compiled_sizes
from picopose_ros.estimation.passes import Network, patch_masks
from picopose_ros.estimation.queries import Query
from picopose_ros.estimation.results import Choice, Hypothesis
from picopose_ros.geometry.crops import CROP_SIZE, CropBox
from picopose_ros.model.config import GRIDS
from picopose_ros.model.fast import Prepared, Refining
from picopose_ros.model.offsets import grid_positions
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import TemplateBank

_PATCHES = 16


def regress(
    network: Network,
    queries: Sequence[Query],
    features: Prepared,
    chosen: Sequence[Choice],
    trace: bool = False,
    affines: Sequence[np.ndarray | None] | None = None,
    keep: int | None = None,
) -> Iterator[tuple[int, Hypothesis]]:
    """Stages 2 and 3 for the chosen templates, pass by pass; the host reads one while the next one runs.

    Args:
        network: the passes.
        queries: the segments. features: of their crops.
        chosen: pairs of a query and a template.
        trace: also keep the output of the coarser grids and stage 1's matches.
        affines: per choice an affine (3, 3) that stage 3 starts from instead of stage 2's, or None.
        keep: number of a query's hypotheses that go through the last grid; None: all.

    Yields:
        Index in ``chosen``, and the hypothesis.
    """
    given = [None] * len(chosen) if affines is None else affines
    patches = network.upload(patch_masks(np.stack([query.mask for query in queries])))
    pairs = _Pairs(network, queries, features, patches, chosen, given)
    parts = list(_split_by_kind([affine is None for affine in given], network.max_pairs))
    coarse: dict[int, list[Refining]] = {}
    if keep is not None:
        coarse = _coarse_grids(pairs, parts)
        best, others = _prune(coarse, pairs, keep)
        if others:
            yield from _pruned(pairs, others, coarse, trace).collect(chosen)
        parts = [best[i : i + network.max_pairs] for i in range(0, len(best), network.max_pairs)]
    running: _Running | None = None
    for part in parts:
        launched = _launch(pairs, part, coarse, trace)
        if running is not None:
            yield from running.collect(chosen)
        running = launched
    if running is not None:
        yield from running.collect(chosen)


def warm_up(network: Network) -> None:
    """Run the batch sizes once, so that nothing is compiled or allocated when an image arrives.

    A CPU that nothing is compiled for prepares nothing that depends on the size: there one is enough, where
    all of them took two seconds with ``tiny`` whenever a node was configured.
    """
    bank = next(iter(network.banks.values()))
    mask = np.ones((CROP_SIZE, CROP_SIZE), np.uint8)
    crop = np.zeros((3, CROP_SIZE, CROP_SIZE), np.float32)
    box = CropBox(0, 0, CROP_SIZE)
    query = Query(0, Segment(bank.class_id, 1.0, mask), bank, box, box.affine(), crop, mask)
    first = 0
    with torch.inference_mode():
        sizes = {*compiled_sizes(network.max_batch), *compiled_sizes(network.max_pairs)}
        if network.device.type == "cpu" and not network.compiles:
            sizes = {1}
        for size in sorted(sizes):
            features = network.encode(np.stack([crop] * size))
            if size <= network.max_pairs:  # with templates that are not cached yet
                chosen = [Choice(0, (first + i) % len(bank), 0.0) for i in range(size)]
                first += size
                for _ in regress(network, [query] * size, features, chosen):
                    pass


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a query and a template that are regressed, with what is on the device of them."""

    network: Network
    queries: Sequence[Query]
    features: Prepared
    patches: Tensor
    chosen: Sequence[Choice]
    given: Sequence[np.ndarray | None]

    def rows(self, part: Sequence[int]) -> Tensor:
        """Rows of the queries of these choices, on the device."""
        rows = torch.tensor([self.chosen[i].query for i in part])
        return rows.to(self.patches.device, non_blocking=True)

    def patches_of(self, part: Sequence[int]) -> Tensor:
        """(B, 16, 16) patch masks of the queries of these choices."""
        return self.patches[self.rows(part)]

    def templates(self, part: Sequence[int]) -> list[tuple[TemplateBank, int]]:
        """The banks and the indices in them of these choices."""
        return [(self.queries[self.chosen[i].query].bank, self.chosen[i].template) for i in part]

    def both(self, part: Sequence[int]) -> tuple[Prepared, Prepared]:
        """Features of the queries and of the templates of these choices."""
        return self.features.select(self.rows(part)), self.network.templates(self.templates(part))

    def start(self, part: Sequence[int], query: Prepared, template: Prepared) -> Refining:
        """Stage 2, or the given affines, as the start of stage 3."""
        network, templates = self.network, self.templates(part)
        template_patches = network.template_patches(templates)
        if self.given[part[0]] is None:
            centres = network.upload(np.stack([bank.centres[t] for bank, t in templates]))
            affines = network.affines(query, template, self.patches_of(part), template_patches, centres)
        else:
            affines = network.upload(np.stack([self.given[i] for i in part]).astype(np.float32))
        return network.start(affines, template_patches)


def _launch(
    pairs: _Pairs, part: Sequence[int], coarse: Mapping[int, list[Refining]], trace: bool
) -> _Running:
    """Queue a pass over some pairs, or its remaining grids, and the copy of its results to the host."""
    query, template = pairs.both(part)
    if coarse:
        levels = [Refining.join(states) for states in zip(*(coarse[i] for i in part))]
        state = levels[-1]
    else:
        levels, state = [], pairs.start(part, query, template)
    levels += pairs.network.offsets(state, query, template, range(len(levels), len(GRIDS)))
    pairs.network.trim()
    matches = [_patch_matches(query, template, pairs.patches_of(part))] if trace else []
    return _Running(part, levels if trace else levels[-1:], matches)


def _coarse_grids(pairs: _Pairs, parts: Sequence[Sequence[int]]) -> dict[int, list[Refining]]:
    """By pair the states after all grids but the last."""
    found: dict[int, list[Refining]] = {}
    for part in parts:
        query, template = pairs.both(part)
        state = pairs.start(part, query, template)
        levels = pairs.network.offsets(state, query, template, range(len(GRIDS) - 1))
        pairs.network.trim()
        found.update((i, [s.select(slice(k, k + 1)) for s in levels]) for k, i in enumerate(part))
    return found


def _pruned(
    pairs: _Pairs, part: Sequence[int], coarse: Mapping[int, list[Refining]], trace: bool
) -> _Running:
    """The results of pairs that don't go through the last grid."""
    levels = [Refining.join(states) for states in zip(*(coarse[i] for i in part))]
    matches = [_patch_matches(*pairs.both(part), pairs.patches_of(part))] if trace else []
    levels.append(pairs.network.enlarged(levels[-1]))
    return _Running(part, levels if trace else levels[-1:], matches, pruned=True)


class _Running:
    """Passes queued on the device, whose results are being copied to the host."""

    def __init__(
        self, part: Sequence[int], levels: Sequence[Refining], matches: Sequence[Tensor], pruned: bool = False
    ) -> None:
        self._part, self._pruned = part, pruned
        tensors = [levels[-1].affine, *matches]
        for level in levels:
            tensors += [level.flow, level.certainty[:, 0]]
        self._traced = bool(matches)
        self._done = None
        if tensors[0].device.type == "cuda":
            self._host = [
                torch.empty(t.shape, dtype=torch.float32, pin_memory=True).copy_(t, non_blocking=True)
                for t in tensors
            ]
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._host = [t.float().cpu() for t in tensors]

    def collect(self, chosen: Sequence[Choice]) -> Iterator[tuple[int, Hypothesis]]:
        """Wait for the results; yields the index in ``chosen`` and the hypothesis."""
        if self._done is not None:
            self._done.synchronize()
        affine, *rest = (t.numpy() for t in self._host)
        matches = rest.pop(0) if self._traced else [None] * len(self._part)
        maps = list(zip(rest[::2], rest[1::2]))
        for k, i in enumerate(self._part):
            *coarse, (flow, certainty) = ((f[k], c[k]) for f, c in maps)
            _, template, score = chosen[i]
            yield (
                i,
                Hypothesis(
                    template, score, affine[k], flow, certainty, tuple(coarse), matches[k], self._pruned
                ),
            )


def _prune(coarse: Mapping[int, list[Refining]], pairs: _Pairs, keep: int) -> tuple[list[int], list[int]]:
    """The ``keep`` choices of every query that rank best after the coarse grids, and the others."""
    order = list(coarse)
    rank = torch.cat([_coherence(coarse[i][-1]) for i in order]).tolist()
    ranked = sorted(zip(rank, order), key=lambda one: (-one[0], one[1]))
    best: list[int] = []
    others: list[int] = []
    taken: dict[int, int] = {}
    for _, i in ranked:
        row = pairs.chosen[i].query
        taken[row] = taken.get(row, 0) + 1
        (best if taken[row] <= keep else others).append(i)
    return sorted(best), sorted(others)


def _coherence(state: Refining) -> Tensor:
    """(B,) number of cells that are certain and move as one affine says.

    Certainty alone grows with wrong hypotheses too; on the grid before the last, this finds the later best
    of five among its first two in three cases of four (24 synthetic queries).
    """
    n = state.flow.shape[-1]
    weight = state.certainty.float().sigmoid().flatten(1)
    grid = grid_positions(n, weight)
    target = (grid + state.flow.float()).flatten(2).transpose(1, 2)
    source = torch.cat([grid.flatten(1), torch.ones_like(grid[:1]).flatten(1)]).T
    weighted = source.T * weight[:, None]
    # A little of the identity keeps the system solvable without certain cells.
    normal = weighted @ source + 1e-3 * torch.eye(3, device=source.device)
    fit = torch.linalg.solve_ex(normal, weighted @ target).result
    off = (target - source @ fit).abs().sum(2)
    return (weight / (1 + off.square())).sum(1)


def _split_by_kind(kinds: Sequence[bool], size: int) -> Iterator[list[int]]:
    """Indices in parts of at most ``size``, each of one kind only."""
    for kind in (True, False):
        indices = [i for i, k in enumerate(kinds) if k == kind]
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def _patch_matches(query: Prepared, template: Prepared, query_patches: Tensor) -> Tensor:
    """(B, 2, 16, 16) query crop px (x, y) of each template patch's best match inside the query's mask."""
    similarity = template.descriptors.transpose(1, 2) @ query.descriptors
    outside = query_patches.flatten(1)[:, None] == 0
    best = similarity.masked_fill(outside, -1.0).argmax(2)
    patch = CROP_SIZE // _PATCHES
    centres = torch.stack([best % _PATCHES, best // _PATCHES], 1) * patch + (patch - 1) / 2
    return centres.unflatten(2, (_PATCHES, _PATCHES))
