"""The network's part of an estimate: crops in, hypotheses out, in as few passes as memory allows."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from picopose_ros.errors import ConfigError
from picopose_ros.geometry.crops import CROP_SIZE
from picopose_ros.model import PicoPose
from picopose_ros.model.config import GRIDS
from picopose_ros.model.fast import FastStages, Prepared, Refining, Schedule
from picopose_ros.model.matching import patch_mask
from picopose_ros.model.offsets import grid_positions
from picopose_ros.segmentation import Segment
from picopose_ros.templates.bank import TemplateBank

_log = logging.getLogger(__name__)

PATCHES = 16
"""Side of the grid of patches of stages 1 and 2."""

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""What the network computes in; see `resolve_precision`."""

Choice = tuple[int, int, float]
"""A template for a segment: position of the segment's query, index in the bank, stage 1's score."""


@dataclass(frozen=True)
class Query:
    """A segment that is worth asking about.

    Attributes:
        index: of the segment in the input. bank: of its class. M_crop_img: (3, 3) full image -> crop.
        crop: (3, 224, 224) network input. mask: (224, 224) uint8.
    """

    index: int
    segment: Segment
    bank: TemplateBank
    M_crop_img: np.ndarray
    crop: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Hypothesis:
    """A template of a query, with what the network says about the two.

    Attributes:
        template: index in the bank. match_score: stage 1's.
        affine: (3, 3) template crop px -> query crop px. flow: (2, 64, 64) cells. certainty: (64, 64) logits.
        coarse: where it is traced, flow (2, n, n) and certainty (n, n) at the grids before the last.
        matches: where it is traced, (2, 16, 16) query crop px (x, y) of each template patch's best match.
        pruned: it was given up before the last grid; flow and certainty are the grid's before, enlarged.
    """

    template: int
    match_score: float
    affine: np.ndarray
    flow: np.ndarray
    certainty: np.ndarray
    coarse: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    matches: np.ndarray | None = None
    pruned: bool = False


def resolve_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in.

    ``auto`` takes fp16 on CUDA; on a CPU bf16 where it has matrix units for it (AMX), for without them fp32
    is faster; else fp32.

    Raises:
        ConfigError: there is no such precision.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.float16
        amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if amx else torch.float32
    if name not in get_args(Precision):
        raise ConfigError(f"precision is '{name}', choose one of {', '.join(get_args(Precision))}")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


