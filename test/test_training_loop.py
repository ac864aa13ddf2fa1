"""The training loop learns, says what it does, and resumes bit for bit after it was killed."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from picopose_ros.cli.main import main as command
from picopose_ros.errors import CheckpointError, ConfigError, PicoPoseError
from picopose_ros.model import PicoPose, load_model, preset
from picopose_ros.model.checkpoint import read_weights, save_model
from picopose_ros.model.features import Features
from picopose_ros.training import train as train_module
from picopose_ros.training import trainer as trainer_module
from picopose_ros.training.averaging import average_weights
from picopose_ros.training.config import _RULES
from picopose_ros.training.curves import Curves
from picopose_ros.training.data import Batch, make_batch
from picopose_ros.training.losses import flow_labels
from picopose_ros.training.pairs import Difficulty
from picopose_ros.training.pictures import correspondence_picture
from picopose_ros.training.pool import PoolReader, build_pool
from picopose_ros.training.sources import Draw
from picopose_ros.training.train import TrainConfig, Trainer, run, train, validate
from picopose_ros.training.trainer import PATIENCE
from picopose_ros.training.validation import _Errors

ROOT = Path(__file__).parent.parent
EASY = Difficulty(occlusion=0, keep_background=0, degrade=0, photometric=0, turn=0.3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    pool = tmp_path_factory.mktemp("pool")
    build_pool(pool, objects=2, first_seed=7, clusters=2, queries=1)
    return TrainConfig(
        pool=str(pool),
        validation_pool=str(pool),
        steps=12,
        objects_per_step=1,
        refine_pairs=2,
        warmup=4,
        learning_rate=2e-3,
        predicted_ramp=1,
        ema=0.8,
        save_every=2,
        validate_every=100,
        workers=0,
        difficulty=EASY,
    )


@pytest.fixture(scope="module")
def batch(config: TrainConfig) -> Batch:
    return make_batch(PoolReader(config.pool), 0, 0, 1, EASY)


@pytest.fixture(autouse=True)
def few_pairs_in_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "_VALIDATION_BATCHES", 2)
    monkeypatch.setattr(train_module, "_VALIDATION_OBJECTS", 1)
    monkeypatch.setattr(trainer_module, "SETTLING_BATCHES", 2)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations that measure nothing."""
    monkeypatch.setattr(train_module, "validate", lambda *_: {"stage3_median": 1.0})
    monkeypatch.setattr(train_module, "correspondence_picture", lambda *_: np.zeros((8, 8, 3), np.uint8))
    monkeypatch.setattr(Trainer, "settle", lambda _: None)


