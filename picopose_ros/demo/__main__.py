"""``python -m picopose_ros.demo``: from a mesh folder and a recording to poses, over real ROS topics."""

from __future__ import annotations

import argparse
import sys
from math import inf
from pathlib import Path

from picopose_ros.errors import PicoPoseError
from picopose_ros.libraries import importing
from picopose_ros.messages.bags import STORAGES


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns 0, 1 if no object was found at all, 2 if something could not run."""
    parser = argparse.ArgumentParser(prog="python -m picopose_ros.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), help="folder for everything it writes"
    )
    parser.add_argument("--frames", type=int, default=60, help="images of the camera's path")
    parser.add_argument("--seed", type=int, default=7, help="of the world's clutter and noise")
    parser.add_argument("--storage", choices=tuple(STORAGES), default="mcap", help="of the bags")
    parser.add_argument("--hypotheses", type=int, default=2, help="templates that the node tries per segment")
    parser.add_argument("--viewpoints", type=int, default=162, choices=(42, 162, 642), help="per object")
    parser.add_argument(
        "--weights", type=Path, help="checkpoint of the tiny network; the packaged one by default"
    )
    parser.add_argument(
        "--domain", type=int, help="ROS_DOMAIN_ID, for who wants to watch; by default one that few have"
    )
    parser.add_argument(
        "--masks",
        choices=("recorded", "own", "late"),
        default="recorded",
        help="those of the recording; of this package's segmenter, which sees the images alone; or of one "
        "image a second of the recording, 300 ms late, and the node follows (recorded)",
    )
    parser.add_argument(
        "--speed", type=float, default=1.0, help="of late masks: seconds of the recording per second (1)"
    )
    parser.add_argument(
        "--follow-rate", type=float, default=10.0, help="of late masks: the node's, Hz of the recording (10)"
    )
    args = parser.parse_args(argv)
    if not (0 < args.speed < inf and 0 < args.follow_rate < inf):
        parser.error("--speed and --follow-rate must be more than 0")
    try:
        with importing():
            from picopose_ros.demo.run import Masks, run_demo
    except ImportError as error:
        print(
            f"demo: ROS is not there ({error}): run `make setup` or source a ROS 2 workspace", file=sys.stderr
        )
        return 2
    options = ["-p", f"hypotheses:={args.hypotheses}", "-p", f"viewpoints:={args.viewpoints}"]
    if args.weights is not None:
        options += ["-p", f"weights:={args.weights}"]
    try:
        report = run_demo(
            args.out,
            args.frames,
            args.seed,
            args.storage,
            options,
            args.domain,
            Masks(args.masks, args.speed, args.follow_rate),
        )
    except PicoPoseError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    found = sum(row.detected for row in report.rows if row.seen_in_training is not None)
    if not found:
        print("demo: no object was found in any frame", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
