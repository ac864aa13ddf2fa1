"""``picopose convert CHECKPOINT OUT.safetensors``: published weights as this package reads them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

NAMED = 10
"""So many unknown tensors are named one by one; the others are counted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="PicoPose's published checkpoint; or for training DINOv2's (dinov2_vitl14_pretrain.pth, timm's)",
    )
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the file to write")
    parser.add_argument("--preset", default="vitl", help="whose weights they are (vitl)")
    parser.add_argument("--half", action="store_true", help="write fp16: half the size")


def run(args: argparse.Namespace) -> int:
    """Convert, and tell what was found; 1 if there were tensors that nobody knows.

    Raises:
        PicoPoseError: the checkpoint can't be used, or OUT can't be written.
    """
    from picopose_ros.model.conversion import convert_checkpoint

    done = convert_checkpoint(args.checkpoint, args.out, args.preset, args.half)
    what = "the whole network" if done.part == "network" else "the backbone only, for training"
    print(
        f"{done.tensors} tensors, {what} of preset {done.preset}, {'fp16' if args.half else 'fp32'}; "
        f"{len(done.dropped)} that influence no output left out",
        file=sys.stderr,
    )
    for key in done.extra[:NAMED]:
        print(f"unknown tensor {key}: left out", file=sys.stderr)
    if len(done.extra) > NAMED:
        print(f"and {len(done.extra) - NAMED} more unknown tensors", file=sys.stderr)
    # As sha256sum prints them, so that `sha256sum --check` reads them.
    print(f"{done.source_sha256}  {args.checkpoint}")
    print(f"{done.sha256}  {args.out}")
    return 1 if done.extra else 0
