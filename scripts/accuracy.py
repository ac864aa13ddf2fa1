#!/usr/bin/env python3
"""Measure the packaged weights and write docs/accuracy.md: `make accuracy`.

Every run is one `picopose` command, printed in the document. A run whose report is there already, of the same
weights, is not repeated, so an interrupted measurement goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from picopose_ros.evaluation.report import markdown, write_atomically
from picopose_ros.model import load_model, model_fingerprint

HELDOUT = "data/heldout"
DEMO = "build/demo/meshes"
DOCUMENT = Path("docs/accuracy.md")
PICTURES = (
    ("main/contact_sheet.png", "accuracy_cases.jpg"),
    ("main/reliability.png", "reliability.png"),
    ("main/difficulty.png", "difficulty_single.png"),
    ("clutter/contact_sheet.png", "accuracy_clutter.jpg"),
    ("clutter/difficulty.png", "difficulty_cluttered.png"),
)
"""Pictures of the runs, and what they are called in the documents' folder."""


@dataclass(frozen=True)
class Run:
    """One run of the benchmark."""

    title: str
    meshes: str
    options: tuple[str, ...]

    def command(self, name: str, folder: Path) -> list[str]:
        """What is typed to get it."""
        places = ("--out", str(folder / f"{name}.json"))
        if name in ("main", "clutter"):
            places += ("--overlays", str(folder / name))
        return ["picopose", "eval", "synthetic", "--meshes", self.meshes, *self.options, *places]


RUNS = {
    "main": Run("True masks", HELDOUT, ("--scenes", "480")),
    "match": Run(
        "Templates by the match alone, as in the paper", HELDOUT, ("--scenes", "192", "--rerank", "0")
    ),
    "second": Run(
        "A second look (an option of the estimator)", HELDOUT, ("--scenes", "192", "--second-look")
    ),
    "masks": Run("Masks as a segmenter makes them", HELDOUT, ("--scenes", "240", "--mask-noise")),
    "background": Run("Background not masked", HELDOUT, ("--scenes", "240", "--background")),
    "clutter": Run(
        "Another renderer: tables with lights, shadows and clutter",
        HELDOUT,
        ("--scenes", "48", "--kind", "cluttered"),
    ),
    "demo": Run("The demo's objects", DEMO, ("--scenes", "60")),
}

Figure = Callable[[dict[str, Any]], float]


def _pose(part: str, hypotheses: int, figure: str) -> Figure:
    words = f"stage 3, {hypotheses} hypothes{'i' if hypotheses == 1 else 'e'}s"
    return lambda report: report["figures"]["overall"][part]["pose"][words][figure]


def _endpoint(stage: str) -> Figure:
    return lambda report: report["figures"]["overall"]["unambiguous"]["endpoints_px"]["right template given"][
        stage
    ]["median"]


def _group(name: str) -> Figure:
    return lambda report: report["figures"]["groups"][name]["unambiguous"]["pose"]["stage 3, 5 hypotheses"][
        "add_recall"
    ]


