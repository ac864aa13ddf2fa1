"""The training loop learns, and resumes bit for bit after it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from picopose_ros.errors import CheckpointError, ConfigError
from picopose_ros.model import load_model
from picopose_ros.training.data import make_batch
from picopose_ros.training.pairs import Difficulty
from picopose_ros.training.pool import PoolReader, build_pool
from picopose_ros.training.train import TrainConfig, Trainer, train, training_losses, validate


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    pool = tmp_path_factory.mktemp("pool")
    build_pool(pool, objects=2, first_seed=7, clusters=2, queries=1)
    return TrainConfig(
        pool=str(pool),
        validation_pool=str(pool),
        steps=6,
        objects_per_step=1,
        refine_pairs=2,
        warmup=1,
        save_every=2,
        validate_every=100,
        workers=0,
    )


def test_losses_fall_on_a_batch_seen_again_and_again(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(replace(config, out=str(tmp_path), steps=1000, warmup=5))
    easy = Difficulty(occlusion=0, keep_background=0, degrade=0, photometric=0, turn=0.3)
    batch = make_batch(PoolReader(config.pool), 0, 0, 1, easy)
    history = [trainer.train_step(batch) for _ in range(12)]
    for name in ("match", "total"):
        assert history[-1][name] < 0.9 * history[0][name], name
    figures = validate(trainer.model, [batch])
    assert 0 < figures["stage1"] < 224
    assert 0 <= figures["recall"] <= 1


def test_gradients_reach_every_parameter(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(replace(config, out=str(tmp_path)))
    parameters = dict(trainer.model.named_parameters())
    untouched = set(parameters)
    for step in range(4):  # the signs of an L1 loss can cancel within one batch
        batch = make_batch(PoolReader(config.pool), 0, step, 1, config.difficulty)
        losses = training_losses(trainer.model, batch, config, 0.5, torch.Generator().manual_seed(step))
        trainer.model.zero_grad()
        sum(losses.values()).backward()
        untouched -= {n for n, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert untouched == set()


_CHILD = """
import sys, json
from dataclasses import asdict, replace
from picopose_ros.training.pairs import Difficulty
from picopose_ros.training.train import TrainConfig, train
values = json.loads(sys.argv[1]); values["difficulty"] = Difficulty(**values["difficulty"])
train(TrainConfig(**values))
"""


def test_a_killed_run_resumes_to_the_same_weights(config: TrainConfig, tmp_path: Path) -> None:
    straight = train(replace(config, out=str(tmp_path / "straight")))
    broken = replace(config, out=str(tmp_path / "broken"))
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(asdict(replace(broken, steps=6)))],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.DEVNULL,
    )
    last = tmp_path / "broken" / "last.pt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    resumed = Trainer(broken)
    assert resumed.resume()
    assert 0 < resumed.step <= config.steps
    finished = train(broken)
    assert finished.step == straight.step
    for (name, a), b in zip(straight.model.state_dict().items(), finished.model.state_dict().values()):
        assert torch.equal(a, b), name
    for (name, a), b in zip(straight.average.state_dict().items(), finished.average.state_dict().values()):
        assert torch.equal(a, b), name
    model = load_model("tiny", tmp_path / "broken" / "weights.safetensors")
    assert not model.training


def test_a_run_of_another_architecture_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(replace(config, out=str(tmp_path)))
    trainer.save()
    state = torch.load(trainer.last, weights_only=True)
    torch.save(state | {"architecture": "{}"}, trainer.last)
    with pytest.raises(CheckpointError, match="another architecture"):
        trainer.resume()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown key 'stepz'"),
        ("steps: 0", "at least 1"),
        ("learning_rate: 7", "between 0 and 1"),
        ("[", "cannot be read"),
    ],
)
def test_a_bad_config_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig.load(path)
    assert str(path) in str(error.value)


def test_the_shipped_config_is_valid() -> None:
    TrainConfig.load(Path(__file__).parent.parent / "config" / "train_tiny.yaml")
