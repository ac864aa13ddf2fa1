"""The released network's schedule, with our modules: what the fast one is measured against and equal to.

It holds no features of templates but the last tap's in fp32, copies and normalises them again for every
segment, encodes the template of every hypothesis anew, makes the query's pyramid for every hypothesis, runs
hypotheses one after the other in fp32 with whole correlation volumes, and solves PnP one by one. Segments go
through the network four at a time. It is a little faster than the released code, whose pyramid has a branch
that influences nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from picopose_ros.estimator import Choice, EstimatorSettings, Hypothesis, PoseEstimator, Query
from picopose_ros.model import Features, PicoPose
from picopose_ros.model.fast import Schedule
from picopose_ros.model.offsets import lookup_volume
from picopose_ros.templates.bank import TemplateBank

CHUNK = 4
"""Segments that go through the released network at once."""


class ReleasedEstimator(PoseEstimator):
    """A `PoseEstimator` that spends its time as the released code does; same arguments, same results.

    Settings that only make sense otherwise (``max_batch``, ``prune``, ``precision``, the memory for
    templates) are not looked at. Its first estimate makes what the released code has made before.
    """

    def __init__(
        self,
        model: PicoPose,
        banks: Mapping[str, TemplateBank],
        settings: EstimatorSettings | None = None,
        device: str | torch.device = "cpu",
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """As `PoseEstimator`; hypotheses are the best matches, without a second thought."""
        settings = replace(settings or EstimatorSettings(), rerank=0, border_crops=False)
        schedule = replace(Schedule(), parallel_pnp=False)
        super().__init__(model, banks, settings, device, aliases, schedule)

    def _encode(self, queries: Sequence[Query]) -> Features:
        crops = torch.from_numpy(np.stack([query.crop for query in queries])).to(self.device)
        parts = [self.model.encode(part) for part in crops.split(CHUNK)]
        taps = tuple(torch.cat(levels) for levels in zip(*(part.taps for part in parts)))
        return Features(taps, torch.cat([part.descriptors for part in parts]))

    def _scores(self, queries: Sequence[Query], features: Features) -> list[torch.Tensor]:
        scores = []
        for row, query in enumerate(queries):
            bank = F.normalize(self._resident[query.bank.class_id].clone(), dim=1, eps=1e-12)
            bank = F.normalize(bank, dim=1, eps=1e-12)
            mask = torch.from_numpy(query.mask)[None].float().to(self.device)
            inside = torch.from_numpy(query.bank.masks).to(self.device).float()
            scores.append(self.model.match(features.descriptors[row : row + 1], mask, bank, inside)[0])
        return scores

    @cached_property
    def _resident(self) -> dict[str, torch.Tensor]:
        """The last tap's features of all templates, in fp32."""
        return {
            name: torch.from_numpy(bank.descriptors).to(self.device).float()
            for name, bank in self.banks.items()
        }

    def _regress(
        self,
        queries: Sequence[Query],
        features: Features,
        chosen: Sequence[Choice],
        trace: bool = False,
        affines: Sequence[np.ndarray | None] | None = None,
        keep: int | None = None,
    ) -> Iterator[tuple[int, Hypothesis]]:
        if trace or affines is not None:
            raise NotImplementedError("the released schedule has no trace")
        own = [[i for i, (row, *_) in enumerate(chosen) if row == q] for q in range(len(queries))]
        with _whole_volumes(self.model):
            for start in range(0, len(queries), CHUNK):
                rows = range(start, min(start + CHUNK, len(queries)))
                for rank in range(max(len(own[row]) for row in rows)):
                    part = [own[row][rank] for row in rows if rank < len(own[row])]
                    yield from zip(part, self._one_each(queries, features, chosen, part))

    def _one_each(
        self, queries: Sequence[Query], features: Features, chosen: Sequence[Choice], part: Sequence[int]
    ) -> list[Hypothesis]:
        """One hypothesis of every segment of a chunk."""
        rows = [chosen[i].query for i in part]
        pairs = [(queries[row].bank, chosen[i][1]) for row, i in zip(rows, part)]
        template = self.model.encode(torch.cat([bank.crops([t]) for bank, t in pairs]).to(self.device))
        masks = torch.from_numpy(np.stack([queries[row].mask for row in rows])).to(self.device)
        template_masks = torch.from_numpy(np.stack([bank.masks[t] for bank, t in pairs])).to(self.device)
        centres = torch.from_numpy(np.stack([bank.centres[t] for bank, t in pairs])).to(self.device)
        found = self.model.regress(
            features.select(torch.tensor(rows, device=self.device)),
            template,
            masks.float(),
            template_masks.float(),
            centres,
        )
        affine, flow = found.affine.float().cpu().numpy(), found.flow.float().cpu().numpy()
        certainty = found.certainty[:, 0].float().cpu().numpy()
        return [
            Hypothesis(chosen[i][1], chosen[i][2], affine[k], flow[k], certainty[k])
            for k, i in enumerate(part)
        ]


@contextmanager
def _whole_volumes(model: PicoPose) -> Iterator[None]:
    """Correlations are looked up in whole volumes, as the released network does, whatever the preset says."""
    blocks = list(model.offsets.blocks)
    before = [block.lookup for block in blocks]
    try:
        for block in blocks:
            block.lookup = lookup_volume
        yield
    finally:
        for block, lookup in zip(blocks, before):
            block.lookup = lookup
