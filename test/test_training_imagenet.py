"""The convolutional backbone: it starts from a file of ImageNet weights, and its statistics stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from picopose_ros.errors import CheckpointError
from picopose_ros.geometry.crops import normalise_crop
from picopose_ros.model import PicoPose, preset
from picopose_ros.model._timm import timm
from picopose_ros.model.backbone import ConvNetBackbone, make_backbone
from picopose_ros.model.checkpoint import load_model, save_model
from picopose_ros.training.config import TrainConfig
from picopose_ros.training.imagenet import load_imagenet
from picopose_ros.training.trainer import Trainer


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published one: the whole classifier's tensors in order, under other names."""
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0")
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("imagenet") / "lite0.pth"
    torch.save({f"tensor{n}": v for n, v in enumerate(network.state_dict().values())}, path)
    return path


@pytest.fixture
def backbone() -> ConvNetBackbone:
    torch.manual_seed(1)
    return make_backbone(preset("tiny").backbone).eval()


@torch.no_grad()
def test_maps_are_those_of_the_published_network(published: Path, backbone: ConvNetBackbone) -> None:
    load_imagenet(backbone, published)
    network = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3)).eval()
    values = torch.load(published, weights_only=True).values()
    for own, value in zip(network.state_dict().values(), values):
        own.copy_(value)
    rgb = np.random.default_rng(0).uniform(0, 1, (224, 224, 3)).astype(np.float32)
    pixels = torch.from_numpy((255 * rgb - 127) / 128).permute(2, 0, 1)[None]
    expected = network(torch.nn.functional.interpolate(pixels, size=256, mode="bilinear"))
    got = backbone.convolve(torch.from_numpy(normalise_crop(rgb))[None])
    # Beyond the border the published network sees 127, this one the crops' mean.
    for a, b, margin in zip(got, expected, (8, 6, 5)):
        inner = (..., slice(margin, -margin), slice(margin, -margin))
        assert a.shape == b.shape
        assert (a[inner] - b[inner]).abs().max() < 0.02 * b[inner].abs().max()


def test_files_that_are_no_weights_are_refused(
    tmp_path: Path, published: Path, backbone: ConvNetBackbone
) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(published.read_bytes()[:20000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_imagenet(backbone, cut)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_imagenet(backbone, tmp_path / "none.pth")
    few = tmp_path / "few.pth"
    torch.save({"a": torch.zeros(3)}, few)
    with pytest.raises(CheckpointError, match="1 tensors"):
        load_imagenet(backbone, few)
    other = tmp_path / "other.pth"
    torch.save({str(n): torch.zeros(n + 1) for n in range(400)}, other)
    with pytest.raises(CheckpointError, match="is no EfficientNet"):
        load_imagenet(backbone, other)


def test_statistics_and_stem_stay_in_training(published: Path, tmp_path: Path) -> None:
    config = TrainConfig(out=str(tmp_path / "run"), backbone_weights=str(published), backbone_rate=0.5)
    trainer = Trainer(config)
    trainer.start()
    backbone = trainer.model.backbone
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    trainer.model.train()
    sum(tap.square().mean() for tap in backbone(torch.randn(2, 3, 224, 224))).backward()
    for group in trainer.optimiser.param_groups:
        group["lr"] = 0.01 * group["share"]
    trainer.optimiser.step()
    after = backbone.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert not [k for k in changed if "running" in k or k.startswith(ConvNetBackbone.STEM)]
    assert "conv.blocks.1.1.conv_dw.weight" in changed and "patch.weight" in changed
    shares = {group["share"] for group in trainer.optimiser.param_groups}
    assert shares == {0.5, 1.0}


def test_a_buffer_that_weights_do_not_carry_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks are built without memory and filled from a file: what is not in it would be arbitrary."""
    path = tmp_path / "weights.safetensors"
    save_model(PicoPose(preset("tiny")), path)
    assert load_model("tiny", path)
    built = PicoPose.__init__

    def with_buffer(self: PicoPose, *args: object) -> None:
        built(self, *args)
        self.affine.register_buffer("forgotten", torch.zeros(3), persistent=False)

    monkeypatch.setattr(PicoPose, "__init__", with_buffer)
    with pytest.raises(CheckpointError, match=r"affine\.forgotten"):
        load_model("tiny", path)
