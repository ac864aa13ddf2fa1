"""One training step on a device: ``python scripts/gpu/step.py DEVICE``; exits 1 if its loss is not finite."""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

from picopose_ros.training.config import TrainConfig
from picopose_ros.training.data import make_batch
from picopose_ros.training.pool import PoolReader, build_pool
from picopose_ros.training.trainer import Trainer


def main(device: str) -> int:
    """Make a pool of one object, train a step, print its loss."""
    with tempfile.TemporaryDirectory() as folder:
        pool = Path(folder) / "pool"
        build_pool(pool, objects=1, first_seed=7, clusters=1, queries=1)
        config = TrainConfig(
            pool=str(pool),
            validation_pool=str(pool),
            out=str(Path(folder) / "run"),
            steps=1,
            objects_per_step=1,
            workers=0,
            device=device,
        )
        trainer = Trainer(config)
        losses = trainer.train_step(make_batch(PoolReader(config.pool), 0, 0, 1, config.difficulty))
    print(f"one step on {device}: loss {losses['total']:.3f}, skipped steps {trainer.skipped}")
    return 0 if math.isfinite(losses["total"]) else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
