"""The network's passes on batches: encode crops, score templates, regress affines, refine offsets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from picopose_ros.estimation.backends import make_stages
from picopose_ros.estimation.batching import Compiled, TemplateCache, filled
from picopose_ros.estimation.queries import Query
from picopose_ros.estimation.settings import Backend, Precision, resolve_precision
from picopose_ros.model import PicoPose
from picopose_ros.model.config import GRIDS
from picopose_ros.model.fast import Prepared, Refining, Schedule
from picopose_ros.model.matching import patch_mask
from picopose_ros.templates.bank import TemplateBank
from picopose_ros.templates.posed import PosedView


class Network:
    """The network and the banks' descriptors on one device. Not for use by two threads at once.

    A crop is (3, 224, 224) float32, a mask (224, 224), its patch mask (16, 16); `Prepared` holds the features
    of B crops, `Refining` the state of B pairs of a template and a query in stage 3. The methods take batches
    in any order and of any origin: the query and the template of a pair may be a segment's crop, a template
    of a bank or a rendering made just now.

    Memory on the device: per object its descriptors (N, C, 256) in half precision, for all objects together
    at most ``cache_bytes`` of template features for stages 2 and 3, and one pass over ``max_pairs`` pairs.

    Attributes:
        device: of the network.
        dtype: what matrix products are computed in.
        max_batch: most crops in one pass of the encoder.
        max_pairs: most pairs in one pass of stages 2 and 3; callers split larger batches.
        compiles: whether batches are filled up to sizes that are compiled.
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
        backend: Backend = "torch",
        onnx_dir: str = "",
    ) -> None:
        """Copy the banks' descriptors and masks to the device.

        Args:
            model: in evaluation mode, on ``device``.
            banks: by class id, made with this model.
            device: of the network.
            max_batch: most crops or pairs that go through the network at once.
            cache_bytes: for the features of recently used templates.
            precision: see `resolve_precision`.
            schedule: which optimisations are on; all if None.
            compile: a backend of `torch.compile` for the encoder, the template features and stage 3; "" for
                none.
            backend, onnx_dir: see `EstimatorSettings`.

        Raises:
            ConfigError, ExportError: the backend can't be used here.
        """
        self.device = device
        self.dtype = resolve_precision(precision, device)
        self._model = model
        self._stages = make_stages(model, device, backend, onnx_dir, precision, schedule)
        self.max_batch = max_batch
        self.max_pairs = min(max_batch, self._stages.pairs_at_once)
        self.compiles = bool(compile)
        stages = self._stages
        self._features: Callable[[Tensor], Prepared] = stages.features
        self._template_parts = stages.parts
        # One function per grid: a compiler keeps few versions of each.
        self._refine = [partial(stages.refine, level) for level in range(len(GRIDS))]
        if compile:
            self._features = Compiled(self._features, compile)
            self._template_parts = Compiled(self._template_parts, compile)
            self._refine = [Compiled(function, compile) for function in self._refine]
        self.banks: dict[str, TemplateBank] = {}
        self._descriptors: dict[str, Tensor] = {}
        self._patches: dict[str, Tensor] = {}
        # Half of the memory for the feature maps of many templates, half for the larger parts of the latest.
        self._maps: TemplateCache[Prepared] = TemplateCache(cache_bytes // 2)
        self._parts: TemplateCache[tuple[Tensor, ...]] = TemplateCache(cache_bytes // 2)
        # As long as somebody keeps a view to use it again, its features are kept with it.
        self._of_views: WeakKeyDictionary[PosedView, Prepared] = WeakKeyDictionary()
        self._take(banks)

    def with_banks(self, banks: Mapping[str, TemplateBank]) -> Network:
        """The same with other banks; what is on the device of those that stay (the same object) is kept."""
        other = copy.copy(self)
        other._take(banks)
        return other

    def _take(self, banks: Mapping[str, TemplateBank]) -> None:
        staying = {name for name, bank in banks.items() if self.banks.get(name) is bank}
        self._maps, self._parts = self._maps.only(staying), self._parts.only(staying)
        descriptors, patches = self._descriptors, self._patches
        self._descriptors, self._patches = {}, {}
        for name, bank in banks.items():
            stays = name in staying
            self._descriptors[name] = descriptors[name] if stays else self.upload(bank.descriptors)
            self._patches[name] = patches[name] if stays else self.upload(patch_masks(bank.masks))
        self.banks = dict(banks)

    def encode(self, crops: np.ndarray) -> Prepared:
        """Features of crops (B, 3, 224, 224) float32, of queries or renderings, in their order."""
        uploaded = self.upload(crops)
        with self._autocast():
            return self._encode(uploaded)

    def encode_views(self, views: Sequence[PosedView], crops: np.ndarray | None = None) -> Prepared | None:
        """Encode views, each once as long as it is kept, and crops (B, 3, 224, 224) in the same pass.

        Returns:
            The features of the crops, in their order; None if there are none. Those of the views: `views`.
        """
        new = [view for view in dict.fromkeys(views) if view not in self._of_views]
        inputs = [] if crops is None else [crops]
        if new:
            inputs.append(np.stack([view.input for view in new]))
        if not inputs:
            return None
        made = self.encode(np.concatenate(inputs))
        count = 0 if crops is None else len(crops)
        self._of_views.update(zip(new, made.select(slice(count, None)).split()))
        return made.select(slice(0, count)) if count else None

    def views(self, views: Sequence[PosedView]) -> Prepared:
        """Features of views (B), in their order; they are kept with each view."""
        self.encode_views(views)
        return Prepared.join([self._of_views[view] for view in views])

    def _encode(self, crops: Tensor) -> Prepared:
        parts = []
        for part in crops.split(self.max_batch):
            count = len(part)
            if self.compiles:
                part = part[filled(count, self.max_batch)]
            parts.append(self._features(part).select(slice(0, count)))
        return Prepared.join(parts)

    def scores(self, queries: Sequence[Query], features: Prepared) -> list[Tensor]:
        """Stage 1: per query the score (N,) of every template of its bank.

        Args:
            features: of the queries' crops.
        """
        found: dict[int, Tensor] = {}
        descriptors = features.descriptors
        if self.device.type == "cuda":
            descriptors = descriptors.to(torch.float32 if self.dtype == torch.float32 else torch.float16)
        for class_id in dict.fromkeys(query.bank.class_id for query in queries):
            rows = [i for i, query in enumerate(queries) if query.bank.class_id == class_id]
            patches = torch.from_numpy(patch_masks(np.stack([queries[row].mask for row in rows])))
            scores = self._stages.scores(
                descriptors[rows], patches, self._descriptors[class_id], self._patches[class_id]
            )
            found.update(zip(rows, scores))
        return [found[row] for row in range(len(queries))]

    def agreement(self, query: Query, descriptors: Tensor, templates: Tensor) -> Tensor:
        """How well a query's matches with each of some templates agree on one motion: (N,) in 0..1.

        Args:
            query: the segment.
            descriptors: (C, 256) of its crop, from :meth:`encode`.
            templates: (N,) indices in its bank.
        """
        class_id = query.bank.class_id
        cells = self.upload(np.flatnonzero(patch_masks(query.mask[None])))
        return self._model.agreement(
            descriptors.float()[:, cells],
            cells,
            self._descriptors[class_id][templates],
            self._patches[class_id][templates],
        )

    def templates(self, wanted: Sequence[tuple[TemplateBank, int]]) -> Prepared:
        """Features of templates for stages 2 and 3, in the order asked for; cached.

        Args:
            wanted: per row the bank and the index of the template in it.
        """
        with self._autocast():
            by_key = {(bank.class_id, template): bank for bank, template in wanted}
            missing = [key for key in by_key if self._maps.get(key) is None]
            if missing:
                crops = torch.cat([by_key[key].crops([key[1]]) for key in missing])
                made = self._encode(self.upload(crops.numpy()))
                for key, one in zip(missing, made.split()):
                    self._maps.put(key, one, sum(map(_size, one.tensors())))
            found = Prepared.join([self._maps.get((bank.class_id, t)) for bank, t in wanted])
            if not self._stages.schedule.template_parts:
                return found
            missing = [key for key in by_key if self._parts.get(key) is None]
            if missing:
                rows = filled(len(missing), self.max_pairs) if self.compiles else range(len(missing))
                made_parts = self._template_parts(
                    Prepared.join([self._maps.get(missing[row]) for row in rows]).maps
                )
                for row, key in enumerate(missing):
                    one = tuple(level[row : row + 1].clone() for level in made_parts)
                    self._parts.put(key, one, sum(map(_size, one)))
            parts = [self._parts.get((bank.class_id, t)) for bank, t in wanted]
            return Prepared(found.descriptors, found.maps, tuple(map(torch.cat, zip(*parts))))

    def template_patches(self, wanted: Sequence[tuple[TemplateBank, int]]) -> Tensor:
        """(B, 16, 16) patch masks of templates."""
        return torch.stack([self._patches[bank.class_id][template] for bank, template in wanted])

    def affines(
        self,
        query: Prepared,
        template: Prepared,
        query_patches: Tensor,
        template_patches: Tensor,
        centres: Tensor,
    ) -> Tensor:
        """Stage 2: the affines (B, 3, 3) template crop px -> query crop px.

        Args:
            query, template: features of the B pairs.
            query_patches, template_patches: (B, 16, 16) patch masks.
            centres: (B, 2) the object's centre in the template crop, px.
        """
        with self._autocast():
            return self._stages.affine(query, template, query_patches, template_patches, centres)

    def start(self, affines: Tensor, template_patches: Tensor) -> Refining:
        """The state before stage 3's first grid.

        Args:
            affines: (B, 3, 3) template crop px -> query crop px, from stage 2 or from a pose.
            template_patches: (B, 16, 16) patch masks.
        """
        with self._autocast():
            return self._stages.start(affines, template_patches)

    def offsets(
        self, state: Refining, query: Prepared, template: Prepared, levels: Sequence[int] = range(len(GRIDS))
    ) -> list[Refining]:
        """Stage 3: the states after each of some grids, flow (B, 2, n, n) and certainty (B, 1, n, n).

        Args:
            state: of :meth:`start`, or after the grid before ``levels``.
            query, template: features of the B pairs, B at most ``max_pairs``. A template without ``parts``
                (a rendering that is used once) is allowed.
            levels: consecutive indices of the grids (16, 32, 64).
        """
        count = len(state.affine)
        found = []
        with self._autocast():
            if self.compiles:
                rows = torch.tensor(filled(count, self.max_pairs), device=self.device)
                state, query, template = state.select(rows), query.select(rows), template.select(rows)
            for level in levels:
                state = self._refine[level](state, query, template)
                found.append(state)
        return [one.select(slice(0, count)) for one in found] if self.compiles else found

    def enlarged(self, state: Refining) -> Refining:
        """The same flow and certainty on a grid of twice the side."""
        return self._stages.enlarged(state)

    def trim(self) -> None:
        """Drop cached templates that exceed the cache's memory."""
        self._maps.trim()
        self._parts.trim()

    def resident_bytes(self) -> dict[str, int]:
        """Memory on the device: ``descriptors`` and ``masks`` of all objects, ``cache`` of templates."""
        return {
            "descriptors": sum(_size(t) for t in self._descriptors.values()),
            "masks": sum(_size(t) for t in self._patches.values()),
            "cache": self._maps.bytes + self._parts.bytes,
        }

    def upload(self, array: np.ndarray) -> Tensor:
        """An array on the network's device."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _autocast(self) -> AbstractContextManager:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled)


def patch_masks(masks: np.ndarray) -> np.ndarray:
    """(B, 16, 16) float32 patch masks of crop masks (B, 224, 224)."""
    return patch_mask(torch.from_numpy(np.ascontiguousarray(masks))).numpy()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
