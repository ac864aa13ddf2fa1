"""Stage 3's features: three taps become maps at 16x16, 32x32 and 64x64 (paper Sec. III-D)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from picopose_ros.model._timm import timm
from picopose_ros.model.config import DPTConfig, FPNConfig


class ResidualUnit(nn.Module):
    """ReLU, 3x3, norm, ReLU, 3x3, norm, plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(F.relu(x)))
        return x + self.bn2(self.conv2(F.relu(y)))


class FusionBlock(nn.Module):
    """Adds a skip connection to the coarser map, refines, doubles the resolution."""

    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        if skip:
            self.skip_unit = ResidualUnit(width)
        self.unit = ResidualUnit(width)
        self.out_conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = x + self.skip_unit(skip)
        x = F.interpolate(self.unit(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class DPTPyramid(nn.Module):
    """The live part of DPT: the first of its four branches influences nothing here and is left out."""

    def __init__(self, tap_dims: tuple[int, ...], config: DPTConfig) -> None:
        super().__init__()
        dims, width = config.project_dims, config.width
        self.project = nn.ModuleList([nn.Conv2d(i, o, 1) for i, o in zip(tap_dims, dims, strict=True)])
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(dims[0], dims[0], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(dims[2], dims[2], 3, stride=2, padding=1),
            ]
        )
        self.reduce = nn.ModuleList([nn.Conv2d(d, width, 3, padding=1, bias=False) for d in dims])
        self.fuse = nn.ModuleList([FusionBlock(width, skip=i > 0) for i in range(3)])

    def forward(self, taps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = (
            reduce(resize(project(tap)))
            for tap, project, resize, reduce in zip(taps, self.project, self.resize, self.reduce, strict=True)
        )
        at16 = self.fuse[0](coarse)
        at32 = self.fuse[1](at16, middle)
        return at16, at32, self.fuse[2](at32, fine)


class FPNPyramid(nn.Module):
    """Top-down sums over taps that have the right resolutions already."""

    def __init__(self, tap_dims: tuple[int, ...], config: FPNConfig) -> None:
        super().__init__()
        conv = timm.layers.ConvNormAct
        fine, middle, coarse = tap_dims
        w16, w32, w64 = config.widths
        self.lateral = nn.ModuleList(
            [nn.Conv2d(coarse, w16, 1), nn.Conv2d(middle, w32, 1), nn.Conv2d(fine, w64, 1)]
        )
        self.down = nn.ModuleList([nn.Conv2d(w16, w32, 1), nn.Conv2d(w32, w64, 1)])
        self.smooth = nn.ModuleList([conv(w32, w32, 3), conv(w64, w64, 3)])

    def forward(self, taps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = taps
        maps = [self.lateral[0](coarse)]
        for tap, lateral, down, smooth in zip(
            (middle, fine), self.lateral[1:], self.down, self.smooth, strict=True
        ):
            upper = F.interpolate(down(maps[-1]), scale_factor=2, mode="bilinear", align_corners=False)
            maps.append(smooth(upper + lateral(tap)))
        return maps[0], maps[1], maps[2]


def make_pyramid(tap_dims: tuple[int, ...], config: DPTConfig | FPNConfig) -> nn.Module:
    """The pyramid module for a configuration."""
    return DPTPyramid(tap_dims, config) if isinstance(config, DPTConfig) else FPNPyramid(tap_dims, config)