class Network:
    """A network and what it needs of the banks, on a device. Not for use by two threads at once.

    Memory on the device: per object its descriptors (N, C, 256) in half precision, for all objects together
    at most ``cache_bytes`` of what stages 2 and 3 need of templates, and one pass over ``max_batch`` pairs.

    Attributes:
        device: of the network. dtype: what matrix products are computed in.
    """

    def __init__(
        self,
        model: PicoPose,
        banks: Mapping[str, TemplateBank],
        device: torch.device,
        max_batch: int = 16,
        cache_bytes: int = 2**29,
        precision: Precision = "auto",
        schedule: Schedule | None = None,
        compile: str = "",
    ) -> None:
        """Bring banks to the device.

        Args:
            model: in evaluation mode, on ``device``. banks: by class id, made with this model.
            max_batch: most crops or pairs that go through the network at once.
            cache_bytes: for templates that were hypotheses lately.
            precision: see `resolve_precision`. schedule: what is done to be fast; everything if None.
            compile: a backend of `torch.compile` for what a segment, a template and a pair need; "" for none.
        """
        self.device = device
        self.dtype = resolve_precision(precision, device)
        self._model = model
        self._stages: FastStages = model.fast(schedule)
        self._max_batch = max_batch
        self._max_pairs = min(max_batch, self._stages.pairs_at_once)
        self._compiles = bool(compile)
        stages = self._stages
        self._crops: Callable[[Tensor], Prepared] = lambda crops: stages.query(stages.encode(crops))
        self._template_parts = stages.parts
        # One function per grid: a compiler keeps few versions of each.
        self._refine = [partial(stages.refine, level) for level in range(len(GRIDS))]
        if compile:
            self._crops = _Compiled(self._crops, compile)
            self._template_parts = _Compiled(self._template_parts, compile)
            self._refine = [_Compiled(function, compile) for function in self._refine]
        self._banks: dict[str, TemplateBank] = {}
        self._descriptors: dict[str, Tensor] = {}
        self._patches: dict[str, Tensor] = {}
        # One half for the maps of many templates, one for the larger parts of the hottest.
        self._maps: _Recent[Prepared] = _Recent(cache_bytes // 2)
        self._parts: _Recent[tuple[Tensor, ...]] = _Recent(cache_bytes // 2)
        self._take(banks)

    def with_banks(self, banks: Mapping[str, TemplateBank]) -> Network:
        """The same with other banks; what is here of those that stay (the same object) is kept."""
        other = copy.copy(self)
        other._take(banks)
        return other

    def _take(self, banks: Mapping[str, TemplateBank]) -> None:
        staying = {name for name, bank in banks.items() if self._banks.get(name) is bank}
        self._maps, self._parts = self._maps.only(staying), self._parts.only(staying)
        descriptors, patches = self._descriptors, self._patches
        self._descriptors, self._patches = {}, {}
        for name, bank in banks.items():
            stays = name in staying
            self._descriptors[name] = descriptors[name] if stays else self._upload(bank.descriptors)
            self._patches[name] = patches[name] if stays else self._upload(_patches(bank.masks))
        self._banks = dict(banks)

    def encode(self, queries: Sequence[Query]) -> Prepared:
        """What all stages need of the queries, in their order."""
        crops = self._upload(np.stack([query.crop for query in queries]))
        with self._autocast():
            return self._prepared(crops)

    def warm_up(self) -> None:
        """Run every size of batch once: nothing is compiled or allocated any more when it matters."""
        bank = next(iter(self._banks.values()))
        mask = np.ones((CROP_SIZE, CROP_SIZE), np.uint8)
        crop = np.zeros((3, CROP_SIZE, CROP_SIZE), np.float32)
        query = Query(0, Segment(bank.class_id, 1.0, mask), bank, np.eye(3), crop, mask)
        first = 0
        with torch.inference_mode():
            for size in sorted({*_sizes(self._max_batch), *_sizes(self._max_pairs)}):
                encoded = self.encode([query] * size)
                if size <= self._max_pairs:  # of templates that are new to it
                    chosen = [(0, (first + i) % len(bank), 0.0) for i in range(size)]
                    first += size
                    for _ in self.regress([query] * size, encoded, chosen):
                        pass

    def _prepared(self, crops: Tensor) -> Prepared:
        """What is computed of crops (B, 3, 224, 224) on the device, in their order."""
        parts = []
        for part in crops.split(self._max_batch):
            filled = part[self._filled(range(len(part)), self._max_batch)] if self._compiles else part
            parts.append(self._crops(filled).select(slice(0, len(part))))
        return Prepared.join(parts)

    def _filled(self, part: Sequence[int], most: int) -> list[int]:
        """The indices, the last one repeated until there are as many as has been compiled for."""
        if not self._compiles:
            return list(part)
        size = next(size for size in _sizes(most) if size >= len(part))
        return [*part, *[part[-1]] * (size - len(part))]

    def scores(self, queries: Sequence[Query], encoded: Prepared) -> list[Tensor]:
        """Stage 1: per query the score (N,) of every template of its bank."""
        found: dict[int, Tensor] = {}
        descriptors = encoded.descriptors
        if self.device.type == "cuda":
            descriptors = descriptors.to(torch.float32 if self.dtype == torch.float32 else torch.float16)
        for class_id in dict.fromkeys(query.bank.class_id for query in queries):
            rows = [i for i, query in enumerate(queries) if query.bank.class_id == class_id]
            patches = torch.from_numpy(_patches(np.stack([queries[row].mask for row in rows])))
            scores = self._stages.scores(
                descriptors[rows], patches, self._descriptors[class_id], self._patches[class_id]
            )
            found.update(zip(rows, scores))
        return [found[row] for row in range(len(queries))]

    def agreement(self, query: Query, descriptors: Tensor, templates: Tensor) -> Tensor:
        """How well a query's matches with some templates (N,) of its bank agree on one motion: (N,) in 0..1.

        Args:
            descriptors: (C, 256) the query's, of :meth:`encode`.
        """
        class_id = query.bank.class_id
        cells = self._upload(np.flatnonzero(_patches(query.mask[None])))
        return self._model.agreement(
            descriptors.float()[:, cells],
            cells,
            self._descriptors[class_id][templates],
            self._patches[class_id][templates],
        )

    def regress(
        self,
        queries: Sequence[Query],
        encoded: Prepared,
        chosen: Sequence[Choice],
        trace: bool = False,
        affines: Sequence[np.ndarray | None] | None = None,
        keep: int | None = None,
    ) -> Iterator[tuple[int, Hypothesis]]:
        """Stages 2 and 3 for the chosen templates, pass by pass, the last one's results while one runs.

        Args:
            queries, encoded: :meth:`encode`'s. chosen: pairs of a query and a template.
            trace: also keep what the coarser grids and stage 1 say.
            affines: per choice an affine (3, 3) that stage 3 starts from instead of stage 2's, or None.
            keep: so many of a query's hypotheses go through the last grid; None: all.
        Yields:
            Index in ``chosen``, and what the network says.
        """
        given = [None] * len(chosen) if affines is None else affines
        patches = self._upload(_patches(np.stack([query.mask for query in queries])))
        pairs = _Pairs(queries, encoded, patches, chosen, given)
        parts = list(_alike_parts([affine is None for affine in given], self._max_pairs))
        halfway: dict[int, list[Refining]] = {}
        if keep is not None:
            halfway = self._halfway(pairs, parts)
            best, others = _promising(halfway, pairs, keep)
            if others:
                yield from self._given_up(pairs, others, halfway, trace).collect(chosen)
            parts = [best[i : i + self._max_pairs] for i in range(0, len(best), self._max_pairs)]
        running: _Running | None = None
        for part in parts:
            launched = self._launch(pairs, part, halfway, trace)
            if running is not None:
                yield from running.collect(chosen)
            running = launched
        if running is not None:
            yield from running.collect(chosen)

    def resident_bytes(self) -> dict[str, int]:
        """Memory on the device: ``descriptors`` and ``masks`` of all objects, ``cache`` of templates."""
        return {
            "descriptors": sum(_size(t) for t in self._descriptors.values()),
            "masks": sum(_size(t) for t in self._patches.values()),
            "cache": self._maps.bytes + self._parts.bytes,
        }

    def _launch(
        self, pairs: _Pairs, part: Sequence[int], halfway: Mapping[int, list[Refining]], trace: bool
    ) -> _Running:
        """Queue a pass over some pairs, or the rest of it, and its results' way to the host."""
        with self._autocast():
            filled = self._filled(part, self._max_pairs)
            query, template = self._both(pairs, filled)
            if halfway:
                levels = [Refining.join(states) for states in zip(*(halfway[i] for i in filled))]
                state = levels[-1]
            else:
                levels, state = [], self._begin(pairs, filled, query, template)
            for level in range(len(levels), len(GRIDS)):
                state = self._refine[level](state, query, template)
                levels.append(state)
        self._trim()
        matches = [_patch_matches(query, template, pairs.patches_of(filled))] if trace else []
        return _Running(part, levels if trace else levels[-1:], matches)

    def _halfway(self, pairs: _Pairs, parts: Sequence[Sequence[int]]) -> dict[int, list[Refining]]:
        """Of every pair the grids before the last."""
        found: dict[int, list[Refining]] = {}
        for part in parts:
            with self._autocast():
                filled = self._filled(part, self._max_pairs)
                query, template = self._both(pairs, filled)
                levels = [self._begin(pairs, filled, query, template)]
                for level in range(len(GRIDS) - 1):
                    levels.append(self._refine[level](levels[-1], query, template))
            self._trim()
            found.update((i, [s.select(slice(k, k + 1)) for s in levels[1:]]) for k, i in enumerate(part))
        return found

    def _given_up(
        self, pairs: _Pairs, part: Sequence[int], halfway: Mapping[int, list[Refining]], trace: bool
    ) -> _Running:
        """What is known of pairs that don't reach the last grid."""
        levels = [Refining.join(states) for states in zip(*(halfway[i] for i in part))]
        matches = []
        if trace:
            matches = [_patch_matches(*self._both(pairs, part), pairs.patches_of(part))]
        levels.append(self._stages.enlarged(levels[-1]))
        return _Running(part, levels if trace else levels[-1:], matches, pruned=True)

    def _both(self, pairs: _Pairs, part: Sequence[int]) -> tuple[Prepared, Prepared]:
        return pairs.encoded.select(pairs.rows(part)), self._templates([pairs.template(i) for i in part])

    def _begin(
        self, pairs: _Pairs, part: Sequence[int], query: Prepared, template: Prepared
    ) -> Refining:
        """Stage 2, or the given affines, as the start of stage 3."""
        templates = [pairs.template(i) for i in part]
        template_patches = torch.stack([self._patches[bank.class_id][t] for bank, t in templates])
        if pairs.given[part[0]] is None:
            centres = self._upload(np.stack([bank.centres[t] for bank, t in templates]))
            own = pairs.patches_of(part)
            affine = self._stages.affine(query, template, own, template_patches, centres)
        else:
            affine = self._upload(np.stack([pairs.given[i] for i in part]).astype(np.float32))
        return self._stages.start(affine, template_patches)

    def _templates(self, wanted: Sequence[tuple[TemplateBank, int]]) -> Prepared:
        """What is known of templates, as one batch; computed where it isn't remembered."""
        by_key = {(bank.class_id, template): bank for bank, template in wanted}
        missing = [key for key in by_key if self._maps.get(key) is None]
        if missing:
            crops = torch.cat([by_key[key].crops([key[1]]) for key in missing])
            made = self._prepared(self._upload(crops.numpy()))
            for key, one in zip(missing, made.split()):
                self._maps.put(key, one, sum(map(_size, one.tensors())))
        found = Prepared.join([self._maps.get((bank.class_id, t)) for bank, t in wanted])
        if not self._stages.schedule.template_parts:
            return found
        missing = [key for key in by_key if self._parts.get(key) is None]
        if missing:
            filled = [missing[i] for i in self._filled(range(len(missing)), self._max_pairs)]
            made_parts = self._template_parts(Prepared.join([self._maps.get(key) for key in filled]).maps)
            for row, key in enumerate(missing):
                one = tuple(level[row : row + 1].clone() for level in made_parts)
                self._parts.put(key, one, sum(map(_size, one)))
        parts = [self._parts.get((bank.class_id, t)) for bank, t in wanted]
        return Prepared(found.descriptors, found.maps, tuple(map(torch.cat, zip(*parts))))

    def _trim(self) -> None:
        self._maps.trim()
        self._parts.trim()

    def _upload(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _autocast(self) -> AbstractContextManager:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)


@dataclass(frozen=True)
class _Pairs:
    """What a regression is about: queries, what is encoded of them, and the choices with given affines."""

    queries: Sequence[Query]
    encoded: Prepared
    patches: Tensor
    chosen: Sequence[Choice]
    given: Sequence[np.ndarray | None]

    def rows(self, part: Sequence[int]) -> Tensor:
        """Rows of the queries of these choices, on the device."""
        rows = torch.tensor([self.chosen[i][0] for i in part])
        return rows.to(self.patches.device, non_blocking=True)

    def patches_of(self, part: Sequence[int]) -> Tensor:
        """(B, 16, 16) patch masks of the queries of these choices."""
        return self.patches[self.rows(part)]

    def template(self, index: int) -> tuple[TemplateBank, int]:
        """The bank and the index in it of a choice."""
        row, template, _ = self.chosen[index]
        return self.queries[row].bank, template


class _Running:
    """Passes that are queued on the device; what comes of them is on its way to the host."""

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
            self._host = [t.float() for t in tensors]

    def collect(self, chosen: Sequence[Choice]) -> Iterator[tuple[int, Hypothesis]]:
        """Wait for it, and say what the network says."""
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


def _promising(
    halfway: Mapping[int, list[Refining]], pairs: _Pairs, keep: int
) -> tuple[list[int], list[int]]:
    """Per query the choices that promise most after the grids done, and the others."""
    order = list(halfway)
    promise = torch.cat([_promise(halfway[i][-1]) for i in order]).tolist()
    ranked = sorted(zip(promise, order), key=lambda one: (-one[0], one[1]))
    best: list[int] = []
    others: list[int] = []
    taken: dict[int, int] = {}
    for _, i in ranked:
        row = pairs.chosen[i][0]
        taken[row] = taken.get(row, 0) + 1
        (best if taken[row] <= keep else others).append(i)
    return sorted(best), sorted(others)


def _promise(state: Refining) -> Tensor:
    """(B,) how well a hypothesis seems to go: how many of its cells are certain and move as one affine says.

    Certainty alone grows with wrong hypotheses too; on the grid before the last, this finds the later best
    of five among its first two in three cases of four (24 synthetic queries).
    """
    n = state.flow.shape[-1]
    weight = state.certainty.float().sigmoid().flatten(1)
    grid = grid_positions(n, weight)
    target = (grid + state.flow.float()).flatten(2).transpose(1, 2)
    source = torch.cat([grid.flatten(1), torch.ones_like(grid[:1]).flatten(1)]).T
    weighted = source.T * weight[:, None]
    # A little of the identity: no certain cell, no fit, no error.
    normal = weighted @ source + 1e-3 * torch.eye(3, device=source.device)
    fit = torch.linalg.solve_ex(normal, weighted @ target).result
    off = (target - source @ fit).abs().sum(2)
    return (weight / (1 + off.square())).sum(1)


class _Compiled:
    """A function by `torch.compile`, one version per shape; as it is, with a warning, where that fails."""

    def __init__(self, function: Callable[..., Any], backend: str) -> None:
        self._function = function
        self._backend = backend
        self._compiled: Callable[..., Any] | None = torch.compile(function, backend=backend, dynamic=False)

    def __call__(self, *args: Any) -> Any:
        if self._compiled is not None:
            try:
                # Copies: a backend that replays graphs overwrites its results at the next call.
                return _copied(self._compiled(*args))
            except torch._dynamo.exc.TorchDynamoException as error:
                self._compiled = None
                reason = str(error).strip().splitlines()[0]
                _log.warning(
                    "the network can't be compiled by '%s' (%s): it goes on as it is; a CPU needs a C++ "
                    "compiler (g++), CUDA needs Triton",
                    self._backend,
                    reason,
                )
        return self._function(*args)


def _copied(result: Prepared | Refining | tuple[Tensor, ...]) -> Any:
    if isinstance(result, tuple):
        return tuple(tensor.clone() for tensor in result)
    return result.each(torch.clone)


def _sizes(most: int) -> list[int]:
    """Sizes of batches that are compiled for: powers of two, and the largest."""
    return [*(2**k for k in range(most.bit_length()) if 2**k < most), most]


T = TypeVar("T")


class _Recent(Generic[T]):
    """Values by (class, template), the least lately used leaving first when memory is full.

    Attributes:
        bytes: that they take.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[str, int], tuple[T, int]] = OrderedDict()
        self.bytes = 0

    def get(self, key: tuple[str, int]) -> T | None:
        """The value, from now on the last to leave."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: tuple[str, int], value: T, size: int) -> None:
        """Remember a new value of ``size`` bytes, at least until :meth:`trim`."""
        self._entries[key] = value, size
        self.bytes += size

    def only(self, classes: Set[str]) -> _Recent[T]:
        """A copy without what belongs to other classes."""
        other = _Recent[T](self._limit)
        for key, (value, size) in self._entries.items():
            if key[0] in classes:
                other.put(key, value, size)
        return other

    def trim(self) -> None:
        """Forget what exceeds the limit."""
        while self.bytes > self._limit:
            _, (_, size) = self._entries.popitem(last=False)
            self.bytes -= size


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _patches(masks: np.ndarray) -> np.ndarray:
    """(B, 16, 16) float32 patch masks of crop masks (B, 224, 224)."""
    return patch_mask(torch.from_numpy(np.ascontiguousarray(masks))).numpy()


def _alike_parts(kinds: Sequence[bool], size: int) -> Iterator[list[int]]:
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
    patch = CROP_SIZE // PATCHES
    centres = torch.stack([best % PATCHES, best // PATCHES], 1) * patch + (patch - 1) / 2
    return centres.unflatten(2, (PATCHES, PATCHES))
