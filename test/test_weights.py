"""`picopose convert`: published files become weights, whole, checked, and without running what they hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import load_parity
from released_weights import fixture_state, sparse_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from picopose_ros.cli.main import main
from picopose_ros.errors import CheckpointError
from picopose_ros.model import PicoPose, convert_released, load_model, preset
from picopose_ros.model.checkpoint import load_backbone, preset_of, read_weights
from picopose_ros.model.conversion import convert_checkpoint
from picopose_ros.model.released_keys import resample_pos_embed

DINO = "feature_extractor.dinov2."
DEAD = 40 + 18
"""Tensors without influence: parameters, and what BatchNorm keeps beside them."""


class Callback:
    """As a training framework saves: an object of a class that nobody has here."""

    def __init__(self) -> None:
        self.best, self.seen, self.folder = torch.ones(3), {1, 2}, Path("runs")


class Malicious:
    """Does something when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def lightning(state: dict[str, Tensor], prefix: str = "network.", **more: Any) -> dict[str, Any]:
    """A checkpoint as Lightning writes it."""
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(1000), "exp_avg_sq": torch.randn(1000)}}
    return {
        "epoch": 9,
        "global_step": 400_000,
        "pytorch-lightning_version": "1.8.1",
        "state_dict": {prefix + key: value for key, value in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 10}}}},
        "callbacks": {"ModelCheckpoint": Callback()},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-5, "params": [0]}]}],
        "lr_schedulers": [{"base_lrs": [1e-5], "_last_lr": [0.0]}],
        "hyper_parameters": Callback(),
        **more,
    }


@pytest.fixture(scope="module")
def arch() -> str:
    """Size of the parity fixture's network."""
    return load_parity().meta["versions"]["arch"]


@pytest.fixture(scope="module")
def state(arch: str) -> dict[str, Tensor]:
    """All tensors of that size, few different numbers."""
    return sparse_state(arch)


