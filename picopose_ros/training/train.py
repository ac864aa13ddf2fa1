"""The training loop: three stages at once, resumable at any moment, on one process or several.

`picopose train --config config/train_tiny.yaml` is one process. On a machine with N GPUs

    torchrun --nproc-per-node N -m picopose_ros.cli.main train --config config/train_vitl.yaml

divides every step among N of them (more machines: `--nnodes`, `--rdzv-endpoint`; all see the run's folder and
the data under the same paths). The config's `shares` has to be a multiple of N. See
:mod:`picopose_ros.training.distributed` for what stays equal.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import cv2
import numpy as np
import torch
from tqdm import tqdm

from picopose_ros.arguments import positive
from picopose_ros.errors import ConfigError, PicoPoseError
from picopose_ros.training import distributed
from picopose_ros.training.config import TrainConfig
from picopose_ros.training.curves import Curves, replace_file
from picopose_ros.training.data import make_batch
from picopose_ros.training.distributed import mean_over_processes
from picopose_ros.training.objective import training_losses
from picopose_ros.training.pictures import correspondence_picture, validation_pairs
from picopose_ros.training.pool import PoolReader
from picopose_ros.training.trainer import Trainer
from picopose_ros.training.validation import validate

__all__ = ["TrainConfig", "Trainer", "train", "training_losses", "validate"]

_VALIDATION_SEED, _VALIDATION_BATCHES, _VALIDATION_OBJECTS = 12345, 6, 4
_BEST = "stage3_median"
"""The figure that decides which weights are the best."""
_NAMED = 20
"""Broken samples are named on the terminal up to this many."""


def train(config: TrainConfig, until: int | None = None) -> Trainer:
    """Run or resume a training; returns when `steps` (or `until`) are done, or after Ctrl-C or SIGTERM.

    The run's folder gets `last.pt` (state, with `previous.pt` before it and `stable.pt` where the learning
    rate begins to fall), `weights.safetensors` (the moving average), `best.safetensors` (the same at the
    evaluation with the smallest `stage3_median`), `curves.csv`, `tensorboard/`, `pictures/`, and
    `skipped.txt` where samples were broken.

    Raises:
        ConfigError: another process trains into the folder, or the processes cannot share a step.
        CheckpointError: the folder holds a run of another architecture, or one that is damaged.
        PicoPoseError: no pool, a full disk, or losses that stay non-finite.
    """
    cv2.setNumThreads(1)  # a loader forked from a process with OpenCV's threads hangs
    trainer = Trainer(config)
    with contextlib.ExitStack() as stack:
        if trainer.rank == 0:
            stack.enter_context(_locked(trainer.out))
        resumed = trainer.start()
        end = min(until or config.steps, config.steps)
        report = _Report(trainer, resumed, end) if trainer.rank == 0 else None
        skipped = _Skipped(trainer)
        stop = stack.enter_context(_Stop())
        stack.enter_context(_explained(trainer))
        for batch in trainer.batches():
            if trainer.step >= end:
                break
            skipped.add(batch.skipped)
            losses = trainer.train_step(batch.to(config.device))
            if report:
                report.step(losses)
            stopped = stop.agreed(config.device)
            at_end = trainer.step == end
            if trainer.step % config.validate_every == 0 or at_end:
                trainer.settle()
                trainer.save_weights("weights.safetensors")
                if report:
                    report.evaluate()
            due = trainer.step % config.save_every == 0 or at_end or trainer.step == config.decay_start
            if due or stopped:
                trainer.save()
            if stopped:
                break
        if report:
            report.close()
    return trainer


class _Report:
    """What the first process shows and writes beside the run's state: progress, curves, pictures, best."""

    def __init__(self, trainer: Trainer, resumed: bool, end: int) -> None:
        self._trainer, config = trainer, trainer.config
        print(
            f"{'resuming at' if resumed else 'starting at'} step {trainer.step} of {config.steps}, "
            f"{trainer.out}",
            flush=True,
        )
        pool = PoolReader(config.validation_pool)
        self._fixed = [
            make_batch(pool, _VALIDATION_SEED, i, _VALIDATION_OBJECTS, config.difficulty).to(config.device)
            for i in range(_VALIDATION_BATCHES)
        ]
        self._shown = validation_pairs(self._fixed)
        self._curves = Curves(trainer.out, trainer.step)
        self._smooth: dict[str, float] = {}
        self._began, self._first = time.monotonic(), trainer.step
        self._bar = tqdm(total=end, initial=trainer.step, unit="step", mininterval=10)

    def step(self, losses: dict[str, float]) -> None:
        """After a step: the bar, with its time to go, and the losses' running means."""
        for name, value in losses.items():
            if np.isfinite(value):
                self._smooth[name] = self._smooth.get(name, value) * 0.98 + value * 0.02
        self._bar.update()
        if self._trainer.step % 20 == 0:
            skipped = f" skipped {len(self._trainer.skipped)}" if self._trainer.skipped else ""
            self._bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in self._smooth.items()) + skipped)

    def evaluate(self) -> None:
        """Measure the shipped weights on the fixed pairs; write a row, a picture, and the best weights."""
        trainer = self._trainer
        figures = validate(trainer.shipped, self._fixed)
        rate = (trainer.step - self._first) / (time.monotonic() - self._began)
        if figures[_BEST] < self._curves.best(_BEST):
            trainer.save_weights("best.safetensors", **{_BEST: f"{figures[_BEST]:.4f}"})
        row = {"step": trainer.step, "steps_per_second": rate, "skipped_steps": len(trainer.skipped)}
        self._curves.add(row | self._smooth | figures)
        text = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
        tqdm.write(f"step {trainer.step} ({rate:.2f}/s): {text}")
        picture = correspondence_picture(
            trainer.shipped, self._shown, f"step {trainer.step}: {_BEST} {figures[_BEST]:.2f} px"
        )
        folder = trainer.out / "pictures"
        folder.mkdir(exist_ok=True)
        coded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        replace_file(folder / f"step_{trainer.step:06d}.jpg", lambda path: path.write_bytes(coded))
        self._curves.add_picture("correspondences", picture, trainer.step)

    def close(self) -> None:
        """End the bar and the curves."""
        self._bar.close()
        self._curves.close()


