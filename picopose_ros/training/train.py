"""The training loop: three stages at once, resumable at any moment."""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from tqdm import tqdm

from picopose_ros.errors import CheckpointError, ConfigError
from picopose_ros.model import PicoPose, preset, save_model
from picopose_ros.model.affine import compose_affine
from picopose_ros.model.config import CROP_SIZE
from picopose_ros.model.matching import patch_mask
from picopose_ros.model.offsets import OffsetLevel, grid_positions
from picopose_ros.training.data import Batch, BatchDataset, PoolSource, make_batch
from picopose_ros.training.losses import (
    AffineLabels,
    affine_loss,
    correlation_loss,
    infonce,
    labels_at,
    noised_affine,
    offset_loss,
    soft_patch_targets,
)
from picopose_ros.training.pairs import Difficulty
from picopose_ros.training.pool import PoolReader


@dataclass(frozen=True)
class TrainConfig:
    """A training run; a YAML file with these keys."""

    preset: str = "tiny"
    pool: str = "data/pool"
    validation_pool: str = "data/pool_val"
    out: str = "runs/tiny"
    seed: int = 0
    steps: int = 10000
    objects_per_step: int = 4
    """Objects a step; each brings two templates and six queries."""
    refine_pairs: int = 10
    """Pairs a step that go through stage 3, the costliest."""
    cross_share: float = 0.2
    """Share of those with a wrong template of the same object."""
    predicted_start: float = 0.5
    """How often stage 3 starts from stage 2's answer instead of the noised truth, in the end."""
    predicted_ramp: int = 3000
    """Steps over which that share grows from nothing."""
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    """`cosine`: falls over the whole run (the paper's). `trapezoid`: constant, then a cosine over the last
    `decay` steps; up to there the run does not depend on `steps`, so it can be made longer later and is still
    the run that one command gives."""
    warmup: int = 200
    decay: int = 1000
    """Steps of the fall at the end of a trapezoid."""
    weight_decay: float = 0.03
    clip: float = 1.0
    ema: float = 0.998
    match_weight: float = 1.0
    rank_weight: float = 0.1
    affine_weight: float = 1.0
    flow_weight: float = 0.1
    certainty_weight: float = 1.0
    correlation_weight: float = 0.3
    """Of the contrastive loss on stage 3's correlated features; not in the paper."""
    autocast: bool = False
    """bf16 mixed precision: faster on GPUs, slower on CPUs without matrix units."""
    save_every: int = 100
    validate_every: int = 500
    workers: int = 1
    device: str = "cpu"
    difficulty: Difficulty = field(default_factory=Difficulty)

    @property
    def decay_start(self) -> int:
        """The first step whose learning rate depends on `steps`."""
        return max(0, self.steps - self.decay) if self.schedule == "trapezoid" else 0

    @staticmethod
    def load(path: str | Path) -> TrainConfig:
        """Read a YAML file.

        Raises:
            ConfigError: unreadable file, unknown key, or a value that cannot work.
        """
        try:
            content = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"training config {path} cannot be read: {error}") from error
        known = {f.name: f for f in fields(TrainConfig)}
        if unknown := sorted(set(content) - set(known)):
            raise ConfigError(
                f"training config {path}: unknown key {unknown[0]!r}; known are {', '.join(known)}"
            )
        try:
            difficulty = Difficulty(**content.pop("difficulty", {}))
            config = TrainConfig(difficulty=difficulty, **content)
        except TypeError as error:
            raise ConfigError(f"training config {path}: {error}") from error
        for name in ("steps", "objects_per_step", "refine_pairs", "save_every", "validate_every"):
            if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
                raise ConfigError(f"training config {path}: {name} must be a whole number of at least 1")
        if not 0 < config.learning_rate < 1:
            raise ConfigError(f"training config {path}: learning_rate must lie between 0 and 1")
        return config


