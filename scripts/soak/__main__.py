"""Load and faults, measured: ``python scripts/soak --duration 600``; `make soak` does it.

Starts the real node and its peers as processes of their own on this machine, over DDS on the loopback device
alone, and writes what it found into docs/soak.md. Exits with 1 if a bar was not held.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]


def on_this_machine_only(domain: int) -> None:
    """Set up DDS for this process and all that it starts; before rclpy is imported."""
    os.environ["ROS_DOMAIN_ID"] = str(domain)
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["FASTDDS_DEFAULT_PROFILES_FILE"] = str(ROOT / "config" / "fastdds_localhost.xml")


def commit() -> str:
    """The commit that is checked out, where git is there to tell."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.split("\n")[0])
    parser.add_argument("--duration", type=float, default=600.0, help="seconds of steady load (600)")
    parser.add_argument("--image-rate", type=float, default=30.0, help="Hz (30)")
    parser.add_argument("--segmentation-rate", type=float, default=10.0, help="Hz (10)")
    parser.add_argument("--malformed", type=int, default=1000, help="malformed messages (1000)")
    parser.add_argument("--seed", type=int, default=7, help="of the malformed messages (7)")
    parser.add_argument("--asks", type=int, default=60, help="frames for the latency (60)")
    parser.add_argument(
        "--latency-only", action="store_true", help="the latency alone, of a node that is just started"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="instead of all else: the node follows, --image-rate and --segmentation-rate apply",
    )
    parser.add_argument("--frames", type=int, default=20, help="different images of the demo's world (20)")
    parser.add_argument("--meshes", type=Path, help="other meshes than the demo's, with --recording")
    parser.add_argument(
        "--recording", type=Path, help="bag with images, camera_infos and segmentations of them"
    )
    parser.add_argument("--domain", type=int, default=88, help="ROS_DOMAIN_ID (88)")
    parser.add_argument("--folder", type=Path, help="for logs, world and cache; a temporary one by default")
    parser.add_argument("--report", type=Path, help="document that gets the table, docs/soak.md")
    parser.add_argument("--json", type=Path, help="the same for programs")
    parser.add_argument(
        "--parameter",
        metavar="NAME:=VALUE",
        action="append",
        default=[],
        help="of the node, e.g. weights:=tiny.safetensors; may be repeated",
    )
    args = parser.parse_args(argv)
    if (args.meshes is None) != (args.recording is None):
        parser.error("--meshes and --recording go together")
    return args


def end(number: int, _frame: FrameType | None) -> None:
    """SIGTERM is an end in good order, too: what was started is to be ended."""
    sys.exit(128 + number)


def main(argv: list[str]) -> int:
    """Run everything."""
    args = parse(argv)
    on_this_machine_only(args.domain)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="picopose_soak_"))
    folder.mkdir(parents=True, exist_ok=True)

    # Only now: these import rclpy. The harness is the tests'.
    sys.path.append(str(ROOT / "test"))
    import following
    import phases
    import report
    from node_harness import Client, NodeProcess
    from peers import NAMESPACE
    from world import demo_world, load_views

    started = time.monotonic()
    print(f"soak in {folder}", flush=True)
    meshes, recording = args.meshes, args.recording
    if recording is None:
        meshes, recording = demo_world(folder / "world", args.frames)
    parameters = {"mesh_dir": meshes, "cache_dir": folder / "cache", "device": "cpu"}
    if args.follow:
        parameters["follow"] = True
    parameters |= dict(word.split(":=", 1) for word in args.parameter)
    views, node = load_views(recording), NodeProcess(folder, args.domain, f"/{NAMESPACE}", parameters)
    client = Client(args.domain, NAMESPACE)
    soak = phases.Soak(folder, recording, views, node, client, args.image_rate, args.segmentation_rate)
    signal.signal(signal.SIGTERM, end)
    try:
        seconds = soak.start_node()
        soak.tell("node ready, objects onboarded", f"{seconds:.1f} s")
        if args.follow:
            following.follow(soak, args.duration)
        elif not args.latency_only:
            phases.load(soak, args.duration)
            phases.publisher_dies(soak)
            phases.listener_dies(soak)
            phases.reader_stalls(soak, max(args.asks // 6, 2))
            phases.malformed(soak, args.malformed, args.seed)
            soak.news()
            phases.exceptions(soak)
            phases.node_dies(soak)
        if not args.follow:
            phases.latency(soak, args.asks)
        phases.exceptions(soak)
    except phases.SoakError as error:
        soak.tell("the soak ended early", str(error), "", False)
    finally:
        code = soak.close()
    soak.tell("exit code after SIGINT", str(code), "0", code == 0)

    about = {
        "machine": report.machine(),
        "rclpy": report.version("rclpy"),
        "commit": commit(),
        "command": " ".join(["scripts/soak", *argv]),
        "took": f"{time.monotonic() - started:.0f} s",
    }
    if args.report:
        report.write(args.report, soak.checks, about)
    if args.json:
        report.write_json(args.json, soak.checks, about)
    failed = [check.what for check in soak.checks if check.passed is False]
    print(f"\n{report.table(soak.checks)}\n")
    print(f"not held: {', '.join(failed)}" if failed else "every bar was held", f"(logs: {folder})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