@pytest.fixture(scope="module")
def checkpoint(arch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the fixture's network, with a trap."""
    path = tmp_path_factory.mktemp("published") / "picopose.ckpt"
    state = fixture_state(arch, load_parity().meta["versions"]["seed"])
    torch.save(lightning(state, trap=Malicious(path.with_name("sprung"))), path)
    return path


@pytest.fixture(scope="module")
def converted(checkpoint: Path, arch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What becomes of it."""
    path = tmp_path_factory.mktemp("converted") / "weights.safetensors"
    assert main(["convert", str(checkpoint), str(path), "--preset", arch]) == 0
    return path


def test_a_lightning_checkpoint_becomes_the_released_network(
    checkpoint: Path, converted: Path, arch: str
) -> None:
    assert not checkpoint.with_name("sprung").exists(), "the checkpoint's code was run"
    assert preset_of(converted) == arch
    model = load_model(arch, converted)
    expected = convert_released(fixture_state(arch, load_parity().meta["versions"]["seed"]))
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    # Not only the same numbers: the same features of the fixture's crops.
    parity = load_parity()
    with torch.no_grad():
        taps = model.encode(torch.from_numpy(parity.tensor("provider/real_rgb"))).taps
    parity.assert_matches("stage1/query_feature_3", taps[-1], 1e-4)


def test_the_file_says_where_it_comes_from(
    state: dict[str, Tensor], arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.ckpt", tmp_path / "out.safetensors"
    torch.save(lightning(state), source)
    written = set()
    for _ in range(2):  # equal bytes every time, so that checksums can be compared
        assert main(["convert", str(source), str(target), "--preset", arch]) == 0
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (source, target)]
        said = capsys.readouterr()
        assert said.out == f"{sums[0]}  {source}\n{sums[1]}  {target}\n"
        assert f"{DEAD} that influence no output left out" in said.err
        with safe_open(target, "pt") as file:
            about = file.metadata()
        assert (about["source"], about["source_sha256"], about["part"]) == ("in.ckpt", sums[0], "network")
        assert json.loads(about["config"])["name"] == arch
        written.add(sums[1])
    assert len(written) == 1


def test_the_published_size(tmp_path: Path) -> None:
    """All tensors of the network that was published, half of the file, less than two gigabytes of memory."""
    sparse = sparse_state("vitl")
    assert len(sparse) == 603
    source, target = tmp_path / "vitl.ckpt", tmp_path / "vitl.safetensors"
    torch.save(lightning(sparse), source)
    done = convert_checkpoint(source, target, half=True)
    assert (done.part, done.preset, len(done.dropped), done.extra) == ("network", "vitl", DEAD, [])
    expected = convert_released(sparse)
    with safe_open(target, "pt") as file:
        keys = set(file.keys())
        assert keys == {key for key in expected if not key.endswith("num_batches_tracked")}
        for key in keys:
            kept = file.get_tensor(key)
            exact = key.endswith(("running_mean", "running_var"))
            assert kept.dtype == (torch.float32 if exact else torch.float16)
            assert torch.equal(kept, expected[key].to(kept.dtype)), key
    position = sparse[f"{DINO}pos_embed"]
    assert expected["backbone.vit.pos_embed"].shape == (1, 257, 1024)
    assert torch.equal(expected["backbone.vit.pos_embed"], resample_pos_embed(position))
    model = load_model("vitl", target)
    assert sum(parameter.numel() for parameter in model.parameters()) == 380_905_417 - 5_845_441 - 1113 * 1024
    for key, value in list(model.state_dict().items())[::25]:
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prefix", ["network.", "module.", "", "network.module."])
def test_prefixes(prefix: str, state: dict[str, Tensor], arch: str, tmp_path: Path) -> None:
    renamed = {prefix + key: value for key, value in state.items()}
    assert convert_released(renamed).keys() == convert_released(state).keys()
    some = {key: value for key, value in renamed.items() if "dinov2.blocks.0." in key}
    torch.save(some, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="backbone of preset") as error:
        convert_checkpoint(tmp_path / "bare.pth", tmp_path / "out.safetensors", arch)
    assert "missing backbone.vit.cls_token" in str(error.value)
    assert "blocks.0." not in str(error.value)


@pytest.mark.parametrize("source", ["facebookresearch", "facebookresearch, old format", "timm"])
def test_a_backbone_alone_is_for_training(
    source: str, state: dict[str, Tensor], arch: str, tmp_path: Path
) -> None:
    published = {key.removeprefix(DINO): value for key, value in state.items() if key.startswith(DINO)}
    path = tmp_path / "dinov2.pth"
    if source == "timm":
        del published["mask_token"]
        path = tmp_path / "model.safetensors"
        save_file({key: value.contiguous() for key, value in published.items()}, path)
    else:
        torch.save(published, path, _use_new_zipfile_serialization=source == "facebookresearch")
    target = tmp_path / "backbone.safetensors"
    done = convert_checkpoint(path, target, arch)
    assert done.part == "backbone" and not done.extra
    expected = convert_released(state)
    with torch.device("meta"):
        model = PicoPose(preset(arch))
    for file in (target, path):
        model.backbone.to_empty(device="cpu")
        load_backbone(model, file)
        for key, value in model.backbone.vit.state_dict().items():
            assert torch.equal(value, expected[f"backbone.vit.{key}"]), key
    with pytest.raises(CheckpointError, match="backbone only: train with it"):
        load_model(arch, target)


def test_what_does_not_fit_is_named_and_nothing_is_written(
    state: dict[str, Tensor], arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.ckpt", tmp_path / "out.safetensors"
    target.write_bytes(b"what was there before")

    def refused(changed: dict[str, Tensor], *words: str) -> None:
        torch.save(lightning(changed), source)
        with pytest.raises(CheckpointError) as error:
            convert_checkpoint(source, target, arch)
        for word in ("in.ckpt", *words):
            assert word in str(error.value)
        assert target.read_bytes() == b"what was there before"
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    bias, weight = "affine_regressor.fc2.bias", "affine_regressor.fc2.weight"
    refused({k: v for k, v in state.items() if k != bias}, "missing affine.fc2.bias", "nothing was written")
    turned = state[weight].T.clone()
    refused({**state, weight: turned}, "affine.fc2.weight (1024, 256) instead of (256, 1024)")
    refused({**state, bias: torch.full_like(state[bias], torch.nan)}, "not finite", "affine.fc2.bias")
    refused({"encoder.weight": torch.zeros(3)}, "of another network", "encoder.weight")
    less = {k: v for k, v in state.items() if "fc1" not in k}
    refused(less, "missing affine.fc1.weight", "missing affine.fc1.bias")

    torch.save(lightning({**state, "ema.decay": torch.zeros(1)}), source)
    assert main(["convert", str(source), str(target), "--preset", arch, "--half"]) == 1
    assert "unknown tensor ema.decay: left out" in capsys.readouterr().err
    load_model(arch, target)

    large = state[bias].clone()
    large[0] = 1e5
    torch.save(lightning({**state, bias: large}), source)
    with pytest.raises(CheckpointError, match="not finite in fp16"):
        convert_checkpoint(source, target, arch, half=True)


@pytest.mark.parametrize("ending", [b"\x80", b"PK"])
def test_a_length_that_begins_as_another_kind_of_file(tmp_path: Path, ending: bytes) -> None:
    """A safetensors file begins with the length of its header: one in 32 as a pickle does."""
    path = tmp_path / "weights.safetensors"
    state = {"a": torch.arange(3.0)}
    save_file(state, path, {"pad": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    wanted = next(n for n in range(length + 8, 1 << 17, 8) if n.to_bytes(8, "little").startswith(ending))
    save_file(state, path, {"pad": "x" * (wanted - length)})
    assert path.read_bytes().startswith(ending)
    tensors, notes = read_weights(path)
    assert notes["pad"] == "x" * (wanted - length) and torch.equal(tensors["a"], state["a"])


def test_files_that_are_no_checkpoints(
    checkpoint: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = checkpoint.read_bytes()
    target = tmp_path / "out.safetensors"
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    files = {
        "cut.ckpt": whole[: len(whole) // 2],
        "head.ckpt": whole[:1000],
        "damaged.ckpt": bytes(damaged),
        "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "empty.ckpt": b"",
        "cut.safetensors": converted.read_bytes()[:5000],
        "zip.ckpt": b"PK\x05\x06" + bytes(18),
        "pickle.ckpt": b"\x80\x02}q\x00.",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert main(["convert", str(tmp_path / name), str(target)]) == 2, name
        said = capsys.readouterr().err
        assert name in said and said.count("\n") == 1, said
    torch.save({"state_dict": {"a": Callback()}}, tmp_path / "objects.ckpt")
    assert main(["convert", str(tmp_path / "objects.ckpt"), str(target)]) == 2
    assert "'a' is no tensor" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.ckpt"), str(target)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), str(tmp_path / "out.pt")]) == 2
    assert "end in .safetensors" in capsys.readouterr().err
    assert main(["convert", str(checkpoint), str(target), "--preset", "huge"]) == 2
    assert "vitl" in capsys.readouterr().err
    assert main(["convert", str(converted), str(converted)]) == 2
    assert "the file that is converted" in capsys.readouterr().err
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "out.safetensors"
    assert main(["convert", str(converted), str(below), "--preset", preset_of(converted)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    "case", ["beyond its storage", "negative", "another record", "no storage", "old format, with code"]
)
def test_checkpoints_made_to_harm(case: str, tmp_path: Path) -> None:
    """Nothing of a forged file is run, and no memory is read that isn't the tensor's."""
    import picopose_ros.model.torch_file as torch_file

    path, sprung = tmp_path / "forged.ckpt", tmp_path / "sprung"
    if case == "old format, with code":
        torch.save({"a": torch.ones(2), "b": Malicious(sprung)}, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"a": torch.arange(4.0)}, path)
        with torch_file.open_torch_file(path) as file:
            lazy = file.content["a"]
            forged = {
                "beyond its storage": torch_file._Lazy(lazy.storage, 2, (4,), (1,)),
                "negative": torch_file._Lazy(lazy.storage, -1, (2,), (1,)),
                "another record": torch_file._Lazy(
                    torch_file._Storage("../data.pkl", torch.float32), 0, (1,), (1,)
                ),
                "no storage": torch_file._Lazy(None, 0, (1,), (1,)),
            }[case]
            with pytest.raises((ValueError, KeyError)):
                file.tensors({"a": forged})
            np.testing.assert_array_equal(file.tensors(file.content)["a"], [0, 1, 2, 3])
        return
    with pytest.raises(CheckpointError, match="forged.ckpt"):
        load_model("vits", path)
    assert not sprung.exists()
