"""What the node adds."""

from __future__ import annotations

import json
import subprocess
import sys

from measure import ROOT, Found, Options, Table

from picopose_ros.errors import PicoPoseError


def ros(options: Options) -> Found:
    """What the node adds, by the soak's measurement."""
    if options.quick:
        raise PicoPoseError("the part ros has no quick form: it starts the real node")
    result = options.folder / "ros_layer.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / "soak"), "--latency-only", "--asks", "40"]
    command += ["--domain", "115", "--folder", str(options.folder / "soak"), "--json", str(result)]
    if options.device != "cpu":
        command += ["--parameter", f"device:={options.device}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if not result.is_file():
        raise PicoPoseError(f"{' '.join(command)} told nothing:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    checks = {check["what"]: check for check in json.loads(result.read_text())["checks"]}
    name = "latency added by the ROS layer, median"
    if checks.get(name, {}).get("value") is None:
        raise PicoPoseError(f"{result} doesn't say '{name}': {sorted(checks)}")
    told = [what for what in checks if "median" in what or "ready" in what]
    rows = [[what, checks[what]["found"]] for what in told]
    note = (
        "The real node over DDS on this machine, images of 640x480 at 30 Hz, four segments, `tiny`; one "
        "segmentation at a time, .1 s after its image, so that nobody waits for a busy estimator. "
        "`python scripts/soak --latency-only` does it."
    )
    title = "The node end to end"
    return Found({"ros_layer": float(checks[name]["value"])}, [Table(title, ["", "found"], rows, note)])