def _choose(batch: Batch, config: TrainConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries that go through stage 3, and which of them meet the wrong template."""
    count = min(config.refine_pairs, len(batch.own))
    chosen = torch.randperm(len(batch.own), generator=generator)[:count]
    cross = torch.zeros(count, dtype=torch.bool)
    cross[: round(count * config.cross_share)] = True
    return chosen, cross


def training_losses(
    model: PicoPose, batch: Batch, config: TrainConfig, progress: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """All weighted losses of a batch; their sum is what is minimised.

    Args:
        progress: how far `predicted_start` has grown, 0 to 1.
    """
    count = len(batch.template_rgb)
    features = model.encode(torch.cat([batch.template_rgb, batch.query_rgb]))
    template, query = features.descriptors[:count], features.descriptors[count:]
    template_patches, query_patches = patch_mask(batch.template_mask), patch_mask(batch.query_mask)
    losses: dict[str, Tensor] = {}

    at16, valid16 = labels_at(batch.position, batch.valid, 16)
    target = soft_patch_targets(at16, valid16)
    losses["match"] = config.match_weight * infonce(query, template[batch.own], target, model.temperature)

    # Retrieval: the own template has to score above another view of the same object.
    foreground = query_patches.flatten(1)
    scores = []
    for index in (batch.own, batch.other):
        similarity = query.transpose(1, 2) @ template[index]
        similarity = similarity.masked_fill(template_patches.flatten(1)[index][:, None] == 0, -1.0)
        scores.append((similarity.amax(2) * foreground).sum(1) / foreground.sum(1).clamp(min=1))
    losses["rank"] = config.rank_weight * F.softplus((scores[1] - scores[0]) / 0.05).mean()

    truth = batch.affine_labels()
    own = batch.own
    correspondence, anchor = model.correspond(
        query.detach(),
        template.detach()[own],
        query_patches,
        template_patches[own],
        batch.template_centre[own],
    )
    translation, scale, cos_sin = model.affine(correspondence.detach(), anchor)
    for name, value in affine_loss(translation, scale, cos_sin, truth).items():
        losses[name] = config.affine_weight * value

    chosen, cross = _choose(batch, config, generator)
    against = torch.where(cross, batch.other[chosen], batch.own[chosen])
    noised = noised_affine(truth, generator)
    start = AffineLabels(*(getattr(noised, f.name)[chosen] for f in fields(AffineLabels)))
    affine = compose_affine(
        start.translation,
        start.scale,
        torch.stack([start.angle.cos(), start.angle.sin()], 1),
        batch.template_centre[own[chosen]],
    )
    predicted = compose_affine(
        translation.detach(), scale.detach(), cos_sin.detach(), batch.template_centre[own]
    )[chosen]
    # Stage 2's own answer, where it is near enough for the look-up windows to see the truth.
    near = (predicted - affine)[:, :2, 2].norm(dim=1) < 40
    use = (torch.rand(len(chosen), generator=generator) < config.predicted_start * progress) & near
    affine = torch.where(use[:, None, None], predicted, affine)

    maps = model.pyramid(features.taps)
    levels = model.refine(
        tuple(m[count:][chosen] for m in maps),
        tuple(m[:count][against] for m in maps),
        affine,
        template_patches[against],
    )
    position = torch.where(cross[:, None, None, None], batch.cross_position[chosen], batch.position[chosen])
    valid = torch.where(cross[:, None, None], batch.cross_valid[chosen], batch.valid[chosen])
    # Two cells beyond each look-up window: the warped features still tell the direction there.
    reach = tuple(block.radius + 2.0 for block in model.offsets.blocks)
    offset = offset_loss(levels, position, valid, reach)
    losses["flow"] = config.flow_weight * offset["flow"]
    losses["certainty"] = config.certainty_weight * offset["certainty"]
    losses["correlation"] = config.correlation_weight * correlation_loss(levels, position, valid)
    return losses


def _endpoint_error(level: OffsetLevel, position: Tensor, valid: Tensor) -> Tensor:
    """(B,) mean distance in crop px over the visible cells; NaN where there are none."""
    grid = level.flow.shape[-1]
    at, seen = labels_at(position, valid, grid)
    predicted = (level.flow + grid_positions(grid, level.flow)) * (CROP_SIZE / grid) + 0.5
    error = (predicted - at).norm(dim=1)
    return (error * seen).sum((1, 2)) / seen.sum((1, 2)).masked_fill(seen.sum((1, 2)) == 0, torch.nan)


@torch.no_grad()
def validate(model: PicoPose, batches: list[Batch]) -> dict[str, float]:
    """Median end-point errors of the stages in crop px on fixed held-out pairs, and certainty's quality."""
    model.eval()
    errors: dict[str, list[Tensor]] = {
        "stage1": [],
        "stage2": [],
        "stage3_16": [],
        "stage3_32": [],
        "stage3": [],
    }
    hits, claims, present, wins = 0.0, 0.0, 0.0, []
    for batch in batches:
        template, query = model.encode(batch.template_rgb), model.encode(batch.query_rgb)
        own = template.select(batch.own)
        at16, seen16 = labels_at(batch.position, batch.valid, 16)
        similarity = own.descriptors.transpose(1, 2) @ query.descriptors
        similarity = similarity.masked_fill(patch_mask(batch.query_mask).flatten(1)[:, None] == 0, -1.0)
        best = similarity.argmax(2)
        matched = torch.stack([best % 16, best // 16], 1).unflatten(2, (16, 16)) * 14.0 + 6.5
        error = (matched - at16).norm(dim=1)
        errors["stage1"].append((error * seen16).sum((1, 2)) / seen16.sum((1, 2)))
        result = model.regress(
            query, own, batch.query_mask, batch.template_mask[batch.own], batch.template_centre[batch.own]
        )
        pixels = torch.floor((grid_positions(64, batch.position) + 0.5) * 3.5)
        moved = (result.affine[:, :2, :2] @ pixels.flatten(1)).unflatten(2, (64, 64)) + result.affine[
            :, :2, 2, None, None
        ]
        error = (moved - batch.position).norm(dim=1)
        errors["stage2"].append((error * batch.valid).sum((1, 2)) / batch.valid.sum((1, 2)))
        for name, level in zip(("stage3_16", "stage3_32", "stage3"), result.levels, strict=True):
            errors[name].append(_endpoint_error(level, batch.position, batch.valid))
        error = _endpoint_map(result.levels[-1], batch.position)
        good = (batch.valid > 0) & (error < 5)
        claimed = result.certainty[:, 0] > 0
        hits += float((good & claimed).sum())
        claims += float(claimed.sum())
        present += float(good.sum())
        for index in (batch.own, batch.other):
            inside = patch_mask(batch.template_mask).flatten(1)[index]
            s = query.descriptors.transpose(1, 2) @ template.descriptors[index]
            foreground = patch_mask(batch.query_mask).flatten(1)
            s = s.masked_fill(inside[:, None] == 0, -1.0).amax(2)
            wins.append((s * foreground).sum(1) / foreground.sum(1).clamp(min=1))
    medians = {k: float(torch.nanmedian(torch.cat(v))) for k, v in errors.items()}
    scores = torch.stack([torch.cat(wins[0::2]), torch.cat(wins[1::2])])
    return {
        **medians,
        "precision": hits / max(claims, 1),
        "recall": hits / max(present, 1),
        "ranked": float((scores[0] > scores[1]).float().mean()),
    }


def _endpoint_map(level: OffsetLevel, position: Tensor) -> Tensor:
    predicted = (level.flow + grid_positions(64, level.flow)) * (CROP_SIZE / 64) + 0.5
    return (predicted - position).norm(dim=1)


def _learning_rate(config: TrainConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / config.warmup)
    start = config.decay_start
    done = max(0, step - start) / max(1, config.steps - start)
    return config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _save(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks: otherwise every step maps, zeroes and unmaps its large tensors anew.

    That costs half as much as the training itself on a CPU. Elsewhere than on glibc nothing happens.
    """
    mmap_max, trim_threshold = -4, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


class Trainer:
    """State of a run: model, its moving average, optimiser, step."""

    def __init__(self, config: TrainConfig) -> None:
        _keep_freed_memory()
        self.config = config
        torch.manual_seed(config.seed)
        self.model = PicoPose(preset(config.preset)).to(config.device, memory_format=torch.channels_last)
        self.average = PicoPose(preset(config.preset)).to(config.device, memory_format=torch.channels_last)
        self.average.load_state_dict(self.model.state_dict())
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
        )
        self.step = 0
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.last = self.out / "last.pt"
        self.stable = self.out / "stable.pt"
        """The state at the start of the learning rate's fall: where a longer run goes on from."""

    def resume(self) -> bool:
        """Continue from the last interval, if there is one.

        A run that was planned for another number of steps goes on from before its learning rate fell.

        Raises:
            CheckpointError: the run in the folder has another architecture, or can't be made longer.
        """
        if not self.last.exists():
            return False
        state = torch.load(self.last, map_location=self.config.device, weights_only=True)
        begun, planned = state["decay_start"], state["steps"]
        start = self.config.decay_start
        if planned != self.config.steps and state["step"] > min(begun, start):
            if not self.stable.exists() or start < begun:
                raise CheckpointError(
                    f"{self.last} was planned for another number of steps and its learning rate is falling "
                    "already; give the steps it was started with, or train into another folder"
                )
            state = torch.load(self.stable, map_location=self.config.device, weights_only=True)
        if state["architecture"] != json.dumps(self.model.config.to_dict()):
            raise CheckpointError(
                f"{self.last} was trained with another architecture than preset '{self.config.preset}' has "
                "now; train into another folder"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        return True

    def save(self) -> None:
        """Write the run's state and the averaged weights, each in one piece."""
        state = {
            "architecture": json.dumps(self.model.config.to_dict()),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "steps": self.config.steps,
            "decay_start": self.config.decay_start,
        }
        if self.step == self.config.decay_start:
            _save(self.stable, state)
        _save(self.last, state)
        info = {"steps": str(self.step), "training": json.dumps(asdict(self.config))}
        save_model(self.average, self.out / "weights.safetensors", half=True, metadata=info)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step on a batch."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        rate = _learning_rate(config, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.model.train()
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.autocast):
            progress = min(1.0, self.step / config.predicted_ramp)
            losses = training_losses(self.model, batch, config, progress, generator)
        total = sum(losses.values())
        self.optimiser.zero_grad(set_to_none=True)
        if torch.isfinite(total):
            total.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            self.optimiser.step()
        self.step += 1
        keep = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(
                self.average.state_dict().values(), self.model.state_dict().values(), strict=True
            ):
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - keep)
                else:
                    mean.copy_(value)
        return {name: float(value.detach()) for name, value in losses.items()} | {
            "total": float(total.detach())
        }

    def batches(self) -> Iterator[Batch]:
        """Batches from the current step on."""
        config = self.config
        source = PoolSource(config.pool, config.difficulty)

        def draw(step: int, share: int) -> Batch:
            return source.objects(config.seed, step, share, config.objects_per_step)

        data = BatchDataset(draw, [0], config.steps)
        loader = torch.utils.data.DataLoader(
            data,
            batch_size=None,
            sampler=range(self.step, config.steps),
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
        )
        return iter(loader)


def train(config: TrainConfig, until: int | None = None) -> Trainer:
    """Run or resume a training; returns when `steps` (or `until`) are done.

    Raises:
        CheckpointError: the output folder holds a run of another architecture.
    """
    trainer = Trainer(config)
    resumed = trainer.resume()
    print(
        f"{'resuming at' if resumed else 'starting at'} step {trainer.step} of {config.steps}, {trainer.out}",
        flush=True,
    )
    validation = PoolReader(config.validation_pool)
    fixed = [make_batch(validation, 12345, i, 4, config.difficulty) for i in range(6)]
    end = min(until or config.steps, config.steps)
    curves = _Curves(trainer.out / "curves.csv")
    smooth: dict[str, float] = {}
    start, first = time.monotonic(), trainer.step
    bar = tqdm(total=config.steps, initial=trainer.step, unit="step", mininterval=10)
    for batch in trainer.batches():
        if trainer.step >= end:
            break
        losses = trainer.train_step(batch.to(config.device))
        for name, value in losses.items():
            if np.isfinite(value):
                smooth[name] = smooth.get(name, value) * 0.98 + value * 0.02
        bar.update()
        if trainer.step % 20 == 0:
            bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in smooth.items()))
        due = trainer.step % config.save_every == 0 or trainer.step in (end, config.decay_start)
        if trainer.step % config.validate_every == 0 or trainer.step == end:
            figures = validate(trainer.average, fixed)
            rate = (trainer.step - first) / (time.monotonic() - start)
            curves.add({"step": trainer.step, "steps_per_second": rate, **smooth, **figures})
            tqdm.write(
                f"step {trainer.step} ({rate:.2f}/s): "
                + ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
            )
        if due:
            trainer.save()
    bar.close()
    return trainer


class _Curves:
    """Appends rows to a CSV file; the header is the first row's keys."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, row: dict[str, float]) -> None:
        new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `picopose train`."""
    parser.add_argument("--config", required=True, help="YAML file of a run, e.g. config/train_tiny.yaml")
    parser.add_argument(
        "--steps-until", type=int, default=None, help="stop at this step (the run can be resumed)"
    )


def run(args: argparse.Namespace) -> int:
    """`picopose train`."""
    train(TrainConfig.load(args.config), args.steps_until)
    return 0
