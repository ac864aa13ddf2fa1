"""State of a training run, one step of it, and how it is kept on disk."""

from __future__ import annotations

import copy
import ctypes
import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from picopose_ros.errors import CheckpointError, PicoPoseError
from picopose_ros.model import PicoPose, load_model, preset, save_model
from picopose_ros.model.backbone import ConvNetBackbone
from picopose_ros.training.config import TrainConfig
from picopose_ros.training.curves import replace_file
from picopose_ros.training.data import Batch, BatchDataset
from picopose_ros.training.distributed import average_statistics, mean_over_processes, my_shares, world
from picopose_ros.training.imagenet import load_imagenet, packaged_weights
from picopose_ros.training.objective import Objective, share_generator
from picopose_ros.training.released import start_released
from picopose_ros.training.sources import Draw

PATIENCE = 20
"""A run with this many steps in a row whose loss is not finite is given up."""
SETTLING_BATCHES = 8
"""So many training batches give the shipped weights their BatchNorm statistics."""
_SETTLING_STEP = 1_000_000_000
"""Where these batches are drawn: beyond any step that is trained on."""
_STATE = {
    "architecture": str,
    "model": dict,
    "average": dict,
    "optimiser": dict,
    "step": int,
    "steps": int,
    "decay_start": int,
}
"""What a state file holds at least. Later additions are optional: `config`, `skipped`."""
_FREE = {"steps", "decay", "out", "device", "workers", "save_every", "validate_every", "validation_pool"}
"""Keys of a config that may change within a run; `resume` sees to it that a fall has not begun."""


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks: otherwise every step maps, zeroes and unmaps its large tensors anew.

    That costs half as much as the training itself on a CPU. Elsewhere than on glibc nothing happens.
    """
    mmap_max, trim_threshold = -4, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def _start_loader(_: int) -> None:
    """In every loader process: one thread; signals are the trainer's to handle, which then needs batches."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Careful(torch.utils.data.Dataset[Batch | PicoPoseError]):
    """Passes the package's errors on unchanged; a loader would turn their message into a traceback."""

    def __init__(self, data: BatchDataset) -> None:
        self._data = data

    def __getitem__(self, step: int) -> Batch | PicoPoseError:
        try:
            return self._data[step]
        except PicoPoseError as error:
            return error