_CHILD = """
import sys, json, torch
torch.set_num_threads(1)
from picopose_ros.training.pairs import Difficulty
from picopose_ros.training import train
from picopose_ros.training.sources import Draw
from picopose_ros.training.train import TrainConfig
train._VALIDATION_BATCHES = 1
values = json.loads(sys.argv[1]); values["difficulty"] = Difficulty(**values["difficulty"])
train.train(TrainConfig(**values))
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So that this process rounds as one that it starts, whatever other tests have set."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_steps_on_one_batch_lower_its_loss(config: TrainConfig, tmp_path: Path, batch: Batch) -> None:
    """No rounding changes this, unlike what a few steps do to batches that were never seen."""
    trainer = Trainer(replace(config, out=str(tmp_path)))
    losses = [trainer.train_step(batch)["total"] for _ in range(config.steps)]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_resumes_to_the_same_weights(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, steps=8)
    straight = train(replace(config, out=str(tmp_path / "straight")))
    held = make_batch(PoolReader(config.pool), 1, 0, 1, EASY)
    assert all(math.isfinite(value) for value in validate(straight.average, [held]).values())

    broken = replace(config, out=str(tmp_path / "broken"))
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, json.dumps(asdict(broken))],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    last = tmp_path / "broken" / "last.pt"
    deadline = time.monotonic() + 240
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    leftover = last.with_name(".last.pt.1")
    leftover.write_bytes(b"half written by a killed process")
    resumed = Trainer(broken)
    assert resumed.resume()
    assert 0 < resumed.step < config.steps
    finished = train(broken)
    assert not leftover.exists()
    assert finished.step == straight.step
    for (name, a), b in zip(straight.model.state_dict().items(), finished.model.state_dict().values()):
        assert torch.equal(a, b), name
    for (name, a), b in zip(straight.average.state_dict().items(), finished.average.state_dict().values()):
        assert torch.equal(a, b), name
    model = load_model("tiny", tmp_path / "broken" / "weights.safetensors")
    assert not model.training
    picture = cv2.imread(str(tmp_path / "broken" / "pictures" / "step_000008.jpg"))
    assert picture.shape == (34 + 2 * 224, 4 * 224, 3)


def test_a_run_starts_from_a_whole_network(config: TrainConfig, tmp_path: Path) -> None:
    torch.manual_seed(5)
    given = PicoPose(preset("tiny")).eval()
    save_model(given, tmp_path / "given.safetensors")
    for start_from, wanted in ((tmp_path / "given.safetensors", given), ("packaged", load_model("tiny"))):
        trainer = Trainer(replace(config, out=str(tmp_path / "run"), start_from=str(start_from)))
        assert not trainer.start()
        for model in (trainer.model, trainer.average):
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(tensor, wanted.state_dict()[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(CheckpointError, match="missing"):
        Trainer(replace(config, out=str(tmp_path / "run"), start_from=str(tmp_path / "missing"))).start()


def test_the_mean_of_two_networks_has_statistics_of_its_own(config: TrainConfig, tmp_path: Path) -> None:
    torch.manual_seed(1)
    pair = [PicoPose(preset("tiny")).eval() for _ in range(2)]
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for model, path, steps in zip(pair, files, ("850", "2000"), strict=True):
        save_model(model, path, metadata={"steps": steps})
    out = tmp_path / "out" / "mean.safetensors"
    average_weights(config, files, out)
    state, notes = read_weights(out)
    assert notes["steps"] == "850 + 2000"
    a, b = (model.state_dict() for model in pair)
    weights = {name for name, _ in pair[0].named_parameters()}
    for name in weights & set(state):
        torch.testing.assert_close(state[name].float(), (a[name] + b[name]) / 2, atol=2e-3, rtol=2e-3)
    measured = [n for n in state if n.endswith("running_var") and not n.startswith("backbone.")]
    assert measured and all((state[n].float() != (a[n] + b[n]) / 2).any() for n in measured)
    assert not load_model("tiny", out).training


@pytest.mark.parametrize(
    ("names", "out", "said"),
    [
        (["a.safetensors"], "mean.safetensors", "two or more weights"),
        (["a.safetensors", "none.safetensors"], "mean.safetensors", "none.safetensors does not exist"),
        (["a.safetensors", "a.safetensors"], "mean.pt", "as .safetensors, not as mean.pt"),
    ],
)
def test_a_mean_of_nothing_is_refused(
    config: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
    out: str,
    said: str,
) -> None:
    save_model(PicoPose(preset("tiny")), tmp_path / "a.safetensors")
    (tmp_path / "run.yaml").write_text(f"preset: tiny\npool: {config.pool}\nout: {tmp_path}\n")
    words = ["average", *(str(tmp_path / name) for name in names), "--out", str(tmp_path / out)]
    assert command([*words, "--config", str(tmp_path / "run.yaml")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / out).exists()


def test_gradients_reach_every_parameter(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(replace(config, out=str(tmp_path), freeze_stem=False))
    parameters = dict(trainer.model.named_parameters())
    untouched = set(parameters)
    for batch in trainer.batches():  # heads that start at zero let none through at first
        trainer.train_step(batch)
        untouched -= {n for n, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0}
        if trainer.step == 3:
            break
    # The first grid starts from no flow: what its first convolution makes of that is its bias.
    assert untouched == {"offsets.blocks.0.encoder.flow.0.weight"}


# What is written, and read again


def test_a_damaged_state_gives_way_to_the_one_before(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(replace(config, out=str(tmp_path)))
    for trainer.step in (2, 4):
        trainer.save()
    trainer.last.write_bytes(trainer.last.read_bytes()[:100_000])
    again = Trainer(replace(config, out=str(tmp_path)))
    assert again.resume() and again.step == 2
    assert "last.pt is damaged" in capsys.readouterr().out
    trainer.previous.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged or cut short"):
        again.resume()
    torch.save({"model": {}}, trainer.last)
    with pytest.raises(CheckpointError, match="holds no state of a training run"):
        again.resume()


def test_a_run_of_another_architecture_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(replace(config, out=str(tmp_path)))
    trainer.save()
    state = torch.load(trainer.last, weights_only=True)
    torch.save(state | {"architecture": "{}"}, trainer.last)
    with pytest.raises(CheckpointError, match="another architecture"):
        trainer.resume()


def test_a_run_can_be_lengthened_from_before_its_rate_fell(config: TrainConfig, tmp_path: Path) -> None:
    short = replace(config, out=str(tmp_path), schedule="trapezoid", steps=10, decay=4)
    longer = replace(short, steps=20)
    assert all(short.learning_rate_at(step) == longer.learning_rate_at(step) for step in range(7))
    assert short.learning_rate_at(7) < longer.learning_rate_at(7)
    trainer = Trainer(short)
    for trainer.step in (4, 6, 8):
        trainer.save()
    again = Trainer(longer)
    assert again.resume() and again.step == 6
    assert Trainer(short).resume()
    trainer.stable.unlink()
    with pytest.raises(CheckpointError, match="another number of steps"):
        Trainer(longer).resume()


def test_options_come_from_the_config_and_a_change_is_said(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(replace(config, out=str(tmp_path))).save()
    other = Trainer(replace(config, out=str(tmp_path), weight_decay=0.5, workers=3))
    assert other.resume()
    assert {group["weight_decay"] for group in other.optimiser.param_groups} == {0.0, 0.5}
    assert "weight_decay 0.03 -> 0.5" in (said := capsys.readouterr().out) and "workers" not in said


def test_a_full_disk_leaves_what_was_there(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(replace(config, out=str(tmp_path)))
    trainer.step = 2
    trainer.save()
    content = trainer.last.read_bytes()

    def full(_: object, path: Path) -> None:
        path.write_bytes(b"the first bytes")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(PicoPoseError, match=r"last\.pt cannot be written .*No space left.* make room"):
        trainer.save()
    assert trainer.last.read_bytes() == content
    assert not list(tmp_path.glob(".*last*"))


def test_the_best_weights_are_kept(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    figures = {1: 5.0, 2: 3.0, 3: 4.0, 4: math.nan, 5: 2.0}
    monkeypatch.setattr(Trainer, "train_step", _count_only)
    monkeypatch.setattr(train_module, "validate", lambda *_: {"stage3_median": figures[seen[-1]]})
    seen: list[int] = []
    real = Trainer.train_step

    def step(trainer: Trainer, batch: Batch) -> dict[str, float]:
        losses = real(trainer, batch)
        seen.append(trainer.step)
        return losses

    monkeypatch.setattr(Trainer, "train_step", step)
    run = replace(config, out=str(tmp_path), validate_every=1, save_every=1, steps=5)
    for until, best in ((4, "2"), (5, "5")):  # the second goes on, and remembers
        train(run, until)
        with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
            assert file.metadata()["steps"] == best
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        assert file.metadata()["steps"] == "5"


def _count_only(trainer: Trainer, _: Batch) -> dict[str, float]:
    trainer.step += 1
    return {"total": 1.0}


def test_curves_drop_what_will_be_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    path.write_text("step,match\n100,5\n200,4\n300,3\n40")
    curves = Curves(tmp_path, 200)
    curves.add({"step": 300, "match": 2.5, "stage3_median": 7})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["100", "200", "300"]
    assert [row["stage3_median"] for row in rows] == ["", "", "7"]
    assert curves.best("stage3_median") == 7 and curves.best("match") == 2.5
    assert curves.best("never measured") == math.inf


def test_curves_go_to_tensorboard_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    curves = Curves(tmp_path)
    curves.add({"step": 3, "match": 2.5})
    curves.add_picture("pairs", np.full((20, 30, 3), 255, np.uint8), 3)
    curves.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("match")] == [(3, 2.5)]
    assert events.Images("pairs")[0].width == 30

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    capsys.readouterr()
    (tmp_path / "alone").mkdir()
    alone = Curves(tmp_path / "alone")
    alone.add({"step": 1, "match": 1.0})
    alone.add_picture("pairs", np.zeros((2, 2, 3), np.uint8), 1)
    alone.close()
    assert "not installed" in (said := capsys.readouterr().out) and said.count("\n") == 1
    assert (tmp_path / "alone" / "curves.csv").exists()


# What goes wrong on the way


def _trainer(config: TrainConfig, tmp_path: Path, factor: Callable[[int], float]) -> Trainer:
    """A trainer whose loss is its first parameter's sum, times a factor of the step."""
    trainer = Trainer(replace(config, out=str(tmp_path)))
    parameter = next(trainer.model.parameters())
    norm = next(m for m in trainer.model.modules() if isinstance(m, torch.nn.BatchNorm2d))

    def losses(*_: object) -> dict[str, Tensor]:
        norm(torch.full((2, norm.num_features, 2, 2), factor(trainer.step)))
        return {"match": parameter.square().sum() * factor(trainer.step)}

    trainer._objective = losses
    return trainer


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(
    config: TrainConfig, tmp_path: Path, batch: Batch
) -> None:
    trainer = _trainer(config, tmp_path, lambda step: math.nan if step == 1 else 1.0)
    trainer.train_step(batch)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert math.isnan(trainer.train_step(batch)["total"])
    assert trainer.skipped == [1] and trainer.step == 2
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    trainer.train_step(batch)
    assert any(not torch.equal(v, before[n]) for n, v in trainer.model.state_dict().items())
    assert all(v.isfinite().all() for v in trainer.average.state_dict().values())
    trainer.save()
    again = Trainer(replace(config, out=str(tmp_path)))
    assert again.resume() and again.skipped == [1]


