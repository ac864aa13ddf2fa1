"""The three stages arranged for inference: the same function of the same weights, computed with less work.

What depends on a template alone (its projected maps, and its share of the first convolution of stage 3's
heads, which is linear in template, query and motion) is computed once per template; what depends on a segment
alone, once per segment. Normalisations are folded into convolutions, the two heads' first convolutions are
one, and correlations are looked up without the volume of all pairs of cells where that is large. The plain
modules stay the reference: training and the parity tests use them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picopose_ros.model.affine import compose_affine, initial_flow
from picopose_ros.model.config import GRIDS
from picopose_ros.model.features import Features
from picopose_ros.model.folding import fold_norms, folded
from picopose_ros.model.matching import bank_scores
from picopose_ros.model.offsets import (
    Head,
    OffsetBlock,
    affine_flow,
    double,
    grid_positions,
    lookup_local,
    lookup_volume,
    sample_at,
    turned,
)
from picopose_ros.model.packed import PackedConv
from picopose_ros.model.winograd import WinogradConv

_WINOGRAD_CHANNELS = 128
"""Fewest channels for which Winograd's convolutions paid off on a CPU."""

_WIDEST = 2**23
"""Values of the widest map of a pass beyond which a CPU is slower: memory, not products, takes the time."""


@dataclass(frozen=True)
class Schedule:
    """The optimisations, each with a switch, so that its effect can be measured.

    Attributes:
        template_parts: a template's share of the heads' first convolution is computed once and cached;
            False: with every hypothesis.
        local_lookup: correlations are looked up without the volume of all pairs of cells.
        winograd: large 3x3 convolutions on a CPU in fp32 by Winograd's method.
        packed: convolutions on a CPU with their weights laid out once and their activation in the same pass.
        bank_product: stage 1 is one product per object of a bank as it is with the patches inside all masks;
            False: per segment with a converted copy, and with all patches.
        parallel_pnp: hypotheses' poses are solved in threads while the network goes on.
    """

    template_parts: bool = True
    local_lookup: bool = True
    winograd: bool = True
    packed: bool = True
    bank_product: bool = True
    parallel_pnp: bool = True


