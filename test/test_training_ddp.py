"""Two processes that share every step make the run of one process that has the whole batch."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from picopose_ros.errors import ConfigError
from picopose_ros.training import distributed
from picopose_ros.training.pool import build_pool
from picopose_ros.training.train import TrainConfig, Trainer

ROOT = Path(__file__).parent.parent
STEPS, BROKEN = 2, 3
"""Steps that are compared; the step after them, in which one of two processes gets a loss of NaN."""

# BatchNorm with fixed statistics, in every process: on a CPU it is the one thing that depends on how a batch
# is divided. Evaluations are left out for the sake of time, and gradients written down.
_CHILD = """
import sys
import torch
from picopose_ros.cli.main import main
from picopose_ros.training import objective, train, trainer
from picopose_ros.training.trainer import Trainer
sys.path.insert(0, sys.argv[1])
from test_training_ddp import BROKEN, fix_statistics, note_gradients
torch.set_num_threads(1)
train._VALIDATION_BATCHES = trainer.SETTLING_BATCHES = 1
train._Report.evaluate = lambda report: report._curves.add({"step": report._trainer.step, **report._smooth})
begin = Trainer.__init__
def patched(self, config):
    begin(self, config)
    fix_statistics(self)
    note_gradients(self)
Trainer.__init__ = patched
real, calls = objective.training_losses, []
def losses(*arguments):
    calls.append(0)
    broken = len(calls) == BROKEN and train.distributed.world()[0] == 1
    return {name: value * float("nan" if broken else 1) for name, value in real(*arguments).items()}
objective.training_losses = losses
raise SystemExit(main(sys.argv[2:]))
"""


def fix_statistics(trainer: Trainer) -> None:
    """Have BatchNorm use its running statistics in training, as it does in evaluation."""
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module


def note_gradients(trainer: Trainer) -> None:
    """Write every step's gradient (clipped) and losses beside the run, per process."""
    real = trainer.train_step

    def step(batch: object) -> dict[str, float]:
        losses = real(batch)
        gradient = {
            name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
        }
        weights = dict(trainer.model.state_dict())
        content = {"losses": losses, "gradient": gradient, "weights": weights}
        torch.save(content, trainer.out / f"step{trainer.step}_rank{trainer.rank}.pt")
        return losses

    trainer.train_step = step


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    build_pool(folder / "pool", objects=2, first_seed=7, clusters=2, queries=1)
    run = {
        "pool": str(folder / "pool"),
        "validation_pool": str(folder / "pool"),
        "steps": BROKEN,
        "objects_per_step": 2,
        "shares": 2,
        "refine_pairs": 2,
        "warmup": 1,
        # Without this AdamW divides small gradients by their own size, and makes of 1e-9 a whole step.
        "epsilon": 1.0,
        "workers": 0,
        "save_every": 2,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def _run_alone(config: Path, out: Path) -> None:
    trainer = Trainer(TrainConfig.load(config, out=str(out)))
    fix_statistics(trainer)
    note_gradients(trainer)
    for batch in trainer.batches():
        trainer.train_step(batch)
        if trainer.step == STEPS:
            break


def _run_two(config: Path, out: Path) -> None:
    child = out.parent / "child.py"
    child.write_text(_CHILD)
    arguments = [child, ROOT / "test", "train", "--config", config, "--out", out]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [str(argument) for argument in arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=570,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _noted(out: Path, step: int, rank: int = 0) -> dict[str, dict]:
    return torch.load(out / f"step{step}_rank{rank}.pt", weights_only=True)


def test_two_processes_make_the_steps_of_one_with_fixed_batchnorm_statistics(
    config: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    _run_alone(config, one)
    _run_two(config, two)
    for step in range(1, STEPS + 1):
        alone, shared = _noted(one, step), _noted(two, step)
        assert shared["losses"] == pytest.approx(alone["losses"], rel=2e-4)
        whole = torch.cat([g.flatten() for g in alone["gradient"].values()])
        scale = float(whole.abs().max())
        off = {name: shared["gradient"][name] - gradient for name, gradient in alone["gradient"].items()}
        assert torch.cat([d.flatten() for d in off.values()]).norm() < 0.01 * whole.norm()
        for name, gradient in alone["gradient"].items():
            # Rounding decides on which side of a kink an activation lies: a few elements may differ.
            outside = off[name].abs() > 5e-4 * scale + 1e-3 * gradient.abs()
            assert int(outside.sum()) <= max(2, 0.02 * gradient.numel()), name
        other = _noted(two, step, rank=1)
        assert other["losses"] == shared["losses"]
        for name, value in shared["weights"].items():
            torch.testing.assert_close(value, alone["weights"][name], rtol=1e-5, atol=2e-6)
            assert torch.equal(value, other["weights"][name]), name
    before, first, second = _noted(two, STEPS), _noted(two, BROKEN), _noted(two, BROKEN, rank=1)
    for noted in (first, second):  # both leave the broken step out
        assert math.isnan(noted["losses"]["total"])
        assert all(torch.equal(value, before["weights"][n]) for n, value in noted["weights"].items())
    # The first process alone writes, and what it wrote is a run that one process can go on with.
    assert {path.name for path in two.iterdir()} >= {"last.pt", "weights.safetensors", "curves.csv"}
    with (two / "curves.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(BROKEN)]
    alone = Trainer(TrainConfig.load(config, out=str(two)))
    assert alone.resume() and alone.step == BROKEN and alone.skipped == [BROKEN - 1]
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, before["weights"][name]), name


def test_shares_are_divided_evenly_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: (1, 2))
    assert distributed.my_shares(6) == [3, 4, 5]
    with pytest.raises(ConfigError, match="2 processes cannot divide a step's 3 shares"):
        distributed.my_shares(3)
    monkeypatch.setattr(distributed, "world", lambda: (0, 1))
    assert distributed.my_shares(3) == [0, 1, 2]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    joined = distributed.joined("cuda")
    with pytest.raises(ConfigError, match="cuda:1 is not there: PyTorch sees 1 GPUs"), joined:
        pass
