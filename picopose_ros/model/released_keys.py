"""The released network's and DINOv2's tensor names become this package's; every key remap lives here."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

# Tensors of the released checkpoint that influence no output.
_DEAD = re.compile(
    r"^(feature_extractor\.dinov2\.(norm\.|mask_token$)"
    r"|offset_regressor\.dpt_head\.(projects\.0\.|resize_layers\.0\.)"
    r"|offset_regressor\.dpt_head\.scratch\.(layer1_rn|refinenet1|refinenet4\.resConfUnit1|output_conv\d)\.?)"
)
_DINO = "feature_extractor.dinov2."
BACKBONE = "backbone.vit."
_POS_EMBED = BACKBONE + "pos_embed"
_DPT, _SCRATCH = r"^offset_regressor\.dpt_head\.", r"^offset_regressor\.dpt_head\.scratch\."
_FLOW = r"^offset_regressor\.flow_decoder\."
_BLOCK = r"offsets.blocks.\1."
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^feature_extractor\.dinov2\.", BACKBONE),
    (r"^affine_regressor\.(translation|scale|inplane)_predictor\.", r"affine.\1."),
    (r"^affine_regressor\.", "affine."),
    (_DPT + r"projects\.1\.", "pyramid.project.0."),
    (_DPT + r"projects\.2\.", "pyramid.project.1."),
    (_DPT + r"projects\.3\.", "pyramid.project.2."),
    (_DPT + r"resize_layers\.1\.", "pyramid.resize.0."),
    (_DPT + r"resize_layers\.3\.", "pyramid.resize.2."),
    (_SCRATCH + r"layer2_rn\.", "pyramid.reduce.0."),
    (_SCRATCH + r"layer3_rn\.", "pyramid.reduce.1."),
    (_SCRATCH + r"layer4_rn\.", "pyramid.reduce.2."),
    (_SCRATCH + r"refinenet4\.", "pyramid.fuse.0."),
    (_SCRATCH + r"refinenet3\.", "pyramid.fuse.1."),
    (_SCRATCH + r"refinenet2\.", "pyramid.fuse.2."),
    (r"(pyramid\.fuse\.\d)\.resConfUnit1\.", r"\1.skip_unit."),
    (r"(pyramid\.fuse\.\d)\.resConfUnit2\.", r"\1.unit."),
    (_FLOW + r"proj\.(\d)\.", _BLOCK + "proj."),
    (_FLOW + r"encoder\.(\d)\.(corr|flow)_net\.(\d)\.conv\.", _BLOCK + r"encoder.\2.\3."),
    (_FLOW + r"encoder\.(\d)\.out_net\.0\.conv\.", _BLOCK + "encoder.out."),
    (_FLOW + r"flow_pred\.(\d)\.layers\.(\d)\.conv\.", _BLOCK + r"flow_head.layers.\2."),
    (_FLOW + r"flow_pred\.(\d)\.predict_layer\.", _BLOCK + "flow_head.predict."),
    (_FLOW + r"mask_pred\.(\d)\.layers\.(\d)\.conv\.", _BLOCK + r"certainty_head.layers.\2."),
    (_FLOW + r"mask_pred\.(\d)\.predict_layer\.", _BLOCK + "certainty_head.predict."),
)


def resample_pos_embed(pos_embed: Tensor, side: int = 16) -> Tensor:
    """Resample DINOv2's position embedding as the released network does.

    Bicubic with an explicit scale factor (side + 0.1) / old side and no antialiasing: resampling by
    target size, as timm does, is not equivalent.

    Args:
        pos_embed: (1, 1 + n^2, C), CLS first.
    Returns:
        (1, 1 + side^2, C).
    """
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    old = round(patches.shape[1] ** 0.5)
    if old == side or old * old != patches.shape[1]:  # the latter is of another network and won't fit
        return pos_embed
    grid = patches.transpose(1, 2).unflatten(2, (old, old)).float()
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / old, mode="bicubic", antialias=False)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], 1)


def convert_released(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map a state dict with the released network's keys to this package's keys.

    Accepts the prefixes `network.` and `module.`, and DINOv2's own keys, which are those of the backbone;
    drops the tensors that influence no output; resamples the position embedding once. A state dict with this
    package's keys passes unchanged.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        name = own_key(key)
        if name is not None:
            converted[name] = resample_pos_embed(value) if name == _POS_EMBED else value
    return converted


def own_key(key: str) -> str | None:
    """This package's name of a tensor, or None for one that influences no output."""
    key = re.sub(r"^((network|module|model)\.)+", "", key)
    key = re.sub(r"^(?=(cls_token|pos_embed|mask_token|patch_embed|blocks|norm)\b)", _DINO, key)
    if _DEAD.match(key):
        return None
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key
