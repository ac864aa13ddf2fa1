"""Where a run's pairs come from: the pool of procedural objects, and shards of rendered scenes."""

from __future__ import annotations

from picopose_ros.training.config import TrainConfig
from picopose_ros.training.data import Batch, PoolSource
from picopose_ros.training.shards import Mixed, ShardPairs


class Draw:
    """Makes shares of a run's batches: a pure function of (step, share). Can be sent to loader processes."""

    def __init__(self, config: TrainConfig) -> None:
        self._seed, self._objects = config.seed, config.objects_per_step // config.shares
        self._pairs = config.pairs_per_step // config.shares
        self._pool = PoolSource(config.pool, config.difficulty)
        self._mixed: Mixed | None = None
        if config.shards:
            sources = [(ShardPairs(source, config.difficulty), source.weight) for source in config.shards]
            if config.procedural_weight:
                sources.insert(0, (self._pool, config.procedural_weight))
            self._mixed = Mixed(sources)

    def __call__(self, step: int, share: int) -> Batch:
        """One share of a step's batch."""
        if self._mixed is not None:
            return self._mixed(self._seed, step, share, self._pairs)
        if self._pairs:
            return self._pool(self._seed, step, share, self._pairs)
        return self._pool.objects(self._seed, step, share, self._objects)
