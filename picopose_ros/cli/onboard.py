"""``picopose onboard MESH_DIR``: make the templates of a folder of meshes ahead of time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from picopose_ros.arguments import (
    add_backend_arguments,
    add_onboarding_arguments,
    load_network,
    settle_unit,
)
from picopose_ros.libraries import importing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("meshes", metavar="MESH_DIR", type=Path, help="folder with one mesh per object")
    add_onboarding_arguments(parser)
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Onboard and tell what became of every object; 1 if one could not be used."""
    with importing():
        from picopose_ros.estimator import encode_by
        from picopose_ros.templates.bank import onboard

    settle_unit(args, "MESH_DIR")
    model, device = load_network(args)
    encode_by(model, device, args.backend, str(args.onnx_dir or ""))
    result = onboard(
        args.meshes, model, args.viewpoints, args.unit, args.cache_dir, device, True, args.shading
    )
    width = max(len(name) for name in result.specs)
    for name, bank in sorted(result.banks.items()):
        size = " x ".join(f"{1000 * side:.1f}" for side in bank.extents)
        print(f"{name:<{width}}  {len(bank)} templates  {size} mm")
    for name, reason in sorted(result.failed.items()):
        print(f"{name:<{width}}  left out: {reason}", file=sys.stderr)
    return 1 if result.failed else 0
