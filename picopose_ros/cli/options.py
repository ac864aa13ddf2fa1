"""Arguments that several sub-commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from picopose_ros.estimator import PoseEstimator


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def add_onboarding_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides how meshes become templates."""
    parser.add_argument("--unit", default="m", choices=("m", "mm", "cm", "in"), help="unit of the meshes (m)")
    parser.add_argument("--preset", default="tiny", help="size of the network: tiny (default) or vitl")
    add_network_arguments(parser)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Which network makes the templates, where, and how many."""
    parser.add_argument("--weights", type=Path, help="checkpoint of the network; the packaged one by default")
    parser.add_argument("--device", default="cpu", help="where the network runs: cpu (default), cuda, cuda:1")
    parser.add_argument(
        "--viewpoints", type=int, default=162, choices=(42, 162, 642), help="templates per object (162)"
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="where templates are kept; the user's cache by default"
    )


def load_estimator(args: argparse.Namespace) -> PoseEstimator:
    """The estimator that the onboarding arguments, `meshes` and `hypotheses` ask for; shows its progress."""
    from picopose_ros.estimator import PoseEstimator

    return PoseEstimator.from_mesh_dir(
        args.meshes,
        preset=args.preset,
        weights=args.weights,
        device=args.device,
        unit=args.unit,
        viewpoints=args.viewpoints,
        cache_dir=args.cache_dir,
        hypotheses=args.hypotheses,
        progress=True,
    )
