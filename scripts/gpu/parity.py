"""The network on a device against the CPU in fp32: ``python scripts/gpu/parity.py DEVICE fp32|fp16``.

Inputs are noise, weights the packaged ones. Prints the largest differences; exits 1 where they are too large.
"""

from __future__ import annotations

import sys

import torch

from picopose_ros.model import PicoPose, load_model

LIMITS = {"fp32": (1e-3, 0.05), "fp16": (2e-2, 1.0)}
"""Largest difference of a match score, and of the median flow in cells."""


def run(model: PicoPose, device: torch.device, half: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (2, 4) and flow (2, 2, 64, 64), on the CPU."""
    draw = torch.Generator().manual_seed(0)
    rgb = torch.rand(4, 3, 224, 224, generator=draw).to(device)
    masks = torch.zeros(4, 224, 224, device=device)
    masks[:, 40:180, 50:170] = 1
    centre = torch.full((2, 2), 112.0, device=device)
    with torch.inference_mode(), torch.autocast(device.type, torch.float16, enabled=half):
        features = model.encode(rgb)
        query, template = (features.select(torch.tensor(ids, device=device)) for ids in ([0, 1], [2, 3]))
        scores = model.match(query.descriptors, masks[:2], features.descriptors, masks)
        flow = model.regress(query, template, masks[:2], masks[2:], centre).flow
    return scores.float().cpu(), flow.float().cpu()


def main(device_name: str, precision: str) -> int:
    """Compare and print."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(device_name)
    expected = run(load_model("tiny"), torch.device("cpu"), False)
    found = run(load_model("tiny", device=device), device, precision == "fp16")
    score = float((expected[0] - found[0]).abs().max())
    flow = float((expected[1] - found[1]).abs().median())
    print(f"{precision}: match scores differ by up to {score:.2g}, the median flow by {flow:.2g} cells")
    limits = LIMITS[precision]
    return 0 if score <= limits[0] and flow <= limits[1] else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