#: What was aimed at: text, run, figure, bar, whether the bar is an upper one.
BARS: tuple[tuple[str, str, Figure, float, bool], ...] = (
    (
        "ADD(-S) < 0.1 d, unambiguous, 1 hypothesis",
        "main",
        _pose("unambiguous", 1, "add_recall"),
        0.90,
        False,
    ),
    ("the same, 5 hypotheses", "main", _pose("unambiguous", 5, "add_recall"), 0.92, False),
    ("the same, all objects, 5 hypotheses", "main", _pose("all", 5, "add_recall"), 0.70, False),
    (
        "rotation error, median, unambiguous, degrees",
        "main",
        _pose("unambiguous", 5, "rotation_deg"),
        1.5,
        True,
    ),
    ("MSPD < 10 px, unambiguous", "main", _pose("unambiguous", 5, "mspd_10px"), 0.93, False),
    ("EPE of stage 1, median, px", "main", _endpoint("1"), 10.0, True),
    ("EPE of stage 2, median, px", "main", _endpoint("2"), 5.0, True),
    ("EPE of stage 3, median, px", "main", _endpoint("3"), 1.8, True),
    (
        "best template within 15 degrees, unambiguous",
        "main",
        lambda r: r["figures"]["overall"]["unambiguous"]["viewpoint"]["best template"]["within_15_deg"],
        0.92,
        False,
    ),
    (
        "ADD(-S) < 0.1 d, unambiguous, 5 hypotheses, background not masked",
        "background",
        _pose("unambiguous", 5, "add_recall"),
        0.82,
        False,
    ),
    (
        "right against wrong template by confidence, AUC",
        "main",
        lambda r: r["figures"]["confidence"]["all"]["auc"],
        0.85,
        False,
    ),
    ("ADD(-S) < 0.1 d, unseen shapes, unambiguous", "main", _group("unseen shapes"), 0.80, False),
    ("ADD(-S) < 0.1 d, unseen textures, unambiguous", "main", _group("unseen textures"), 0.80, False),
    ("ADD(-S) < 0.1 d, unseen both, unambiguous", "main", _group("unseen both"), 0.80, False),
    (
        "ADD(-S) < 0.1 d, unambiguous, another renderer",
        "clutter",
        _pose("unambiguous", 5, "add_recall"),
        0.80,
        False,
    ),
    (
        "ADD(-S) < 0.1 d, unambiguous, degraded masks (no bar)",
        "masks",
        _pose("unambiguous", 5, "add_recall"),
        0.0,
        False,
    ),
)


def _bars(reports: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| figure | aim | measured | |", "| --- | ---: | ---: | --- |"]
    for text, run, figure, bar, upper in BARS:
        if run not in reports:
            lines.append(f"| {text} | {bar:g} | not measured | |")
            continue
        value = figure(reports[run])
        if value is None:
            lines.append(f"| {text} | {bar:g} | none | |")
            continue
        met = value <= bar if upper else value >= bar
        aim = f"{'<=' if upper else '>='} {bar:g}" if bar else ""
        lines.append(f"| {text} | {aim} | {value:.2f} | {'' if met else 'not reached'} |")
    return lines


def document(reports: dict[str, dict[str, Any]], folder: Path) -> str:
    """The part of docs/accuracy.md that is measured, Markdown."""
    lines = ["<!-- measured: begin -->", "", "## At a glance", "", *_bars(reports), ""]
    for name, report in reports.items():
        command = " ".join(RUNS[name].command(name, folder))
        lines += [f"## {RUNS[name].title}", "", "```bash", command, "```", "", markdown(report), ""]
    return "\n".join([*lines, "<!-- measured: end -->"])


def main() -> int:
    """Run what is missing, then write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("build/accuracy"), help="for reports and pictures"
    )
    parser.add_argument("--only", nargs="*", choices=tuple(RUNS), help="these runs (all)")
    parser.add_argument("--no-document", action="store_true", help="measure only")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    weights = model_fingerprint(load_model("tiny"))[:16]
    picopose = Path(sys.executable).with_name("picopose")
    if not (Path(HELDOUT) / "benchmark.json").is_file():
        subprocess.run([picopose, "eval", "objects", "--out", HELDOUT], check=True)
    reports: dict[str, dict[str, Any]] = {}
    for name, run in RUNS.items():
        path = args.folder / f"{name}.json"
        report = json.loads(path.read_text()) if path.is_file() else None
        stale = report is None or report["benchmark"]["weights"] != weights
        if stale and (not args.only or name in args.only):
            print(" ".join(run.command(name, args.folder)), flush=True)
            subprocess.run([picopose, *run.command(name, args.folder)[1:]], check=True)
            report, stale = json.loads(path.read_text()), False
        if not stale:
            reports[name] = report
    if not args.no_document:
        text = DOCUMENT.read_text()
        before, rest = text.split("<!-- measured: begin -->")
        after = rest.split("<!-- measured: end -->")[1]
        write_atomically(DOCUMENT, before + document(reports, args.folder) + after)
        for source, target in PICTURES:
            picture = cv2.imread(str(args.folder / source))
            if picture is not None:
                coded = cv2.imencode(Path(target).suffix, picture)[1]
                write_atomically(DOCUMENT.parent / target, coded.tobytes())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