def test_a_gradient_that_is_not_finite_is_skipped_too(
    config: TrainConfig, tmp_path: Path, batch: Batch
) -> None:
    trainer = _trainer(config, tmp_path, lambda _: 1.0)
    parameter = next(trainer.model.parameters())
    trainer._objective = lambda *_: {"match": (parameter * 0).sum().sqrt()}  # 0, with a gradient of 0 / 0
    before = parameter.detach().clone()
    assert trainer.train_step(batch)["total"] == 0
    assert trainer.skipped == [0] and torch.equal(parameter, before)


def test_many_losses_that_are_not_finite_end_the_run(
    config: TrainConfig, tmp_path: Path, batch: Batch
) -> None:
    trainer = _trainer(config, tmp_path, lambda _: math.inf)
    for _ in range(PATIENCE - 1):
        trainer.train_step(batch)
    with pytest.raises(
        PicoPoseError, match=f"{PATIENCE} steps in a row, up to step {PATIENCE - 1},.*match inf"
    ):
        trainer.train_step(batch)


def test_ctrl_c_saves_and_says_how_to_go_on(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fast: None,
) -> None:
    def interrupted(trainer: Trainer, batch: Batch) -> dict[str, float]:
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return _count_only(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    path = tmp_path / "run.yaml"
    path.write_text(f"pool: {config.pool}\nvalidation_pool: {config.pool}\nobjects_per_step: 1\nworkers: 0\n")
    handler = signal.getsignal(signal.SIGINT)
    given = {"config": path, "steps": 9, "device": "cpu", "out": str(tmp_path / "run"), "steps_until": None}
    assert run(Namespace(**given)) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopped at step 3 of 9; the same command goes on from there" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(Trainer, "train_step", _count_only)
    assert run(Namespace(**given)) == 0
    assert "resuming at step 3 of 9" in capsys.readouterr().out


def test_two_processes_do_not_train_into_one_folder(config: TrainConfig, tmp_path: Path) -> None:
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    try:
        with pytest.raises(ConfigError, match="another process is training into"):
            train(replace(config, out=str(tmp_path)))
    finally:
        process.communicate(b"\n")


def test_broken_samples_are_named_once(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    batch: Batch,
    fast: None,
) -> None:
    monkeypatch.setattr(Trainer, "train_step", _count_only)
    drawn = [replace(batch, skipped=names) for names in ((), ("pool: a", "pool: b"), ("pool: a",))]
    monkeypatch.setattr(Trainer, "batches", lambda _: iter(drawn))
    train(replace(config, out=str(tmp_path), steps=3))
    assert (tmp_path / "skipped.txt").read_text() == "pool: a\npool: b\n"
    assert capsys.readouterr().out.count("pool: a") == 1


def test_errors_of_loader_processes_stay_one_line(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    def killed(_: Trainer) -> Iterator[Batch]:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        yield

    run = replace(config, out=str(tmp_path), workers=1, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "batches", killed)
        with pytest.raises(PicoPoseError, match="killed at step 0 .*fewer workers"):
            train(run)

    def broken(*_: object) -> Batch:
        raise PicoPoseError("the message")

    monkeypatch.setattr(Draw, "__call__", broken)  # forked loaders have it, too
    with pytest.raises(PicoPoseError, match="^the message$"):
        train(run)


# The picture and the figures


def _truthful(batch: Batch, shift: float) -> Any:
    """A network that knows the truth, or misses it by this many px."""
    flow = flow_labels(batch.position + shift / math.sqrt(2), 64)
    certainty = torch.where(batch.valid > 0, 1.0, -1.0)[:, None]
    features = Features((), torch.zeros(len(batch.template_rgb), 1))
    result = SimpleNamespace(levels=[SimpleNamespace(flow=flow)], certainty=certainty)
    return SimpleNamespace(eval=lambda: None, encode=lambda _: features, regress=lambda *_: result)


def test_the_picture_shows_errors(batch: Batch) -> None:
    shares = []
    for shift in (0.0, 20.0):
        picture = correspondence_picture(_truthful(batch, shift), batch, "a title")
        assert picture.shape == (34 + 224 * len(batch.own), 4 * 224, 3)
        last = picture[34:, 3 * 224 :].astype(int)
        red, green = last[..., 0] > last[..., 1] + 60, last[..., 1] > last[..., 0] + 60
        shares.append(red.sum() / (red | green).sum())
        template = picture[34:258, :224].astype(int) * 2 - batch_picture(batch)
        assert np.median(np.abs(template)) < 2  # between its dots
    assert shares[0] < 0.02 and shares[1] > 0.98


def batch_picture(batch: Batch) -> np.ndarray:
    """The own template of the first query, (224, 224, 3), 0..255."""
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    bgr = batch.template_rgb[batch.own[0]].numpy().transpose(1, 2, 0) * std + (
        0.48145466,
        0.4578275,
        0.40821073,
    )
    return bgr[..., ::-1] * 255


def test_medians_are_over_all_cells() -> None:
    errors = _Errors()
    one, two = torch.zeros(1, 2, 2), torch.full((1, 2, 2), 3.0)
    one[0, 0, 0] = 100.0
    errors.add(one, torch.ones(1, 2, 2))
    errors.add(two, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))
    errors.add(two, torch.zeros(1, 2, 2))  # nothing visible
    assert errors.figures("x") == {"x": 3.0, "x_median": 0.0}


# Configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown key 'stepz'"),
        ("steps: 0", "steps is 0; it must be a whole number of at least 1"),
        ("steps: 2.5", "steps is 2.5"),
        ("steps: true", "steps is True"),
        ("steps:", "steps is None"),
        ("seed: -1", "at least 0"),
        ("learning_rate: 7", "learning_rate is 7; it must be a number between 0 and 1"),
        ("learning_rate: fast", "learning_rate is 'fast'"),
        ("learning_rate: .nan", "learning_rate is nan"),
        ("betas: [0.9, 1.0]", "a list of two, each a number of at least 0 and below 1"),
        ("ema: 1", "below 1"),
        ("preset: huge", "preset is 'huge'; it must be one of vitl, vitb, vits, tiny"),
        ("schedule: linear", "one of cosine, trapezoid"),
        ("autocast: maybe", "one of true, false, auto"),
        ("device: tpu", "cpu, cuda"),
        ("out: ''", "a text that is not empty"),
        ("difficulty: {occlusion: 2}", "difficulty: occlusion is 2; it must be a number from 0 to 1"),
        ("difficulty: {turn: 9}", "difficulty: turn is 9; it must be an angle"),
        ("difficulty: {rain: 1}", "difficulty: unknown key 'rain'"),
        ("difficulty: 3", "difficulty holds 3"),
        ("shares: 3", "objects_per_step is 4; it must be a multiple of shares"),
        ("procedural_weight: 0", "no pairs to train on"),
        ("shards: [{shards: x, models: y}]", "pairs_per_step is 0"),
        ("shards: [{shards: x}]", r"shards\[0\]"),
        ("backbone_weights: x.pth\nbackbone_rate: 2", "backbone_rate is 2"),
        ("{preset: vits, losses: tiny}", "losses is 'tiny'"),
        ("{start_from: packaged, backbone_weights: packaged}", "both given"),
        ("[1]", "keys and values"),
        ("[", "cannot be read"),
    ],
)
def test_a_bad_config_names_file_key_and_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig.load(path)
    assert str(path) in str(error.value)


def test_a_good_config_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-5\nclip: 0\nbetas: [0.5, 0.999]\ndifficulty: {turn: 1}\nshards: []\n")
    config = TrainConfig.load(path, steps=5, out="elsewhere")
    assert config == TrainConfig(
        learning_rate=1e-5,
        clip=0,
        betas=(0.5, 0.999),
        difficulty=Difficulty(turn=1),
        steps=5,
        out="elsewhere",
    )
    assert (config.form, replace(config, preset="vits").form) == ("tiny", "released")
    assert not config.use_autocast() and replace(config, autocast=True).use_autocast()
    path.write_text("")
    assert TrainConfig.load(path) == TrainConfig()
    with pytest.raises(ConfigError, match="command line: steps is 0"):
        TrainConfig.load(path, steps=0)


def test_every_key_has_a_rule() -> None:
    assert {f.name for f in fields(TrainConfig)} == set(_RULES) | {"difficulty"}


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("train_*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_configs_are_valid(path: Path) -> None:
    TrainConfig.load(path)
