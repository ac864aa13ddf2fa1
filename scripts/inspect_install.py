"""Looks at a colcon install of this package from inside its environment; used by check_colcon.sh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ament_index_python.packages import get_package_prefix, get_package_share_directory

workspace = Path(os.environ["WORKSPACE"]).resolve()


def inside(path: str | Path) -> bool:
    return Path(path).resolve().is_relative_to(workspace)


def main() -> None:
    import picopose_ros
    from picopose_ros import msg, segmentation

    for module in (picopose_ros, msg, segmentation):
        assert inside(module.__file__), f"{module.__name__} was imported from {module.__file__}, not {workspace}"

    message = msg.SegmentArray(segments=[msg.Segment(class_id="mug", encoding=msg.Segment.ENCODING_RLE, rle=[0, 4])])
    from rclpy.serialization import deserialize_message, serialize_message

    assert deserialize_message(serialize_message(message), msg.SegmentArray) == message

    share = Path(get_package_share_directory("picopose_ros"))
    prefix = Path(get_package_prefix("picopose_ros"))
    assert inside(share) and inside(prefix), f"the ament index names {share}"
    for file in ("launch/picopose.launch.py", "config/picopose.yaml", "config/picopose.rviz", "package.xml"):
        assert (share / file).is_file(), f"{share / file} is not installed"
    for file in ("picopose_node", "picopose"):
        assert os.access(prefix / "lib/picopose_ros" / file, os.X_OK), f"{file} is not installed as an executable"
    shown = subprocess.run([prefix / "lib/picopose_ros/picopose", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "onboard" in shown.stdout, f"picopose --help: {shown.stdout}{shown.stderr}"
    print(f"colcon install: messages, modules, launch, config and executables are in place ({sys.version.split()[0]})")


if __name__ == "__main__":
    main()