@dataclass
class Prepared:
    """What is computed of B crops before they are paired.

    Attributes:
        descriptors: (B, C, 256) unit vectors.
        maps: per grid (B, C, n, n) projected features.
        parts: of templates, per grid their share (B, W, n, n) of the heads' first convolution; or nothing.
    """

    descriptors: Tensor
    maps: tuple[Tensor, ...]
    parts: tuple[Tensor, ...] = ()

    def select(self, rows: Tensor | slice) -> Prepared:
        """The crops named by indices or a slice."""
        return self.each(lambda tensor: tensor[rows])

    def split(self) -> list[Prepared]:
        """The crops one by one, as batches of one that share no memory."""
        return [self.each(lambda t, i=i: t[i : i + 1].clone()) for i in range(len(self.descriptors))]

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors."""
        return (self.descriptors, *self.maps, *self.parts)

    def each(self, change: Callable[[Tensor], Tensor]) -> Prepared:
        """The same with every tensor changed."""
        return Prepared(
            change(self.descriptors), tuple(map(change, self.maps)), tuple(map(change, self.parts))
        )

    @staticmethod
    def join(prepared: Sequence[Prepared]) -> Prepared:
        """One batch of several."""
        columns = [[getattr(one, field.name) for one in prepared] for field in fields(Prepared)]
        return Prepared(
            torch.cat(columns[0]), *(tuple(map(torch.cat, zip(*levels))) for levels in columns[1:])
        )


@dataclass
class Refining:
    """State of B pairs in stage 3.

    Attributes:
        affine: (B, 3, 3) template crop px -> query crop px.
        flow: (B, 2, n, n) cells, of the last grid done. certainty: (B, 1, n, n) logits.
        residual: (B, 2, n, n) with aligned grids, the flow less the affine.
    """

    affine: Tensor
    flow: Tensor
    certainty: Tensor
    residual: Tensor | None = None

    def select(self, rows: Tensor | slice) -> Refining:
        """The pairs named by indices or a slice."""
        return self.each(lambda tensor: tensor[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> Refining:
        """The same with every tensor changed."""
        residual = None if self.residual is None else change(self.residual)
        return Refining(change(self.affine), change(self.flow), change(self.certainty), residual)

    @staticmethod
    def join(states: Sequence[Refining]) -> Refining:
        """One batch of several."""
        residual = None if states[0].residual is None else torch.cat([s.residual for s in states])
        return Refining(
            torch.cat([s.affine for s in states]),
            torch.cat([s.flow for s in states]),
            torch.cat([s.certainty for s in states]),
            residual,
        )


class FastStages:
    """A network's stages, arranged for inference on the device that the network is on.

    It keeps folded copies of convolutions' weights: make a new one when the network's weights change.

    Attributes:
        model: the network, a `PicoPose` (which makes these stages, so that its type is not imported here).
        schedule: what is done to be fast.
        folded: backbone and pyramid without batch normalisations.
        pairs_at_once: pairs in a pass beyond which nothing is gained.
    """

    def __init__(self, model: nn.Module, schedule: Schedule | None = None) -> None:
        self.model = model
        self.schedule = schedule or Schedule()
        with torch.no_grad():
            packed = self.schedule.packed
            self.folded = fold_norms(model.backbone, packed), fold_norms(model.pyramid, packed)
            self._blocks = [_FastBlock(block, self.schedule) for block in model.offsets.blocks]
        self.pairs_at_once = 2**16
        if next(model.parameters()).device.type == "cpu":
            self.pairs_at_once = max(_WIDEST // (self._blocks[-1].width * GRIDS[-1] ** 2), 1)

    def encode(self, rgb: Tensor) -> Features:
        """Encode normalised crops (B, 3, 224, 224)."""
        return self.model.described(self.folded[0](rgb))

    def query(self, features: Features) -> Prepared:
        """What stage 3 needs of segments."""
        maps = self.folded[1](features.taps)
        maps = tuple(block.project(level) for block, level in zip(self._blocks, maps))
        return Prepared(features.descriptors, maps)

    def features(self, crops: Tensor) -> Prepared:
        """What all stages need of normalised crops (B, 3, 224, 224), of segments or templates."""
        return self.query(self.encode(crops))

    def template(self, features: Features) -> Prepared:
        """What stages 2 and 3 need of templates, without :meth:`parts`."""
        return self.query(features)

    def parts(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Templates' share of the heads' first convolution, from their maps."""
        return tuple(block.template_part(level) for block, level in zip(self._blocks, maps))

    def scores(
        self, descriptors: Tensor, patches: Tensor, bank: Tensor, bank_patches: Tensor
    ) -> Tensor:
        """Stage 1 for B crops of an object: (B, N).

        Args:
            descriptors: (B, C, 256). patches: (B, 16, 16), on the CPU. bank: (N, C, 256), any float type.
            bank_patches: (N, 16, 16).
        """
        masked = self.model.config.masked_matching
        if self.schedule.bank_product:
            inside = bank_patches.flatten(1) if masked else None
            return bank_scores(descriptors, patches.flatten(1), bank, inside)
        return self.model.match(descriptors, patches.to(bank.device), bank, bank_patches)

    def affine(
        self,
        query: Prepared,
        template: Prepared,
        query_patches: Tensor,
        template_patches: Tensor,
        centre: Tensor,
    ) -> Tensor:
        """Stage 2: the affine (B, 3, 3); arguments as those of `PicoPose.correspond`."""
        found = self.model.correspond(
            query.descriptors, template.descriptors, query_patches, template_patches, centre
        )
        return compose_affine(*self.model.affine(*found), centre)

    def start(self, affine: Tensor, template_patches: Tensor) -> Refining:
        """The beginning of stage 3: the affine (B, 3, 3) as a flow, the mask (B, 16, 16) as the certainty."""
        half_pixel = self.model.offsets.half_pixel
        affine = affine.float()
        flow = initial_flow(affine, None if half_pixel else template_patches)
        residual = torch.zeros_like(flow) if self.model.offsets.aligned else None
        return Refining(affine, flow, template_patches[:, None], residual)

    def enlarged(self, state: Refining) -> Refining:
        """The same on a grid of twice the side."""
        half_pixel = self.model.offsets.half_pixel
        return Refining(
            state.affine,
            2 * double(state.flow, half_pixel) - 0.5 * half_pixel,
            double(state.certainty, half_pixel),
            None if state.residual is None else 2 * double(state.residual, True),
        )

    def refine(self, level: int, state: Refining, query: Prepared, template: Prepared) -> Refining:
        """One grid of stage 3; ``level`` 0, 1, 2. The state is that of the grid before, or the start."""
        if level:
            state = self.enlarged(state)
        part = template.parts[level] if template.parts else None
        return self._blocks[level].refine(state, query.maps[level], template.maps[level], part)


