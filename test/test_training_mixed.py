"""The released network trains on shards mixed with a pool, through the loop's own config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from test_training_shards import models, objects, samples, shard  # noqa: F401  (fixtures)

from picopose_ros.training.pool import build_pool
from picopose_ros.training.train import TrainConfig, Trainer


@pytest.fixture
def config(shard: Path, models: Path, tmp_path: Path) -> TrainConfig:  # noqa: F811
    build_pool(tmp_path / "pool", objects=1, first_seed=7, clusters=2, queries=1)
    content = {
        "preset": "vits",
        "shards": [{"shards": str(shard), "models": str(models), "weight": 2}],
        "procedural_weight": 1,
        "pairs_per_step": 2,
        "shares": 2,
        "pool": str(tmp_path / "pool"),
        "out": str(tmp_path / "run"),
        "steps": 2,
        "workers": 0,
        "learning_rate": 1e-4,
        "warmup": 1,
        "betas": [0.5, 0.999],
        "epsilon": 1e-6,
        "decay_all": True,
        "clip": 0,
        "ema": 0,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return TrainConfig.load(path)


def test_the_released_network_makes_steps_on_shards_and_a_pool(config: TrainConfig) -> None:
    trainer = Trainer(config)
    assert not trainer.start()
    weights = {name: value.clone() for name, value in trainer.model.named_parameters()}
    for batch in trainer.batches():
        assert len(batch.own) == len(batch.query_rgb) == 2 and batch.skipped == ()
        losses = trainer.train_step(batch)
        assert set(losses) >= {"match", "translation", "scale", "angle", "total"}
        assert 0 < losses["total"] <= 100
    assert trainer.step == 2 and not trainer.skipped
    still = [n for n, p in trainer.model.named_parameters() if torch.equal(p, weights[n])]
    assert not still
    for mean, value in zip(trainer.average.state_dict().values(), trainer.model.state_dict().values()):
        assert torch.equal(mean, value)  # ema: 0
