"""`make bench`: its shortest run writes the table, and what would make the table lie is refused."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from picopose_ros.errors import ConfigError
from picopose_ros.model import preset

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "scripts" / "bench"
MODULES = ("document", "measure", "networks", "plots", "simulated")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The script's modules."""
    sys.path.insert(0, str(BENCH))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(BENCH))
    for name in MODULES:
        del sys.modules[name]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def write_document(path: Path) -> Path:
    path.write_text(
        "# Fast\n\nbefore\n\n<!-- measured: begin -->\noutworn\n<!-- measured: end -->\n\nafter\n"
    )
    return path


def test_the_short_run_writes_its_tables_and_plots(tmp_path: Path) -> None:
    document = write_document(tmp_path / "fast.md")
    done = run("--quick", "--part", "hundreds", "--folder", tmp_path / "parts", "--document", document)
    assert done.returncode == 0, done.stdout + done.stderr
    text = document.read_text()
    assert text.startswith("# Fast\n\nbefore\n") and text.endswith("\nafter\n") and "outworn" not in text
    report = (tmp_path / "parts" / "report.md").read_text()
    assert "these figures mean nothing" in text and "## Hundreds of objects" in report
    assert "## Hundreds of objects" not in text, "settings are not chosen by it"
    assert "not measured" in done.stdout and "TARGETS MISSED" not in done.stdout
    picture = cv2.imread(str(tmp_path / "parts" / "cpu_hundreds.png"))
    assert picture is not None and picture.min() < 60, "something is drawn"
    assert "(cpu_hundreds.png)" in report
    facts = json.loads((tmp_path / "parts" / "cpu" / "hundreds.json").read_text())["about"]
    assert facts["threads"] == 1 and facts["quick"] and facts["commit"] and facts["torch"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--quick",), 2, "does not go into docs/performance.md"),
        (("--part", "nothing"), 2, "invalid choice"),
        (("--device", "abacus", "--no-document"), 1, "device 'abacus' can't be used"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = run(*arguments, "--folder", tmp_path)
    assert done.returncode == code and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def part(targets: dict[str, float], **about: object) -> dict[str, object]:
    facts = {"part": "network", "command": "bench", "device": "cpu", "machine": "m", "threads": 2}
    facts |= {"torch": "2", "commit": "c", "date": "d", "seconds": 1.0, "quick": False}
    return {"about": {**facts, **about}, "targets": targets, "tables": [], "plots": []}


def test_targets_are_met_missed_or_not_measured(bench: dict[str, ModuleType]) -> None:
    document = bench["document"]
    found = {
        "cpu/network": part({"large_5": 4.2, "large_1": 1.2}),
        "cpu/onboarding": part({"onboard_cold": 21.0}),
    }
    rows = {row[0]: row for row in document.target_rows(found)}
    assert len(rows) == len(document.TARGETS)
    verdicts = {target.key: rows[target.what][2:4] for target in document.TARGETS if target.device == "cpu"}
    assert verdicts["large_5"] == ["4.20", "yes"] and verdicts["large_1"] == ["1.20", "**no**"]
    assert verdicts["onboard_cold"] == ["21.0 s", "**no**"], "there less is better"
    assert verdicts["tiny_rate"] == ["not measured", ""]
    said = document.say_targets(found)
    assert "2 TARGETS MISSED" in said and said.count("MISSED  ") == 2
    # What a CPU did says nothing about a GPU.
    assert document.target_rows({"cpu/network": part({"large_8": 12.0})})[2][2] == "not measured"


def test_broken_parts_and_documents_without_a_place_are_refused(
    bench: dict[str, ModuleType], tmp_path: Path
) -> None:
    document = bench["document"]
    (tmp_path / "cpu").mkdir()
    for content in ("{", "[]", '{"about": {}}'):
        (tmp_path / "cpu" / "network.json").write_text(content)
        with pytest.raises(ConfigError, match="network.json is no result of a part"):
            document.read_parts(tmp_path)
    (tmp_path / "fast.md").write_text("# Fast\n")
    with pytest.raises(ConfigError, match="no measured section"):
        document.write_document({}, tmp_path / "fast.md")
    assert (tmp_path / "fast.md").read_text() == "# Fast\n"


def test_candidates_take_turns(bench: dict[str, ModuleType]) -> None:
    order = []
    candidates = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench["measure"].interleave(candidates, 3, "cpu", warmup=1)
    assert "".join(order) == "abababab"
    assert all(len(times[name].rounds) == 3 for name in "ab"), "the warm-up doesn't count"
    Times = bench["measure"].Times
    # A disturbed round disturbs one ratio.
    assert bench["measure"].ratio(Times((30.0, 300.0, 30.0)), Times((10.0, 10.0, 10.0))) == 3.0


def test_plots_refuse_what_they_cannot_draw(bench: dict[str, ModuleType]) -> None:
    measure, plots = bench["measure"], bench["plots"]

    def plot(*points: tuple[float, float]) -> np.ndarray:
        return plots.panel(measure.Plot("p", "t", "x", "y", [measure.Curve("c", points)]))

    assert plot((1, 5.0), (32, 500.0)).shape == (plots.HEIGHT, plots.WIDTH, 3)
    assert plot((1, 5.0)).shape == (plots.HEIGHT, plots.WIDTH, 3), "one point is a plot"
    for points in ([], [(1, float("nan"))], [(1, 0.0)]):
        with pytest.raises(ValueError, match="plot p"):
            plot(*points)


def test_simulated_objects_are_of_the_networks_shapes(bench: dict[str, ModuleType]) -> None:
    simulated, networks = bench["simulated"], bench["networks"]
    for name, width in (("tiny", 128), ("vitl", 1024)):
        banks = simulated.simulated_banks(preset(name), 2, 42)
        assert [len(bank) for bank in banks.values()] == [42, 42]
        one, other = (bank.descriptors for bank in banks.values())
        assert one.shape == (42, width, 256) and one.dtype == np.float16 and not np.array_equal(one, other)
        assert np.allclose(np.linalg.norm(one.astype(np.float32), axis=1), 1, atol=2e-3)
    assert networks.vit_gflop(preset("vitl").backbone) == pytest.approx(162.0, abs=0.1)
    for segments, width, height in ((1, 640, 480), (32, 640, 480), (5, 1920, 1080)):
        rgb, camera, found = simulated.simulated_image(banks, segments, width, height)
        assert rgb.shape == (height, width, 3) and (camera.width, camera.height) == (width, height)
        assert len(found) == segments and sum(s.mask.astype(int) for s in found).max() == 1
        assert all(segment.mask.sum() > 1000 for segment in found)
