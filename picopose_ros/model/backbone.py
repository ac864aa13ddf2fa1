"""Backbones: a crop becomes three feature maps (taps)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picopose_ros.model._timm import timm
from picopose_ros.model.config import GRIDS, ConvNetConfig, ViTConfig


class ViTBackbone(nn.Module):
    """timm's DINOv2 transformer; the taps are the raw residual stream after three blocks.

    The final norm and the mask token never influence an output and are not allocated.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.taps = config.taps
        self.vit = timm.create_model(config.timm_name, pretrained=False, num_classes=0, img_size=224)
        self.vit.norm = nn.Identity()

    def embed(self, rgb: Tensor) -> Tensor:
        """Tokens that enter block 0, (B, 257, C): CLS first, position embedding added."""
        return self.vit._pos_embed(self.vit.patch_embed(rgb))

    def blocks(self, rgb: Tensor, indices: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Raw outputs of the named blocks as (B, C, 16, 16), CLS dropped."""
        return tuple(
            self.vit.forward_intermediates(
                rgb, indices=list(indices), norm=False, stop_early=True, intermediates_only=True
            )
        )

    def forward(self, rgb: Tensor) -> tuple[Tensor, ...]:
        return self.blocks(rgb, self.taps)


def _normed(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A convolution and its batch normalisation (by running statistics) as one, and its activation."""
    if not isinstance(norm, nn.BatchNorm2d):  # it is part of the convolution already (`fold_norms`)
        return norm(conv(x))
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight, bias = conv.weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain
    padding = conv.padding
    if isinstance(conv, timm.layers.Conv2dSame):
        x, padding = timm.layers.pad_same(x, conv.kernel_size, conv.stride, conv.dilation), 0
    return norm.act(F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups))


class ConvNetBackbone(nn.Module):
    """A convolutional network that can start from ImageNet weights, and transformer blocks at 16x16.

    Its batch normalisation always uses the statistics in the weights, in training, too: pretrained ones stay
    as they are. The taps are 64x64, 32x32 and 16x16 maps.
    """

    STEM = ("conv.conv_stem.", "conv.bn1.", "conv.blocks.0.", "conv.blocks.1.0.")
    """Names of the parameters above stride 4, the costliest to train and the most general."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.input_size = config.input_size
        conv = timm.create_model(config.timm_name, features_only=True, out_indices=(1, 2, 3))
        del conv.blocks[conv.feature_info.info[3]["stage"] :]  # below stride 16
        for norm in (m for m in conv.modules() if isinstance(m, nn.BatchNorm2d)):
            del norm.num_batches_tracked
            norm.num_batches_tracked = None
        self.conv = conv
        self._taps = [conv.feature_info.info[i]["stage"] - 1 for i in (1, 2, 3)]
        self.patch = nn.Conv2d(config.conv_dims[-1], dim, 1)
        self.pos_embed = nn.Parameter(torch.empty(1, GRIDS[0] ** 2, dim).normal_(std=0.02))
        block = timm.models.vision_transformer.Block
        self.blocks = nn.ModuleList([block(dim, config.heads, mlp_ratio=3.0) for _ in range(config.depth)])

    def _inverted(self, block: nn.Module, x: Tensor) -> Tensor:
        """One of timm's `DepthwiseSeparableConv` and `InvertedResidual` without squeeze and excitation."""
        if hasattr(block, "conv_pwl"):
            y = _normed(block.conv_pw, block.bn1, x)
            y = _normed(block.conv_dw, block.bn2, y)
            y = _normed(block.conv_pwl, block.bn3, y)
        else:
            y = _normed(block.conv_dw, block.bn1, x)
            y = _normed(block.conv_pw, block.bn2, y)
        return x + y if block.has_skip else y

    def convolve(self, rgb: Tensor) -> list[Tensor]:
        """The convolutional network's maps at strides 4, 8 and 16."""
        x = F.interpolate(rgb, size=self.input_size, mode="bilinear", align_corners=False)
        x = _normed(self.conv.conv_stem, self.conv.bn1, x)
        maps = []
        for stage in self.conv.blocks:
            for block in stage:
                x = self._inverted(block, x)
            maps.append(x)
        return [maps[i] for i in self._taps]

    def forward(self, rgb: Tensor) -> tuple[Tensor, ...]:
        fine, middle, coarse = self.convolve(rgb)
        coarse = self.patch(coarse)
        tokens = coarse.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return fine, middle, tokens.transpose(1, 2).reshape(coarse.shape)


def make_backbone(config: ViTConfig | ConvNetConfig) -> nn.Module:
    """The backbone module for a configuration."""
    return ViTBackbone(config) if isinstance(config, ViTConfig) else ConvNetBackbone(config)
