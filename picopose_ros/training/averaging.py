"""One network from the weights of several: ``picopose average``.

The mean of weights that come from one training, or from trainings that go on from the same state, is often as
good as the best of them, and better on images of another kind (Wortsman et al., Model soups, ICML 2022).
BatchNorm's statistics are not averaged but measured anew, on batches of the training's pool.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from picopose_ros.errors import ConfigError
from picopose_ros.model.checkpoint import load_model, read_weights
from picopose_ros.training.config import TrainConfig
from picopose_ros.training.trainer import Trainer


def average_weights(config: TrainConfig, files: Sequence[Path], out: Path) -> None:
    """Write the mean of several weights, fp16, with BatchNorm statistics of their own.

    Args:
        config: of the training they come from: its preset, and the pool that the statistics are of.
        files: weights of that preset, two or more. out: the file to write, .safetensors.

    Raises:
        CheckpointError: weights that can't be read, or of another preset.
        ConfigError: fewer than two files, or an `out` of another kind.
        PicoPoseError: there is no pool, or the disk is full.
    """
    if len(files) < 2:
        raise ConfigError("there is nothing to average: give two or more weights files")
    if out.suffix != ".safetensors":
        raise ConfigError(f"the mean is written as .safetensors, not as {out.name}")
    mean: dict[str, Tensor] = {}
    steps = []
    for path in files:
        steps.append(read_weights(path)[1].get("steps", "?"))  # a checkpoint of PyTorch has no notes
        for name, value in load_model(config.preset, path).state_dict().items():
            share = value.double() / len(files)
            mean[name] = mean[name] + share if name in mean else share
    trainer = Trainer(replace(config, out=str(out.parent)))
    state = trainer.average.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(mean[name])
    trainer.settle()
    trainer.save_weights(out.name, steps=" + ".join(steps))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `picopose average`."""
    parser.add_argument("weights", nargs="+", type=Path, metavar="WEIGHTS", help="two or more weights files")
    parser.add_argument("--config", required=True, help="YAML file of the run that they come from")
    parser.add_argument("--out", required=True, type=Path, metavar="OUT.safetensors", help="file to write")


def run(args: argparse.Namespace) -> int:
    """`picopose average`."""
    average_weights(TrainConfig.load(args.config), args.weights, args.out)
    return 0
