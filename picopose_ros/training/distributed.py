"""Several processes share every training step; started by `torchrun`, one process is the plain case.

A step's batch is made of shares (`TrainConfig.shares`), each a pure function of (seed, step, share). Every
process takes the same number of whole shares, gradients are averaged (`DistributedDataParallel`), and losses
divide by counts over all processes (:func:`per_process`), so the step is the one that a single process would
make of the whole batch. What is left is BatchNorm: on CUDA it is synchronised (`SyncBatchNorm`, exact); on a
CPU every process normalises by its own share, and the running statistics are averaged.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from picopose_ros.errors import ConfigError


def world() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def per_process(count: Tensor) -> Tensor:
    """What a process divides its sum by, so that the mean over processes is the mean over all.

    Args:
        count: () how many values this process has summed.
    Returns:
        () the count over all processes, at least 1, divided by the number of processes.
    """
    if not dist.is_initialized():
        return count.clamp(min=1)
    return mean_over_processes(count).clamp(min=1 / dist.get_world_size())


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, without gradient; the tensor itself where there is but one."""
    if not dist.is_initialized():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@contextlib.contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the processes that `torchrun` started, if it did, and leave them at the end.

    Args:
        device: `cpu`, `cuda`, ...; with several processes `cuda` becomes this process's own GPU.

    Yields:
        The device of this process.

    Raises:
        ConfigError: no such GPU, or more processes than GPUs on this machine.
    """
    cuda = torch.device(device).type == "cuda"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if cuda and several:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if cuda and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device} is not there: PyTorch sees {torch.cuda.device_count()} GPUs; use device cpu, a "
            "CUDA build of PyTorch, or with torchrun no more processes than GPUs"
        )
    if not several:
        yield device
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def average_statistics(model: nn.Module) -> None:
    """Average BatchNorm's running statistics over all processes; synchronised ones agree already."""
    if not dist.is_initialized():
        return
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = mean_over_processes(torch.cat([b.flatten() for b in buffers]))
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def my_shares(shares: int) -> list[int]:
    """The shares of every step's batch that this process takes.

    Raises:
        ConfigError: they cannot be divided evenly.
    """
    rank, processes = world()
    if shares % processes:
        raise ConfigError(
            f"{processes} processes cannot divide a step's {shares} shares evenly: set shares in the "
            f"training config to {processes} or a multiple of it"
        )
    each = shares // processes
    return list(range(rank * each, (rank + 1) * each))
