"""``picopose export DIR``: the network as ONNX files, compared with PyTorch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from picopose_ros.arguments import blaming


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="the folder to write; an export in it is replaced"
    )
    parser.add_argument("--preset", default="tiny", help="size of the network: tiny (default) or vitl")
    parser.add_argument("--weights", type=Path, help="checkpoint of the network; the packaged one by default")
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16"),
        help="what products are computed in (fp32); inputs and outputs are float32 in any case",
    )
    parser.add_argument(
        "--part", action="append", metavar="NAME", help="only this graph, by its file's name; may be repeated"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print per output the largest difference from PyTorch.

    Raises:
        PicoPoseError: a package is missing, the weights or the folder can't be used, or the difference is
            more than rounding.
    """
    from picopose_ros.errors import CheckpointError
    from picopose_ros.model import load_model, preset
    from picopose_ros.model.export import PARTS, Difference, export_onnx

    def tell(one: Difference) -> None:
        print(f"{one.part:<15} {one.output:<14} {one.largest:10.2e} {one.scale:10.2e}", flush=True)

    with blaming("--preset"):
        preset(args.preset)
    with blaming("--weights", CheckpointError):
        model = load_model(args.preset, args.weights)
    print(f"{'part':<15} {'output':<14} {'difference':>10} {'largest':>10}")
    manifest = export_onnx(model, args.folder, args.precision, args.part or PARTS, tell)
    size = sum((args.folder / part["file"]).stat().st_size for part in manifest["parts"].values())
    print(
        f"{len(manifest['parts'])} parts of preset {manifest['preset']} in {args.precision}, opset "
        f"{manifest['opset']}, {size / 2**20:.1f} MB: {args.folder}",
        file=sys.stderr,
    )
    return 0