def read_state(path: Path, device: str) -> dict[str, Any]:
    """A run's state from `last.pt`, `previous.pt` or `stable.pt`.

    Raises:
        CheckpointError: cut short, damaged, or something else.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged zip archive or pickle fails in many ways
        raise CheckpointError(
            f"{path} is damaged or cut short ({type(error).__name__}); delete it to start anew"
        ) from error
    if not isinstance(state, dict):
        state = {}
    for key, kind in _STATE.items():
        if not isinstance(state.get(key), kind):
            raise CheckpointError(f"{path} holds no state of a training run (no {key!r}); delete it")
    return state


def _parameter_groups(model: PicoPose, config: TrainConfig) -> list[dict[str, Any]]:
    """The optimiser's groups: with and without weight decay, the pretrained convolutions at a lower rate.

    Parameters that are not trained are switched off.
    """
    backbone = model.backbone
    convolutional = isinstance(backbone, ConvNetBackbone)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        pretrained = convolutional and name.startswith("backbone.conv.")
        stem = pretrained and name.removeprefix("backbone.").startswith(ConvNetBackbone.STEM)
        if stem and config.freeze_stem:
            parameter.requires_grad_(False)
            continue
        decay = config.weight_decay if parameter.ndim > 1 or config.decay_all else 0.0
        if pretrained:
            decay = 0.0  # its normalisation is fixed: decay would only shrink its maps
        groups.setdefault((config.backbone_rate if pretrained else 1.0, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "share": share}
        for (share, decay), parameters in groups.items()
    ]


class Trainer:
    """State of a run: model, its moving average, optimiser, step.

    With several processes every one of them holds all of it, equal after every step; the first alone writes.
    """

    def __init__(self, config: TrainConfig) -> None:
        _keep_freed_memory()
        self.config = config
        self.rank, processes = world()
        self.shares = my_shares(config.shares)
        torch.manual_seed(config.seed)
        self.model = PicoPose(preset(config.preset)).to(config.device, memory_format=torch.channels_last)
        self.average = PicoPose(preset(config.preset)).to(config.device, memory_format=torch.channels_last)
        self.average.load_state_dict(self.model.state_dict())
        if processes > 1 and torch.device(config.device).type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.optimiser = torch.optim.AdamW(
            _parameter_groups(self.model, config),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
        )
        self._objective: nn.Module = Objective(self.model, config)
        if processes > 1:
            self._objective = DistributedDataParallel(self._objective)
        self.shipped = self.average
        """The averaged weights as they were at the last `settle`."""
        self._settling: list[tuple[int, Batch]] | None = None
        self.step = 0
        self.skipped: list[int] = []
        """Steps whose loss was not finite, so that they changed no weight."""
        self.out = Path(config.out)
        self.last = self.out / "last.pt"
        self.previous = self.out / "previous.pt"
        """The state one interval before `last.pt`, should that be damaged."""
        self.stable = self.out / "stable.pt"
        """The state at the start of the learning rate's fall: where a longer run goes on from."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PicoPoseError(f"folder {self.out} of the run cannot be made: {error.strerror}") from error

    def start(self) -> bool:
        """Resume the run in the folder, or begin a new one; True where it was resumed.

        Raises:
            CheckpointError: as `resume`, or weights to start from that cannot be used.
        """
        if self.resume():
            return True
        if self.config.start_from:
            given = None if self.config.start_from == "packaged" else self.config.start_from
            whole = load_model(self.config.preset, given, self.config.device)
            self.model.load_state_dict(whole.state_dict())
        elif self.config.form == "released":
            start_released(self.model, self.config.backbone_weights)
        elif self.config.backbone_weights:
            given = self.config.backbone_weights
            load_imagenet(self.model.backbone, packaged_weights() if given == "packaged" else given)
        self.average.load_state_dict(self.model.state_dict())
        return False

    def resume(self) -> bool:
        """Continue from the last interval, if there is one.

        A run that was planned for another number of steps goes on from before its learning rate fell.

        Raises:
            CheckpointError: the run in the folder has another architecture, is damaged, or can't be made
                longer.
        """
        state = self._stored()
        if state is None:
            return False
        begun, planned = state["decay_start"], state["steps"]
        start = self.config.decay_start
        if (planned, begun) != (self.config.steps, start) and state["step"] > min(begun, start):
            if not self.stable.exists() or start < begun:
                raise CheckpointError(
                    f"{self.last} was planned for another number of steps and its learning rate is falling "
                    "already; give the steps it was started with, or train into another folder"
                )
            state = read_state(self.stable, self.config.device)
        if state["architecture"] != json.dumps(self.model.config.to_dict()):
            raise CheckpointError(
                f"{self.last} was trained with another architecture than preset '{self.config.preset}' has "
                "now; train into another folder"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self._load_optimiser(state["optimiser"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.last} does not fit this version's network or optimiser ({error}); train into another "
                "folder"
            ) from error
        self.step = state["step"]
        self.skipped = list(state.get("skipped", []))
        self._compare(state.get("config"))
        return True

    def _stored(self) -> dict[str, Any] | None:
        """The newest state that can be read; None where there never was one."""
        damaged: CheckpointError | None = None
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                state = read_state(path, self.config.device)
            except CheckpointError as error:
                damaged = damaged or error
                continue
            if damaged and self.rank == 0:
                print(f"{damaged}; going on from {path.name}, step {state['step']}", flush=True)
            return state
        if damaged:
            raise damaged
        return None

    def _load_optimiser(self, state: dict[str, Any]) -> None:
        # Options come from the config, as they do in a run of one piece; moments from the file.
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimiser.param_groups]
        self.optimiser.load_state_dict(state)
        for group, own in zip(self.optimiser.param_groups, options, strict=True):
            group.update(own)

    def _compare(self, before: str | None) -> None:
        """Log the keys of the config that differ from those the run was started with."""
        if before is None or self.rank:
            return
        old, new = json.loads(before), json.loads(json.dumps(asdict(self.config)))
        changed = [k for k in new if k not in _FREE and k in old and old[k] != new[k]]
        if changed:
            listed = ", ".join(f"{k} {old[k]} -> {new[k]}" for k in changed)
            print(
                f"the run was begun with another config ({listed}): no single command repeats it", flush=True
            )

    def save(self) -> None:
        """Write the run's state, in one piece; only the first process does.

        Raises:
            PicoPoseError: the disk is full or not writable; what was there before is still there.
        """
        if self.rank:
            return
        state = {
            "architecture": json.dumps(self.model.config.to_dict()),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "steps": self.config.steps,
            "decay_start": self.config.decay_start,
            "skipped": self.skipped,
            "config": json.dumps(asdict(self.config)),
        }
        if self.step == self.config.decay_start:
            replace_file(self.stable, lambda path: torch.save(state, path))
        if self.last.exists():
            self._link(self.last, self.previous)
        replace_file(self.last, lambda path: torch.save(state, path))

    @staticmethod
    def _link(source: Path, target: Path) -> None:
        """A second name for a file's content, in place of what had it."""
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:  # a file system without hard links does without the second chance
            return
        os.replace(partial, target)

    @torch.no_grad()
    def settle(self) -> None:
        """Make `shipped`: the averaged weights as fp16 holds them, with BatchNorm statistics of their own.

        The moving average of the statistics lags behind that of the weights, and where an input hardly
        varies (the residual flow of the first offset block is zero) BatchNorm magnifies the lag. With several
        processes all of them have to call this.
        """
        self.shipped = copy.deepcopy(self.average)
        for parameter in self.shipped.parameters():
            parameter.copy_(parameter.half().float())
        frozen = (
            set(self.shipped.backbone.modules())
            if isinstance(self.shipped.backbone, ConvNetBackbone)
            else set()
        )
        norms = [
            m
            for m in self.shipped.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m not in frozen
        ]
        if norms:
            if self._settling is None:
                draw = Draw(self.config)
                steps = range(_SETTLING_STEP, _SETTLING_STEP + SETTLING_BATCHES)
                data = BatchDataset(draw, self.shares, _SETTLING_STEP + SETTLING_BATCHES)
                self._settling = [(step, data[step]) for step in steps]
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over the batches
            self.shipped.train()
            objective = Objective(self.shipped, self.config)
            for step, batch in self._settling:
                generators = [share_generator(self.config.seed, step, share) for share in self.shares]
                objective(batch.to(self.config.device), 1.0, generators)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            average_statistics(self.shipped)
        self.shipped.eval()

    def save_weights(self, name: str, **notes: str) -> None:
        """Write the shipped weights, fp16, into the run's folder, with notes in the file's metadata.

        Raises:
            PicoPoseError: the disk is full or not writable.
        """
        if self.rank == 0:
            info = {"steps": str(self.step), "training": json.dumps(asdict(self.config)), **notes}
            replace_file(self.out / name, lambda p: save_model(self.shipped, p, half=True, metadata=info))

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step on this process's shares of a batch; losses are those of the whole batch.

        A step whose loss or gradient is not finite leaves the weights and BatchNorm's statistics as they are.

        Raises:
            PicoPoseError: 20 steps in a row were not finite.
        """
        config = self.config
        generators = [share_generator(config.seed, self.step, share) for share in self.shares]
        rate = config.learning_rate_at(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        self.model.train()
        statistics = [b.clone() for b in self.model.buffers()]
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.use_autocast()):
            progress = min(1.0, self.step / config.predicted_ramp)
            losses = self._objective(batch, progress, generators)
        total = sum(losses.values())
        values = mean_over_processes(torch.stack([*losses.values(), total]).detach()).tolist()
        self.optimiser.zero_grad(set_to_none=True)
        finite = math.isfinite(values[-1])
        if finite:
            total.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
            finite = math.isfinite(norm)
        if finite:
            self.optimiser.step()
            average_statistics(self.model)
        else:
            with torch.no_grad():
                for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                    buffer.copy_(before)
            self.skipped.append(self.step)
        self.step += 1
        self._average()
        if self.skipped[-PATIENCE:] == list(range(self.step - PATIENCE, self.step)):
            last = ", ".join(f"{name} {value:g}" for name, value in zip(losses, values))
            raise PicoPoseError(
                f"{PATIENCE} steps in a row, up to step {self.step - 1}, had a loss or gradient that is not "
                f"finite ({last}); lower learning_rate or switch autocast off, then go on from what "
                f"{self.out} holds"
            )
        return dict(zip([*losses, "total"], values, strict=True))

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for mean, value in zip(
            self.average.state_dict().values(), self.model.state_dict().values(), strict=True
        ):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - keep)
            else:
                mean.copy_(value)

    def batches(self) -> Iterator[Batch]:
        """This process's shares of the batches from the current step on.

        Raises:
            PicoPoseError: a source has nothing to give.
        """
        config = self.config
        loader = torch.utils.data.DataLoader(
            _Careful(BatchDataset(Draw(config), self.shares, config.steps)),
            batch_size=None,
            sampler=range(self.step, config.steps),
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
            worker_init_fn=_start_loader,
        )
        for batch in loader:
            if isinstance(batch, PicoPoseError):
                raise batch
            yield batch