class _Conv:
    """A convolution with what follows it folded in: its batch normalisation, and ReLU if asked for."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        schedule: Schedule,
        relu: bool = False,
    ) -> None:
        channels, kernel = weight.shape[1], weight.shape[-1]
        self._relu = relu
        self._winograd = None
        pays = kernel == 3 and channels >= _WINOGRAD_CHANNELS and weight.device.type == "cpu"
        if schedule.winograd and pays:
            self._winograd = WinogradConv(weight, bias)
        self._direct = PackedConv(
            weight,
            bias,
            padding=(kernel // 2, kernel // 2),
            activation="relu" if relu else "none",
            packed=schedule.packed,
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self._winograd is None or torch.is_autocast_enabled("cpu"):
            return self._direct(x)
        x = self._winograd(x)
        return F.relu_(x) if self._relu else x


class _FastBlock:
    """`OffsetBlock` for inference.

    Attributes:
        width: channels that the first convolution behind the concatenation gives.
    """

    def __init__(self, block: OffsetBlock, schedule: Schedule) -> None:
        self._block = block
        self._schedule = schedule
        encoder = block.encoder

        def conv(layer: nn.Conv2d, norm: nn.Module, relu: bool = True) -> _Conv:
            return _Conv(*folded(layer, norm), schedule, relu)

        self._project = conv(*block.proj, relu=False)
        self._corr = [conv(*pair) for pair in zip(encoder.corr, encoder.norms[:2])]
        self._flow = [conv(*pair) for pair in zip(encoder.flow, encoder.norms[2:4])]
        self._motion = conv(encoder.out, encoder.norms[4])

        heads = (block.flow_head, block.certainty_head)
        firsts = [folded(head.layers[0], head.norms[0]) for head in heads]
        merged = [torch.cat(tensors) for tensors in zip(*firsts)]
        self._widths = [len(bias) for _, bias in firsts]
        self._both: _Conv | None = None
        weight, bias = merged
        if isinstance(block.trunk, nn.Sequential):
            self._both = _Conv(*merged, schedule, relu=True)
            weight, bias = folded(block.trunk[0], block.trunk[1])
        self.width = len(bias)
        dim = block.proj[0].out_channels
        # The first convolution behind the concatenation, split: the template's share and the others'.
        self._template_part = _Conv(weight[:, :dim].contiguous(), bias, schedule)
        self._others_part = _Conv(weight[:, dim:].contiguous(), None, schedule)
        self._tails = [_tail(head, schedule) for head in heads]

    def project(self, features: Tensor) -> Tensor:
        """(B, C, n, n) pyramid map -> projected features."""
        return self._project(features)

    def template_part(self, projected: Tensor) -> Tensor:
        """A template's share (B, W, n, n) of the first convolution, bias included."""
        return self._template_part(projected)

    def refine(self, state: Refining, query: Tensor, template: Tensor, part: Tensor | None) -> Refining:
        """As `OffsetBlock.forward`, from projected maps."""
        block, flow = self._block, state.flow
        n = flow.shape[-1]
        grid = grid_positions(n, flow)
        if state.residual is None:
            seen, position = query, grid + flow + block.shift
        else:
            base = affine_flow(state.affine, n)
            flow = state.residual
            seen, position = sample_at(query, (grid + base + block.shift).to(query.dtype)), grid + flow
        motion = self._encode_motion(self._correlation(template, seen, position), flow)
        warped = sample_at(seen, position.to(seen.dtype))
        joint = self._others_part(torch.cat([warped, *motion], 1))
        joint += self.template_part(template) if part is None else part
        joint = F.relu_(joint)
        if self._both is not None:
            joint = self._both(joint)
        step, certainty = (
            tail(half).float() for tail, half in zip(self._tails, joint.split(self._widths, 1))
        )
        certainty = state.certainty + certainty
        if state.residual is None:
            return Refining(state.affine, flow + step, certainty)
        residual = flow + step
        return Refining(state.affine, base + turned(state.affine, residual), certainty, residual)

    def _correlation(self, template: Tensor, seen: Tensor, position: Tensor) -> Tensor:
        block = self._block
        corr_t, corr_q = block.correlated(template, seen)
        lookup = lookup_local if self._schedule.local_lookup else lookup_volume
        return lookup(corr_t, corr_q, position, block.radius, block.levels)

    def _encode_motion(self, correlation: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
        x, y = correlation, flow
        for conv in self._corr:
            x = conv(x)
        for conv in self._flow:
            y = conv(y)
        motion = self._motion(torch.cat([x, y], 1))
        return motion, flow.to(motion.dtype)


def _tail(head: Head, schedule: Schedule) -> Callable[[Tensor], Tensor]:
    """What follows a head's first convolution."""
    convs = [
        _Conv(*folded(layer, norm), schedule, relu=True)
        for layer, norm in zip(head.layers[1:], head.norms[1:])
    ]
    convs.append(_Conv(head.predict.weight.detach(), head.predict.bias.detach(), schedule))

    def run(x: Tensor) -> Tensor:
        for conv in convs:
            x = conv(x)
        return x

    return run
