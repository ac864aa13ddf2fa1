"""``picopose eval``: the measurements, each a command of its own."""

from __future__ import annotations

from picopose_ros.cli.main import Command

COMMANDS = {
    "objects": Command("picopose_ros.evaluation.objects", "write objects that no training sees, as meshes"),
    "synthetic": Command("picopose_ros.evaluation.synthetic", "measure on rendered scenes of any meshes"),
    "detection": Command("picopose_ros.evaluation.detection", "instances found, and the poses that survive"),
    "sequences": Command("picopose_ros.evaluation.sequences", "follow objects through rendered films"),
    "bop": Command("picopose_ros.evaluation.bop.run", "poses of a BOP dataset, as the official csv"),
    "score": Command("picopose_ros.evaluation.score", "VSD, MSSD, MSPD and AR of a results csv"),
    "tables": Command("picopose_ros.evaluation.tables", "the paper's tables for a BOP dataset"),
}
