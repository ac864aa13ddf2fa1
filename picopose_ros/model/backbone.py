"""Backbones: a crop becomes three feature maps (taps)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from picopose_ros.model._timm import timm
from picopose_ros.model.config import GRIDS, HybridConfig, ViTConfig


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


class HybridBackbone(nn.Module):
    """Convolutions down to 16x16, then transformer blocks: needs far fewer training pairs than a plain ViT.

    The taps are 64x64, 32x32 and 16x16 maps.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        basic = timm.models.resnet.BasicBlock
        conv = timm.layers.ConvNormAct
        narrow, wide = config.stem_dims
        dim = config.embed_dim
        self.input_size = config.input_size
        self.stem = nn.Sequential(conv(3, narrow, 7, stride=3, padding=3), basic(narrow, narrow))
        self.middle = nn.Sequential(conv(narrow, wide, 3, stride=2), basic(wide, wide))
        self.patch = conv(wide, dim, 3, stride=2)
        self.pos_embed = nn.Parameter(torch.randn(1, GRIDS[0] ** 2, dim) * 0.02)
        block = timm.models.vision_transformer.Block
        self.blocks = nn.ModuleList([block(dim, config.heads, mlp_ratio=3.0) for _ in range(config.depth)])

    def forward(self, rgb: Tensor) -> tuple[Tensor, ...]:
        x = F.interpolate(rgb, size=self.input_size, mode="bilinear", align_corners=False)
        fine = self.stem(x)
        middle = self.middle(fine)
        coarse = self.patch(middle)
        tokens = coarse.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens)
        return fine, middle, tokens.transpose(1, 2).reshape(coarse.shape)


def make_backbone(config: ViTConfig | HybridConfig) -> nn.Module:
    """The backbone module for a configuration."""
    return ViTBackbone(config) if isinstance(config, ViTConfig) else HybridBackbone(config)