class _Skipped:
    """Names each broken sample once: on the terminal, and in the run's `skipped.txt`."""

    def __init__(self, trainer: Trainer) -> None:
        self._path = trainer.out / "skipped.txt"
        self._writes = trainer.rank == 0
        self._names: list[str] = []
        if self._path.exists():
            self._names = self._path.read_text(errors="replace").splitlines()

    def add(self, names: tuple[str, ...]) -> None:
        """The broken samples that a batch met."""
        new = [name for name in dict.fromkeys(names) if name not in self._names]
        for name in new:
            self._names.append(name)
            if len(self._names) <= _NAMED:
                tqdm.write(f"broken sample {len(self._names)} is left out: {name}")
        if new and self._writes:
            text = "".join(f"{name}\n" for name in self._names)
            replace_file(self._path, lambda path: path.write_text(text))


class _Stop:
    """Turns Ctrl-C and SIGTERM into a flag: a run ends between two steps. A second Ctrl-C ends it at once."""

    def __enter__(self) -> _Stop:
        self._flag = False
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller's matter
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        # torchrun passes the terminal's Ctrl-C on to processes that had it already.
        if self._flag and number == signal.SIGINT and distributed.world()[1] == 1:
            raise KeyboardInterrupt
        self._flag = True

    def agreed(self, device: str) -> bool:
        """Whether any of the processes was asked to stop: they all leave after the same step."""
        if distributed.world()[1] == 1:
            return self._flag
        return bool(mean_over_processes(torch.tensor(float(self._flag), device=device)) > 0)


@contextlib.contextmanager
def _explained(trainer: Trainer) -> Iterator[None]:
    """Say what a killed loader process means; PyTorch raises it wherever the trainer happens to be."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise PicoPoseError(
            f"a loader process was killed at step {trainer.step} ({error}): often for want of memory; with "
            "fewer workers the same command goes on from what was saved last"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training into a folder; clear away what a killed one has half written."""
    # A record lock: loader processes would inherit one of flock, and outlive a killed trainer with it.
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process is training into {folder}; wait for it, or give another folder as out"
            ) from error
        for name in ("last", "previous", "stable", "weights", "best", "curves", "skipped"):
            for path in folder.glob(f".*{name}.*"):
                path.unlink(missing_ok=True)
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `picopose train`."""
    parser.add_argument("--config", required=True, help="YAML file of a run, e.g. config/train_tiny.yaml")
    parser.add_argument("--steps", type=positive, help="steps of the run, instead of the config's")
    parser.add_argument("--device", help="cpu, cuda or cuda:1, instead of the config's")
    parser.add_argument("--out", help="the run's folder, instead of the config's; one with a run goes on")
    parser.add_argument(
        "--steps-until", type=positive, default=None, help="stop at this step (the run can be resumed)"
    )


def run(args: argparse.Namespace) -> int:
    """`picopose train`."""
    given = {key: getattr(args, key) for key in ("steps", "device", "out")}
    overrides = {key: value for key, value in given.items() if value is not None}
    config = TrainConfig.load(args.config, **overrides)
    with distributed.joined(config.device) as device:
        config = replace(config, device=device)
        trainer = train(config, args.steps_until)
        end = min(args.steps_until or config.steps, config.steps)
        if trainer.step < end:
            if trainer.rank == 0:
                print(
                    f"stopped at step {trainer.step} of {config.steps}; the same command goes on from there",
                    file=sys.stderr,
                )
            return 130
    return 0
