"""Networks and the arithmetic of the large one."""

from __future__ import annotations

import torch

from picopose_ros.model import PicoPose, preset
from picopose_ros.model.config import ViTConfig


def random_network(name: str, device: str) -> PicoPose:
    """A preset with weights of chance: what it computes is worth nothing, and takes as long as ever."""
    with torch.device("meta"):
        model = PicoPose(preset(name))
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # keeps the size of what flows through
                deviation = parameter[0].numel() ** -0.5
                parameter.normal_(0.0, deviation, generator=generator)
            else:
                parameter.fill_(0.0)
        for module in model.modules():
            for part in ("weight", "gamma"):
                value = getattr(module, part, None)
                if isinstance(value, torch.Tensor) and value.ndim == 1:
                    value.fill_(1.0 if part == "weight" else 0.1)
        for key, buffer in model.named_buffers():
            buffer.fill_(1.0 if key.endswith("running_var") else 0.0)
    return model.to(device).eval()


def vit_gflop(config: ViTConfig, tokens: int = 257, depth: int = 24) -> float:
    """Operations (2 x multiply-adds, in 10^9) of a ViT's pass over one crop: 162 for ViT-L."""
    width = config.embed_dim
    products = 2 * tokens * width**2 * (3 + 1 + 8)  # qkv, output, both layers of the MLP
    attention = 2 * 2 * tokens**2 * width
    embedding = 2 * (tokens - 1) * 3 * 14**2 * width
    return (depth * (products + attention) + embedding) / 1e9
