"""Presets of the network: one set of stages, several widths."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from picopose_ros.errors import ConfigError

CROP_SIZE = 224
"""Side of a crop in pixels."""
GRIDS = (16, 32, 64)
"""Sides of the three grids of stage 3; the first is also the patch grid of stages 1 and 2."""
CELL = CROP_SIZE / GRIDS[0]
"""Side of a patch (a cell of the 16x16 grid) in crop pixels: 14."""


@dataclass(frozen=True)
class ViTConfig:
    """A plain vision transformer whose patch grid is 16x16, by its timm name."""

    timm_name: str
    embed_dim: int
    taps: tuple[int, int, int]
    """0-based blocks whose raw outputs feed stage 3; the last one also feeds stages 1 and 2."""

    @property
    def tap_dims(self) -> tuple[int, ...]:
        return (self.embed_dim,) * 3


@dataclass(frozen=True)
class ConvNetConfig:
    """A convolutional network of timm whose maps at strides 4, 8 and 16 are the taps; the last one goes
    through a 1x1 convolution and transformer blocks first."""

    timm_name: str
    conv_dims: tuple[int, int, int]
    """Channels of its maps at strides 4, 8 and 16."""
    embed_dim: int
    depth: int
    heads: int
    input_size: int
    """The crop is resized to this side first; 16 pixels a patch."""

    @property
    def tap_dims(self) -> tuple[int, ...]:
        return (*self.conv_dims[:2], self.embed_dim)


@dataclass(frozen=True)
class DPTConfig:
    """Stage 3's dense prediction head over three 16x16 taps (Ranftl et al., DPT)."""

    project_dims: tuple[int, int, int]
    width: int

    @property
    def widths(self) -> tuple[int, int, int]:
        return (self.width,) * 3


@dataclass(frozen=True)
class FPNConfig:
    """A light top-down pyramid over taps that are 64x64, 32x32 and 16x16 already."""

    widths: tuple[int, int, int]
    """Channels at 16, 32 and 64."""


@dataclass(frozen=True)
class AffineConfig:
    """Stage 2: correspondence map -> in-plane rotation, scale, translation."""

    input: Literal["cosine", "softmax"]
    """`cosine`: the clamped similarity itself, as in the paper. `softmax`: per template patch its
    distribution over query patches, and the anchor: the similarity transform that most best matches agree
    on, which the network then corrects instead of starting from nothing."""
    width: int
    hidden: tuple[int, int]
    log_scale: bool
    """The scale head predicts ln s (always positive) instead of s."""


@dataclass(frozen=True)
class OffsetConfig:
    """Stage 3: one offset block per grid (16, 32, 64)."""

    proj_dims: tuple[int, int, int]
    radii: tuple[int, int, int]
    levels: tuple[int, int, int]
    """Depth of the correlation pyramid at each grid."""
    lookup: tuple[str, str, str]
    """`volume`: correlate everything, then look up. `local`: correlate only what is looked up. Equal
    results; on an accelerator the first is faster for small grids. A CPU always does the second."""
    cosine: bool
    """Correlate unit vectors with a learned scale instead of dot products over sqrt(C)."""
    motion_dims: tuple[int, int, int, int, int]
    """Widths of the motion encoder: correlation 1x1 and 3x3, flow 7x7 and 3x3, joint output."""
    trunk_dims: tuple[int, int, int] | None
    """Per grid, width of a 1x1 convolution that both heads share; None: either head reads the full input."""
    head_dims: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """Per grid, widths of the flow head's 3x3 convolutions."""
    certainty_dims: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    """Per grid, widths of the certainty head's."""
    aligned: bool
    """First warp the query's features by the affine onto the template's grid, and refine the residual flow
    there: windows, flow and kernels no longer depend on the in-plane rotation and the scale. Needs
    `half_pixel`. False: the released network's flow in the query's own axes."""
    norm: bool
    """Batch normalisation after every hidden convolution, and a flow head that starts at zero: learns from
    nothing in a fraction of the pairs."""
    half_pixel: bool
    """Cells are areas: look up and upsample with half-pixel centres, so that the flow of a linear motion
    stays exact from grid to grid. False: the released network's corner alignment."""
    detach: bool
    """In training, no gradient from one grid's input to the grid before it."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape of a network."""

    name: str
    backbone: ViTConfig | ConvNetConfig
    neck: DPTConfig | FPNConfig
    affine: AffineConfig
    offsets: OffsetConfig
    match_dim: int | None = None
    """Width of a linear head on the last tap for matching; None matches the tap itself."""
    masked_matching: bool = False
    """Score = mean over the segment's patches of the best similarity to a patch inside the template's
    mask (paper Eq. 1). False: the released network's score, quirks included."""
    mask_background: bool = False
    """Crop pixels outside the segment's mask are blacked out before the network sees them."""

    @property
    def template_shading(self) -> Literal["flat", "auto"]:
        """How templates are lit (`picopose_ros.templates.renderer.Shading`): the released network knows flat
        ones alone. Not a field, because the network's shape does not depend on it."""
        return "flat" if isinstance(self.backbone, ViTConfig) else "auto"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _released(name: str, timm_name: str, dim: int, taps: tuple[int, int, int]) -> ModelConfig:
    return ModelConfig(
        name=name,
        backbone=ViTConfig(timm_name, dim, taps),
        neck=DPTConfig(project_dims=(512, 1024, 1024), width=256),
        affine=AffineConfig(input="cosine", width=256, hidden=(1024, 256), log_scale=False),
        offsets=OffsetConfig(
            proj_dims=(256, 256, 256),
            radii=(2, 2, 2),
            levels=(1, 2, 3),
            lookup=("volume", "volume", "volume"),
            cosine=False,
            motion_dims=(256, 192, 128, 64, 126),
            trunk_dims=None,
            head_dims=((512, 256), (512, 256), (512, 256)),
            certainty_dims=((512, 256), (512, 256), (512, 256)),
            aligned=False,
            norm=False,
            half_pixel=False,
            detach=False,
        ),
    )


PRESETS: dict[str, ModelConfig] = {
    "vitl": _released("vitl", "vit_large_patch14_dinov2", 1024, (11, 17, 23)),
    # The released architecture at smaller backbones: what the parity tests and quick studies use.
    "vitb": _released("vitb", "vit_base_patch14_dinov2", 768, (5, 8, 11)),
    "vits": _released("vits", "vit_small_patch14_dinov2", 384, (5, 8, 11)),
    "tiny": ModelConfig(
        name="tiny",
        backbone=ConvNetConfig(
            "tf_efficientnet_lite0", (24, 40, 112), embed_dim=160, depth=3, heads=5, input_size=256
        ),
        neck=FPNConfig(widths=(64, 64, 32)),
        affine=AffineConfig(input="softmax", width=128, hidden=(256, 256), log_scale=True),
        offsets=OffsetConfig(
            proj_dims=(64, 48, 24),
            radii=(3, 3, 2),
            levels=(1, 1, 1),
            lookup=("volume", "volume", "local"),
            cosine=True,
            motion_dims=(48, 32, 16, 8, 30),
            trunk_dims=(96, 64, 40),
            head_dims=((96, 96), (64, 64), (40, 40)),
            certainty_dims=((96,), (64,), (40,)),
            aligned=True,
            norm=True,
            half_pixel=True,
            detach=True,
        ),
        match_dim=128,
        masked_matching=True,
        mask_background=True,
    ),
}


def preset(name: str) -> ModelConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset '{name}' does not exist; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
