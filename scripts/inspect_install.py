"""Looks at a colcon install of this package from inside its environment; used by check_colcon.sh."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ament_index_python.packages import get_package_prefix, get_package_share_directory
from rclpy.serialization import deserialize_message, serialize_message

import picopose_ros
from picopose_ros import action, msg, segmentation, srv

INSTALL = Path(os.environ["COLCON_PREFIX_PATH"].split(os.pathsep)[0]).resolve()


def expect(condition: bool, complaint: str) -> None:
    if not condition:
        raise SystemExit(f"colcon install: {complaint}")


def inside(path: str | Path) -> bool:
    return Path(path).resolve().is_relative_to(INSTALL)


def main() -> None:
    for module in (picopose_ros, msg, segmentation, srv, action):
        expect(inside(module.__file__), f"{module.__name__} comes from {module.__file__}, not from {INSTALL}")

    segment = msg.Segment(class_id="mug", encoding=msg.Segment.ENCODING_RLE, rle=[0, 4])
    message = msg.SegmentArray(height=2, width=2, segments=[segment])
    returned = deserialize_message(serialize_message(message), msg.SegmentArray)
    expect(returned == message, f"a message came back as {returned}")

    request = srv.EstimatePoses.Request(segments=message, class_ids=["mug"], hypotheses=3)
    returned = deserialize_message(serialize_message(request), srv.EstimatePoses.Request)
    expect(returned == request, f"a request came back as {returned}")

    goal = action.FindObject.Goal(class_id="mug", min_score=0.5, frames=3)
    returned = deserialize_message(serialize_message(goal), action.FindObject.Goal)
    expect(returned == goal, f"a goal came back as {returned}")

    share = Path(get_package_share_directory("picopose_ros"))
    expect(inside(share), f"the ament index names {share}")
    for file in ("launch/picopose.launch.py", "config/picopose.yaml", "config/picopose.rviz", "package.xml"):
        expect((share / file).is_file(), f"{share / file} is missing")
    executables = Path(get_package_prefix("picopose_ros")) / "lib/picopose_ros"
    for file in ("picopose", "picopose_node"):
        expect(os.access(executables / file, os.X_OK), f"{executables / file} is no executable")
    shown = subprocess.run([executables / "picopose", "--help"], stdout=subprocess.PIPE, text=True)
    expect(shown.returncode == 0 and "onboard" in shown.stdout, "`picopose --help` lists no commands")
    print("colcon install: messages, modules, launch file, configuration and executables are in place")


if __name__ == "__main__":
    main()
